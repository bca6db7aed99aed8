"""One vLLM server as the engine sees it: brought to a version, given requests, repaired when it is lost."""

import itertools
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from unisd_jax.config import VllmOptions
from unisd_jax.errors import UserError
from unisd_jax.rollout.protocol import RolloutFailed, Sampling
from unisd_jax.rollout.vllm_http import Completion, LoadFailed, Lost, Refused, Server, of_another_run
from unisd_jax.rollout.vllm_server import OwnServer

# What a server says of its weights that no trainer has changed, and of those that a trainer has left.
UNTOUCHED, LEFT = "default", "left"
CLOSING_SECONDS = 5.0


class Target(NamedTuple):
    """What a server must hold: the weights in a folder, an adapter on top or not, all of it under one label.

    `content` tells weights apart, wherever they lie. `model` is what requests ask for: the model itself, or the adapter
    by its name.
    """

    label: str
    weights: str
    content: str
    adapter: str | None = None
    model: str = "student"


Prove = Callable[["Lane", Target], None]


class Lane:
    """A server at a fixed address, or one that `start` starts (again) when there is none."""

    def __init__(
        self,
        options: VllmOptions,
        *,
        owner: str,
        address: str | None = None,
        start: Callable[[], OwnServer] | None = None,
        say: Callable[[str], None] = print,
    ):
        self._options, self._owner, self._say = options, owner, say
        self._start = start
        self._process: OwnServer | None = None
        self.server = None if address is None else Server(address, timeout=options.request_timeout)
        self._weights: str | None = None  # the content of the server's weights, as far as it is known
        self._adapter: str | None = None
        self._label: str | None = None
        self._has_served = False
        self._bringing, self._closing = threading.Lock(), threading.Event()
        self.repairs = 0

    def bring(self, target: Target, prove: Prove) -> None:
        """Loads what `target` names, where it is not there yet, and has `prove` look at it.

        Raises:
          RolloutFailed: another run's server, or it could not be done in `attempts`.
        """
        with self._bringing:
            for attempt in itertools.count(1):
                try:
                    self._connect()
                    self._load(target)
                    prove(self, target)
                    self._has_served = True
                    return
                except (Lost, LoadFailed) as error:
                    self._recover(error, attempt)

    def serve(
        self, target: Target, todo: queue.Queue, done: dict[int, list[Completion]], sampling: Sampling, prove: Prove,
        *, at_once: int,
    ):  # fmt: skip
        """Answers requests from `todo` into `done`, by their rows, until none is left; several lanes can share them.

        Raises:
          RolloutFailed: the server was lost and could not be repaired in `attempts`, or serves other weights.
        """
        failures = 0
        while True:
            answered, lost = self._answer(target, todo, done, sampling, at_once)
            if lost is None:
                return
            failures = 1 if answered else failures + 1
            self._recover(lost, failures)
            self.bring(target, prove)

    def close(self) -> None:
        """Stops a server of our own; lets go of any other. Whatever is under way ends with an error."""
        self._closing.set()
        process = self._process  # another thread may be replacing it
        if process is not None:
            process.stop()
        if self._start is not None or self._label is None:
            return
        server = Server(self.server.address, timeout=CLOSING_SECONDS)
        # What is being loaded now would be given a label afterwards.
        told = self._bringing.acquire(timeout=CLOSING_SECONDS)
        if told:
            try:
                if server.label() == self._label:
                    server.set_label(LEFT)
            except (Lost, UserError):
                told = False
            finally:
                self._bringing.release()
        if not told:
            self._say(f"{server.address} could not be told that this run has ended")

    def _connect(self) -> None:
        """Finds out what the server holds, after starting it where it is ours and there is none."""
        self._require_open()
        try:
            if self._start is not None and (self._process is None or not self._process.alive()):
                self._launch()
            if self._label is None:
                self.server.check(may_resume=lambda label: self._options.take_over or self._is_ours(label))
        except UserError as error:
            # What has worked before may do so again; else something is wrong with the configuration.
            raise Lost(str(error)) if self._has_served else error from None
        found = self.server.label()
        if found == self._label:
            return
        self._weights = self._adapter = None
        if not self._is_ours(found):
            if self._label is not None:
                raise RolloutFailed(taken(self.server.address, found))
            if not self._options.take_over:
                raise RolloutFailed(of_another_run(self.server.address, found))
        self._label = found

    def _is_ours(self, label: str) -> bool:
        """Whether no other run has given a server its label."""
        if self._label is not None:
            return label in (UNTOUCHED, LEFT) or label.split("/")[0] == self._owner
        # A killed run may go on with another number of processes, which they have at the end of their names.
        return label in (UNTOUCHED, LEFT) or _run_of(label.split("/")[0]) == _run_of(self._owner)

    def _launch(self) -> None:
        if self._process is not None:
            self.repairs += 1
            self._say(f"the vLLM server has ended ({self._process.reason()})")
            self._process.stop()
        self._process = self._label = None
        self._process = self._start()
        self._require_open()
        self.server = Server(self._process.address, timeout=self._options.request_timeout)

    def _load(self, target: Target) -> None:
        anew = self._weights != target.content
        if anew:
            self._weights = None
            self.server.load_weights(target.weights, target.label)
            self._weights = target.content
        if target.adapter is not None and (anew or self._adapter != target.model):
            self.server.load_adapter(target.adapter, target.model, target.label, self._adapter)
            self._adapter = target.model
        if self.server.label() != target.label:
            self.server.set_label(target.label)
        self._label = target.label

    def _answer(
        self, target: Target, todo: queue.Queue, done: dict[int, list[Completion]], sampling: Sampling, at_once: int
    ) -> tuple[int, Lost | None]:
        """(How many it answered, why the server was lost); what was not answered is in `todo` again."""
        stop, answered, lost = threading.Event(), [], []

        def work() -> None:
            while not stop.is_set():
                try:
                    request = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    self._require_open()
                    done[request.row] = complete(
                        self.server, target, request.prompt, sampling, seed=request.seed, n=request.n
                    )
                    answered.append(request)
                except Lost as error:
                    todo.put(request)
                    lost.append(error)
                    stop.set()
                except BaseException as error:
                    stop.set()
                    self._require_open(error)
                    raise

        for worker in [in_thread(work) for _ in range(at_once)]:
            worker.result()
        return len(answered), lost[0] if lost else None

    def _recover(self, error: Exception, failures: int) -> None:
        """Makes way for another try: ends a server of our own, or waits for one that is not.

        Raises:
          RolloutFailed: this was the last.
        """
        self._require_open(error)
        address = "the vLLM server" if self.server is None else self.server.address
        if failures >= self._options.attempts:
            log = f" ({self._process.reason()})" if self._process is not None else ""
            raise RolloutFailed(f"{address} failed {failures} times (rollout.vllm.attempts): {error}{log}")
        self.repairs += 1
        self._weights = None
        seconds = min(0.25 * 4.0 ** (failures - 1), 30.0)
        self._say(f"{error}; {'trying' if self._start is None else 'starting the vLLM server'} again in {seconds:g} s")
        if self._process is not None:
            self._process.stop()
            self._process = None
        self._closing.wait(seconds)
        if self._start is not None:
            return
        until = time.monotonic() + self._options.start_timeout
        while not self.server.healthy():
            self._require_open(error)
            if time.monotonic() > until:
                raise RolloutFailed(
                    f"{error}; it did not come back within {self._options.start_timeout:g} s "
                    "(rollout.vllm.start_timeout)"
                )
            self._closing.wait(min(1.0, seconds))

    def _require_open(self, error: BaseException | None = None) -> None:
        if self._closing.is_set():
            process = self._process
            if process is not None:
                process.stop()
            raise RolloutFailed(f"the engine was closed{'' if error is None else f': {error}'}")


def _run_of(owner: str) -> str:
    return re.sub(r"-\d{1,4}$", "", owner)


def complete(server: Server, target: Target, prompt: Sequence[int], sampling: Sampling, **asked) -> list[Completion]:
    """`Server.complete` by the weights of `target`.

    Raises:
      Lost: the server has others, those that it starts with.
      RolloutFailed: it has another run's.
    """
    try:
        found = server.complete(prompt, sampling, model=target.model, **asked)
    except Refused:
        # A server that was started again knows no adapter.
        _require_label(server, target, {server.label()})
        raise
    _require_label(server, target, {completion.label for completion in found})
    return found


def _require_label(server: Server, target: Target, labels: set[str]) -> None:
    for label in labels - {target.label}:
        if label == UNTOUCHED:
            raise Lost(f"{server.address} has been restarted and serves its first weights")
        raise RolloutFailed(taken(server.address, label))


def taken(address: str, label: str) -> str:
    """The message for a server whose weights someone else has changed."""
    return (
        f"{address} now serves {label}: another run has taken this server over; give each run servers of its own "
        "(rollout.vllm.addresses)"
    )


def in_thread(function: Callable[[], None]) -> Future:
    """Runs `function` in a thread that does not keep the program from ending."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
