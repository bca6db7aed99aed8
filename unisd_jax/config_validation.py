"""Which values make sense: ranges, divisibility, and switches that fit the mode."""

import math
import re
from collections.abc import Mapping
from typing import Any

from unisd_jax.config_loading import show, suggestion
from unisd_jax.config_modes import SWITCHES, check_mode, mechanisms
from unisd_jax.config_ranges import RANGES
from unisd_jax.errors import ConfigError

ADDRESS = re.compile(r"https?://[^/:\s]+:\d{1,5}")
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def check_values(values: Mapping[str, Any]) -> None:
    """Checks a whole configuration, given as {dotted name: value} with every value in its declared type.

    Raises:
      ConfigError: the first thing wrong, in one line that names the option.
    """
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, found {show(value)}")
    for expected, holds, names in RANGES:
        for name in names:
            if values[name] is not None and not holds(values[name]):
                raise ConfigError(f"{name} must be {expected}, found {show(values[name])}")
    _check_lora_targets(values["model.lora.targets"])
    _check_start(values)
    _check_batch(values)
    check_mode(values)
    _check_clip_and_tokens(values)
    _check_views(values)
    _check_losses(values)
    _check_rollout(values)
    _check_evaluation(values)


def _check_start(values: Mapping[str, Any]) -> None:
    start, trainable = values["model.lora.start"], values["model.trainable"]
    if start is not None and trainable != "lora":
        raise ConfigError(f"model.lora.start is an adapter, but model.trainable is {show(trainable)}; expected lora")


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


def _check_clip_and_tokens(values: Mapping[str, Any]) -> None:
    ceiling, quantile = (values[f"objective.clip.{name}"] for name in ("token_clip", "token_clip_quantile"))
    if ceiling is not None and quantile is not None:
        raise ConfigError(
            f"objective.clip.token_clip ({ceiling}) and objective.clip.token_clip_quantile ({quantile}) are both set; "
            "set one of them to null"
        )
    skip, length = values["objective.num_loss_tokens_to_skip"], values["rollout.max_completion_length"]
    if skip >= length:
        raise ConfigError(
            f"objective.num_loss_tokens_to_skip ({skip}) must be below rollout.max_completion_length ({length}), "
            "or no token is left for the loss"
        )


def _check_views(values: Mapping[str, Any]) -> None:
    """Auxiliary views are there exactly when the agreement needs them."""
    views, per_pass = values["teacher.contexts.num_auxiliary_contexts"], values["objective.agreement.views_per_pass"]
    if not mechanisms(values)["agreement"]:
        if views:
            raise ConfigError(
                f"teacher.contexts.num_auxiliary_contexts is {views}, but objective.agreement.level is none: "
                "nothing would read these views; set it to 0"
            )
        if values["objective.agreement.budget.share"] < 1:
            raise ConfigError("objective.agreement.budget.share is below 1, but objective.agreement.level is none")
        return
    if views == 0:
        raise ConfigError(
            "teacher.contexts.num_auxiliary_contexts is 0: agreement compares auxiliary views, at least 2 of them; "
            "set it, or objective.agreement.level=none"
        )
    if views % per_pass:
        raise ConfigError(
            f"objective.agreement.views_per_pass ({per_pass}) must divide "
            f"teacher.contexts.num_auxiliary_contexts ({views})"
        )
    _check_budget(values, views)


def _check_budget(values: Mapping[str, Any], views: int) -> None:
    budget = {name: values[f"objective.agreement.budget.{name}"] for name in ("share", "unit", "signal")}
    if budget["share"] == 1:
        return
    if budget["unit"] == "token" and values["objective.agreement.level"] == "sequence":
        raise ConfigError(
            'objective.agreement.budget.unit "token" needs objective.agreement.level=token, found "sequence": '
            "a completion's mean needs all of its tokens"
        )
    if budget["signal"] == "spread" and views < 3:
        raise ConfigError(
            f'objective.agreement.budget.signal "spread" scores two views everywhere and saves the others: it needs '
            f"teacher.contexts.num_auxiliary_contexts of at least 3, found {views}"
        )


