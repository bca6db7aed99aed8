"""Which runs are seeds of one configuration, and what each was measured on."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from unisd_jax.config import defining_difference
from unisd_jax.config_modes import mechanisms
from unisd_jax.overview.files import Problem, number
from unisd_jax.overview.measurements import (
    Column,
    Measurement,
    as_text,
    at_the_end,
    known_weights,
    of_evaluation,
    other_base,
    without_base,
)
from unisd_jax.overview.reading import Evaluation, Found, Run

K, GAMMA = "teacher.contexts.num_auxiliary_contexts", "objective.agreement.gamma_agreement"
_SHORT = {K: "K", GAMMA: "gamma"}
# What a mode's runs on different tasks have to differ in: these do not keep them out of one row of the table.
_OF_THE_TASK = ("data.", "evaluation.", "train.steps", "train.batch_size", "train.micro_batches")
_OF_THE_TASK += ("rollout.max_completion_length",)


@dataclass(eq=False)
class Group:
    """Runs that differ in nothing but the seed."""

    model: str
    mode: str  # and, of a custom one, what is on
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
    bases: dict[str, dict[Column, Measurement]] = defaultdict(dict)
    measured: dict[Run, dict[Column, Measurement]] = {run: at_the_end(run) for run in found.runs}
    homes = {run: run.folder.resolve() for run in found.runs}
    weights = known_weights(found.evaluations)
    for evaluation in found.evaluations:
        _give(evaluation, weights, homes, measured, bases, problems)
    groups = _groups(measured, problems)
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
    return [name for name in names if len({as_text(config.get(name)) for config in configs}) > 1]


def short(path: str) -> str:
    """The last part of a model's path or name."""
    return PurePath(path).name or path


def _groups(measured: dict[Run, dict[Column, Measurement]], problems: list[Problem]) -> list[Group]:
    by_config: dict[str, Group] = {}
    for run in measured:
        config = options(run.config)
        # A run whose settings are unknown is a group of its own.
        key = as_text(config) if config else str(run.folder)
        by_config.setdefault(key, Group(run.told("model.path", "model"), _mode(run), config, [])).runs.append(run)
    groups = sorted(by_config.values(), key=lambda one: (one.model, _order(one.mode)))
    for one in groups:
        one.runs = _one_of_each_seed(one.runs, measured, problems)
    _name_apart(groups)
    return groups


def _mode(run: Run) -> str:
    """The mode; of a custom one also what is on, as the folders of a sweep are named."""
    mode = run.told("mode", "mode")
    try:
        on = mechanisms(run.config) if mode == "custom" else {}
    except (KeyError, TypeError):  # the options of a damaged file, or of another version
        on = {}
    return f"{mode} {'_'.join(name for name, is_on in on.items() if is_on)}".rstrip()


def _one_of_each_seed(
    runs: Sequence[Run], measured: dict[Run, dict[Column, Measurement]], problems: list[Problem]
) -> list[Run]:
    """By seed, of several runs of one seed that which came furthest: a start that was given up hides no result."""
    by_seed: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_seed[run.told("seed", "seed")].append(run)
    found = []
    for seed in sorted(by_seed, key=lambda seed: (len(seed), seed)):
        best = max(by_seed[seed], key=lambda run: (number(run.result, "steps") is not None, bool(measured[run])))
        found.append(best)
        what = f"the same configuration and seed as {best.label}: not a further seed, left out of all means"
        problems += [Problem(run.label, what) for run in by_seed[seed] if run is not best]
    return found


def _order(mode: str) -> tuple[int, str]:
    """Baselines first, UniSD* and what is left of it last, as in the paper's table."""
    place = {"sft": 0, "sdft": 1, "gkd": 2, "ssd": 3, "opsd": 4, "plain": 5, "unisd_star": 8, "custom": 9}
    return place.get(mode.partition(" ")[0], 7 if not mode.startswith("agreement") else 6), mode


def _name_apart(groups: Sequence[Group]) -> None:
    siblings: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for one in groups:
        if one.config:
            siblings[one.model, one.mode].append(one)
        else:
            one.note = f"settings of {one.runs[0].label} unknown"
    for alike in siblings.values():
        names = _telling(alike)
        shown = 3  # more are hard to read, but no two may have the same note
        while shown < len(names) and len({_note(one, names, shown) for one in alike}) < len(alike):
            shown += 1
        for one in alike:
            one.note = _note(one, names, shown)


def _telling(alike: Sequence[Group]) -> list[str]:
    """The options in which groups differ; on different tasks other sizes are expected, and the task says enough."""
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in alike:
        by_task[as_text(one.config.get("data.task"))].append(one.config)
    within = {name for configs in by_task.values() for name in differing(configs)}
    names = differing([one.config for one in alike])
    return [name for name in names if name in within or name == "data.task" or not name.startswith(_OF_THE_TASK)]


def _note(one: Group, names: Sequence[str], shown: int) -> str:
    parts = [f"{_SHORT.get(name, name.rpartition('.')[2])}={one.config.get(name)}" for name in names[:shown]]
    return ", ".join(parts + [f"and {len(names) - shown} more"] * (len(names) > shown))


def rows(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups of one model and mode that can share a row of a table: alike but for their task, of which each is one."""
    found: list[list[Group]] = []
    for one in groups:
        fitting = [row for row in found if all(_share_a_row(other, one) for other in row)]
        if fitting:
            # On one task there may be several trainings: the row whose data and length are most alike.
            min(fitting, key=lambda row: len(differing([row[0].config, one.config]))).append(one)
        else:
            found.append([one])
    return found


def _share_a_row(one: Group, other: Group) -> bool:
    alike = (one.model, one.mode) == (other.model, other.mode) and one.config and other.config
    tasks = one.config.get("data.task") != other.config.get("data.task")
    apart = {without_base(column) for column in one.measured}.isdisjoint(map(without_base, other.measured))
    return bool(alike and tasks and apart) and not differing([one.config, other.config], _OF_THE_TASK)


def _give(
    evaluation: Evaluation,
    weights: dict[str, str],
    homes: dict[Run, Path],
    measured: dict[Run, dict[Column, Measurement]],
    bases: dict[str, dict[Column, Measurement]],
    problems: list[Problem],
) -> None:
    """Puts an evaluation where it belongs: to the run whose checkpoint it is of, or to the model before training."""
    summary, measurement = evaluation.summary, of_evaluation(evaluation)
    model, adapter = summary.get("model"), summary.get("adapter")
    of = [run for run, home in homes.items() if _is_checkpoint(str(adapter or model), home)]
    around = set(evaluation.folder.resolve().parents)
    of = [run for run in of if homes[run] in around] or of
    if len(of) == 1:
        place = measured[of[0]]
        measurement = of_evaluation(evaluation, other_base(evaluation, of[0].told("model.path", "model"), weights))
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
                # What was compared with another model says nothing of this one.
                if "exact" in values and not column.base and column not in bases[one.model]:
                    bases[one.model][column] = Measurement(column, values, measurement.items, measurement.base)
                base = bases[one.model].get(column)
                if base and not measurement.base and base.items and base.items == measurement.items:
                    measurement.base = base.own
