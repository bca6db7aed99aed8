"""What the end-to-end tests write, run and ask of a run directory."""

import json
from pathlib import Path
from typing import Any, NamedTuple

# What a test adds when it is only about training.
TRAIN_ONLY = ("--evaluation.enabled=false", "--evaluation.drift_tokens=0")
# What differs between two runs of the same thing.
TIMING = {"tokens_per_second", "seconds_rollout", "seconds_update", "seconds_step", "peak_memory_gib", "seconds"}
TIMING |= {"seconds_waiting", "seconds_compiling", "programs_compiled", "seconds_evaluation", "resources"}
TIMING |= {"continued_after"}  # the checkpoint from which a run went on is whichever was there

# A task of one's own that grades the form of replies, by their characters.
TASK_WITH_FORM = """
from unisd_jax.data.tasks import Item, Task

def make(row, position, form):
    return Item(f"m{position}", row.text("prompt"), "a", "a")

def grade(text, item):
    form = float(sum(map(ord, text)) % 3 == 0)
    return {"exact": form, "form": form, "last": text[-1:] or "none"}

TASK = Task("mine", make, grade)
"""


class Outcome(NamedTuple):
    """What a command said and how it ended."""

    code: int
    out: str
    err: str


def write_items(path: Path, prefix: str, count: int, **changes: Any) -> Path:
    """`count` short items; `changes` replaces fields of all of them."""
    items = (
        {"id": f"{prefix}{index}", "prompt": f"{prefix} {index}?", "completion": f"a{index}"} | changes
        for index in range(count)
    )
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def error_line(outcome: Outcome) -> str:
    """The one line on stderr of a command that refused its input."""
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.out + outcome.err
    lines = outcome.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    return lines[0]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_result(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "result.json").read_text())


def weights(run_dir: Path) -> bytes:
    return (run_dir / "hf" / "model.safetensors").read_bytes()


def numbers(run_dir: Path) -> tuple[bytes, list[dict[str, Any]], dict[str, Any], list[dict[str, Any]]]:
    """Everything a run computed, without what a clock decides: weights, metrics, result, samples."""
    lines = [{name: value for name, value in line.items() if name not in TIMING} for line in read_metrics(run_dir)]
    result = {name: value for name, value in read_result(run_dir).items() if name not in TIMING}
    samples = run_dir / "samples.jsonl"
    return weights(run_dir), lines, result, samples.read_text().splitlines() if samples.exists() else []
