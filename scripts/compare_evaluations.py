"""Compare evaluations of the same items: `python scripts/compare_evaluations.py BEFORE AFTER [AFTER ...]`.

Each is the folder of an evaluation, or the folders of several seeds of one configuration joined by commas. All are
compared with the first; no difference is printed without its interval.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unisd_jax.errors import UserError, report_error
from unisd_jax.eval.statistics import Interval, paired_seeds_interval, seeds_interval
from unisd_jax.eval.summary import estimate, gain
from unisd_jax.io import write_json_atomic
from unisd_jax.markdown import table

SUMMARY_FILE, ITEMS_FILE = "summary.json", "items.jsonl"
_REQUIRED = {"task": str, "items": int, "samples": int}
_EXPLANATION = (
    "detectable: the smallest difference that McNemar's test finds with 80% power on so many items, if the two "
    "disagree as often as here"
)


class Evaluation(NamedTuple):
    """A finished evaluation: its summary and, by item id, the hash of the item and the grades that are numbers."""

    folder: Path
    summary: dict[str, Any]
    hashes: dict[str, str]
    grades: dict[str, dict[str, float]]


class Side(NamedTuple):
    """What is compared: the scores [S, N] of one configuration's seeds on the items of all sides."""

    name: str
    seeds: list[Evaluation]
    scores: np.ndarray


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 for evaluations that cannot be compared."""
    options = _parser().parse_args(arguments)
    try:
        sides = read_sides([options.before, *options.after], options.metric)
        result = compare(sides, options.metric)
        if options.json:
            write_json_atomic(options.json, result)
    except (UserError, OSError) as error:
        return report_error(error)
    print("\n\n".join(_sections(result, markdown=options.markdown)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare evaluations of the same items.")
    several = "folder of an evaluation, or those of several seeds joined by commas"
    parser.add_argument("before", type=_folders, metavar="BEFORE", help=several)
    parser.add_argument("after", type=_folders, metavar="AFTER", nargs="+", help="the same; compared with BEFORE")
    parser.add_argument("--metric", default="exact", help="a grade of the items (default: exact)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    return parser


def _folders(text: str) -> list[Path]:
    folders = [Path(part) for part in text.split(",") if part]
    if not folders or len({folder.resolve() for folder in folders}) < len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different folders joined by commas")
    return folders


def read_sides(folders: Sequence[Sequence[Path]], metric: str) -> list[Side]:
    """The evaluations of each side, all of the same items in the same order.

    Raises:
      UserError: a folder holds no finished evaluation, or one of another task or other items, or not this metric.
    """
    sides = [[read_evaluation(folder) for folder in side] for side in folders]
    first = sides[0][0]
    for evaluation in (evaluation for side in sides for evaluation in side):
        _require_same_items(first, evaluation)
        _require_metric(evaluation, metric)
    names = [side[0].summary.get("name") for side in sides]
    if not all(names) or len(set(names)) < len(names):
        names = [str(side[0].folder) for side in sides]
    return [
        Side(
            name if len(side) == 1 else f"{name} ({len(side)} seeds)",
            side,
            np.array([[evaluation.grades[item][metric] for item in first.hashes] for evaluation in side]),
        )
        for name, side in zip(names, sides, strict=True)
    ]


def read_evaluation(folder: Path) -> Evaluation:
    """A finished evaluation.

    Raises:
      UserError: the folder is missing, its evaluation has not finished, or a file in it is something else.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory: expected the folder of an evaluation")
    path = folder / SUMMARY_FILE
    if not path.is_file():
        raise UserError(f"{path} is not there: it comes at the end of an evaluation, so this one has not finished")
    summary = _object(path, path.read_bytes())
    absent = [key for key, kind in _REQUIRED.items() if not isinstance(summary.get(key), kind)]
    if absent:
        raise UserError(f"{path} has no valid {', '.join(absent)}: expected the summary of an evaluation")
    hashes, grades = _read_items(folder / ITEMS_FILE)
    if not hashes or len(hashes) != summary["items"]:
        raise UserError(f"{folder / ITEMS_FILE} has {len(hashes)} items, and {SUMMARY_FILE} says {summary['items']}")
    return Evaluation(folder, summary, hashes, grades)


