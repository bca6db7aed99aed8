"""The training objective: which scores each mechanism uses, and how the terms add up.

Three steps, so that a batch may be split and the vocabulary never be held: `score_tokens` turns logits into a few
numbers per token, `token_plan` decides from the whole batch how much every token counts, `objective` forms the terms.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unisd_jax.losses.agreement import Level, Statistic, sequence_weights, token_weights
from unisd_jax.losses.contrastive import contrastive_hinge
from unisd_jax.losses.divergence import clip_at, entropy, quantile_ceiling, token_divergence, token_log_probs
from unisd_jax.losses.matching import feature_distance
from unisd_jax.losses.reduce import Normalize, reduction_weights, weighted_sum
from unisd_jax.losses.selection import entropy_mask, importance_weights


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The settings of `token_agreement` and `sequence_agreement`."""

    level: Level = "token"
    gamma: float = 1.0
    statistic: Statistic = "var"
    quantile: float = 0.95
    cap: float = 10.0


@dataclasses.dataclass(frozen=True)
class Objective:
    """The settings of the objective; hashable, so a static argument of jit.

    `temperature` divides the logits of student, teacher and negative view. A mechanism is off at its default: no
    ceiling and no quantile (clip), `agreement` None, weight 0 (contrast, matching), `top_entropy` 1, `importance` None.
    """

    loss: Literal["divergence", "nll", "none"] = "divergence"
    alpha: float = 0.0
    normalize: Normalize = "batch"
    temperature: float = 1.0
    entry_ceiling: float | None = None
    skip_tokens: int = 0
    top_entropy: float = 1.0
    clip_ceiling: float | None = None
    clip_quantile: float | None = None
    agreement: Agreement | None = None
    contrast_weight: float = 0.0
    contrast_margin: float = 0.5
    matching_weight: float = 0.0
    importance: Literal["token", "sequence"] | None = None
    importance_cap: float = 2.0

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the terms that add up to the loss."""
        main = {"divergence": "divergence", "nll": "nll", "none": None}[self.loss]
        parts = {main: True, "contrast": self.contrast_weight > 0, "matching": self.matching_weight > 0}
        return tuple(name for name, on in parts.items() if on and name)


class TokenScores(NamedTuple):
    """What the student's pass says of each completion token, in nats; None where the objective does not ask for it."""

    divergence: Float[Array, "B T"] | None
    student_logp: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    entry_capped: Bool[Array, "B T"] | None = None


class TeacherScores(NamedTuple):
    """What the teacher's views say, without gradient; None for what no mechanism needs.

    `hidden` [B, T, H] after the final norm and `logp` belong to the primary view, `negative_logp` to the negative one;
    `disagreement` of the auxiliary views is [B, T] or [B]; where a budget left tokens out, `scored` says which it has.
    """

    hidden: Float[Array, "B T H"] | None = None
    logp: Float[Array, "B T"] | None = None
    negative_logp: Float[Array, "B T"] | None = None
    disagreement: Float[Array, "*B"] | None = None
    scored: Bool[Array, "B T"] | None = None


class TokenPlan(NamedTuple):
    """How much each token counts, computed from the whole batch; constants for the gradient.

    `main` are the coefficients of the divergence (or nll), `auxiliary` those of contrast and matching; `ceiling` is the
    clip's κ, the same number at every token, None without clip; `weights` and `importance` are the agreement and the
    importance weights as they entered.
    """

    main: Float[Array, "B T"]
    auxiliary: Float[Array, "B T"]
    ceiling: Float[Array, "B T"] | None
    weights: Float[Array, "B T"] | None
    importance: Float[Array, "B T"] | None = None


def loss_mask(mask: Bool[Array, "B T"], skip_tokens: int) -> Bool[Array, "B T"]:
    """The completion tokens that the loss counts: all but the first `skip_tokens` of each completion."""
    return mask & (jnp.arange(mask.shape[1]) >= skip_tokens)


def score_tokens(
    student_logits: Float[Array, "B T V"],
    teacher_logits: Float[Array, "B T V"] | None,
    completion_ids: Int[Array, "B T"],
    *,
    settings: Objective,
) -> TokenScores:
    """The student's scores at the temperature of the loss (1 for nll); entropy without gradient."""
    scaled = student_logits if settings.loss == "nll" else student_logits / settings.temperature
    divergence = capped = None
    if teacher_logits is not None:
        pair, options = (scaled, teacher_logits / settings.temperature), {"alpha": settings.alpha}
        divergence = token_divergence(*pair, **options, entry_ceiling=settings.entry_ceiling)
        if settings.entry_ceiling is not None:
            capped = token_divergence(*pair, **options) > divergence
    logp = token_log_probs(scaled, completion_ids)
    return TokenScores(divergence, logp, jax.lax.stop_gradient(entropy(scaled)), capped)


