"""What checkpoints reached: the numbers of one evaluation, and the column of the report that they belong to."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from unisd_jax.overview.files import mapping, number
from unisd_jax.overview.reading import Evaluation, Run

# What decides the numbers of the evaluation at the end of training, beside the checkpoint.
_OF_THE_TEST = ("data.test_split", "data.test_path", "data.test_limit", "data.path", "data.revision", "data.form.")
_OF_THE_TEST += ("evaluation.max_completion_length",)
# Options of the data that do not decide which the test items are: all others have to be alike.
_OF_TRAINING = ("data.train_", "data.shuffle", "data.overlong", "data.max_prompt_length", "data.length_")


class Ends(NamedTuple):
    """A number and its 95% interval, whose ends are None where none was computed."""

    mean: float
    low: float | None = None
    high: float | None = None


class Column(NamedTuple):
    """A task and the way it was measured: only numbers of one column are compared."""

    task: str
    source: str  # "evaluate", or "training" for the evaluation at the end of a run
    items: int
    how: str  # the hash of items and sampling
    base: str = ""  # what a gain is over, empty where that is the model before training


@dataclass(eq=False)
class Measurement:
    """What one checkpoint reached in one column; `own` and `base` hold grades [N] by metric where they are known.

    `items` tells which items these are of: their ids and hashes, or what chose them.
    """

    column: Column
    values: dict[str, Ends]
    items: tuple[tuple[str, str], ...] = ()
    own: dict[str, np.ndarray] = field(default_factory=dict)
    base: dict[str, np.ndarray] = field(default_factory=dict)
    run: Run | None = None  # whose checkpoint it is of, None for a model before training


def without_base(column: Column) -> Column:
    """The column for what does not depend on the model that a gain is over."""
    return column._replace(base="")


def as_text(value: Any) -> str:
    """The same for equal values."""
    return json.dumps(value, sort_keys=True, default=str)


def _digest(value: Any) -> str:
    return hashlib.sha256(as_text(value).encode()).hexdigest()[:12]


def at_the_end(run: Run) -> dict[Column, Measurement]:
    """The evaluation that ends a run."""
    result = run.result
    after, items = number(result, "after"), number(result, "items")
    if after is None or items is None:
        return {}
    test = {name: value for name, value in run.config.items() if name.startswith(_OF_THE_TEST)}
    # Where training went on from an adapter, before and gain are of that and not of the model alone.
    start = run.config.get("model.lora.start")
    column = Column(run.told("data.task", "task"), "training", int(items), _digest(test), _path(start) if start else "")
    values = {"exact": Ends(after)}
    for name in ("before", "drift"):
        if number(result, name) is not None:
            values[name] = Ends(number(result, name))
    if number(result, "gain") is not None:
        ends = result.get("gain_interval")
        low, high = ends if isinstance(ends, list) and len(ends) == 2 else (None, None)
        values["gain"] = Ends(number(result, "gain"), number({"": low}, ""), number({"": high}, ""))
    data = {name: value for name, value in run.config.items() if name.startswith("data.")}
    if run.grades is None or "data.task" not in data:
        return {column: Measurement(column, values)}
    # No file names all test items; they are the same where the options that choose them are.
    chosen = _digest({name: value for name, value in data.items() if not name.startswith(_OF_TRAINING)})
    before, after = ({"exact": grades} for grades in run.grades)
    return {column: Measurement(column, values, (("data options", chosen),), after, before)}


def of_evaluation(found: Evaluation, base: str = "") -> Measurement:
    """What an evaluation has measured; `base` as of its column."""
    summary = found.summary
    sampling = mapping(summary, "identity", "generation", "sampling")
    how = [mapping(summary, "identity").get("items") or found.items, mapping(summary, "identity").get("form")]
    # Not the ids of padding and of stop tokens, which are the model's.
    how += [sampling.get(name) for name in ("max_completion_length", "temperature", "top_p", "top_k", "min_p")]
    how.append(summary.get("samples"))
    column = Column(summary["task"], "evaluate", int(number(summary, "items") or 0), _digest(how), base)
    places = {
        "exact": ("metrics", "exact"), "before": ("before", "metrics", "exact"), "gain": ("gain", "exact"),
        "released": ("released", "metrics", "exact"), "released_before": ("before", "released", "metrics", "exact"),
        "released_gain": ("gain", "released_exact"), "drift": ("retention", "jsd"), "ppl_fit": ("ppl_fit",),
        "ppl_ret": ("retention", "ppl_ret"), "ppl_fit_before": ("before", "ppl_fit"),
    }  # fmt: skip
    values = {}
    for name, place in places.items():
        ends = [number(summary, *place, end) for end in Ends._fields]
        if ends[0] is not None:
            values[name] = Ends(*ends)
    return Measurement(column, values, found.items, found.own, found.base)


def known_weights(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """Path -> hash of the weights, of the models that evaluations were of or compared with."""
    found = {}
    for summary in (evaluation.summary for evaluation in evaluations):
        identity = mapping(summary, "identity")
        told = [(summary.get("base"), mapping(identity, "scores", "base").get("weights"))]
        if not summary.get("adapter"):
            told.append((summary.get("model"), mapping(identity, "generation").get("weights")))
        found |= {_path(path): str(weights) for path, weights in told if weights}
    return found


def other_base(evaluation: Evaluation, start: str, weights: dict[str, str]) -> str:
    """What the evaluation compares with, empty where that is `start`, the model before training, or nothing."""
    base = evaluation.summary.get("base")
    if base is None:
        return ""
    own = weights.get(_path(base))
    # One model may have been named by several paths.
    paths = {_path(base)} | {path for path, known in weights.items() if known == own}
    return "" if _path(start) in paths else min(paths)


def _path(name: Any) -> str:
    return os.path.abspath(str(name))