def _read_items(path: Path) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    hashes, grades = {}, {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        item = _object(f"{path}, line {number}", line)
        if not (isinstance(item.get("id"), str) and isinstance(item.get("grades"), dict) and "item" in item):
            raise UserError(f"{path}, line {number}: expected an object with id, item and grades")
        if item["id"] in hashes:
            raise UserError(f"{path}, line {number}: the item {item['id']!r} is there twice")
        hashes[item["id"]] = item["item"]
        numbers = {name: value for name, value in item["grades"].items() if isinstance(value, int | float)}
        grades[item["id"]] = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
    return hashes, grades


def _object(where: str | Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object")
    return value


def _require_same_items(first: Evaluation, other: Evaluation) -> None:
    tasks = first.summary["task"], other.summary["task"]
    if tasks[0] != tasks[1]:
        raise UserError(f"{other.folder} is of the task {tasks[1]} and {first.folder} of {tasks[0]}: expected one task")
    ids = first.hashes.keys() | other.hashes.keys()
    differ = sum(first.hashes.get(item) != other.hashes.get(item) for item in ids)
    if differ:
        raise UserError(
            f"{other.folder} has other items than {first.folder}: {differ} of {len(ids)} ids are in one of them only "
            "or stand for another question or answer"
        )


def _require_metric(evaluation: Evaluation, metric: str) -> None:
    without = [item for item, grades in evaluation.grades.items() if metric not in grades]
    if without:
        known = sorted(set.intersection(*map(set, evaluation.grades.values())))
        raise UserError(
            f"{evaluation.folder}: {len(without)} of its {len(evaluation.grades)} items have no number for "
            f"--metric {metric}; all have {', '.join(known) or 'none'}"
        )


def compare(sides: Sequence[Side], metric: str) -> dict[str, Any]:
    """Each side's mean and each further side's difference to the first, with intervals; what --json writes."""
    first = sides[0]
    summary, items = first.seeds[0].summary, first.scores.shape[1]
    described = [_describe(side) for side in sides]
    return {
        "task": summary["task"],
        "metric": metric,
        "items": items,
        "shares": all(bool(((side.scores >= 0) & (side.scores <= 1)).all()) for side in sides),
        "sides": described,
        "comparisons": [_difference(first, side) for side in sides[1:]],
        "notes": _notes(described, _measured_differently(sides)),
    }


def _describe(side: Side) -> dict[str, Any]:
    if len(side.scores) > 1:
        found = seeds_interval(side.scores)._asdict() | {"interval": "bootstrap over seeds and items"}
    else:
        found = estimate(side.scores[0])
    return {
        "name": side.name,
        "folders": [str(evaluation.folder) for evaluation in side.seeds],
        "seeds": len(side.scores),
        "samples": sorted({evaluation.summary["samples"] for evaluation in side.seeds}),
        **found,
        "drift": _drift(side),
    }


def _drift(side: Side) -> float | None:
    """Mean over the seeds of retention.jsd (nats per token); None where one of them has not measured it."""
    drifts = [(evaluation.summary.get("retention") or {}).get("jsd") for evaluation in side.seeds]
    values = [drift["mean"] if isinstance(drift, dict) else drift for drift in drifts]
    return None if None in values else float(np.mean(values))


def _difference(first: Side, side: Side) -> dict[str, Any]:
    found = {"before": first.name, "after": side.name, "mcnemar": None, "minimum_detectable": None}
    if len(first.scores) == len(side.scores) == 1:
        return found | gain(first.scores[0], side.scores[0])
    return found | paired_seeds_interval(first.scores, side.scores)._asdict()


def _measured_differently(sides: Sequence[Side]) -> list[str]:
    """What the evaluations depend on beside weights and seed, where they are not alike: settings, code, base."""
    settings = [_flat(evaluation.summary.get("identity") or {}) for side in sides for evaluation in side.seeds]
    names = dict.fromkeys(name for found in settings for name in found)
    return [name for name in names if len({json.dumps(found[name]) for found in settings if name in found}) > 1]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`, without what seeds and checkpoints of one configuration may differ in.

    Of the scores beside a base only who that is: the drift says whether there is one.
    """
    if not isinstance(value, dict):
        own = name.rpartition(".")[2] in ("weights", "adapter", "seed") or name.startswith("scores")
        return {} if own and not (name == "scores.base.weights") else {name: value}
    return {key: inner for part in value for key, inner in _flat(value[part], f"{name}.{part}".lstrip(".")).items()}


def _notes(sides: Sequence[dict[str, Any]], differing: Sequence[str]) -> list[str]:
    notes = [f"not measured alike, these differ: {', '.join(differing)}"] if differing else []
    if len({samples for side in sides for samples in side["samples"]}) > 1:
        each = ", ".join(f"{side['name']}: {' or '.join(map(str, side['samples']))}" for side in sides)
        notes.append(f"replies per item differ ({each}); a score is the mean of an item's replies")
    if any(1 < side["seeds"] < 5 for side in sides):
        notes.append("so few seeds say little about others: intervals over them are too narrow")
    if len(sides) > 2:
        notes.append(f"{len(sides) - 1} comparisons: neither p nor intervals are corrected for their number")
    return notes


def _sections(result: dict[str, Any], *, markdown: bool) -> list[str]:
    """The printed paragraphs."""
    metric, shares = result["metric"], result["shares"]
    form = table if markdown else _aligned
    sides = [
        [side["name"], _with_ends(side, shares, ""), side["interval"], _number(side["drift"], ".4f")]
        for side in result["sides"]
    ]
    comparisons = []
    for found in result["comparisons"]:
        test, detectable = found["mcnemar"] or {}, found["minimum_detectable"]
        comparisons.append([
            f"{found['after']} - {found['before']}", _with_ends(found, shares, "+"),
            str(test.get("gained", "-")), str(test.get("lost", "-")), _p_value(test.get("p_value")),
            _number(None if detectable is None else 100 * detectable, ".1f"),
        ])  # fmt: skip
    unit, difference = (f"{metric} (%)", "points") if shares else (metric, metric)
    headings = ["evaluation", f"{unit}, 95% interval", "interval by", "drift (nats)"]
    differences = ["difference", f"{difference}, 95% interval", "gained", "lost", "McNemar p", "detectable (points)"]
    return [
        f"{result['task']}, {result['items']} items",
        form(headings, sides),
        form(differences, comparisons),
        *([_EXPLANATION] if any(found["mcnemar"] for found in result["comparisons"]) else []),
        *(f"note: {note}" for note in result["notes"]),
    ]


def _with_ends(found: dict[str, Any], shares: bool, sign: str) -> str:
    mean, low, high = (found[name] * (100 if shares else 1) for name in Interval._fields)
    form = f"{sign}.1f" if shares else f"{sign}.4g"
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _p_value(value: float | None) -> str:
    return "<0.001" if value is not None and value < 0.001 else _number(value, ".3f")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _aligned(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (headings, *rows)]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
