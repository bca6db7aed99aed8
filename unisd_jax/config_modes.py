"""The modes: names for combinations of mechanisms, checked against the switches that a configuration sets."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from unisd_jax.config_loading import show
from unisd_jax.errors import ConfigError

# The switch of each mechanism: whether the options turn it on.
MECHANISMS = {
    "ema": lambda values: values["teacher.ema"],
    "agreement": lambda values: values["objective.agreement.level"] != "none",
    "contrast": lambda values: values["objective.contrast.contrastive_weight"] > 0,
    "matching": lambda values: values["objective.matching.final_layer_distill_weight"] > 0,
    "clip": lambda values: any(
        values[f"objective.clip.{name}"] is not None for name in ("token_clip", "token_clip_quantile")
    ),
}
# How each is switched, in the words of an error message.
SWITCHES = {
    "ema": "teacher.ema",
    "agreement": "objective.agreement.level",
    "contrast": "objective.contrast.contrastive_weight",
    "matching": "objective.matching.final_layer_distill_weight",
    "clip": "objective.clip.token_clip or objective.clip.token_clip_quantile",
}


class Mode(NamedTuple):
    """The mechanisms a mode has, those it may have, and the other options that define it."""

    mechanisms: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    options: Mapping[str, Any] = {}


_DIVERGENCE = {"objective.loss": "divergence", "rollout.source": "student"}


def _agreement(level: str, method: str) -> Mode:
    options = {"objective.agreement.level": level, "teacher.contexts.method": method}
    return Mode(("agreement",), options=_DIVERGENCE | options)


MODES = {
    "plain": Mode(options=_DIVERGENCE),
    "agreement_seq_random": _agreement("sequence", "random"),
    "agreement_seq_retrieval": _agreement("sequence", "retrieval"),
    "agreement_seq_induction": _agreement("sequence", "induction"),
    "agreement_tok_random": _agreement("token", "random"),
    "agreement_tok_retrieval": _agreement("token", "retrieval"),
    "agreement_tok_induction": _agreement("token", "induction"),
    "ema": Mode(("ema",), options=_DIVERGENCE),
    "contrastive": Mode(("contrast",), options=_DIVERGENCE),
    "match_joint": Mode(("matching",), options=_DIVERGENCE),
    "match_repr": Mode(("matching",), options=_DIVERGENCE | {"objective.loss": "none"}),
    "clip": Mode(("clip",), options=_DIVERGENCE),
    "unisd_star": Mode(("ema", "agreement", "contrast", "matching"), ("clip",), _DIVERGENCE),
    "sft": Mode(options={"objective.loss": "nll", "rollout.source": "gold"}),
    "ssd": Mode(options={"objective.loss": "nll", "rollout.source": "base"}),
    "sdft": Mode(("ema",), options=_DIVERGENCE),
    "gkd": Mode(options=_DIVERGENCE),
    "opsd": Mode(options=_DIVERGENCE),
    "custom": Mode(optional=tuple(MECHANISMS)),
}

# What `parity: upstream` stands for; the base configuration sets these, and a run that says otherwise is a mistake.
UPSTREAM = {
    "objective.normalize": "upstream",
    "teacher.ema_adapters": False,
    "teacher.ema_dtype": "bfloat16",
    "optimizer.zero_first_rate": True,
    "data.shuffle": False,
    "data.form.as_released": True,
    "data.form.hint": False,
    "teacher.contexts.as_released": True,
    "rollout.stop": "tokenizer",
}


def mechanisms(values: Mapping[str, Any]) -> dict[str, bool]:
    """Which mechanisms a configuration, given as {dotted name: value}, switches on."""
    return {name: on(values) for name, on in MECHANISMS.items()}


def check_mode(values: Mapping[str, Any]) -> None:
    """The mode only names the switches; a run whose name and switches disagree is a mistake.

    Raises:
      ConfigError: a mechanism or option that is not the mode's.
    """
    name = values["mode"]
    mode = MODES[name]
    for option, value in mode.options.items():
        if values[option] != value:
            raise ConfigError(f"mode {show(name)} needs {option}={show(value)}, found {show(values[option])}")
    for mechanism, on in mechanisms(values).items():
        if mechanism in mode.optional or on == (mechanism in mode.mechanisms):
            continue
        state, verb = ("on", "has no") if on else ("off", "needs")
        raise ConfigError(
            f"mode {show(name)} {verb} {mechanism}, and it is switched {state} ({SWITCHES[mechanism]}); "
            "change it, or set mode=custom to combine mechanisms freely"
        )
    if values["parity"] == "upstream":
        for option, value in UPSTREAM.items():
            if values[option] != value:
                raise ConfigError(f'parity "upstream" needs {option}={show(value)}, found {show(values[option])}')
