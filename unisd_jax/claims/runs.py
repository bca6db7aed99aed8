"""What is trained for the claims: methods, on variants of the data, with several seeds; and what came of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from unisd_jax.claims.variants import CLEAN, FREE, NOISY, WRONG, Variant
from unisd_jax.config import Config, load_config
from unisd_jax.results import RunResult, read_result


class Method(NamedTuple):
    """A mode's file, and options over it."""

    mode: str
    options: tuple[str, ...] = ()


class Run(NamedTuple):
    """One training."""

    variant: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """What is printed of it."""
        return f"{self.variant}, {self.method}, seed {self.seed}"


class Settings(NamedTuple):
    """What all runs have in common: files, the model, budget, and options that come last."""

    out: Path
    config: Path
    modes: Path
    model: str
    seeds: tuple[int, ...]
    options: tuple[str, ...] = ()


_EVERY_STEP = ("--checkpoint.every=1", "--checkpoint.keep=1000", "--teacher.ema_sync_steps=1")
# At the default strength of 1 the sequence weights of these short replies lie between 0.89 and 1.
_SEQUENCE = ("--objective.agreement.gamma_agreement=50",)
_STAR = (
    "--objective.agreement.level=sequence",
    "--teacher.ema_sync_steps=1",
    "--teacher.contexts.method=random",
    *_SEQUENCE,
)
# In the release's arithmetic every completion is divided by its own weight, and the EMA leaves the adapters out.
_CANCELLED = ("--mode=custom", "--objective.normalize=upstream")

METHODS: dict[str, Method] = {
    "sft": Method("sft"),
    "plain": Method("plain"),
    "ema": Method("ema", (*_EVERY_STEP, "--teacher.ema_decay=0.9")),
    "live teacher": Method("ema", (*_EVERY_STEP, "--teacher.ema_decay=0.0")),
    "match_joint": Method("match_joint"),
    "match_repr": Method("match_repr"),
    "clip": Method("clip", ("--objective.clip.token_clip=2.0",)),
    "agreement_tok": Method("agreement_tok_random"),
    "agreement_seq": Method("agreement_seq_random", _SEQUENCE),
    "unisd_star": Method("unisd_star", _STAR),
    "unisd_star, weights cancelled": Method("unisd_star", (*_STAR, *_CANCELLED)),
    "unisd_star, released": Method("unisd_star", (*_STAR, *_CANCELLED, "--teacher.ema_adapters=false")),
}
# Only timed.
MORE_VIEWS = "agreement_tok, K = 6"
TIMED: dict[str, Method] = {
    name: METHODS[name]._replace(options=tuple(word for word in METHODS[name].options if word not in _EVERY_STEP[:2]))
    for name in ("sft", "plain", "ema", "clip", "match_repr", "match_joint", "agreement_tok", "unisd_star")
} | {MORE_VIEWS: Method("agreement_tok_random", ("--teacher.contexts.num_auxiliary_contexts=6",))}
TRAINED: dict[str, tuple[str, ...]] = {
    CLEAN: tuple(METHODS),
    WRONG: ("sft", "plain", "agreement_tok", "agreement_seq"),
    NOISY: ("agreement_tok", "agreement_seq"),
    FREE: ("sft", "plain"),
}


def planned(seeds: Sequence[int]) -> list[Run]:
    """All runs, seed after seed, so that what is there when time runs out is of whole seeds."""
    return [Run(variant, method, seed) for seed in seeds for variant in TRAINED for method in TRAINED[variant]]


def configuration(run: Run, variants: dict[str, Variant], settings: Settings) -> Config:
    """The configuration of a run."""
    method = METHODS[run.method]
    own = [f"--name={_word(run.method)}-s{run.seed}", f"--output_dir={settings.out / _word(run.variant)}"]
    return composed(settings, method.mode, run.seed, [*method.options, *variants[run.variant].options, *own])


def composed(settings: Settings, mode: str, seed: int, options: Sequence[str], last: Sequence[str] = ()) -> Config:
    """A mode's file under what all have in common; the user's own options come after `options`, before `last`."""
    files = [settings.modes / f"{mode}.yaml", settings.config]
    own = [f"--seed={seed}", f"--model.path={settings.model}"]
    return load_config(files, [*own, *options, *settings.options, *last])


def run_dir(run: Run, settings: Settings) -> Path:
    """Where a run is."""
    return settings.out / _word(run.variant) / f"{_word(run.method)}-s{run.seed}"


def _word(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter == "_" else "-" for letter in name)


class Finished(NamedTuple):
    """What a run came to."""

    result: RunResult
    before: dict[str, Any]
    after: dict[str, Any]

    def grade(self, name: str, *, at: str = "after") -> Float[np.ndarray, " N"]:
        """A grade of every test item, before or after the training."""
        return np.array([grade[name] for grade in getattr(self, at)["grades"]], float)

    def metric(self, name: str) -> list[float]:
        """A metric of every step that has it."""
        return [record[name] for record in self.result.history if record.get(name) is not None]


def read(run: Run, settings: Settings) -> Finished:
    """What a finished run left."""
    folder = run_dir(run, settings)
    ends = [json.loads((folder / name).read_text()) if (folder / name).exists() else {} for name in _ENDS]
    return Finished(read_result(folder), *ends)


_ENDS = ("before.json", "after.json")
