"""The train step, pure: score the views, form the objective, update student and teacher."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from unisd_jax.losses import Objective, TokenScores, objective, reduction_weights
from unisd_jax.models import Lora, Model, completion_hidden
from unisd_jax.teacher import ema_update_measured, start_ema, weight_distance
from unisd_jax.types import TrainState, Views


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The static settings of a step. `ema_decay` None: no EMA, the teacher is the frozen base."""

    objective: Objective = Objective()
    micro_batches: int = 1
    ema_decay: float | None = None
    ema_sync_steps: int = 1


def init_state(student: Any, optimizer: optax.GradientTransformation, settings: StepSettings) -> TrainState:
    """Step 0: a fresh optimizer and, with EMA, a teacher equal to the student."""
    teacher = None if settings.ema_decay is None else start_ema(student)
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
    coefficients = reduction_weights(views.completions.mask, normalize=settings.objective.normalize)
    teacher_params, teacher_lora = weights(base if state.teacher is None else state.teacher, base)

    def split(tree):
        return jax.tree.map(lambda x: _split_rows(x, settings.micro_batches), tree)

    def teach(prompts_and_completions):
        prompts, completions = prompts_and_completions
        return completion_hidden(model, teacher_params, teacher_lora, prompts, completions)

    teacher_hidden = None
    if views.teacher is not None:
        teacher_hidden = jax.lax.map(teach, (split(views.teacher), split(views.completions)))

    def loss(student, prompts, completions, teacher_hidden, coefficients):
        params, lora = weights(student, base)
        hidden = completion_hidden(model, params, lora, prompts, completions)
        teacher_logits = None if teacher_hidden is None else model.logits(teacher_params, teacher_hidden)
        return objective(
            model.logits(params, hidden), teacher_logits, completions.ids, completions.mask, coefficients,
            settings=settings.objective,
        )  # fmt: skip

    def accumulate(totals, micro):
        (value, scores), gradients = jax.value_and_grad(loss, has_aux=True)(state.student, *micro)
        return jax.tree.map(jnp.add, totals, (value, gradients)), scores

    zero = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, state.student))
    micro_batches = (split(views.student), split(views.completions), teacher_hidden, split(coefficients))
    (value, gradients), scores = jax.lax.scan(accumulate, zero, micro_batches)
    scores = jax.tree.map(_join_rows, scores)

    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.student)
    student = optax.apply_updates(state.student, updates)
    step = state.step + 1
    teacher, truncation = _move_teacher(state.teacher, student, step, settings)
    metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradients)}
    metrics |= token_metrics(scores, views, settings.objective)
    if teacher is not None:
        metrics |= {"teacher_distance": weight_distance(teacher, student), "ema_truncation": truncation}
    return TrainState(step, student, teacher, optimizer_state), metrics


def weights(trainable: Any, base: dict[str, Any]) -> tuple[dict[str, Any], Lora | None]:
    """(params, adapter) to run the model with: the base under an adapter, or full weights in the base's dtype."""
    if isinstance(trainable, Lora):
        return base, trainable
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), trainable, base), None


def token_metrics(scores: TokenScores, views: Views, settings: Objective) -> dict[str, Float[Array, ""]]:
    """Means over the completion tokens of the global batch; names and units in docs/metrics.md."""
    mask = views.completions.mask
    metrics = {
        "entropy": masked_mean(scores.entropy, mask),
        "completion_length": jnp.mean(jnp.sum(mask, axis=1).astype(jnp.float32)),
    }
    if settings.loss == "divergence":
        metrics["divergence"] = masked_mean(scores.divergence, mask)
    if views.sampler_logps is not None:
        gap = jnp.where(mask, jnp.abs(scores.student_logp - views.sampler_logps), 0.0)
        metrics |= {"sampler_gap": masked_mean(gap, mask), "sampler_gap_max": jnp.max(gap)}
    return metrics


def masked_mean(values: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean over the tokens where `mask` holds; 0 if there are none."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def _move_teacher(teacher: Any, student: Any, step, settings: StepSettings) -> tuple[Any, Float[Array, ""]]:
    if teacher is None:
        return None, jnp.float32(0.0)
    return jax.lax.cond(
        step % settings.ema_sync_steps == 0,
        lambda: ema_update_measured(teacher, student, decay=settings.ema_decay),
        lambda: (teacher, jnp.float32(0.0)),
    )


def _split_rows(x: Array, parts: int) -> Array:
    """[B, …] → [parts, B/parts, …], row i to part i mod parts, so that a batch sharded over rows stays where it is."""
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def _join_rows(x: Array) -> Array:
    """Undoes `_split_rows`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
