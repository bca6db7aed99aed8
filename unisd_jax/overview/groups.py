"""Which runs are seeds of one configuration, and what each was measured on."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from unisd_jax.config import defining_difference
from unisd_jax.overview.files import Problem, mapping, number
from unisd_jax.overview.reading import Evaluation, Found, Run

K, GAMMA = "teacher.contexts.num_auxiliary_contexts", "objective.agreement.gamma_agreement"
_SHORT = {K: "K", GAMMA: "gamma"}
# What a mode's runs on different tasks have to differ in: these do not keep them out of one row of the table.
_OF_THE_TASK = ("data.", "evaluation.", "train.steps", "train.batch_size", "train.micro_batches")
_OF_THE_TASK += ("rollout.max_completion_length",)
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


@dataclass(eq=False)
class Group:
    """Runs that differ in nothing but the seed."""

    model: str
    mode: str
    config: dict[str, Any]  # every option that changes numbers, but the seed
    runs: list[Run]
    measured: dict[Column, list[Measurement]] = field(default_factory=dict)
    note: str = ""  # what tells it from the other groups of its mode

    @property
    def label(self) -> str:
        """Mode and note."""
        return f"{self.mode} ({self.note})" if self.note else self.mode


class Study(NamedTuple):
    """Everything the report shows."""

    groups: list[Group]
    bases: dict[str, dict[Column, Measurement]]  # model -> the model before training
    columns: list[Column]
    runs: list[Run]
    problems: list[Problem]


def group(found: Found) -> Study:
    """Seeds put together, evaluations given to the runs they are of."""
    problems = list(found.problems)
    groups = _groups(found.runs, problems)
    bases: dict[str, dict[Column, Measurement]] = defaultdict(dict)
    measured: dict[Run, dict[Column, Measurement]] = {run: _at_the_end(run) for run in found.runs}
    homes = {run: run.folder.resolve() for run in found.runs}
    for evaluation in found.evaluations:
        _give(evaluation, homes, measured, bases, problems)
    _drop_what_evaluations_repeat(measured)
    for one in groups:
        for run in one.runs:
            for column, measurement in measured[run].items():
                measurement.run = run
                one.measured.setdefault(column, []).append(measurement)
    _complete_bases(groups, bases)
    columns = {column for one in groups for column in one.measured} | {c for base in bases.values() for c in base}
    return Study(groups, dict(bases), sorted(columns), found.runs, problems)


def options(config: dict[str, Any]) -> dict[str, Any]:
    """Those that change a run's numbers, but the seed."""
    # defining_difference knows which they are; against an empty configuration it has a line for each.
    names = (line.partition(":")[0] for line in defining_difference({}, config))
    return {name: config[name] for name in names if name != "seed"}


def differing(configs: Sequence[dict[str, Any]], ignored: Sequence[str] = ()) -> list[str]:
    """The options in which not all are alike, in the order of the first."""
    names = dict.fromkeys(name for config in configs for name in config if not name.startswith(tuple(ignored)))
    return [name for name in names if len({_text(config.get(name)) for config in configs}) > 1]


def short(path: str) -> str:
    """The last part of a model's path or name."""
    return PurePath(path).name or path


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _digest(value: Any) -> str:
    return hashlib.sha256(_text(value).encode()).hexdigest()[:12]


def _groups(runs: Sequence[Run], problems: list[Problem]) -> list[Group]:
    by_config: dict[str, Group] = {}
    for run in runs:
        config = options(run.config)
        # A run whose settings are unknown is a group of its own.
        key = _text(config) if config else str(run.folder)
        model, mode = run.told("model.path", "model"), run.told("mode", "mode")
        one = by_config.setdefault(key, Group(model, mode, config, []))
        earlier = [other for other in one.runs if other.told("seed", "seed") == run.told("seed", "seed")]
        if earlier:
            what = f"the same configuration and seed as {earlier[0].label}: not a further seed, left out of all means"
            problems.append(Problem(run.label, what))
        else:
            one.runs.append(run)
    groups = sorted(by_config.values(), key=lambda one: (one.model, _order(one.mode)))
    for one in groups:
        one.runs.sort(key=lambda run: (len(seed := run.told("seed", "seed")), seed))
    _name_apart(groups)
    return groups


def _order(mode: str) -> tuple[int, str]:
    """Baselines first, UniSD* last, as in the paper's table."""
    place = {"sft": 0, "sdft": 1, "gkd": 2, "ssd": 3, "opsd": 4, "plain": 5, "unisd_star": 8, "custom": 9}
    return place.get(mode, 7 if not mode.startswith("agreement") else 6), mode


