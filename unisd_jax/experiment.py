"""Everything a run needs, built from its configuration: model, data, sampler, optimizer, compiled step."""

import dataclasses
import functools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unisd_jax.config import Config, to_dict
from unisd_jax.data.buckets import Buckets, length_buckets
from unisd_jax.data.chat import Chat, load_chat
from unisd_jax.data.loading import load_items, without_test_questions
from unisd_jax.data.pipeline import Examples, ViewMessages, fitting, length_report, tokenize
from unisd_jax.data.sources import Place
from unisd_jax.data.tasks import get_task
from unisd_jax.data.tasks.base import Form, Item, Task
from unisd_jax.errors import ConfigError, UserError
from unisd_jax.eval.runner import Evaluation, evaluate_examples
from unisd_jax.losses import Agreement, Objective
from unisd_jax.models import (
    HeadOptions,
    Lora,
    Model,
    ModelConfig,
    init_lora,
    load_hf,
    load_peft,
    local_checkpoint,
    merge,
    read_config,
    resolve_attention,
)
from unisd_jax.models.layout import place
from unisd_jax.optim import adamw, learning_rate_schedule
from unisd_jax.parallel import multihost
from unisd_jax.parallel.mesh import build_mesh
from unisd_jax.parallel.sharding import head_layout
from unisd_jax.preparation import require_negatives_in_data, shared_views
from unisd_jax.random import purpose_key
from unisd_jax.rollout import JaxSampler, Sampling
from unisd_jax.step import StepSettings, init_state, weights
from unisd_jax.teacher import student_messages
from unisd_jax.teacher.scoring import Budget
from unisd_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run. `base` are the weights it starts from, read from the folder `checkpoint`.

    An experiment for evaluation alone has no training examples and no buckets.

    `dropped` counts training items that were too long, `without_negative` those for which no wrong reply could be made.
    """

    config: Config
    mesh: jax.sharding.Mesh
    checkpoint: Path
    model: Model
    base: dict[str, Any]
    chat: Chat
    task: Task
    train: Examples
    buckets: Buckets
    test: Examples
    dropped: int
    without_negative: int
    sampler: JaxSampler
    sampling: Sampling
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    settings: StepSettings


def build(config: Config, *, read_only: bool = False, training: bool = True) -> Experiment:
    """Loads the data first, then the tokenizer, then the weights: what is cheap to get wrong fails first.

    What the teacher's views need and no cache has is made on the way, unless `read_only`. Without `training` only what
    evaluation reads is built.

    Raises:
      NotPrepared: `read_only`, and something is still to be made.
      UserError: data, checkpoint or mesh cannot be used; the message names the option.
    """
    task = get_task(config.data.task)
    train_items, test_items = _load_items(config, task, training)
    require_negatives_in_data(config, train_items)
    mesh = build_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    checkpoint = local_checkpoint(config.model.path)
    model_config = read_config(checkpoint)
    _check_lengths(config, model_config)
    chat = load_chat(checkpoint, stop=config.rollout.stop, head_rows=model_config.vocab_size)
    for note in chat.notes:
        print(f"note: {note}", flush=True)
    load = functools.cache(lambda: load_model(config, checkpoint, mesh))
    made = shared_views(config, task, train_items, chat, lambda: _base_sampler(*load()), read_only=read_only)
    cache = None if read_only else Path(config.teacher.cache_dir) / "tokens"
    train, dropped = _tokenize(config, chat, made.items, made.views, cache=cache)
    for line in length_report(train, dropped):
        print(f"training items, {line}", flush=True)
    # A test item that does not fit would change what is measured: never dropped.
    questions = [ViewMessages(student_messages(item.prompt, item.earlier)) for item in test_items]
    test, _ = _tokenize(config, chat, test_items, questions, overlong="error")
    model, base = load()
    schedule = learning_rate_schedule(
        config.optimizer.learning_rate, steps=config.train.steps, warmup_ratio=config.optimizer.warmup_ratio,
        schedule=config.optimizer.schedule, zero_first_rate=config.optimizer.zero_first_rate,
    )  # fmt: skip
    rollout = config.rollout
    return Experiment(
        config=config,
        mesh=mesh,
        checkpoint=checkpoint,
        model=model,
        base=base,
        chat=chat,
        task=task,
        train=train,
        buckets=length_buckets(train, number=config.data.length_buckets, multiple=config.data.length_multiple),
        test=test,
        dropped=dropped.total(),
        without_negative=made.without_negative,
        sampler=JaxSampler(model),
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


def load_model(config: Config, checkpoint: Path, mesh: jax.sharding.Mesh) -> tuple[Model, dict[str, Any]]:
    """The checkpoint's model, set up as the configuration asks for, and its weights on the mesh."""
    model, params = load_hf(checkpoint, dtype=jnp.dtype(config.model.dtype), mesh=mesh)
    return configured_model(model, config, mesh, backend=jax.default_backend()), params


