"""The pass through the output matrix: the student's scores and the loss's gradient through them, without logits.

A term of the loss depends on the logits through a token's divergence and log-prob alone. So their jacobians at the
hidden states give every term's gradient there; the gradient to a head that is trained is one more sum over the tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unisd_jax.losses import Objective, TeacherScores, TokenPlan, TokenScores, objective, token_plan
from unisd_jax.models import divergence_scores, sampled_token_scores, scores_with_jacobians
from unisd_jax.teacher.scoring import Network
from unisd_jax.types import Completions, Views


def scores_and_jacobians(
    hidden: Float[Array, "B T H"],
    head: Float[Array, "V H"],
    teacher: Network,
    taught: TeacherScores,
    views: Views,
    mask: Bool[Array, "B T"],
    plan: TokenPlan | None,
    *,
    settings: Objective,
    trained_head: bool,
) -> tuple[TokenScores, dict[str, Float[Array, "B T H"]], Float[Array, "V H"] | None, TokenPlan]:
    """(scores, their jacobians at `hidden`, the loss's gradient to a head that is trained, the plan that was used).

    Without a plan, that of these tokens is made. Jacobians are of "divergence" and "student_logp", as far as the terms
    depend on them; the head's gradient leaves out the matching term, which does not reach it.
    """
    needed = _differentiated(settings)
    teacher_hidden = taught.hidden if settings.loss == "divergence" else None
    if plan is None and trained_head:
        # The head's gradient is a sum over tokens, so their weights must be known before it is formed.
        first = head_scores(hidden, head, teacher_hidden, teacher, views.completions, settings=settings)
        plan = pass_ties(make_plan(mask, taught, first, views, settings), settings)
    weighed = {}
    if trained_head and needed:
        weighed = {"weighed": needed, "weigh": functools.partial(_weigh, settings=settings, names=needed)}
    found, jacobians, head_gradient = scores_with_jacobians(
        hidden, head, teacher_hidden, None if teacher_hidden is None else teacher.head, views.completions.ids,
        views.completions.mask, (mask, plan, taught.logp, taught.negative_logp) if weighed else None,
        jacobians=needed, alpha=settings.alpha, temperature=_temperature(settings),
        entry_ceiling=settings.entry_ceiling, options=teacher.model.head_options, **weighed,
    )  # fmt: skip
    scores = TokenScores(found.divergence, found.student_logp, found.student_entropy, found.entry_capped)
    if plan is None:
        plan = make_plan(mask, taught, scores, views, settings)
    if trained_head:
        head_gradient = jnp.zeros_like(head) if head_gradient is None else head_gradient.astype(head.dtype)
    return scores, jacobians, head_gradient, plan


def head_scores(
    hidden: Float[Array, "B T H"],
    head: Float[Array, "V H"],
    teacher_hidden: Float[Array, "B T H"] | None,
    teacher: Network,
    completions: Completions,
    *,
    settings: Objective,
) -> TokenScores:
    """The student's scores without gradient; the divergence where there are teacher states."""
    scaling = {"temperature": _temperature(settings), "options": teacher.model.head_options}
    if teacher_hidden is None:
        logp, entropy = sampled_token_scores(hidden, head, completions.ids, completions.mask, **scaling)
        return TokenScores(None, logp, entropy)
    found = divergence_scores(
        hidden, head, teacher_hidden, teacher.head, completions.ids, completions.mask, alpha=settings.alpha,
        entry_ceiling=settings.entry_ceiling, **scaling,
    )  # fmt: skip
    return TokenScores(found.divergence, found.student_logp, found.student_entropy, found.entry_capped)


def term_gradients(
    scores: TokenScores,
    jacobians: dict[str, Float[Array, "B T H"]],
    taught: TeacherScores,
    mask: Bool[Array, "B T"],
    plan: TokenPlan,
    *,
    settings: Objective,
) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, "B T H"]]]:
    """(terms by name, each one's gradient at the hidden states in float32); without matching."""

    def terms_of(divergence, logp):
        found = scores._replace(divergence=divergence, student_logp=logp)
        return _without_matching(found, taught, mask, plan, settings)

    terms, pull = jax.vjp(terms_of, scores.divergence, scores.student_logp)
    gradients = {}
    for name in terms:
        weights = pull({other: jnp.float32(other == name) for other in terms})
        weights = dict(zip(("divergence", "student_logp"), weights, strict=True))
        gradients[name] = sum(weights[score][..., None] * jacobian for score, jacobian in jacobians.items())
    return terms, gradients


def make_plan(
    mask: Bool[Array, "B T"], taught: TeacherScores, scores: TokenScores | None, views: Views, settings: Objective
) -> TokenPlan:
    """`token_plan` of the rows of a batch."""
    return token_plan(
        mask, settings=settings, disagreement=taught.disagreement, scored=taught.scored, scores=scores,
        sampler_logps=views.sampler_logps,
    )  # fmt: skip


def pass_ties(plan: TokenPlan, settings: Objective) -> TokenPlan:
    """A ceiling that the token which is the quantile stays under when its divergence is rounded differently later."""
    return plan if settings.clip_quantile is None else plan._replace(ceiling=plan.ceiling * (1 + 1e-6))


def _weigh(scores, beside, *, settings: Objective, names: tuple[str, ...]):
    """∂loss/∂score of some tokens, by score: what the head's gradient weighs them with."""
    mask, plan, logp, negative_logp = jax.tree.map(lambda x: x[None], beside)

    def loss(values):
        own = {"divergence": scores.divergence, "student_logp": scores.student_logp} | values
        own = TokenScores(*(None if x is None else x[None] for x in own.values()), scores.student_entropy[None])
        return sum(_without_matching(own, TeacherScores(None, logp, negative_logp), mask, plan, settings).values())

    return jax.grad(loss)({name: getattr(scores, name) for name in names})


def _without_matching(scores, taught, mask, plan, settings: Objective):
    return objective(scores, None, taught, mask, plan, settings=dataclasses.replace(settings, matching_weight=0.0))


def _differentiated(settings: Objective) -> tuple[str, ...]:
    """The scores through which the loss has a gradient."""
    main = {"divergence": ("divergence",), "nll": ("student_logp",), "none": ()}[settings.loss]
    contrast = ("student_logp",) if settings.contrast_weight > 0 else ()
    return tuple(dict.fromkeys(main + contrast))


def _temperature(settings: Objective) -> float:
    """The temperature at which the student is scored: cross-entropy is the model's own."""
    return 1.0 if settings.loss == "nll" else settings.temperature
