"""The train step, pure: score the views, form the objective, update student and teacher."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from unisd_jax.head_pass import head_scores, make_plan, pass_ties, scores_and_jacobians, term_gradients
from unisd_jax.losses import (
    Objective,
    TeacherScores,
    TokenPlan,
    TokenScores,
    agreement_weights,
    loss_mask,
    masked_mean,
    matching_term,
    mechanism_metrics,
    needs_scores_first,
    term_metrics,
    token_metrics,
)
from unisd_jax.models import (
    Dropout,
    Lora,
    Model,
    completion_hidden,
    join_rows,
    map_rows,
    split_rows,
)
from unisd_jax.random import purpose_key
from unisd_jax.teacher import ema_update_measured, start_ema, weight_distance
from unisd_jax.teacher.scoring import (
    Budget,
    ContextScoring,
    Network,
    context_disagreement,
    passes_saved,
    score_primary_and_negative,
)
from unisd_jax.types import TrainState, Views


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The static settings of a step.

    `ema_decay` None: no EMA, the teacher is the frozen base. `ema_adapters` False leaves adapters out of the average,
    as the release does. `dropout` acts on the adapters in the pass that has the gradient, and nowhere else. `audit`
    also scores what a budget leaves out, to measure the error.
    """

    objective: Objective = Objective()
    micro_batches: int = 1
    ema_decay: float | None = None
    ema_sync_steps: int = 1
    ema_adapters: bool = True
    ema_dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: float = 0.0
    seed: int = 0
    views_per_pass: int = 1
    budget: Budget | None = None
    audit: bool = False


def init_state(student: Any, optimizer: optax.GradientTransformation, settings: StepSettings) -> TrainState:
    """Step 0: a fresh optimizer and, with EMA, a teacher equal to the student."""
    dtype = jnp.dtype(settings.ema_dtype)
    teacher = None if settings.ema_decay is None else start_ema(student, dtype=dtype)
    return TrainState(jnp.int32(0), student, teacher, optimizer.init(student))


def train_step(
    state: TrainState,
    base: dict[str, Any],
    views: Views,
    *,
    model: Model,
    optimizer: optax.GradientTransformation,
    settings: StepSettings,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimizer update on one global batch.

    `base` are the frozen weights: under LoRA those both networks share, else the starting point of a frozen teacher.
    Splitting the batch (`micro_batches`, devices) changes nothing but rounding: every token's weight in the loss is
    computed from the whole batch first.
    """
    teacher = Network(model, *weights(base if state.teacher is None else state.teacher, base))
    gradients, metrics = loss_and_gradients(state.student, teacher, base, views, settings=settings, step=state.step)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.student)
    student = optax.apply_updates(state.student, updates)
    step = state.step + 1
    moved, motion = _move_teacher(state.teacher, student, step, settings)
    if moved is not None:
        metrics |= motion | {"teacher_distance": weight_distance(moved, student)}
    return TrainState(step, student, moved, optimizer_state), metrics


def loss_and_gradients(
    student: Any, teacher: Network, base: dict[str, Any], views: Views, *, settings: StepSettings, step: Any = 0
) -> tuple[Any, dict[str, Float[Array, ""]]]:
    """Gradient of the objective with respect to `student` (an adapter or full weights), and the metrics of the step."""
    options, parts = settings.objective, settings.micro_batches
    mask = loss_mask(views.completions.mask, options.skip_tokens)
    taught = score_primary_and_negative(teacher, views, settings=options, micro_batches=parts)
    first = None
    if _scores_student_first(settings, views):
        first = student_scores(student, teacher, base, views, taught, settings)
    taught, metrics = _with_disagreement(taught, teacher, views, mask, first, settings)
    plan = None
    if first is not None or not needs_scores_first(options):
        plan = make_plan(mask, taught, first, views, options)
        plan = plan if first is None else pass_ties(plan, options)

    keys = _dropout_keys(student, mask.shape[0], settings, step)
    # The other views have been turned into numbers already: not to be split with the rest.
    rows = _Part(views._replace(contexts=None, negative=None, teacher=None), mask, taught, plan, keys)
    total, scores, used = _accumulate(student, teacher, base, rows, settings)
    loss = sum(total.terms.values())
    metrics |= {"loss": loss, "gradient_norm": optax.tree.norm(total.gradients)}
    metrics |= term_metrics(total.terms, total.squares, loss)
    metrics |= token_metrics(scores, first, views, mask, options)
    metrics |= mechanism_metrics(scores, taught, mask, used, options)
    return total.gradients, metrics


class Totals(NamedTuple):
    """Sums over the parts of a batch; `squares` are squared norms of each term's gradient at the hidden states."""

    gradients: Any
    terms: dict[str, Float[Array, ""]]
    squares: dict[str, Float[Array, ""]]


class _Part(NamedTuple):
    views: Views
    mask: Bool[Array, "B T"]
    taught: TeacherScores
    plan: TokenPlan | None
    dropout_keys: Any


def student_scores(
    student: Any, teacher: Network, base: dict[str, Any], views: Views, taught: TeacherScores, settings: StepSettings
) -> TokenScores:
    """The student's scores before the pass that has the gradient: without gradient and without dropout."""
    options, network = settings.objective, Network(teacher.model, *weights(student, base))

    def score(rows):
        prompts, completions, teacher_hidden = rows
        hidden = network.hidden(prompts, completions)
        return head_scores(hidden, network.head, teacher_hidden, teacher, completions, settings=options)

    teacher_hidden = None if options.clip_quantile is None else taught.hidden
    return map_rows(score, (views.student, views.completions, teacher_hidden), settings.micro_batches)


def weights(trainable: Any, base: dict[str, Any]) -> tuple[dict[str, Any], Lora | None]:
    """(params, adapter) to run the model with: the base under an adapter, or full weights in the base's dtype."""
    if isinstance(trainable, Lora):
        return base, trainable
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), trainable, base), None


