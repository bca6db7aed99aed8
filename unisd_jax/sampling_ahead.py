"""Batches whose completions are sampled while earlier ones are trained on, and how a checkpoint keeps them.

With `rollout.staleness` k the batch of update t is sampled by the weights after update t − k (the first ones by those
of the start), always: what is trained on does not depend on who is faster.
"""

import base64
import io
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from unisd_jax.collection import Batch, begin_batch, unsampled, whole
from unisd_jax.errors import UserError
from unisd_jax.experiment import Experiment
from unisd_jax.parallel import multihost
from unisd_jax.rollout import PendingRollout, Rollout
from unisd_jax.types import TrainState

_ARRAYS = Rollout._fields[:-1]


class BatchQueue:
    """The batches of a run, in order, up to `rollout.staleness` of them begun ahead of the one that is taken.

    `data` gives each batch's examples and can return to an earlier place (`get_state`, `set_state`).
    """

    def __init__(self, experiment: Experiment, data: Iterator):
        self._experiment, self._data = experiment, data
        self._begun: deque[tuple[Any, Batch]] = deque()
        self._taken: tuple[int, dict[str, Any]] | None = None

    def take(self, state: TrainState) -> Batch:
        """The batch of the next update; begins those that may now be sampled with the weights of `state`."""
        config, step = self._experiment.config, int(state.step)
        self._taken = step, self._place()
        while len(self._begun) <= config.rollout.staleness and step + len(self._begun) < config.train.steps:
            place, examples = self._data.get_state(), next(self._data)
            batch = begin_batch(self._experiment, state, examples, step + len(self._begun))
            self._begun.append((place, batch))
        return self._begun.popleft()[1]

    def place(self, state: TrainState) -> dict[str, Any]:
        """Where the data has to go on after `state` if nothing had been begun."""
        if self._taken is not None and self._taken[0] == int(state.step):
            return self._taken[1]  # taken, and not trained on
        return self._place()

    def get_state(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Where the data has to go on, and the batches begun from there, as JSON has them; waits for their samples."""
        return self._place(), [_saved(batch) for _, batch in self._begun]

    def set_state(self, place: dict[str, Any], begun: list[dict[str, Any]]) -> None:
        """Goes on from what `get_state` gave.

        Raises:
          UserError: a batch was sampled for another update or from weights of another age than this run samples from.
        """
        self._begun.clear()
        self._data.set_state(place)
        for saved in begun:
            place, examples = self._data.get_state(), next(self._data)
            batch = unsampled(self._experiment, examples, saved["step"], saved["version"])
            if saved["step"] - saved["version"] > self._experiment.config.rollout.staleness:
                raise UserError(
                    f"the checkpoint holds completions for step {saved['step']} by weights of step {saved['version']}; "
                    f"rollout.staleness is {self._experiment.config.rollout.staleness}"
                )
            rollouts = {name: self._restored(saved, name) for name in ("sampled", "answers")}
            self._begun.append((place, batch._replace(**rollouts)))

    def _place(self) -> dict[str, Any]:
        return self._begun[0][0] if self._begun else self._data.get_state()

    def _restored(self, saved: dict[str, Any], name: str) -> PendingRollout | None:
        if saved[name] is None:
            return None
        with np.load(io.BytesIO(base64.b64decode(saved[name]))) as arrays:
            parts = whole(self._experiment, tuple(arrays[field] for field in _ARRAYS), all_rows=True)
        rollout = Rollout(*parts, saved["version"])
        return PendingRollout(lambda: rollout)


def _saved(batch: Batch) -> dict[str, Any]:
    record: dict[str, Any] = {"step": batch.step, "version": batch.version}
    for name, pending in (("sampled", batch.sampled), ("answers", batch.answers)):
        record[name] = None
        if pending is not None:
            rollout, file = pending.result(), io.BytesIO()
            np.savez_compressed(file, **{field: multihost.gather(getattr(rollout, field)) for field in _ARRAYS})
            record[name] = base64.b64encode(file.getvalue()).decode()
    return record
