"""Which values make sense: ranges, divisibility, and switches that fit the mode."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from unisd_jax.config_loading import show, suggestion
from unisd_jax.errors import ConfigError

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

# What is expected, in words; the test for it; the options it is asked of. Null is not asked.
_RANGES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    (
        "at least 1",
        lambda x: x >= 1,
        (
            "model.lora.rank",
            "data.train_limit",
            "data.test_limit",
            "data.max_prompt_length",
            "data.length_multiple",
            "teacher.ema_sync_steps",
            "rollout.max_completion_length",
            "train.steps",
            "train.batch_size",
            "train.micro_batches",
            "mesh.data",
            "mesh.fsdp",
            "mesh.tensor",
            "evaluation.batch_size",
            "evaluation.max_completion_length",
            "checkpoint.every",
            "checkpoint.keep",
        ),
    ),
    (
        "0 or more",
        lambda x: x >= 0,
        ("rollout.top_k", "optimizer.weight_decay", "evaluation.drift_tokens", "logging.samples"),
    ),
    (
        "greater than 0",
        lambda x: x > 0,
        (
            "model.lora.alpha",
            "rollout.temperature",
            "rollout.max_sampler_gap",
            "optimizer.learning_rate",
            "optimizer.eps",
            "optimizer.max_grad_norm",
        ),
    ),
    (
        "between 0 and 1",
        lambda x: 0 <= x <= 1,
        ("teacher.ema_decay", "objective.alpha", "optimizer.warmup_ratio"),
    ),
    (
        "at least 0 and below 1",
        lambda x: 0 <= x < 1,
        ("rollout.min_p", "optimizer.b1", "optimizer.b2"),
    ),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, ("rollout.top_p",)),
    ("at least 0 and below 2**32", lambda x: 0 <= x < 2**32, ("seed",)),
    ("a non-empty string", lambda x: x.strip() != "", ("model.path", "output_dir", "logging.wandb_project")),
    (
        "a plain folder name",
        lambda x: x.strip() != "" and not x.startswith(".") and not set(x) & set("/\\\0"),
        ("name",),
    ),
)


def check_values(values: Mapping[str, Any]) -> None:
    """Checks a whole configuration, given as {dotted name: value} with every value in its declared type.

    Raises:
      ConfigError: the first thing wrong, in one line that names the option.
    """
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, found {show(value)}")
    for expected, holds, names in _RANGES:
        for name in names:
            if values[name] is not None and not holds(values[name]):
                raise ConfigError(f"{name} must be {expected}, found {show(values[name])}")
    _check_lora_targets(values["model.lora.targets"])
    _check_batch(values)
    _check_mode(values)
    for name in ("data.train_path", "data.test_path"):
        if values["data.task"] == "jsonl" and not values[name]:
            raise ConfigError(f'{name} is missing: data.task "jsonl" reads its items from that file')


def _check_lora_targets(targets: list[str]) -> None:
    known = ", ".join(LORA_TARGETS)
    if not targets:
        raise ConfigError(f"model.lora.targets must name at least one of {known}; found none")
    for target in targets:
        if target not in LORA_TARGETS:
            hint = suggestion(target, LORA_TARGETS)
            raise ConfigError(f"model.lora.targets must be among {known}; found {show(target)}{hint}")
    if len(set(targets)) < len(targets):
        raise ConfigError(f"model.lora.targets must name each projection once, found {', '.join(targets)}")


def _check_batch(values: Mapping[str, Any]) -> None:
    batch, micro_batches = values["train.batch_size"], values["train.micro_batches"]
    if batch % micro_batches:
        raise ConfigError(f"train.batch_size ({batch}) must be divisible by train.micro_batches ({micro_batches})")
    rows, shards = batch // micro_batches, values["mesh.data"] * values["mesh.fsdp"]
    if rows % shards:
        raise ConfigError(
            f"train.batch_size / train.micro_batches ({rows}) must be divisible by mesh.data * mesh.fsdp ({shards})"
        )


def _check_mode(values: Mapping[str, Any]) -> None:
    """The mode only names the two switches; a run whose name and switches disagree is a mistake."""
    mode = values["mode"]
    wanted = {"objective.loss": "nll" if mode == "sft" else "divergence", "teacher.ema": mode == "ema"}
    for name, value in wanted.items():
        if values[name] != value:
            raise ConfigError(f"mode {show(mode)} needs {name}={show(value)}, found {show(values[name])}")
    if mode == "plain" and values["teacher.condition"] == "none":
        raise ConfigError(
            'teacher.condition must be "gold" when teacher.ema is false, found "none": '
            "the teacher would equal the student at the start, and nothing would be learned"
        )
