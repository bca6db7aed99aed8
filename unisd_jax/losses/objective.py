"""The training objective: which scores the mechanisms use and how their terms add up."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unisd_jax.losses.divergence import entropy, token_divergence, token_log_probs
from unisd_jax.losses.reduce import Normalize, weighted_sum


@dataclasses.dataclass(frozen=True)
class Objective:
    """The settings of the objective; hashable, so a static argument of jit. `temperature` divides all logits."""

    loss: Literal["divergence", "nll"] = "divergence"
    alpha: float = 0.0
    normalize: Normalize = "batch"
    temperature: float = 1.0


class TokenScores(NamedTuple):
    """What was measured at each completion token, for the metrics; no gradient."""

    divergence: Float[Array, "B T"]
    student_logp: Float[Array, "B T"]
    entropy: Float[Array, "B T"]


def objective(
    student_logits: Float[Array, "B T V"],
    teacher_logits: Float[Array, "B T V"] | None,
    completion_ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    coefficients: Float[Array, "B T"],
    *,
    settings: Objective,
) -> tuple[Float[Array, ""], TokenScores]:
    """Σ c · D(student, teacher), or Σ c · (−log p_S(gold)) for `nll`; c from `reduction_weights` of the whole batch.

    Logits are divided by the temperature first (`nll` reads them at temperature 1). Source: UniSD Eqs. 1 and 9.
    """
    scaled = student_logits if settings.loss == "nll" else student_logits / settings.temperature
    logp = token_log_probs(scaled, completion_ids)
    if settings.loss == "nll":
        values, divergence = -logp, jnp.zeros_like(logp)
    else:
        values = divergence = token_divergence(scaled, teacher_logits / settings.temperature, alpha=settings.alpha)
    scores = TokenScores(divergence, logp, entropy(scaled))
    return weighted_sum(values, mask, coefficients), jax.lax.stop_gradient(scores)
