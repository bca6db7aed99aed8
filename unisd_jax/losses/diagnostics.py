"""What a mechanism did in one step, as numbers: weights, clipping, hinge. Names and units are in docs/metrics.md."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unisd_jax.losses.objective import Objective, TeacherScores, TokenPlan, TokenScores
from unisd_jax.losses.reduce import masked_mean


def effective_share(weights: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """(Σ w)² / (N Σ w²) over the N masked tokens: the effective sample size as a share of N; 1 for equal weights."""
    kept = jnp.where(mask, weights, 0.0)
    squares = jnp.maximum(jnp.sum(jnp.square(kept)), 1e-30)
    return jnp.square(jnp.sum(kept)) / (jnp.maximum(jnp.sum(mask), 1) * squares)


def mechanism_metrics(
    scores: TokenScores, teacher: TeacherScores, mask: Bool[Array, "B T"], plan: TokenPlan, settings: Objective
) -> dict[str, Float[Array, ""]]:
    """The metrics of the mechanisms that are on, over the tokens of the loss."""
    metrics = {}
    if plan.weights is not None:
        metrics |= {
            "agreement_weight": masked_mean(plan.weights, mask),
            "agreement_weight_min": jnp.min(jnp.where(mask, plan.weights, jnp.inf), initial=jnp.inf),
            "agreement_effective_share": effective_share(plan.weights, mask),
            "agreement_above_99": masked_mean(plan.weights > 0.99, mask),
            "agreement_disagreement": _mean_disagreement(teacher.disagreement, mask),
        }
    if plan.ceiling is not None and scores.divergence is not None:
        metrics |= {"clip_share": masked_mean(scores.divergence > plan.ceiling, mask), "clip_ceiling": plan.ceiling}
    if settings.contrast_weight > 0:
        near = jnp.abs(scores.student_logp - teacher.logp)
        far = jnp.abs(scores.student_logp - teacher.negative_logp)
        metrics |= {
            "contrast_active_share": masked_mean(settings.contrast_margin + near - far > 0, mask),
            "contrast_positive_distance": masked_mean(near, mask),
            "contrast_negative_distance": masked_mean(far, mask),
        }
    if settings.top_entropy < 1:
        metrics["entropy_mask_share"] = masked_mean(plan.main > 0, mask)
    return metrics


def _mean_disagreement(disagreement: Float[Array, "*B"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    return masked_mean(disagreement, mask) if disagreement.ndim == 2 else jnp.mean(disagreement)
