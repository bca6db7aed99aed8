"""What a run is: the options, how they are read, and which combinations make sense.

`configs/base.yaml` explains every option and its unit. Relative paths in a configuration (`model.path`,
`data.train_path`, `data.test_path`, `output_dir`) are relative to the current directory, not to the file.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import draccus
import yaml

from unisd_jax.config_loading import (
    Variants,
    conform,
    deep_merge,
    flatten,
    option_table,
    parse_override,
    read_tree,
    show,
    suggestion,
    walk_options,
)
from unisd_jax.config_options import Config as Config
from unisd_jax.config_options import DistributedOptions as DistributedOptions
from unisd_jax.config_options import TrainOptions
from unisd_jax.config_options import VllmOptions as VllmOptions
from unisd_jax.config_validation import check_values, likely_mistakes
from unisd_jax.errors import ConfigError

# Options merged over a file where `parity`, `preset`, or both of two options have that value; a later one wins.
_VARIANTS = ("parity.upstream", "preset.command", "preset.launcher", "preset.launcher+mode.unisd_star")
_EPOCH = re.compile(r"(\d+) items")

VLLM_PLACES = tuple(field.name for field in fields(VllmOptions) if field.name not in ("dtype", "sync", "arguments"))
# Where a run is kept and what is said about it; these may change when a run is resumed.
_NOT_DEFINING = (
    "name",
    "output_dir",
    "preset",
    "logging",
    "checkpoint",
    "teacher.cache_dir",
    "distributed",
    "train.compilation_cache",
    "evaluation.every",
    "evaluation.every_items",
    "measure",
    "resources",
    # Of the servers, all but what they compute and what is sent to them.
    *(f"rollout.vllm.{name}" for name in VLLM_PLACES),
)


def load_config(paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file or in several, with dotted overrides such as `--train.steps=20` on top.

    A file may have a top-level key `inherit` (a path or a list of paths, relative to the file): those files
    are merged first, mappings recursively, scalars and lists replaced, later ones winning. Several files are merged
    as if a file inherited them in this order. A file's `variants` map names such as `preset.launcher` to options that
    are merged over that file where `preset` is "launcher". The value of an override is YAML. Paths inside the
    configuration stay as written: relative to the current directory. `train.steps` may be `374 items`: one pass over
    so many in whole batches.

    Raises:
      ConfigError: unreadable file, unknown option, wrong type, value out of range, switches that contradict
        the mode.
    """
    paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    files = _read(paths, (), Variants(_VARIANTS))
    tree = _merged(files, overrides)
    conform(Config, _steps_counted(tree), Config)  # an unknown name is an error of its own, before it is looked for
    if chosen := _chosen_variants(tree, files):
        variants = Variants(_VARIANTS, chosen)
        tree = _read(paths, overrides, variants)
        # A resolved configuration has all options, those of its variants among them.
        resolved = {name for name, _, _ in walk_options(Config)} <= set(flatten(tree))
        missing = sorted(name for name in set(chosen) - variants.found if "+" not in name)
        if missing and not resolved:
            named = " ".join(map(str, paths))
            raise ConfigError(
                f"{named}: neither it nor a file it inherits has variants: {missing[0]}; inherit base.yaml"
            )
    config = draccus.decode(Config, conform(Config, _steps_counted(tree), Config))
    if config.train.steps == 0 and isinstance(written := tree["train"]["steps"], str):
        raise ConfigError(
            f"train.steps is {show(written)}, less than one batch of train.batch_size ({config.train.batch_size})"
        )
    validate(config)
    return config


def _chosen_variants(tree: Mapping[str, Any], files: Mapping[str, Any]) -> list[str]:
    """Those that fit. The mode is that of the files: an ablation keeps the values of the file it starts from."""

    def holds(condition: str) -> bool:
        option, _, value = condition.partition(".")
        return (files if option == "mode" else tree).get(option) == value

    return [name for name in _VARIANTS if all(map(holds, name.split("+")))]


