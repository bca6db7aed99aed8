"""Rollouts by vLLM servers: every version of the weights is published to files, loaded, proved, and only then used.

Publishing forms the files in the calling thread; loading, proving and sampling happen in the order in which they were
asked for, in a thread of their own, while the caller may train.
"""

import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from unisd_jax.errors import UserError
from unisd_jax.models import Lora, Model
from unisd_jax.models.checksums import checksums, named_leaves
from unisd_jax.parallel import multihost
from unisd_jax.parallel.sharding import batch_sharding
from unisd_jax.rollout.diagnosis import explain
from unisd_jax.rollout.lanes import CHECKPOINT, Lane, Request, Target, in_thread
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
from unisd_jax.rollout.weights import Published, Publisher


class Version(NamedTuple):
    """A published version: what the servers hold, and the trainer's own scores of the probe under it."""

    checksums: dict[str, list]
    target: Target
    published: Published
    expected: Any  # [B, T]


class VllmEngine(RolloutEngine):
    """A `RolloutEngine` of this process' own servers, all of them at the same version.

    Args:
      model: the network whose weights are published.
      checkpoint: the folder that the servers start from.
      lanes: the servers.
      publisher: writes the files.
      probe: what is scored on both sides after every load.
      bound: nats; the largest difference of a log-prob there.
      adapter_only: what is published with an adapter goes as the adapter alone.
    """

    def __init__(
        self,
        model: Model,
        *,
        checkpoint: Path,
        lanes: Sequence[Lane],
        publisher: Publisher,
        probe: Probe,
        bound: float,
        adapter_only: bool = False,
    ):
        self.model, self.version = model, None
        self._checkpoint, self._lanes, self._publisher = str(Path(checkpoint).absolute()), lanes, publisher
        self._probe, self._bound, self._adapter_only = probe, bound, adapter_only
        self._current: Version | None = None
        self._loading: Future | None = None
        self._tasks: queue.Queue = queue.Queue()
        self._found: dict[str, float] = {}
        self._lock = threading.Lock()
        self._answers: dict[str, np.ndarray] = {}
        threading.Thread(target=self._work, daemon=True).start()

    def publish(self, params: dict[str, Any], version: int, lora: Lora | None = None) -> None:
        """Writes the weights for the servers and starts loading them; the same weights again only get a new label.

        Raises:
          RolloutFailed: they could not be written.
        """
        sums = checksums(named_leaves((params, lora)))
        if self._current is not None and sums == self._current.checksums:
            self._relabel(version)
            return
        alone = self._adapter_only and lora is not None
        kind = "adapter" if alone else "weights"
        try:
            published = self._publisher.write(params, version, lora=lora, kind=kind, fetch=multihost.gather)
        except UserError as error:
            raise RolloutFailed(str(error)) from None
        self._measure(
            sync_gib=published.manifest.size / 2**30,
            seconds_sync_convert=published.seconds_convert,
            seconds_sync_write=published.seconds_write,
        )
        folder, label = str(published.folder), published.label
        target = Target(label, folder, published.manifest.content)
        if alone:
            target = Target(label, self._checkpoint, CHECKPOINT, folder, label)
        expected = probe_logps(self.model, params, self._probe, lora=lora)
        previous, self._current = self._current, Version(sums, target, published, expected)
        self.version, current = version, self._current
        self._loading = self._submit(lambda: self._bring(current, previous, params, lora))

    def begin(self, prompt_ids, prompt_mask, sampling: Sampling, *, key: PRNGKeyArray, version: int) -> PendingRollout:
        """Asks for completions of this process' rows; the other processes ask for theirs."""
        require_version(self.version, version)
        batch, everywhere = len(prompt_ids), isinstance(prompt_ids, np.ndarray)
        number, count = multihost.own_share()
        sharding = None if everywhere or self.model.mesh is None else batch_sharding(self.model.mesh)
        rows = list(range(number, batch, count)) if sharding is None else multihost.own_rows(sharding, batch)
        ids, mask = (multihost.gather(array)[rows] for array in (prompt_ids, prompt_mask))
        prompts = [row[kept].tolist() for row, kept in zip(ids, np.asarray(mask, bool), strict=True)]
        asked = requests(prompts, _seeds(key, batch)[rows].tolist(), greedy=sampling.temperature == 0)
        current, loading = self._current, self._loading
        task = self._submit(lambda: self._sample(current, loading, asked, sampling))

        def join() -> Rollout:
            own = padded(task.result(), sampling)
            if sharding is None:
                return Rollout(*(multihost.all_rows(array, rows, batch) for array in own), version)
            return Rollout(*(multihost.join_rows(array, sharding, batch) for array in own), version)

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
        """Stops the servers of our own, lets go of others, removes the published files."""
        self._tasks.put(None)
        for lane in self._lanes:
            lane.close()
        self._publisher.close()

    def _relabel(self, version: int) -> None:
        if version == self.version:
            return
        relabelled = self._current.published._replace(
            manifest=self._current.published.manifest._replace(version=version)
        )
        target = self._current.target._replace(label=relabelled.label)
        self._current = self._current._replace(target=target)
        self.version, current, earlier = version, self._current, self._loading

        def bring() -> None:
            earlier.result()
            _together(lambda lane: lane.bring(current.target, lambda server, target: None), self._lanes)

        self._loading = self._submit(bring)

    def _bring(self, current: Version, previous: Version | None, params: dict[str, Any], lora: Lora | None) -> None:
        """Loads a version into every server and has each prove it; then older files are removed."""
        begun = time.monotonic()
        gaps: list[Gap] = []

        def prove(server: Server, target: Target) -> None:
            found = self._scored(server, target)
            gap = probe_gap(found, current.expected, self._probe.completions.mask)
            gaps.append(gap)
            if gap.largest > self._bound:
                published = previous.published if previous is not None else None
                raise RolloutFailed(
                    f"{server.address}: after {target.label} was loaded, log-probs of the probe are up to "
                    f"{gap.largest:.3g} nats from the trainer's, {gap.mean:.3g} on average (rollout.vllm.max_probe_gap "
                    f"is {self._bound:g}): "
                    + explain(
                        self.model, params, lora, self._probe, found, current.published, published,
                        tolerance=self._bound,
                    )
                )  # fmt: skip
            if previous is not None:
                self._require_moved(server, found, current, previous)
            self._answers[server.address] = found

        _together(lambda lane: lane.bring(current.target, prove), self._lanes)
        self._publisher.remove_before(current.published.manifest.version)
        self._measure(
            seconds_sync_load=time.monotonic() - begun,
            probe_gap=max(gap.mean for gap in gaps),
            probe_gap_max=max(gap.largest for gap in gaps),
        )

    def _require_moved(self, server: Server, found: np.ndarray, current: Version, previous: Version) -> None:
        """Refuses a server that scores as before, to the last bit, where the trainer's scores have clearly moved.

        In bfloat16 one update may be too small for the bound on the gap.
        """
        moved = probe_gap(current.expected, previous.expected, self._probe.completions.mask).largest
        if np.array_equal(found, self._answers.get(server.address)) and moved > self._bound / 10:
            raise RolloutFailed(
                f"{server.address}: after {current.target.label} was loaded, it scores the probe exactly as before, "
                f"where the trainer's log-probs have moved by up to {moved:.3g} nats: it has kept its weights"
            )

    def _scored(self, server: Server, target: Target) -> np.ndarray:
        mask = self._probe.completions.mask
        found = np.zeros(mask.shape, np.float32)

        def score(row: int, prompt: list[int], said: list[int]) -> None:
            sampling = Sampling(len(said), (), 0)
            (completion,) = server.complete(prompt, sampling, seed=0, model=target.model, forced=said)
            found[row, : len(said)] = completion.logps

        _together(lambda job: score(job[0], *job[1]), list(enumerate(self._probe.rows())))
        return found

    def _sample(self, current: Version, loading: Future, asked: list[Request], sampling: Sampling) -> list[Completion]:
        """One completion per row; what was asked of a server that is lost is asked again."""
        loading.result()
        todo: queue.Queue = queue.Queue()
        for request in asked:
            todo.put(request)
        done: dict[int, list[Completion]] = {}

        def prove(server: Server, target: Target) -> None:
            gap = probe_gap(self._scored(server, target), current.expected, self._probe.completions.mask)
            if gap.largest > self._bound:
                raise RolloutFailed(
                    f"{server.address}: repaired, but log-probs of the probe are up to {gap.largest:.3g} nats from the "
                    f"trainer's (rollout.vllm.max_probe_gap is {self._bound:g})"
                )

        _together(lambda lane: lane.serve(current.target, todo, done, sampling, prove), self._lanes)
        return [completion for request in asked for completion in done[request.row]]

    def _measure(self, **values: float) -> None:
        with self._lock:
            for name, value in values.items():
                earlier = self._found.get(name, 0.0)
                self._found[name] = max(earlier, value) if name.startswith("probe") else earlier + value

    def _submit(self, task: Callable[[], Any]) -> Future:
        future: Future = Future()
        self._tasks.put((future, task))
        return future

    def _work(self) -> None:
        while (entry := self._tasks.get()) is not None:
            future, task = entry
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)


