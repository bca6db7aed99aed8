"""What a mechanism did in one step, as numbers: weights, clipping, hinge. Names and units are in docs/metrics.md."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unisd_jax.losses.contrastive import token_distance
from unisd_jax.losses.objective import Objective, TeacherScores, TokenPlan, TokenScores
from unisd_jax.losses.reduce import masked_mean
from unisd_jax.types import Views


def effective_share(weights: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """(Σ w)² / (N Σ w²) over the N masked tokens: the effective sample size as a share of N; 1 for equal weights."""
    kept = jnp.where(mask, weights, 0.0)
    squares = jnp.maximum(jnp.sum(jnp.square(kept)), 1e-30)
    return jnp.square(jnp.sum(kept)) / (jnp.maximum(jnp.sum(mask), 1) * squares)


def term_metrics(
    terms: dict[str, Float[Array, ""]], squares: dict[str, Float[Array, ""]], loss: Float[Array, ""]
) -> dict[str, Float[Array, ""]]:
    """Each term's value, its share of the loss, and of the sum of the terms' gradient norms at the hidden states."""
    norms = {name: jnp.sqrt(square) for name, square in squares.items()}
    metrics = {}
    for name, value in terms.items():
        metrics |= {
            f"loss_{name}": value,
            f"loss_share_{name}": value / jnp.where(loss == 0, 1.0, loss),
            f"gradient_share_{name}": norms[name] / jnp.maximum(sum(norms.values()), 1e-30),
        }
    return metrics


def token_metrics(
    scores: TokenScores, first: TokenScores | None, views: Views, mask: Bool[Array, "B T"], settings: Objective
) -> dict[str, Float[Array, ""]]:
    """Means over the tokens of the loss; names and units in docs/metrics.md."""
    metrics = {"entropy": masked_mean(scores.entropy, mask)}
    if settings.loss == "divergence":
        metrics["divergence"] = masked_mean(scores.divergence, mask)
    if views.sampler_logps is not None:
        # The sampler has no dropout: compare it with the scores that have none.
        logp = (scores if first is None else first).student_logp
        gap = jnp.where(views.completions.mask, jnp.abs(logp - views.sampler_logps), 0.0)
        metrics |= {"sampler_gap": masked_mean(gap, views.completions.mask), "sampler_gap_max": jnp.max(gap)}
    return metrics


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
        metrics |= {
            "clip_share": masked_mean(scores.divergence > plan.ceiling, mask),
            "clip_ceiling": plan.ceiling[0, 0],
        }
    if settings.contrast_weight > 0:
        near = token_distance(scores.student_logp, teacher.logp)
        far = token_distance(scores.student_logp, teacher.negative_logp)
        metrics |= {
            "contrast_active_share": masked_mean(settings.contrast_margin + near - far > 0, mask),
            "contrast_positive_distance": masked_mean(near, mask),
            "contrast_negative_distance": masked_mean(far, mask),
        }
    if settings.top_entropy < 1:
        metrics["entropy_mask_share"] = masked_mean(plan.main > 0, mask)
    if plan.importance is not None:
        metrics["importance_weight"] = masked_mean(plan.importance, mask)
        metrics["importance_capped_share"] = masked_mean(plan.importance >= settings.importance_cap * (1 - 1e-6), mask)
    if scores.entry_capped is not None:
        metrics["entry_capped_share"] = masked_mean(scores.entry_capped, mask)
    if teacher.scored is not None:
        metrics["agreement_scored_share"] = masked_mean(teacher.scored, mask)
    return metrics


def _mean_disagreement(disagreement: Float[Array, "*B"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    if disagreement.ndim == 2:
        return masked_mean(disagreement, mask)
    return masked_mean(disagreement[:, None], jnp.any(mask, axis=1, keepdims=True))