def _name_apart(groups: Sequence[Group]) -> None:
    siblings: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for one in groups:
        siblings[one.model, one.mode].append(one)
    for alike in siblings.values():
        names = differing([one.config for one in alike])
        tasks = len({one.config.get("data.task") for one in alike}) > 1
        # On different tasks different sizes are to be expected; the task says enough.
        told = [name for name in names if not (tasks and name.startswith(_OF_THE_TASK)) or name == "data.task"]
        for one in alike:
            parts = [f"{_SHORT.get(name, name.rpartition('.')[2])}={one.config.get(name)}" for name in told[:3]]
            more = [f"and {len(told) - 3} more"] if len(told) > 3 else []
            unknown = ["settings unknown"] if not one.config else []
            one.note = ", ".join(unknown or parts + more)


def rows(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups of one model and mode that can share a row of a table: alike but for their task, no column twice."""
    found: list[list[Group]] = []
    for one in groups:
        for row in found:
            alike = (row[0].model, row[0].mode) == (one.model, one.mode) and row[0].config and one.config
            apart = all(other.measured.keys().isdisjoint(one.measured) for other in row)
            if alike and apart and not differing([row[0].config, one.config], _OF_THE_TASK):
                row.append(one)
                break
        else:
            found.append([one])
    return found


def _at_the_end(run: Run) -> dict[Column, Measurement]:
    """The evaluation that ends a run."""
    result = run.result
    after, items = number(result, "after"), number(result, "items")
    if after is None or items is None:
        return {}
    test = {name: value for name, value in run.config.items() if name.startswith(_OF_THE_TEST)}
    column = Column(run.told("data.task", "task"), "training", int(items), _digest(test))
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


def _of_evaluation(found: Evaluation) -> Measurement:
    summary = found.summary
    sampling = mapping(summary, "identity", "generation", "sampling")
    how = [mapping(summary, "identity").get("items") or found.items, mapping(summary, "identity").get("form")]
    # Not the ids of padding and of stop tokens, which are the model's.
    how += [sampling.get(name) for name in ("max_completion_length", "temperature", "top_p", "top_k", "min_p")]
    column = Column(
        summary["task"], "evaluate", int(number(summary, "items") or 0), _digest([how, summary.get("samples")])
    )
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


def _give(
    evaluation: Evaluation,
    homes: dict[Run, Path],
    measured: dict[Run, dict[Column, Measurement]],
    bases: dict[str, dict[Column, Measurement]],
    problems: list[Problem],
) -> None:
    """Puts an evaluation where it belongs: to the run whose checkpoint it is of, or to the model before training."""
    summary, measurement = evaluation.summary, _of_evaluation(evaluation)
    model, adapter = summary.get("model"), summary.get("adapter")
    of = [run for run, home in homes.items() if _is_checkpoint(str(adapter or model), home)]
    around = set(evaluation.folder.resolve().parents)
    of = [run for run in of if homes[run] in around] or of
    if len(of) == 1:
        place = measured[of[0]]
    elif not of and not adapter and (not homes or any(run.config.get("model.path") == model for run in homes)):
        place = bases[str(model)]
    else:
        reason = "could be of several runs" if of else "is of no run in this report and of no model that one began with"
        problems.append(Problem(str(evaluation.folder), f"measures {adapter or model}, which {reason}: left out"))
        return
    if measurement.column in place:
        problems.append(Problem(str(evaluation.folder), "one of two evaluations of the same: the first is used"))
    place.setdefault(measurement.column, measurement)


def _is_checkpoint(path: str, home: Path) -> bool:
    """Whether a path names what a run has written; the folder may have been moved since."""
    parts = PurePath(path).parts
    return len(parts) >= 2 and parts[-1] in ("hf", "adapter") and parts[-2] == home.name


def _drop_what_evaluations_repeat(measured: dict[Run, dict[Column, Measurement]]) -> None:
    """No evaluation at the end of training is shown where each run that has it was evaluated on its task again."""
    again = {(run, column.task) for run, found in measured.items() for column in found if column.source == "evaluate"}
    ended = [(run, column) for run, found in measured.items() for column in found if column.source == "training"]
    needed = {column.task for run, column in ended if (run, column.task) not in again}
    for run, column in ended:
        if column.task not in needed:
            del measured[run][column]


def _complete_bases(groups: Iterable[Group], bases: dict[str, dict[Column, Measurement]]) -> None:
    """The model before training, from what its runs say of it, where it has no evaluation of its own."""
    renamed = {"before": "exact", "released_before": "released", "ppl_fit_before": "ppl_fit"}
    for one in groups:
        for column, found in one.measured.items():
            for measurement in found:
                values = {new: measurement.values[old] for old, new in renamed.items() if old in measurement.values}
                if "exact" in values and column not in bases[one.model]:
                    bases[one.model][column] = Measurement(column, values, measurement.items, measurement.base)
                base = bases[one.model].get(column)
                if base and not measurement.base and base.items and base.items == measurement.items:
                    measurement.base = base.own
