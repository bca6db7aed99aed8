"""Everything a run needs, built from its configuration: model, data, sampler, optimizer, compiled step."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unisd_jax.config import Config, to_dict
from unisd_jax.data.buckets import Buckets, length_buckets
from unisd_jax.data.chat import Chat
from unisd_jax.data.pipeline import Example, ViewMessages, length_report
from unisd_jax.data.tasks.base import Task
from unisd_jax.errors import UserError
from unisd_jax.eval.runner import Evaluation, evaluate_examples
from unisd_jax.inputs import read_inputs, tokenized
from unisd_jax.losses import Agreement, Objective
from unisd_jax.models import (
    Lora,
    Model,
    init_lora,
    load_peft,
    merge,
)
from unisd_jax.models.layout import place
from unisd_jax.optim import adamw, learning_rate_schedule
from unisd_jax.preparation import shared_views
from unisd_jax.random import purpose_key
from unisd_jax.resources import Phase
from unisd_jax.rollout import RolloutEngine, Sampling
from unisd_jax.rollout.engines import make_engine
from unisd_jax.rollout.vllm_command import require_vllm
from unisd_jax.step import StepSettings, init_state, weights
from unisd_jax.teacher import student_messages
from unisd_jax.teacher.scoring import Budget
from unisd_jax.types import TrainState

# Items whose prompts and gold replies prove that an engine in another process has the right weights.
PROBED = 6


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run. `base` are the weights it starts from, read from the folder `checkpoint`.

    For evaluation alone there are no training examples and no buckets.
    `dropped` counts training items that were too long, `without_negative` those for which no wrong reply could be made.
    """

    config: Config
    mesh: jax.sharding.Mesh
    checkpoint: Path
    model: Model
    base: dict[str, Any]
    chat: Chat
    task: Task
    train: Sequence[Example]
    buckets: Buckets
    test: Sequence[Example]
    dropped: int
    without_negative: int
    sampler: RolloutEngine
    sampling: Sampling
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    settings: StepSettings


def build(config: Config, *, read_only: bool = False, training: bool = True) -> Experiment:
    """Reads the inputs, makes the views, loads the weights: what is cheap to get wrong fails first.

    What the teacher's views need and no cache has is made on the way, unless `read_only`. Without `training` only what
    evaluation reads is built.

    Raises:
      NotPrepared: `read_only`, and something is still to be made.
      UserError: data, checkpoint or mesh cannot be used; the message names the option.
    """
    require_vllm(config)
    inputs = read_inputs(config, training=training)
    chat, train, dropped, without_negative, buckets = inputs.chat, [], 0, 0, Buckets((), ())
    if training:
        made = shared_views(config, inputs.task, inputs.train, chat, inputs.sampler, read_only=read_only)
        cache = None if read_only else Path(config.teacher.cache_dir) / "tokens"
        train, reasons = tokenized(config, chat, made.items, made.views, cache=cache)
        for line in length_report(train, reasons):
            print(f"training items, {line}", flush=True)
        dropped, without_negative = reasons.total(), made.without_negative
        buckets = length_buckets(train, number=config.data.length_buckets, multiple=config.data.length_multiple)
    # A test item that does not fit would change what is measured: never dropped.
    questions = [ViewMessages(student_messages(item.prompt, item.earlier)) for item in inputs.test]
    test, _ = tokenized(config, chat, inputs.test, questions, overlong="error")
    model, base = inputs.weights()
    schedule = learning_rate_schedule(
        config.optimizer.learning_rate, steps=config.train.steps, warmup_ratio=config.optimizer.warmup_ratio,
        schedule=config.optimizer.schedule, zero_first_rate=config.optimizer.zero_first_rate,
    )  # fmt: skip
    rollout = config.rollout
    sampler = make_engine(
        config, model, inputs.checkpoint, [(example.student, example.gold) for example in (train or test)[:PROBED]],
        pad_id=chat.pad_id, folder=Path(config.output_dir) / config.name, training=training,
    )  # fmt: skip
    return Experiment(
        config=config,
        mesh=inputs.mesh,
        checkpoint=inputs.checkpoint,
        model=model,
        base=base,
        chat=chat,
        task=inputs.task,
        train=train,
        buckets=buckets,
        test=test,
        dropped=dropped,
        without_negative=without_negative,
        sampler=sampler,
        sampling=Sampling(
            rollout.max_completion_length,
            chat.stop_ids,
            chat.pad_id,
            rollout.temperature,
            rollout.top_p,
            rollout.top_k,
            rollout.min_p,
            chat.vocab_size,
        ),  # fmt: skip
        schedule=schedule,
        optimizer=adamw(
            schedule,
            b1=config.optimizer.b1,
            b2=config.optimizer.b2,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            max_grad_norm=config.optimizer.max_grad_norm,
        ),  # fmt: skip
        settings=step_settings(config),
    )


