"""What each experiment trains: a mode, the file that it starts from, and options on top."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unisd_jax.config import Config, to_dict
from unisd_jax.config_loading import flatten
from unisd_jax.config_modes import MODES, mechanisms

VIEWS, GAMMAS = (3, 4, 5, 6, 7), (0.01, 0.1, 1.0)

# The experiments that are a list of modes.
OF_MODES: dict[str, tuple[str, ...]] = {
    "agreement": tuple(mode for mode in MODES if mode.startswith("agreement_")),
    "induction": ("agreement_seq_induction",),
} | {
    mode: (mode,)
    for mode in (
        *("ema", "contrastive", "match_joint", "match_repr", "clip", "unisd_star"),
        *("plain", "sft", "sdft", "gkd", "opsd", "ssd"),
    )
}
EXPERIMENTS = (*OF_MODES, "ablation", "sensitivity")

# What is left of UniSD* without a mechanism: the options as where it was never switched on.
OFF: dict[str, dict[str, Any]] = {
    "ema": {"teacher.ema": False},
    "agreement": {
        "objective.agreement.level": "none",
        "objective.agreement.budget.share": 1.0,
        "teacher.contexts.num_auxiliary_contexts": 0,
        "teacher.contexts.method": "random",
    },
    "contrast": {"objective.contrast.contrastive_weight": 0.0},
    "matching": {"objective.matching.final_layer_distill_weight": 0.0},
    "clip": {"objective.clip.token_clip": None, "objective.clip.token_clip_quantile": None},
}


class Recipe(NamedTuple):
    """A run: options over the file of a mode (`start`), which make it the mode `mode`."""

    mode: str
    start: str
    options: Mapping[str, Any] = {}


def of_modes(experiment: str) -> list[Recipe]:
    """The modes of an experiment as they are."""
    return [Recipe(mode, mode) for mode in OF_MODES[experiment]]


def ablation(full: Config) -> list[Recipe]:
    """UniSD* (`full`), UniSD* without each of its mechanisms, each mechanism alone, and none of them.

    All with UniSD*'s values. One mechanism alone is a mode of its own; where the values agree with that mode's, so do
    the runs, and they are made once.
    """
    values = flatten(to_dict(full))
    parts = [name for name, on in mechanisms(values).items() if on]
    level = {"token": "tok", "sequence": "seq"}.get(values["objective.agreement.level"])
    alone = {
        "ema": "ema",
        "agreement": f"agreement_{level}_{values['teacher.contexts.method']}",
        "contrast": "contrastive",
        "matching": "match_joint",
        "clip": "clip",
    }

    def without(*names: str) -> dict[str, Any]:
        return {option: value for name in names for option, value in OFF[name].items()}

    found = [Recipe("unisd_star", "unisd_star")]
    found += [Recipe("custom", "unisd_star", without(part)) for part in parts]
    found += [
        Recipe(alone[part], "unisd_star", without(*(other for other in parts if other != part))) for part in parts
    ]
    return [*found, Recipe("plain", "unisd_star", without(*parts))]


def sensitivity(views: Sequence[int], gammas: Sequence[float]) -> list[Recipe]:
    """Both levels of the agreement with every number of views and every gamma."""
    return [
        Recipe(
            mode,
            mode,
            {
                "teacher.contexts.num_auxiliary_contexts": number,
                "objective.agreement.gamma_agreement": gamma,
            },
        )
        for mode in ("agreement_tok_retrieval", "agreement_seq_retrieval")
        for number in views
        for gamma in gammas
    ]
