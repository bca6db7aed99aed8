"""One vLLM server as the engine sees it: brought to a version, given requests, repaired when it is lost."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from unisd_jax.config import VllmOptions
from unisd_jax.errors import UserError
from unisd_jax.rollout.protocol import RolloutFailed, Sampling
from unisd_jax.rollout.vllm_http import Completion, LoadFailed, Lost, Server
from unisd_jax.rollout.vllm_server import OwnServer

# What a server says of its weights that no trainer has changed, and of those that a trainer has left.
UNTOUCHED, LEFT = "default", "left"
# The content of the weights that a server starts with.
CHECKPOINT = "checkpoint"


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


class Request(NamedTuple):
    """`n` completions of one prompt, for the rows from `row` on."""

    row: int
    prompt: Sequence[int]
    n: int
    seed: int


Prove = Callable[[Server, Target], None]


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
        self._closed = False
        self.repairs = 0

    def bring(self, target: Target, prove: Prove) -> None:
        """Loads what `target` names, where it is not there yet, and has `prove` look at it.

        Raises:
          RolloutFailed: another trainer's server, or it could not be done in `attempts`.
        """
        for attempt in range(1, self._options.attempts + 1):
            try:
                self._connect()
                self._load(target)
                prove(self.server, target)
                return
            except (Lost, LoadFailed) as error:
                self._recover(error, attempt)

    def serve(
        self, target: Target, todo: queue.Queue, done: dict[int, list[Completion]], sampling: Sampling, prove: Prove
    ):
        """Answers requests from `todo` into `done`, by their rows, until none is left; several lanes can share them.

        Raises:
          RolloutFailed: the server was lost and could not be repaired in `attempts`, or serves other weights.
        """
        failures = 0
        while True:
            before = len(done)
            lost = self._answer(target, todo, done, sampling)
            if lost is None:
                return
            failures = 1 if len(done) > before else failures + 1
            self._recover(lost, failures)
            self.bring(target, prove)

    def close(self) -> None:
        """Stops a server of our own; lets go of any other."""
        self._closed = True
        if self._process is not None:
            self._process.stop()
        elif self._start is None and self._label is not None:
            try:
                if self.server.label() == self._label:
                    self.server.set_label(LEFT)
            except (Lost, RolloutFailed):
                self._say(f"{self.server.address} could not be told that this run has ended")

    def _connect(self) -> None:
        if self._start is not None and (self._process is None or not self._process.alive()):
            try:
                self._process = self._start()
            except UserError as error:
                raise RolloutFailed(str(error)) if self.repairs else error from None
            self.server = Server(self._process.address, timeout=self._options.request_timeout)
        if self._label is None:
            self.server.check()
        found = self.server.label()
        if found == self._label:
            return
        if found == UNTOUCHED:
            self._weights, self._adapter = CHECKPOINT, None
        else:
            self._weights = None
            if found != LEFT and found.split("/")[0] != self._owner and not self._options.take_over:
                raise RolloutFailed(
                    f"{self.server.address} serves the weights of another run, {found.split('/')[0]}: give this one a "
                    "server of its own, or set rollout.vllm.take_over=true if that run has ended"
                )
        self._label = found

    def _load(self, target: Target) -> None:
        if self._weights != target.content:
            self._weights = None
            self.server.load_weights(target.weights, target.label)
            self._weights = target.content
        if target.adapter is not None and self._adapter != target.model:
            self.server.load_adapter(target.adapter, target.model, target.label, self._adapter)
            self._adapter = target.model
        if self.server.label() != target.label:
            self.server.set_label(target.label)
        self._label = target.label

    def _answer(self, target: Target, todo: queue.Queue, done: dict[int, list[Completion]], sampling: Sampling):
        """Why the server was lost; None when no request is left. What was not answered is in `todo` again."""
        stop, lost = threading.Event(), []

        def work() -> None:
            while not stop.is_set():
                try:
                    request = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    found = self.server.complete(
                        request.prompt, sampling, seed=request.seed, n=request.n, model=target.model
                    )
                    self._require(target.label, found[0].label)
                    done[request.row] = found
                except Lost as error:
                    todo.put(request)
                    lost.append(error)
                    stop.set()
                except BaseException:
                    stop.set()
                    raise

        workers = [in_thread(work) for _ in range(min(self._options.max_sequences, max(1, todo.qsize())))]
        for worker in workers:
            worker.result()
        return lost[0] if lost else None

    def _require(self, wanted: str, found: str) -> None:
        if found == UNTOUCHED:
            raise Lost(f"{self.server.address} has been restarted and serves its first weights")
        if found != wanted:
            raise RolloutFailed(
                f"{self.server.address} serves {found}, but {wanted} was published: another trainer uses this server; "
                "give each its own"
            )

    def _recover(self, error: Exception, failures: int) -> None:
        """Makes way for another try: ends a server of our own, or waits for one that is not.

        Raises:
          RolloutFailed: this was the last.
        """
        address = "the vLLM server" if self.server is None else self.server.address
        if self._closed:
            raise RolloutFailed(f"{address} was stopped: {error}")
        if failures >= self._options.attempts:
            raise RolloutFailed(f"{address} failed {failures} times (rollout.vllm.attempts): {error}{self._log()}")
        self.repairs += 1
        self._weights = None
        if self._start is not None:
            self._say(f"{error}; starting the vLLM server again")
            if self._process is not None:
                self._process.stop()
            self._process, self._label = None, None
            return
        seconds = min(2.0**failures / 2, 30.0)
        self._say(f"{error}; trying again in {seconds:g} s")
        time.sleep(seconds)

    def _log(self) -> str:
        return f" ({self._process.reason()})" if self._process is not None else ""


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
