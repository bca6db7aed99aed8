"""Rollouts by vLLM servers: every version of the weights is published to files, loaded, proved, and only then used.

Publishing forms the files in the calling thread; loading, proving and sampling happen in the order in which they were
asked for, in a thread of their own, while the caller may train.
"""

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from unisd_jax.errors import UserError
from unisd_jax.models import Lora, Model
from unisd_jax.models.checksums import checksums, named_leaves
from unisd_jax.parallel import multihost
from unisd_jax.parallel.sharding import batch_sharding
from unisd_jax.rollout.diagnosis import explain
from unisd_jax.rollout.lanes import Lane, Target, complete, in_thread
from unisd_jax.rollout.probe import Gap, Probe, probe_gap, probe_logps
from unisd_jax.rollout.protocol import (
    PendingRollout,
    Rollout,
    RolloutEngine,
    RolloutFailed,
    Sampling,
    require_version,
)
from unisd_jax.rollout.vllm_http import Completion, Server
from unisd_jax.rollout.vllm_rows import Request, padded, requests
from unisd_jax.rollout.weights import BASE, Published, Publisher

# Nats; where the trainer's scores have moved so far, new weights do not score the same to the last bit, in bfloat16
# neither: each score is a sum over the whole vocabulary.
MOVED = 2e-4
# Of the bound on the largest difference: for the mean, and for the mean distance of a server from itself.
MEAN_SHARE, SAME_SHARE = 1 / 8, 1 / 50


class Version(NamedTuple):
    """A published version: what the servers hold, and the trainer's own scores of the probe under it."""

    checksums: dict[str, list]
    target: Target
    published: Published
    expected: np.ndarray  # [B, T]


