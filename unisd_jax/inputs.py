"""What a run reads before its first step: items, tokenizer, mesh, weights."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from unisd_jax.config import Config
from unisd_jax.data.chat import Chat, load_chat
from unisd_jax.data.loading import load_items, without_test_questions
from unisd_jax.data.pipeline import Examples, ViewMessages, fitting, tokenize
from unisd_jax.data.sources import Place
from unisd_jax.data.tasks import get_task
from unisd_jax.data.tasks.base import Item, Task
from unisd_jax.errors import ConfigError, UserError
from unisd_jax.models import HeadOptions, Model, ModelConfig, load_hf, local_checkpoint, read_config, resolve_attention
from unisd_jax.parallel import multihost
from unisd_jax.parallel.mesh import build_mesh
from unisd_jax.parallel.sharding import head_layout
from unisd_jax.preparation import require_negatives_in_data
from unisd_jax.rollout import JaxSampler


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run reads. `weights()` loads the model, once; `sampler()` is one that has its weights as version 0."""

    config: Config
    task: Task
    train: list[Item]
    test: list[Item]
    mesh: jax.sharding.Mesh
    checkpoint: Path
    chat: Chat
    weights: Callable[[], tuple[Model, dict[str, Any]]]

    def sampler(self) -> JaxSampler:
        """A sampler of the initial weights."""
        model, base = self.weights()
        sampler = JaxSampler(model)
        sampler.publish(base, 0)
        return sampler


def read_inputs(config: Config, *, training: bool = True) -> Inputs:
    """Reads the data first, then the tokenizer: what is cheap to get wrong fails first. The weights wait.

    Without `training` there are no training items.

    Raises:
      UserError: data, checkpoint or mesh cannot be used; the message names the option.
    """
    task = get_task(config.data.task)
    train, test = _load_items(config, task, training)
    require_negatives_in_data(config, train)
    mesh = build_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    checkpoint = local_checkpoint(config.model.path)
    model_config = read_config(checkpoint)
    _check_lengths(config, model_config, training)
    chat = load_chat(checkpoint, stop=config.rollout.stop, head_rows=model_config.vocab_size)
    for note in chat.notes:
        print(f"note: {note}", flush=True)
    weights = functools.cache(lambda: load_model(config, checkpoint, mesh))
    return Inputs(config, task, train, test, mesh, checkpoint, chat, weights)


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


def tokenized(
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


def _load_items(config: Config, task: Task, training: bool) -> tuple[list[Item], list[Item]]:
    """Training items, none of which a test item asks too, and test items; says where they are from."""
    found = {}
    for side in ("train", "test") if training else ("test",):
        options = config.data
        place = Place(options.source, _path(options.path), _path(getattr(options, f"{side}_path")), options.revision)
        found[side] = load_items(
            task, side, place=place, split=getattr(options, f"{side}_split"),
            form=options.form, limit=getattr(options, f"{side}_limit"),
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


def _check_lengths(config: Config, model: ModelConfig, training: bool) -> None:
    sampled = config.rollout.max_completion_length if training else 0
    completion = max(sampled, config.evaluation.max_completion_length)
    needed = config.data.max_prompt_length + completion
    if needed > model.max_position:
        raise UserError(
            f"data.max_prompt_length + max_completion_length is {needed} tokens, the model reads at most "
            f"{model.max_position} (dynamic rope scaling goes further, but not with a cache of keys); lower one of them"
        )