def shared_options(config: Config) -> str:
    """What all processes of a run must have alike: every option but how they find each other."""
    tree = to_dict(config)
    del tree["distributed"]
    return json.dumps(tree)


def mesh_size(config: Config) -> int:
    """How many devices the configuration asks for, in all processes together."""
    return config.mesh.data * config.mesh.fsdp * config.mesh.tensor


def step_settings(config: Config) -> StepSettings:
    """The static settings of the train step that a configuration asks for."""
    budget = config.objective.agreement.budget
    return StepSettings(
        objective_settings(config),
        config.train.micro_batches,
        ema_decay=config.teacher.ema_decay if config.teacher.ema else None,
        ema_sync_steps=config.teacher.ema_sync_steps,
        ema_adapters=config.teacher.ema_adapters,
        ema_dtype=config.teacher.ema_dtype,
        dropout=config.model.lora.dropout if config.model.trainable == "lora" else 0.0,
        seed=config.seed,
        views_per_pass=config.objective.agreement.views_per_pass,
        budget=Budget(budget.share, budget.unit, budget.signal) if budget.share < 1 else None,
    )


def objective_settings(config: Config) -> Objective:
    """The objective that a configuration asks for."""
    options, agreement = config.objective, None
    if options.agreement.level != "none":
        agreement = Agreement(
            options.agreement.level,
            options.agreement.gamma_agreement,
            options.agreement.agreement_stat,
            options.agreement.agreement_quantile,
            options.agreement.agreement_cap,
        )
    return Objective(
        loss=options.loss,
        alpha=options.alpha,
        normalize=options.normalize,
        temperature=config.rollout.temperature,
        entry_ceiling=options.entry_ceiling,
        skip_tokens=options.num_loss_tokens_to_skip,
        top_entropy=options.top_entropy_quantile,
        clip_ceiling=options.clip.token_clip,
        clip_quantile=options.clip.token_clip_quantile,
        agreement=agreement,
        contrast_weight=options.contrast.contrastive_weight,
        contrast_margin=options.contrast.contrastive_margin,
        matching_weight=options.matching.final_layer_distill_weight,
        importance=None if options.importance.level == "none" else options.importance.level,
        importance_cap=options.importance.cap,
    )


def new_state(experiment: Experiment) -> TrainState:
    """The train state before the first step, placed on the mesh."""
    config, options = experiment.config, experiment.config.model.lora
    if config.model.trainable == "lora" and options.start is not None:
        student = _start_adapter(experiment, options.start)
    elif config.model.trainable == "lora":
        key = purpose_key(config.seed, 0, "adapter_init")
        student = init_lora(key, experiment.base, rank=options.rank, alpha=options.alpha, targets=options.targets)
    else:
        student = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), experiment.base)
    state = init_state(student, experiment.optimizer, experiment.settings)
    return place(state, experiment.mesh)


def _start_adapter(experiment: Experiment, path: str) -> Lora:
    try:
        adapter = load_peft(path, experiment.model, experiment.base)
    except UserError as error:
        raise UserError(f"model.lora.start: {error}") from None
    rank = max(factors.a.shape[-1] for factors in adapter.factors.values())
    print(
        f"the student starts from {path}: rank {rank}, scale {adapter.scale:g}, {', '.join(adapter.factors)}; "
        "model.lora.rank, model.lora.alpha and model.lora.targets are not read",
        flush=True,
    )
    return adapter


def student_params(experiment: Experiment, state: TrainState) -> dict[str, Any]:
    """The student's weights as one plain parameter tree; adapters are merged into a copy."""
    return merge(*weights(state.student, experiment.base))


def evaluate_test(
    experiment: Experiment, params: dict[str, Any], version: int, phase: Phase, *, limit: int | None = None
) -> Evaluation:
    """The test items, all or the first `limit`, answered greedily without a demonstration; counts tokens in `phase`.

    Raises:
      UserError: a mean is not finite: the weights are unusable.
    """
    options, examples = experiment.config.evaluation, experiment.test[:limit]
    evaluation = evaluate_examples(
        experiment.sampler, experiment.model, params, examples, experiment.chat, experiment.task,
        version=version, max_completion_length=options.max_completion_length, batch_size=options.batch_size,
        length_multiple=experiment.config.data.length_multiple,
    )  # fmt: skip
    phase.add(
        prompt_tokens=sum(2 * len(example.student) for example in examples),  # for its reply, and before its gold reply
        completion_tokens=sum(len(example.gold) for example in examples) + sum(evaluation.reply_tokens),
    )
    for name, value in evaluation.means.items():
        require_finite(f"{name} of the test items", value, version)
    return evaluation


def require_finite(what: str, value: float, version: int) -> None:
    """Refuses a measurement that only broken weights give.

    Raises:
      UserError: `value` is NaN or infinite.
    """
    if not math.isfinite(value):
        raise UserError(
            f"after {version} updates {what} is {value}: the weights are unusable; lower optimizer.learning_rate"
            if version
            else f"model.path: {what} is {value}: the weights cannot be used"
        )