def _steps_counted(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tree with `train.steps: 374 items` as a number of batches, 0 where there is not one."""
    train = tree.get("train")
    steps = train.get("steps") if isinstance(train, Mapping) else None
    written = _EPOCH.fullmatch(steps) if isinstance(steps, str) else None
    if written is None:
        return tree
    batch = train.get("batch_size", TrainOptions.batch_size)
    if type(batch) is not int or batch < 1:  # what is wrong with it is said where it is checked
        batch = 1
    return {**tree, "train": {**train, "steps": int(written[1]) // batch}}


def warnings(config: Config) -> list[str]:
    """What is allowed but will hardly do what it says, in one line each."""
    return likely_mistakes(flatten(to_dict(config)))


def _read(paths: Sequence[Path], overrides: Sequence[str], variants: Variants) -> dict[str, Any]:
    done: set[Path] = set()
    tree: dict[str, Any] = {}
    for path in paths:
        if path.resolve() in done:
            raise ConfigError(
                f"the configuration file {show(str(path))} is given twice, or inherited by one before it: it would "
                "change nothing; leave it out"
            )
        tree = deep_merge(tree, read_tree(path, variants, done=done))
    return _merged(tree, overrides)


def _merged(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for text in overrides:
        tree = deep_merge(tree, parse_override(text, Config))
    return tree


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts, lists and scalars: every option, in the order of declaration."""
    return conform(Config, asdict(config), Config)


def to_yaml(config: Config) -> str:
    """YAML text that `load_config` reads back as an equal configuration."""
    # Not allow_unicode: PyYAML would fold a string with a "next line" character and lose it.
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def config_hash(config: Config) -> str:
    """12 hexadecimal digits that name the run's numbers: two runs with the same hash compute the same thing.

    The start of the SHA-256 of the sorted JSON of every option except `name`, `output_dir`, `preset`, `logging.*`,
    `checkpoint.*`, `distributed.*`, `measure.*`, `resources.*`, `evaluation.every`, `evaluation.every_items`,
    `teacher.cache_dir`, `train.compilation_cache` and `rollout.vllm.*` but its `dtype`, `sync` and `arguments`.
    """
    defining = {key: value for key, value in flatten(to_dict(config)).items() if _defines(key)}
    return hashlib.sha256(json.dumps(defining, sort_keys=True).encode()).hexdigest()[:12]


def defining_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """`difference` without the options that change no number."""
    return [line for line in difference(a, b) if _defines(line.partition(":")[0])]


def _defines(key: str) -> bool:
    """Whether the option, by its dotted name, changes the numbers of a run."""
    return not any(key == name or key.startswith(f"{name}.") for name in _NOT_DEFINING)


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Lines such as `train.steps: 10 -> 20`, one for each option in which two `to_dict` results differ."""
    old, new = flatten(a), flatten(b)
    absent = object()
    lines = []
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key, absent), new.get(key, absent)
        if before != after:
            shown = ["(absent)" if value is absent else show(value) for value in (before, after)]
            lines.append(f"{key}: {shown[0]} -> {shown[1]}")
    return lines


def validate(config: Config) -> None:
    """Checks what types cannot say: ranges, divisibility, and that the switches fit the mode.

    Raises:
      ConfigError: the first thing wrong, in one line that names the option.
    """
    check_values(flatten(to_dict(config)))


# --- The command line ---


@dataclass(frozen=True)
class CommandLine:
    """What an entry point was asked to do."""

    config: Config
    dry_run: bool
    print_config: bool


def parse_command_line(argv: Sequence[str], prog: str) -> CommandLine:
    """Reads `--config FILE ... [--a.b=c ...] [--dry-run] [--print-config]`; `--help` prints the usage and exits.

    Args:
      argv: the words after the program's name.
      prog: how the program is called, for the help text.

    Raises:
      ConfigError: any other word, no file, or a configuration that `load_config` refuses.
    """
    if "--help" in argv or "-h" in argv:
        print(_help(prog))
        raise SystemExit(0)
    paths, flags, overrides = [], set(), []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--dry-run", "--print-config"):
            if equals:
                raise ConfigError(f"{name} takes no value, found {show(word)}")
            flags.add(name)
        elif name == "--config":
            paths.append(value if equals else next(words, ""))
            if not paths[-1] or paths[-1].startswith("--"):
                raise ConfigError("--config needs a file: --config configs/quickstart.yaml")
        elif name.startswith("--") and equals:
            overrides.append(word)
        else:
            raise ConfigError(_bad_word(word))
    if not paths:
        raise ConfigError(f"--config FILE is missing; {prog} --help shows the usage")
    return CommandLine(load_config(paths, overrides), "--dry-run" in flags, "--print-config" in flags)


def _bad_word(word: str) -> str:
    known = ["--config", "--dry-run", "--print-config", "--help"]
    names = [f"--{name}" for name, _, _ in walk_options(Config)]
    if word in names:
        return f"{word} needs its value after an equals sign: {word}=VALUE"
    return f"expected --section.option=value, found {show(word)}" + suggestion(word, known + names)


def _help(prog: str) -> str:
    """The usage and every option by section, with its type and default."""
    lines = [
        f"usage: {prog} --config FILE [--config FILE ...] [--section.option=value ...] [--dry-run] [--print-config]",
        "",
        "  --config FILE             YAML configuration; configs/base.yaml explains it; of several, the later win",
        "  --section.option=value    replaces one option; the value is YAML: --model.lora.targets=[q,v]",
        "  --dry-run                 check and build everything, then stop before the first step",
        "  --print-config            print the resolved configuration and stop",
        "  --help                    this text",
        "",
        "Options with their defaults (a configuration file usually inherits others, so print it to be sure):",
    ]
    return "\n".join(lines + option_table(Config))
