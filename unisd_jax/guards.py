"""What stops a run before a wrong state is saved, with the last good one and the batch in the message."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from unisd_jax.checkpoint import Checkpoints
from unisd_jax.config import Config
from unisd_jax.data.pipeline import Example
from unisd_jax.errors import UserError
from unisd_jax.parallel import multihost
from unisd_jax.types import TrainState


def check_metrics(
    metrics: dict[str, float],
    config: Config,
    step: int,
    examples: Sequence[Example],
    checkpoints: Checkpoints,
) -> None:
    """Stops before a wrong state is saved: loss or gradient not finite, or a sampler that has left the policy.

    Raises:
      UserError: names the step and the items of its batch.
    """
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(metrics[name]):
            raise UserError(f"step {step}: {name} is {metrics[name]}; {_what_is_left(examples, checkpoints)}")
    gap, limit = metrics.get("sampler_gap", 0.0), config.rollout.max_sampler_gap
    if gap > limit:
        why, staleness = "the rollouts are not the policy's own", config.rollout.staleness
        if staleness:
            why = (
                f"too much for samples of weights {staleness} updates old: lower rollout.staleness or the learning rate"
            )
        raise UserError(
            f"step {step}: sampler and trainer differ by {gap:.3g} nats per token (rollout.max_sampler_gap "
            f"is {limit}): {why}; {_last_good(checkpoints)}"
        )


def check_weights(state: TrainState, step: int, examples: Sequence[Example], checkpoints: Checkpoints) -> None:
    """Refuses to save a state that is not finite: the loss that would show it comes one step later.

    Raises:
      UserError: names the step and the items of its batch.
    """
    if not all_finite(state):
        raise UserError(f"step {step}: weights not finite after the update; {_what_is_left(examples, checkpoints)}")


@jax.jit
def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no leaf holds a NaN or an infinity."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _what_is_left(examples: Sequence[Example], checkpoints: Checkpoints) -> str:
    items = ", ".join(example.item.id for example in examples)
    items += " and the items of the other processes" if multihost.process_count() > 1 else ""
    return f"{_last_good(checkpoints)}; lower optimizer.learning_rate or look at the batch: {items}"


def _last_good(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    return f"last good checkpoint: {'none' if checkpoints.latest_step is None else f'step {checkpoints.latest_step}'}"