def _check_losses(values: Mapping[str, Any]) -> None:
    """Every switch has something to act on."""
    on, loss, source = mechanisms(values), values["objective.loss"], values["rollout.source"]
    for mechanism, needs in (
        ("agreement", ("divergence",)),
        ("clip", ("divergence",)),
        ("ema", ("divergence", "none")),
    ):
        if on[mechanism] and loss not in needs:
            raise ConfigError(
                f"objective.loss is {show(loss)}, which has no use for {mechanism} ({SWITCHES[mechanism]})"
            )
    if loss == "nll" and values["teacher.condition"] == "self":
        raise ConfigError("objective.loss=nll has no teacher that teacher.condition=self could be shown to")
    for name, neutral in (("alpha", 0), ("top_entropy_quantile", 1), ("importance.level", "none")):
        unread = loss == "none" or (loss == "nll" and name == "alpha")
        if unread and values[f"objective.{name}"] != neutral:
            raise ConfigError(
                f"objective.{name} acts on the divergence, but objective.loss is {show(loss)}; "
                f"set it to {show(neutral)}"
            )
    if loss == "nll" and (on["contrast"] or on["matching"]):
        raise ConfigError("objective.loss=nll has no teacher: switch contrast and matching off")
    if loss == "nll" and source == "student":
        raise ConfigError(
            "objective.loss=nll raises the likelihood of given completions: it needs rollout.source=gold or base, "
            'found "student"'
        )
    if loss == "none" and not (on["contrast"] or on["matching"]):
        raise ConfigError("objective.loss=none leaves nothing to train on: switch contrast or matching on")
    if values["objective.entry_ceiling"] is not None and loss != "divergence":
        raise ConfigError(f"objective.entry_ceiling caps the divergence, but objective.loss is {show(loss)}")
    share = values["rollout.on_policy_share"]
    if share < 1 and source != "student":
        raise ConfigError(f"rollout.on_policy_share is {share}, but rollout.source is {show(source)}; expected student")
    if values["objective.importance.level"] != "none" and (source != "student" or share < 1):
        raise ConfigError("objective.importance compares student and sampler: it needs rollout.source=student always")
    if loss != "nll" and values["teacher.condition"] == "none" and not on["contrast"]:
        raise ConfigError(
            'teacher.condition is "none" and there is no contrast: '
            "the teacher would equal the student at the start, and nothing would be learned"
        )


def _check_rollout(values: Mapping[str, Any]) -> None:
    staleness, source = values["rollout.staleness"], values["rollout.source"]
    if staleness and (source != "student" or values["rollout.on_policy_share"] < 1):
        raise ConfigError(
            f"rollout.staleness is {staleness}: completions are sampled ahead from the student, it needs "
            "rollout.source=student always"
        )
    if staleness and values["objective.importance.level"] == "none":
        raise ConfigError(
            f"rollout.staleness is {staleness}: completions of older weights need importance weights; set "
            "objective.importance.level=token or sequence"
        )
    for address in values["rollout.vllm.addresses"]:
        if not ADDRESS.fullmatch(address):
            raise ConfigError(f"rollout.vllm.addresses must be like http://10.0.0.7:8000, found {show(address)}")
    if values["rollout.vllm.sync"] == "adapter" and values["model.trainable"] != "lora":
        raise ConfigError("rollout.vllm.sync=adapter sends an adapter: it needs model.trainable=lora")


def _check_evaluation(values: Mapping[str, Any]) -> None:
    every, samples = values["evaluation.every"], values["measure.samples"]
    if every and not values["evaluation.enabled"]:
        raise ConfigError(f"evaluation.every is {every}, but evaluation.enabled is false: set one of them otherwise")
    if values["measure.temperature"] > 0:
        return
    if samples > 1:
        raise ConfigError(
            f"measure.samples is {samples}, but measure.temperature is 0: all greedy replies to an item are the same; "
            "set a temperature, such as 0.7"
        )
    for name, off in (("top_p", 1), ("top_k", 0), ("min_p", 0)):
        if values[f"measure.{name}"] != off:
            raise ConfigError(
                f"measure.{name} narrows what is sampled, but measure.temperature is 0; set a temperature"
            )


def likely_mistakes(values: Mapping[str, Any]) -> list[str]:
    """Settings that are allowed but will hardly do what they say, one line each."""
    on, found, alpha = mechanisms(values), [], values["objective.alpha"]
    ceiling = values["objective.clip.token_clip"]
    if ceiling is not None and 0 < alpha < 1:
        bound = -alpha * math.log(alpha) - (1 - alpha) * math.log1p(-alpha)
        if ceiling >= bound:
            found.append(
                f"objective.clip.token_clip is {ceiling}, and the JSD at objective.alpha={alpha} is at most "
                f"{bound:.3f} nats: it will never clip; lower it, or use a KL (alpha 0 or 1)"
            )
    if on["agreement"] and values["objective.agreement.gamma_agreement"] == 0:
        found.append("objective.agreement.gamma_agreement is 0: all agreement weights will be 1")
    if on["agreement"] and values["teacher.contexts.num_auxiliary_contexts"] == 1:
        found.append("teacher.contexts.num_auxiliary_contexts is 1: one view agrees with itself, all weights will be 1")
    if values["objective.agreement.level"] == "sequence" and values["objective.normalize"] == "upstream":
        found.append(
            "objective.normalize=upstream divides each completion by its own weights: sequence-level agreement cancels"
        )
    if on["ema"] and values["teacher.ema_sync_steps"] > values["train.steps"]:
        found.append(
            f"teacher.ema_sync_steps is {values['teacher.ema_sync_steps']}, more than train.steps "
            f"({values['train.steps']}): the teacher never moves"
        )
    if on["ema"] and values["teacher.ema_decay"] == 1:
        found.append("teacher.ema_decay is 1: the teacher never moves")
    if on["ema"] and not values["teacher.ema_adapters"] and values["model.trainable"] == "lora":
        found.append("teacher.ema_adapters is false: under LoRA the EMA teacher never moves, as in the release")
    return found