def configured_model(model: Model, config: Config, mesh: jax.sharding.Mesh, *, backend: str) -> Model:
    """`model` with the attention, the recomputation, the head and the mesh that the configuration asks for.

    Raises:
      ConfigError: an implementation is asked for that the backend or the mesh cannot run.
    """
    capability = float(getattr(mesh.devices.flat[0], "compute_capability", 9.0))
    attention = resolve_attention(
        config.model.attention, backend=backend, dtype=jnp.dtype(config.model.dtype),
        head_dim=model.config.head_dim, capability=capability,
    )  # fmt: skip
    scoring = head_options(config, mesh, backend=backend)._replace(vocab_size=model.head_options.vocab_size)
    used = mesh if mesh.size > 1 else None
    return dataclasses.replace(model, head_options=scoring, remat=config.train.remat, attention=attention, mesh=used)


def head_options(config: Config, mesh: jax.sharding.Mesh, *, backend: str) -> HeadOptions:
    """How the fused kernels run.

    Raises:
      ConfigError: a Pallas kernel is asked for that this machine or this mesh cannot run.
    """
    options = config.head
    needed = {"pallas_gpu": "gpu", "pallas_triton": "gpu", "pallas_tpu": "tpu"}.get(options.implementation, backend)
    if needed != backend:
        raise ConfigError(f"head.implementation is {options.implementation}, which needs a {needed}; found a {backend}")
    divided = config.mesh.tensor * config.mesh.fsdp > 1
    if options.implementation.startswith("pallas") and (options.vocab_block or divided):
        raise ConfigError(
            f"head.implementation is {options.implementation}, which scores whole rows of the vocabulary; "
            "it needs head.vocab_block null, mesh.fsdp 1 and mesh.tensor 1"
        )
    return HeadOptions(options.implementation, options.chunk_size, options.vocab_block, head_layout(mesh))


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


def evaluate_test(experiment: Experiment, params: dict[str, Any], version: int) -> Evaluation:
    """The test items, answered greedily without a demonstration.

    Raises:
      UserError: a mean is not finite: the weights are unusable.
    """
    options = experiment.config.evaluation
    evaluation = evaluate_examples(
        experiment.sampler, experiment.model, params, experiment.test, experiment.chat, experiment.task,
        version=version, max_completion_length=options.max_completion_length, batch_size=options.batch_size,
        length_multiple=experiment.config.data.length_multiple,
    )  # fmt: skip
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


def _load_items(config: Config, task: Task, training: bool) -> tuple[list[Item], list[Item]]:
    """Training items, none of which a test item asks too, and test items; says where they are from."""
    found = {}
    for side in ("train", "test") if training else ("test",):
        options = config.data
        place = Place(options.source, _path(options.path), _path(getattr(options, f"{side}_path")), options.revision)
        found[side] = load_items(
            task, side, place=place, split=getattr(options, f"{side}_split"),
            form=Form(**dataclasses.asdict(options.form)), limit=getattr(options, f"{side}_limit"),
        )  # fmt: skip
        if multihost.is_main():
            print(found[side].note, flush=True)
    if not training:
        return [], found["test"].items
    train, shared = without_test_questions(found["train"].items, found["test"].items)
    if shared:
        print(f"{shared} training items left out: test items ask the same questions", flush=True)
    if not train:
        raise UserError(
            "every training item asks what a test item asks: set data.train_split and data.test_split, or the paths, "
            "to different rows"
        )
    return train, found["test"].items


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _base_sampler(model: Model, base: dict[str, Any]) -> JaxSampler:
    sampler = JaxSampler(model)
    sampler.publish(base, 0)
    return sampler


def _tokenize(
    config: Config,
    chat: Chat,
    items: list[Item],
    views: list[ViewMessages],
    *,
    cache: Path | None = None,
    overlong: str | None = None,
) -> tuple[Examples, Counter[str]]:
    """The items that are short enough as token ids, which all processes make together; how many are not, by reason."""
    examples = tokenize(
        items, views, chat, cache=cache, share=multihost.own_share(),
        wait=lambda: multihost.wait_for_all("the token ids"),
    )  # fmt: skip
    reads_gold = config.rollout.source == "gold" or config.rollout.on_policy_share < 1
    return fitting(
        examples,
        max_prompt_length=config.data.max_prompt_length,
        max_gold_length=config.rollout.max_completion_length if reads_gold else None,
        overlong=overlong or config.data.overlong,
    )


def _check_lengths(config: Config, model: ModelConfig) -> None:
    completion = max(config.rollout.max_completion_length, config.evaluation.max_completion_length)
    needed = config.data.max_prompt_length + completion
    if needed > model.max_position:
        raise UserError(
            f"data.max_prompt_length + max_completion_length is {needed} tokens, the model reads at most "
            f"{model.max_position} (dynamic rope scaling goes further, but not with a cache of keys); lower one of them"
        )
