"""AdamW with warm-up, a schedule and a global-norm clip."""

import math
from typing import Literal

import jax.numpy as jnp
import optax


def learning_rate_schedule(
    peak: float,
    *,
    steps: int,
    warmup_ratio: float,
    schedule: Literal["cosine", "constant"],
    zero_first_rate: bool = False,
) -> optax.Schedule:
    """Learning rate of the 0-based update i: peak·(i+1)/W for i < W = ⌈warmup_ratio·steps⌉, then the schedule.

    Unlike the usual warm-up the first update is not lost to a learning rate of 0; `zero_first_rate` has it so
    (peak·i/W).
    """
    warmup = math.ceil(warmup_ratio * steps)

    def rate(count):
        rising = (count + (0 if zero_first_rate else 1)) / max(warmup, 1)
        progress = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * progress)) if schedule == "cosine" else 1.0
        return peak * jnp.where(count < warmup, rising, falling)

    return rate


def adamw(
    schedule: optax.Schedule, *, b1: float, b2: float, eps: float, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """Clip to a global norm, then AdamW; state in float32."""
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
    )
