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
    """A mode's file, and options over it; `steps` where they are not those of all runs, `evaluated` at both ends."""

    mode: str
    options: tuple[str, ...] = ()
    steps: int | None = None
    evaluated: bool = True


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
# Sequence weights and an EMA of the adapters are what the release's arithmetic cancels and leaves out.
_STAR = (
    "--objective.agreement.level=sequence",
    "--teacher.ema_sync_steps=1",
    "--teacher.contexts.method=random",
)
_RELEASED = ("--mode=custom", "--teacher.ema_adapters=false", "--objective.normalize=upstream")

METHODS: dict[str, Method] = {
    "sft": Method("sft"),
    "plain": Method("plain"),
    "ema": Method("ema", (*_EVERY_STEP, "--teacher.ema_decay=0.9")),
    "live teacher": Method("ema", (*_EVERY_STEP, "--teacher.ema_decay=0.0")),
    "match_joint": Method("match_joint"),
    "match_repr": Method("match_repr"),
    "clip": Method("clip", ("--objective.clip.token_clip=2.0",)),
    "agreement_tok": Method("agreement_tok_random"),
    "agreement_seq": Method("agreement_seq_random"),
    "unisd_star": Method("unisd_star", _STAR),
    "unisd_star, released": Method("unisd_star", (*_STAR, *_RELEASED)),
    "agreement_tok, K = 6": Method(
        "agreement_tok_random", ("--teacher.contexts.num_auxiliary_contexts=6",), steps=5, evaluated=False
    ),
}
TRAINED: dict[str, tuple[str, ...]] = {
    CLEAN: tuple(METHODS),
    WRONG: ("sft", "plain", "agreement_tok", "agreement_seq"),
    NOISY: ("agreement_tok", "agreement_seq"),
    FREE: ("sft", "plain"),
}


def planned(seeds: Sequence[int]) -> list[Run]:
    """All runs, seed after seed, so that what is there when time runs out is of whole seeds."""
    return [
        Run(variant, method, seed)
        for seed in seeds
        for variant in TRAINED
        for method in TRAINED[variant]
        if METHODS[method].evaluated or seed == seeds[0]  # what only costs is timed once
    ]


def configuration(run: Run, variants: dict[str, Variant], settings: Settings) -> Config:
    """The configuration of a run."""
    method = METHODS[run.method]
    own = [
        f"--name={_word(run.method)}-s{run.seed}",
        f"--output_dir={settings.out / _word(run.variant)}",
        f"--seed={run.seed}",
        f"--model.path={settings.model}",
        f"--evaluation.enabled={str(method.evaluated).lower()}",
        *([] if method.steps is None else [f"--train.steps={method.steps}"]),
    ]
    files = [settings.modes / f"{method.mode}.yaml", settings.config]
    options = [*method.options, *variants[run.variant].options, *own]
    return load_config(files, [*options, *settings.options])


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

    @property
    def step_seconds(self) -> list[float]:
        """Of the steps in which nothing was compiled, without the first."""
        records = self.result.history[1:]
        return [record["seconds_step"] for record in records if record["seconds_compiling"] == 0]

    def metric(self, name: str) -> list[float]:
        """A metric of every step that has it."""
        return [record[name] for record in self.result.history if record.get(name) is not None]


def read(run: Run, settings: Settings) -> Finished | None:
    """A finished run; None if it is not."""
    folder = run_dir(run, settings)
    if not (folder / "result.json").exists():
        return None
    ends = [json.loads((folder / name).read_text()) if (folder / name).exists() else {} for name in _ENDS]
    return Finished(read_result(folder), *ends)


_ENDS = ("before.json", "after.json")