def needs_scores_first(settings: Objective) -> bool:
    """Whether `token_plan` depends on the student's scores of the whole batch."""
    return settings.clip_quantile is not None or settings.top_entropy < 1 or settings.importance is not None


def token_plan(
    mask: Bool[Array, "B T"],
    *,
    settings: Objective,
    disagreement: Float[Array, "*B"] | None = None,
    scored: Bool[Array, "B T"] | None = None,
    scores: TokenScores | None = None,
    sampler_logps: Float[Array, "B T"] | None = None,
) -> TokenPlan:
    """How much every token of the batch counts; `mask` as `loss_mask` gives it.

    The main coefficients are c · ρ · e with c from `reduction_weights` under the agreement weights w, ρ the importance
    weights and e the entropy mask; outside e the weight w is 1. As in the release, only w enters the denominators.

    Raises:
      ValueError: a mechanism that is on lacks what it needs.
    """
    _require("the auxiliary views' disagreement", disagreement, settings.agreement is not None)
    _require("the student's scores", scores, needs_scores_first(settings))
    _require("the sampler's log-probs", sampler_logps, settings.importance is not None)
    weights = None
    if settings.agreement is not None:
        weights = agreement_weights(disagreement, mask, settings=settings.agreement, scored=scored)
    chosen = None
    if settings.top_entropy < 1:
        chosen = entropy_mask(scores.entropy, mask, top=settings.top_entropy)
        weights = None if weights is None else jnp.where(chosen, weights, 1.0)
    main = reduction_weights(mask, weights, normalize=settings.normalize)
    importance = None
    if settings.importance is not None:
        importance = importance_weights(
            scores.student_logp, sampler_logps, mask, cap=settings.importance_cap, level=settings.importance
        )
        main *= importance
    if chosen is not None:
        main *= chosen
    ceiling = settings.clip_ceiling
    if settings.clip_quantile is not None:
        ceiling = quantile_ceiling(scores.divergence, mask, settings.clip_quantile)
    if ceiling is not None:
        ceiling = jnp.full(mask.shape, ceiling, jnp.float32)
    auxiliary = reduction_weights(mask, normalize=settings.normalize)
    return jax.lax.stop_gradient(TokenPlan(main, auxiliary, ceiling, weights, importance))


def agreement_weights(
    disagreement: Float[Array, "*B"],
    mask: Bool[Array, "B T"],
    *,
    settings: Agreement,
    scored: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """The weight of every token; at the sequence level that of its completion.

    Tokens that are not `scored` weigh 1 and have no part in the quantile that the others are measured by.
    """
    if settings.level == "token":
        mask = mask if scored is None else mask & scored
        return token_weights(disagreement, mask, gamma=settings.gamma, quantile=settings.quantile, cap=settings.cap)
    return jnp.broadcast_to(sequence_weights(disagreement, gamma=settings.gamma)[:, None], mask.shape)


def objective(
    scores: TokenScores,
    student_hidden: Float[Array, "B T H"] | None,
    teacher: TeacherScores,
    mask: Bool[Array, "B T"],
    plan: TokenPlan,
    *,
    settings: Objective,
) -> dict[str, Float[Array, ""]]:
    """The terms by name, each with its weight in it; the loss is their sum. Only matching looks at `student_hidden`.

    * divergence: Σ c · min(D, κ), or nll: −Σ c · log p_S(token)
    * contrast: λ · Σ a · hinge
    * matching: λ · Σ a · mean_H (h_S − h_T)²

    with c and a from `token_plan` of the whole batch. Source: UniSD Eqs. 1 and 9, Algorithm 1.
    """
    terms = {}
    if settings.loss == "nll":
        terms["nll"] = weighted_sum(-scores.student_logp, mask, plan.main)
    elif settings.loss == "divergence":
        clipped = clip_at(scores.divergence, plan.ceiling)
        terms["divergence"] = weighted_sum(clipped, mask, plan.main)
    if settings.contrast_weight > 0:
        hinge = contrastive_hinge(
            scores.student_logp, teacher.logp, teacher.negative_logp, margin=settings.contrast_margin
        )
        terms["contrast"] = settings.contrast_weight * weighted_sum(hinge, mask, plan.auxiliary)
    if settings.matching_weight > 0:
        terms["matching"] = matching_term(student_hidden, teacher, mask, plan, settings=settings)
    return terms


def matching_term(
    student_hidden: Float[Array, "B T H"],
    teacher: TeacherScores,
    mask: Bool[Array, "B T"],
    plan: TokenPlan,
    *,
    settings: Objective,
) -> Float[Array, ""]:
    """λ · Σ a · mean_H (h_S − h_T)², the one term that needs no logits."""
    distance = feature_distance(student_hidden, teacher.hidden)
    return settings.matching_weight * weighted_sum(distance, mask, plan.auxiliary)


def _require(what: str, value, needed: bool) -> None:
    if needed and value is None:
        raise ValueError(f"the objective's settings need {what}, which was not given")