def _scores_student_first(settings: StepSettings, views: Views) -> bool:
    """Whether the whole batch must be scored before the pass that has the gradient."""
    separate = settings.micro_batches > 1 or settings.dropout > 0
    budget = settings.budget is not None and settings.budget.signal == "entropy"
    gap = settings.dropout > 0 and views.sampler_logps is not None
    return (needs_scores_first(settings.objective) and separate) or budget or gap


def _with_disagreement(taught: TeacherScores, teacher: Network, views: Views, mask, first, settings: StepSettings):
    """`taught` with the disagreement of the auxiliary views, and the metrics of what a budget saved."""
    options = settings.objective
    if options.agreement is None:
        return taught, {}
    scoring = ContextScoring(settings.views_per_pass, settings.micro_batches, settings.budget)
    entropy = None if first is None else first.entropy
    found, scored = context_disagreement(
        teacher, views, mask, settings=options, scoring=scoring, student_entropy=entropy
    )
    batch, number, _ = views.contexts.ids.shape
    extra = int(_scores_student_first(settings, views) > _scores_student_first(_without_budget(settings), views))
    saved = passes_saved(scoring, batch=batch, tokens=mask.shape[1], views=number, extra_passes=extra)
    metrics = {name: jnp.float32(value) for name, value in saved.items()}
    if settings.audit:
        scoring = dataclasses.replace(scoring, budget=None)
        full, _ = context_disagreement(teacher, views, mask, settings=options, scoring=scoring)
        exact = agreement_weights(full, mask, settings=options.agreement)
        used = agreement_weights(found, mask, settings=options.agreement, scored=scored)
        metrics["agreement_weight_error"] = masked_mean(jnp.abs(used - exact), mask)
    return taught._replace(disagreement=found, scored=scored), metrics


def _without_budget(settings: StepSettings) -> StepSettings:
    return dataclasses.replace(settings, budget=None)


def _dropout_keys(student: Any, rows: int, settings: StepSettings, step: Any):
    """A key per row of the batch, or None without dropout."""
    if settings.dropout == 0 or not isinstance(student, Lora):
        return None
    key = purpose_key(settings.seed, step, "dropout")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def _accumulate(student, teacher: Network, base, rows: _Part, settings: StepSettings):
    """(Totals, token scores, token plan) of the batch, part by part."""
    if settings.micro_batches == 1:
        return _part_gradients(student, teacher, base, rows, settings)

    def add(totals, part):
        found, scores, used = _part_gradients(student, teacher, base, part, settings)
        return jax.tree.map(jnp.add, totals, found), (scores, used)

    zeros = {name: jnp.float32(0.0) for name in settings.objective.terms}
    start = Totals(jax.tree.map(jnp.zeros_like, student), zeros, zeros)
    total, found = jax.lax.scan(add, start, jax.tree.map(lambda x: split_rows(x, settings.micro_batches), rows))
    return total, *jax.tree.map(join_rows, found)


def _part_gradients(student, teacher: Network, base, part: _Part, settings: StepSettings):
    """(Totals, token scores, token plan) of some rows; without a plan, that of the rows themselves is used."""
    options, views = settings.objective, part.views
    dropout = None if part.dropout_keys is None else Dropout(settings.dropout, part.dropout_keys)

    def outputs(student):
        params, lora = weights(student, base)
        hidden = completion_hidden(teacher.model, params, lora, views.student, views.completions, dropout)
        return hidden, teacher.model.head(params) if lora is None else None

    (hidden, trained_head), pull_outputs = jax.vjp(outputs, student)
    head = teacher.model.head(base) if trained_head is None else trained_head
    scores, jacobians, head_gradient, plan = scores_and_jacobians(
        hidden, head, teacher, part.taught, views, part.mask, part.plan, settings=options,
        trained_head=trained_head is not None,
    )  # fmt: skip
    # One gradient per term at the hidden states: it shows each term's share.
    terms, separate = term_gradients(scores, jacobians, part.taught, part.mask, plan, settings=options)
    if options.matching_weight > 0:
        value, gradient = jax.value_and_grad(matching_term)(hidden, part.taught, part.mask, plan, settings=options)
        terms["matching"], separate["matching"] = value, gradient.astype(jnp.float32)
    squares = {name: jnp.sum(jnp.square(found)) for name, found in separate.items()}
    (gradients,) = pull_outputs((sum(separate.values()).astype(hidden.dtype), head_gradient))
    return Totals(gradients, terms, squares), scores, plan


def _move_teacher(teacher: Any, student: Any, step, settings: StepSettings) -> tuple[Any, dict[str, Array]]:
    """The teacher after the step, and how far it moved: exactly 0 where it was not touched."""
    if teacher is None:
        return None, {}
    still = {"teacher_motion": jnp.float32(0.0), "ema_truncation": jnp.float32(0.0)}
    if settings.ema_decay == 1 or (isinstance(teacher, Lora) and not settings.ema_adapters):
        return teacher, still

    def move():
        moved, truncation = ema_update_measured(teacher, student, decay=settings.ema_decay)
        return moved, {"teacher_motion": weight_distance(teacher, moved), "ema_truncation": truncation}

    return jax.lax.cond(step % settings.ema_sync_steps == 0, move, lambda: (teacher, still))
