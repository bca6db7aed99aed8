"""The run directory: what is written there at the start and at the end, and reading it back."""

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import yaml

from unisd_jax import config as configuration
from unisd_jax.config import Config
from unisd_jax.data.chat import Chat, load_chat
from unisd_jax.errors import ConfigError, UserError
from unisd_jax.eval.runner import Evaluation
from unisd_jax.eval.summary import gain, item_scores
from unisd_jax.experiment import Experiment
from unisd_jax.io import try_lock, write_text_atomic
from unisd_jax.metrics import METRICS_FILE, read_metrics
from unisd_jax.models import Model, load_hf
from unisd_jax.parallel import multihost
from unisd_jax.provenance import environment

NO_LOCKS = errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS  # what a file system says that has none


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run came to; `before`, `after` and `gain` are fractions of exact match (None without evaluation)."""

    run_dir: Path
    before: float | None
    after: float | None
    gain: float | None
    gain_interval: tuple[float, float] | None
    details: dict[str, Any]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The metrics of every step, as docs/metrics.md lists them."""
        return read_metrics(self.run_dir / METRICS_FILE)

    def load(self, *, dtype: Any = jnp.float32) -> tuple[Model, dict[str, Any], Chat]:
        """The trained network, its weights, and the chat format and tokenizer that go with them."""
        model, params = load_hf(self.run_dir / "hf", dtype=dtype)
        return model, params, load_chat(self.run_dir / "hf", head_rows=model.config.vocab_size)


def open_run_dir(config: Config) -> Path:
    """`output_dir/name`, if a run of `config` can start or continue there; nothing is written yet.

    Raises:
      ConfigError: the directory cannot be written, holds something else, or belongs to a run with other numbers; then
        the message lists the options that differ.
    """
    run_dir = Path(config.output_dir) / config.name
    path = run_dir / "config.yaml"
    _check_usable(run_dir)
    if path.exists():
        try:
            earlier = yaml.safe_load(path.read_text())
            lines = configuration.defining_difference(earlier, configuration.to_dict(config))
        except (yaml.YAMLError, AttributeError):
            raise ConfigError(f"{path} is not a resolved configuration; choose another name or output_dir") from None
        if lines:
            raise ConfigError(
                f"{run_dir} holds a run with other options ({'; '.join(lines)}); choose another name or output_dir"
            )
    return run_dir


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keeps a run directory to this run: started a second time, it would write the same files. All processes call it.

    Raises:
      UserError: a process that lives has it.
    """
    lock, is_free = None, True
    if multihost.is_main():
        try:
            lock = try_lock(run_dir / ".lock")
            is_free = lock is not None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
    try:
        if any(multihost.largest(int(not is_free))):
            raise UserError(
                f"{run_dir}: another process is at this run; end that one first, or choose another name or output_dir"
            )
        yield
    finally:
        if lock is not None:
            os.close(lock)


def write_config(run_dir: Path, config: Config) -> None:
    """The resolved configuration, itself a file for `--config`: from here on the directory belongs to this run."""
    write_text_atomic(run_dir / "config.yaml", configuration.to_yaml(config))


def write_samples(run_dir: Path, experiment: Experiment, before: Evaluation | None, after: Evaluation | None) -> None:
    """The first test items with their replies before and after, as JSON lines."""
    if before is None or after is None:
        return
    lines = []
    for index, example in enumerate(experiment.test[: experiment.config.logging.samples]):
        sample = {
            "id": example.item.id,
            "prompt": example.item.prompt,
            "gold": example.item.completion,
            "before": before.replies[index],
            "after": after.replies[index],
            "exact_before": before.grades[index]["exact"],
            "exact_after": after.grades[index]["exact"],
        }
        lines.append(json.dumps(sample, ensure_ascii=False))
    write_text_atomic(run_dir / "samples.jsonl", "".join(line + "\n" for line in lines))


def summary(
    experiment: Experiment,
    before: Evaluation | None,
    after: Evaluation | None,
    drift: float | None,
    seconds: dict[str, float],
    resources: dict[str, Any],
) -> dict[str, Any]:
    """The contents of result.json."""
    config = experiment.config
    result = {
        "name": config.name,
        "mode": config.mode,
        "model": config.model.path,
        "seed": config.seed,
        "steps": config.train.steps,
        "items": len(experiment.test),
        "config_hash": configuration.config_hash(config),
        "before": None,
        "after": None,
        "gain": None,
        "gain_interval": None,
        "drift": drift,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "peak_memory_gib": resources["peak_memory_gib"],
        "resources": resources,
    } | environment()
    if before is not None and after is not None:
        found = changes(before, after, seed=config.seed)
        result |= {
            "before": before.means["exact"],
            "after": after.means["exact"],
            "gain": found["exact"]["mean"],
            "gain_interval": [found["exact"]["low"], found["exact"]["high"]],
            "changes": found,
            "before_metrics": before.means,
            "after_metrics": after.means,
        }
    return result


def changes(before: Evaluation, after: Evaluation, *, seed: int) -> dict[str, dict[str, Any]]:
    """after − before of every grade that is a number, over the same items, with its 95% interval."""
    old, new = (item_scores(evaluation.grades, 1) for evaluation in (before, after))
    return {name: gain(old[name], new[name], seed=seed) for name in old}


def read_result(run_dir: Path) -> RunResult:
    """The result of a complete run."""
    details = json.loads((run_dir / "result.json").read_text())
    interval = details["gain_interval"]
    return RunResult(
        run_dir,
        details["before"],
        details["after"],
        details["gain"],
        tuple(interval) if interval else None,
        details,
    )


def require_writable(folder: Path) -> None:
    """Refuses a folder below `output_dir` that could not be made or written.

    Raises:
      ConfigError: the nearest one that is there is no directory, or is not writable.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        found = "is not writable" if existing.is_dir() else "is not a directory"
        raise ConfigError(f"output_dir: {existing} {found}; choose another output_dir or name")


def _check_usable(run_dir: Path) -> None:
    require_writable(run_dir)
    if run_dir.is_dir() and not (run_dir / "config.yaml").exists():
        # `unisd_jax.evaluate` may have been here before the training.
        foreign = sorted(path.name for path in run_dir.iterdir() if path.name != "evaluation" and path.name[0] != ".")
        if foreign:
            raise ConfigError(
                f"{run_dir} holds {foreign[0]} but no config.yaml: it is not a run directory; "
                "choose another name or output_dir"
            )


def print_result(result: RunResult) -> None:
    """The few lines a user waits for."""
    print(f"\nreport: {result.run_dir / 'report.md'}")
    print(f"trained model (Hugging Face format): {result.run_dir / 'hf'}")
    if result.gain is not None and result.gain_interval is not None:
        low, high = result.gain_interval
        print(
            f"exact match on {result.details['items']} test items: {result.before:.1%} -> {result.after:.1%}, "
            f"gain {100 * result.gain:+.1f} points (95% interval {100 * low:+.1f} to {100 * high:+.1f})"
        )