class VllmEngine(RolloutEngine):
    """A `RolloutEngine` of this process' own servers, all of them at the same version.

    After a failure it fails for good: what the servers hold then is not known.

    Args:
      model: the network whose weights are published.
      lanes: the servers.
      publisher: writes the files.
      probe: what is scored on both sides after every load.
      bound: nats; the largest difference of a log-prob there.
      max_sequences: completions that a server works on at a time.
      adapter_only: what is published with an adapter goes as the adapter alone.
    """

    def __init__(
        self,
        model: Model,
        *,
        lanes: Sequence[Lane],
        publisher: Publisher,
        probe: Probe,
        bound: float,
        max_sequences: int,
        adapter_only: bool = False,
    ):
        self.model, self.version = model, None
        self._lanes, self._publisher = lanes, publisher
        self._probe, self._bound, self._adapter_only = probe, bound, adapter_only
        self._max_sequences = max_sequences
        self._current: Version | None = None
        self._base: Published | None = None  # what adapters are put on
        self._loading: Future | None = None
        self._tasks: queue.Queue | None = None
        # The newest task, and the newest that needs files older than the current version's.
        self._newest: Future | None = None
        self._needing_older: Future | None = None
        self._failed: BaseException | None = None
        self._found: dict[str, float] = {}
        self._lock = threading.Lock()
        self._proved: dict[Lane, np.ndarray] = {}  # how each server scored the probe when it last proved its weights

    def publish(self, params: dict[str, Any], version: int, lora: Lora | None = None) -> None:
        """Writes the weights for the servers and starts loading them; the same weights again only get a new label.

        Raises:
          RolloutFailed: they could not be written, or the engine has failed before.
        """
        if self._failed is not None:
            raise self._failed
        sums = checksums(named_leaves((params, lora)))
        if self._current is not None and sums == self._current.checksums:
            self._relabel(version)
            return
        alone = self._adapter_only and lora is not None
        kind = "adapter" if alone else "weights"
        # Only two versions have room: the proof of the current one may need the one before, and one that is written a
        # second time takes the place of its files.
        needed = (self._newest if version == self.version else self._needing_older, self._loading)
        wait([future for future in needed if future is not None])
        try:
            if alone and self._base is None:
                self._base = self._publisher.write(params, version, fetch=multihost.gather, name=BASE)
            published = self._publisher.write(params, version, lora=lora, kind=kind, fetch=multihost.gather)
        except (UserError, OSError) as error:
            raise RolloutFailed(str(error)) from error
        self._measure(
            sync_gib=published.manifest.size / 2**30,
            seconds_sync_convert=published.seconds_convert,
            seconds_sync_write=published.seconds_write,
        )
        folder, label = str(published.folder), published.label
        target = Target(label, folder, published.manifest.content)
        if alone:
            target = Target(label, str(self._base.folder), self._base.manifest.content, folder, label)
        expected = multihost.gather(probe_logps(self.model, params, self._probe, lora=lora))
        previous, self._current = self._current, Version(sums, target, published, expected)
        self.version, current, self._needing_older = version, self._current, self._newest
        self._loading = self._submit(lambda: self._load(current, previous, params, lora))

    def begin(self, prompt_ids, prompt_mask, sampling: Sampling, *, key: PRNGKeyArray, version: int) -> PendingRollout:
        """Asks for completions of this process' rows; the other processes ask for theirs."""
        require_version(self.version, version)
        batch, whole = len(prompt_ids), isinstance(prompt_ids, np.ndarray) or self.model.mesh is None
        number, count = multihost.own_share()
        # Not the rows that this process' devices hold: where the mesh has them twice, they would be drawn twice.
        rows = list(range(number, batch, count))
        ids, mask = (multihost.gather(array)[rows] for array in (prompt_ids, prompt_mask))
        prompts = [row[kept].tolist() for row, kept in zip(ids, np.asarray(mask, bool), strict=True)]
        # A bit less than a server tells apart, so that every row's seed is one.
        first = int(jax.random.bits(key)) >> 1
        asked = requests(prompts, rows, first, most=self._max_sequences, greedy=sampling.temperature == 0)
        current, loading = self._current, self._loading
        task = self._submit(lambda: self._sample(current, loading, asked, sampling))

        def join() -> Rollout:
            arrays = [multihost.all_rows(array, rows, batch) for array in padded(task.result(), sampling)]
            if not whole:
                sharding = batch_sharding(self.model.mesh)
                held = multihost.own_rows(sharding, batch)
                arrays = [multihost.join_rows(array[held], sharding, batch) for array in arrays]
            return Rollout(*arrays, version)

        return PendingRollout(join)

    def generate(self, prompt_ids, prompt_mask, sampling: Sampling, *, key: PRNGKeyArray, version: int) -> Rollout:
        """`begin`, and waits."""
        return self.begin(prompt_ids, prompt_mask, sampling, key=key, version=version).result()

    def measurements(self) -> dict[str, float]:
        """Of the weights published since the last call, and how often a server had to be repaired so far."""
        with self._lock:
            found, self._found = self._found, {}
        return found | {"server_repairs": sum(lane.repairs for lane in self._lanes)}

    def close(self) -> None:
        """Stops the servers of our own, lets go of others, removes the published files; what is pending fails."""
        self._failed = self._failed or RolloutFailed("the engine was closed")
        with contextlib.ExitStack() as stack:
            stack.callback(self._publisher.close)
            if self._tasks is not None:
                stack.callback(self._tasks.put, None)
            for lane in self._lanes:
                stack.callback(lane.close)

    def _relabel(self, version: int) -> None:
        if version == self.version:
            return
        published = self._current.published
        published = published._replace(manifest=published.manifest._replace(version=version))
        current = self._current._replace(
            target=self._current.target._replace(label=published.label), published=published
        )
        self._current, self.version, earlier = current, version, self._loading

        def relabel() -> None:
            earlier.result()
            prove = functools.partial(self._prove_again, current)
            _together(lambda lane: lane.bring(current.target, prove), self._lanes)

        self._loading = self._submit(relabel)

    def _load(self, current: Version, previous: Version | None, params: dict[str, Any], lora: Lora | None) -> None:
        """Loads a version into every server and has each prove it; then older files are removed."""
        begun = time.monotonic()
        gaps: list[Gap] = []

        def diagnose(found: np.ndarray) -> str:
            if multihost.process_count() > 1:
                return "which weights differ is looked for in runs of one process only"
            published = None if previous is None else previous.published
            return explain(
                self.model, params, lora, self._probe, found, current.published, published, tolerance=self._bound
            )

        def prove(lane: Lane, target: Target) -> None:
            found, gap = self._prove(current, lane, target, diagnose)
            gaps.append(gap)
            if previous is not None:
                self._require_moved(lane, found, current, previous)
            self._proved[lane] = found

        _together(lambda lane: lane.bring(current.target, prove), self._lanes)
        self._publisher.remove_before(current.published.manifest.version)
        self._measure(
            seconds_sync_load=time.monotonic() - begun,
            probe_gap=max(gap.mean for gap in gaps),
            probe_gap_max=max(gap.largest for gap in gaps),
        )

    def _prove(
        self, current: Version, lane: Lane, target: Target, diagnose: Callable[[np.ndarray], str] | None = None
    ) -> tuple[np.ndarray, Gap]:
        """The server's scores of the probe, which are the trainer's.

        Raises:
          RolloutFailed: they are others.
        """
        found = self._scored(lane.server, target)
        gap = probe_gap(found, current.expected, self._probe.completions.mask)
        if gap.largest > self._bound or gap.mean > self._bound * MEAN_SHARE:
            raise RolloutFailed(
                f"{lane.server.address}: with {target.label}, log-probs of the probe are up to {gap.largest:.3g} nats "
                f"from the trainer's, {gap.mean:.3g} on average (rollout.vllm.max_probe_gap is {self._bound:g}, for "
                f"the average {self._bound * MEAN_SHARE:g})" + ("" if diagnose is None else f": {diagnose(found)}")
            )
        return found, gap

    def _prove_again(self, current: Version, lane: Lane, target: Target) -> None:
        """Like `_prove`, of weights that a server has proved to have: it scores now as it did then.

        Raises:
          RolloutFailed: it does not.
        """
        found, _ = self._prove(current, lane, target)
        gap = probe_gap(found, self._proved[lane], self._probe.completions.mask)
        if gap.mean > self._bound * SAME_SHARE:
            raise RolloutFailed(
                f"{lane.server.address}: with {target.label} again, log-probs of the probe are {gap.mean:.3g} nats on "
                "average from its own before: it has other weights"
            )

    def _require_moved(self, lane: Lane, found: np.ndarray, current: Version, previous: Version) -> None:
        """Refuses a server that scores as before, to the last bit, where the trainer's scores have moved.

        In bfloat16 one update may be too small for the bound on the gap.
        """
        contents = [version.published.manifest.content for version in (current, previous)]
        moved = probe_gap(current.expected, previous.expected, self._probe.completions.mask).largest
        if contents[0] != contents[1] and moved > MOVED and np.array_equal(found, self._proved.get(lane)):
            raise RolloutFailed(
                f"{lane.server.address}: after {current.target.label} was loaded, it scores the probe exactly as "
                f"before, where the trainer's log-probs have moved by up to {moved:.3g} nats: it has kept its weights"
            )

    def _scored(self, server: Server, target: Target) -> np.ndarray:
        """One row after the other: what a server computes together decides how it rounds."""
        mask = self._probe.completions.mask
        found = np.zeros(mask.shape, np.float32)
        for row, (prompt, said) in enumerate(self._probe.rows()):
            sampling = Sampling(len(said), (), 0)
            (completion,) = complete(server, target, prompt, sampling, seed=0, forced=said)
            found[row, : len(said)] = completion.logps
        return found

    def _sample(self, current: Version, loading: Future, asked: list[Request], sampling: Sampling) -> list[Completion]:
        """One completion per row; what was asked of a server that is lost is asked again."""
        loading.result()
        todo: queue.Queue = queue.Queue()
        for request in asked:
            todo.put(request)
        done: dict[int, list[Completion]] = {}
        # No more than its share, or the first server would take all; and no more completions than it makes at once, or
        # the time that a request waits there would count as the server's silence.
        fitting = self._max_sequences // max((request.n for request in asked), default=1)
        at_once = max(1, min(fitting, -(-len(asked) // len(self._lanes))))

        def serve(lane: Lane) -> None:
            prove = functools.partial(self._prove_again, current)
            lane.serve(current.target, todo, done, sampling, prove, at_once=at_once)

        _together(serve, self._lanes)
        return [completion for request in asked for completion in done[request.row]]

    def _measure(self, **values: float) -> None:
        with self._lock:
            for name, value in values.items():
                earlier = self._found.get(name, 0.0)
                self._found[name] = max(earlier, value) if name.startswith("probe") else earlier + value

    def _submit(self, task: Callable[[], Any]) -> Future:
        if self._tasks is None:
            self._tasks = queue.Queue()
            threading.Thread(target=self._work, daemon=True).start()
        self._newest = Future()
        if self._failed is None:
            self._tasks.put((self._newest, task))
        else:
            self._newest.set_exception(self._failed)
        return self._newest

    def _work(self) -> None:
        while self._do(self._tasks.get()):
            pass

    def _do(self, entry: tuple[Future, Callable[[], Any]] | None) -> bool:
        """Whether there was a task; nothing of it, such as its weights, is kept."""
        if entry is None:
            return False
        future, task = entry
        if self._failed is not None:
            future.set_exception(self._failed)
            return True
        try:
            future.set_result(task())
        except BaseException as error:
            if isinstance(error, UserError | OSError) and not isinstance(error, RolloutFailed):
                error = RolloutFailed(str(error))
            self._failed = error
            future.set_exception(error)
        return True


def _together(function: Callable[[Any], None], arguments: Sequence[Any]) -> None:
    """Calls `function` with each argument, all at once; raises what one of them does, the first of them."""
    for future in [in_thread(functools.partial(function, argument)) for argument in arguments]:
        future.result()