def requests(prompts: Sequence[list[int]], seeds: Sequence[int], *, greedy: bool) -> list[Request]:
    """One request for each run of equal prompts, with the seed of its first row; greedy ones are all the same draw."""
    found: list[Request] = []
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        if found and found[-1].prompt == prompt:
            found[-1] = found[-1]._replace(n=found[-1].n + 1)
        else:
            found.append(Request(row, prompt, 1, 0 if greedy else seed))
    return found


def padded(completions: Sequence[Completion], sampling: Sampling) -> tuple[np.ndarray, ...]:
    """(ids, mask, logps, stopped) as a Rollout has them."""
    shape = len(completions), sampling.max_completion_length
    ids, logps = np.full(shape, sampling.pad_id, np.int32), np.zeros(shape, np.float32)
    mask, stopped = np.zeros(shape, bool), np.zeros(shape[:1], bool)
    for row, completion in enumerate(completions):
        length = len(completion.ids)
        ids[row, :length], logps[row, :length], mask[row, :length] = completion.ids, completion.logps, True
        stopped[row] = completion.stopped
    return ids, mask, logps, stopped


def _seeds(key: PRNGKeyArray, rows: int) -> np.ndarray:
    """A seed of 31 bits for each row of the batch: a function of the key and the row alone."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    return np.asarray(jax.vmap(jax.random.bits)(keys) >> 1)


def _together(function: Callable[[Any], None], arguments: Sequence[Any]) -> None:
    """Calls `function` with each argument, all at once; raises the first error when all have ended."""
    for future in [in_thread(functools.partial(function, argument)) for argument in arguments]:
        future.result()
