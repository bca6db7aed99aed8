"""The command line of run_experiments.py: read once, so that it does not matter where an option stands."""

import argparse
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unisd_jax.errors import ConfigError, OneLineParser
from unisd_jax.experiments.plan import Request
from unisd_jax.experiments.recipes import EXPERIMENTS, GAMMAS, VIEWS

# Options that a list of ours stands for, and options that are ours to set.
LISTED = {"model.path": "models", "data.task": "tasks", "seed": "seeds"}
OURS = {
    "mode": "the experiment's name",
    "name": "nothing: runs are named by what they are",
    "output_dir": "--output-dir",
}
OVERRIDE = re.compile(r"--([a-z_0-9]+(?:\.[a-z_0-9]+)+|parity|seed|mode|name|output_dir)(=.*)?", re.DOTALL)
DESCRIPTION = """Runs experiments: all trainings, evaluations and caches that they take, on the devices that there are.
docs/experiments.md explains it."""


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    request: Request
    devices: str | None
    memory_gib: float | None
    dry_run: bool
    cluster: Path | None


class _Once(argparse.Action):
    """An option with one value: of two, one would be forgotten without a word."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(self, "given", values) != values:
            parser.error(f"{option_string} is given twice; leave one of them out")
        self.given = values
        setattr(namespace, self.dest, values)


def parse(argv: Sequence[str]) -> Asked:
    """Reads the words after the program's name; `--help` prints the usage and exits.

    Raises:
      ConfigError: a word that is not understood, or options that contradict each other.
    """
    overrides = [word for word in argv if OVERRIDE.fullmatch(word)]
    given = _parser().parse_intermixed_args([word for word in argv if not OVERRIDE.fullmatch(word)])
    overrides += [f"--preset={given.preset}"] if given.preset else []
    lists = {name: getattr(given, name) for name in ("models", "tasks", "seeds")}
    kept = _checked_overrides(overrides, lists)
    names = EXPERIMENTS if "all" in given.experiments else tuple(dict.fromkeys(given.experiments))
    for name in given.bases:
        if not Path(name).is_file():
            raise ConfigError(f"--config {name} is not a file; expected what all runs have in common, as YAML")
    swept = [f"--{name}" for name in ("views", "gammas") if getattr(given, name) is not None]
    if swept and "sensitivity" not in names:
        raise ConfigError(f"{swept[0]} is for the experiment sensitivity, which is not among {', '.join(names)}")
    if given.cluster and (given.devices is not None or given.memory_gib is not None):
        raise ConfigError("--devices and --memory-gib are for this machine; with --cluster give submit.sh sbatch's own")
    if given.memory_gib is not None and not given.memory_gib > 0:
        raise ConfigError(f"--memory-gib is {given.memory_gib}, expected the GiB that one job takes, above 0")
    cluster = None
    if given.cluster:
        if given.cluster[0] != "slurm":
            raise ConfigError(f"--cluster {given.cluster[0]}: expected slurm DIR; others can read its jobs.json")
        cluster = Path(given.cluster[1])
    request = Request(
        experiments=names, output_dir=given.output_dir, bases=tuple(given.bases), overrides=tuple(kept),
        views=given.views or VIEWS, gammas=given.gammas or GAMMAS, evaluate=given.evaluate, **lists,
    )  # fmt: skip
    return Asked(request, given.devices, given.memory_gib, given.dry_run, cluster)


def _checked_overrides(overrides: Sequence[str], lists: dict[str, tuple]) -> list[str]:
    """The overrides of a configuration, each once.

    Raises:
      ConfigError: one without a value, two values for one option, or an option that is given otherwise.
    """
    values: dict[str, str] = {}
    for word in overrides:
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            raise ConfigError(f"--{name} needs its value after an equals sign: --{name}=VALUE")
        if name in OURS:
            raise ConfigError(f"--{name} is set for every run; use {OURS[name]}")
        if name in LISTED and lists[LISTED[name]]:
            raise ConfigError(f"--{LISTED[name]} and --{name} are both given; leave one of them out")
        if values.setdefault(name, value) != value:
            raise ConfigError(f"--{name} is given twice, as {values[name]} and as {value}; leave one of them out")
    return [f"--{name}={value}" for name, value in values.items()]


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python scripts/run_experiments.py",
        usage="%(prog)s EXPERIMENT [EXPERIMENT ...] [options] [--section.option=value ...]\n"
        "       %(prog)s run-job JOBS.json INDEX",
        description=DESCRIPTION,
        allow_abbrev=False,
    )
    add, once = parser.add_argument, functools.partial(parser.add_argument, action=_Once)
    known = [*EXPERIMENTS, "all"]
    add("experiments", nargs="+", choices=known, metavar="EXPERIMENT", help=", ".join(known))
    once("--models", type=_list_of(str), default=(), help="folders or hub ids: a,b; else the configuration's")
    once("--tasks", type=_list_of(str), default=(), help="as data.task: a,b; else the configuration's")
    once("--seeds", type=_list_of(int), default=(), help="such as 0,1,2; else the configuration's")
    once("--devices", help="0,1: GPUs; 0+1,2+3: two for each job; tpu:0,1; cpu:2: two jobs at once; else all GPUs")
    common = "what all runs have in common, beside their mode; of several, the later win"
    add("--config", dest="bases", action="append", default=[], metavar="BASE.yaml", help=common)
    once("--preset", choices=["none", "command", "launcher"], help="hyper-parameters of the paper's release")
    once("--output-dir", default="runs/experiments", help="where everything is kept (default: %(default)s)")
    once("--views", type=_list_of(int), help="K of sensitivity (default: 3,4,5,6,7)")
    once("--gammas", type=_list_of(float), help="gamma of sensitivity (default: 0.01,0.1,1)")
    add("--evaluate", action=argparse.BooleanOptionalAction, default=True, help="measure what was trained")
    once("--memory-gib", type=float, help="memory of one job on a CPU (default: measured on earlier ones)")
    add("--dry-run", action="store_true", help="print every job and run nothing")
    once("--cluster", nargs=2, metavar=("slurm", "DIR"), help="write SLURM scripts and a list of jobs; run nothing")
    return parser


def _list_of(kind: type) -> Callable[[str], tuple[Any, ...]]:
    def read(text: str) -> tuple[Any, ...]:
        words = text.split(",")
        try:
            if not all(word.strip() for word in words):
                raise ValueError
            found = tuple(kind(word.strip()) for word in words)
        except ValueError:
            wanted = {int: "whole numbers", float: "numbers"}.get(kind, "names")
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {wanted} such as a,b") from None
        return tuple(dict.fromkeys(found))

    return read
