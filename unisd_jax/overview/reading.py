"""The run directories and evaluations below some paths; what cannot be read is named, never a reason to stop."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unisd_jax.config_loading import flatten, parse_yaml
from unisd_jax.errors import UserError
from unisd_jax.metrics import METRICS_FILE, read_metrics
from unisd_jax.overview.files import Problem, number, read_json, read_json_lines, reason
from unisd_jax.overview.kept import job_state, read_grades
from unisd_jax.report import CONFIG_FILE, RESULT_FILE, SAMPLES_FILE

SUMMARY_FILE, ITEMS_FILE = "summary.json", "items.jsonl"
METRICS = ("exact", "released_exact")  # the grades of an item that the report uses
# Folders of a run, and beside runs, that hold no run of their own and may hold thousands of files; in those of `jobs`
# lie the configurations of runs whose directories are elsewhere.
_SKIPPED = {"adapter", "cache", "checkpoints", "hf", "jobs", "plots", "teacher_adapter", "wandb"}
_RUN_FILES = {CONFIG_FILE, RESULT_FILE, METRICS_FILE}
# Where one of these lies, a report.md is that of the run or of the evaluation.
_WITH_A_REPORT = (CONFIG_FILE, RESULT_FILE, METRICS_FILE, SUMMARY_FILE, ITEMS_FILE)


@dataclass(eq=False)
class Run:
    """What a run directory holds; a part that is missing or damaged is empty. The configuration is flat.

    `grades` are those of the test items before and after training [N]; `job` is what a sweep says of an unfinished run.
    """

    folder: Path
    label: str
    config: dict[str, Any]
    result: dict[str, Any]
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    grades: tuple[np.ndarray, np.ndarray] | None
    job: str

    def told(self, option: str, name: str) -> str:
        """An option of the configuration, else what the result has under `name`."""
        return str(self.config.get(option, self.result.get(name, "unknown")))


@dataclass(eq=False)
class Evaluation:
    """A finished evaluation: its summary and, where they can be read, the grades [N] of its items and its base's."""

    folder: Path
    summary: dict[str, Any]
    items: tuple[tuple[str, str], ...] = ()
    own: dict[str, np.ndarray] = field(default_factory=dict)
    base: dict[str, np.ndarray] = field(default_factory=dict)


class Found(NamedTuple):
    """All that was found."""

    runs: list[Run]
    evaluations: list[Evaluation]
    problems: list[Problem]


def read_all(paths: Sequence[Path]) -> Found:
    """Every run directory and evaluation at or below `paths`.

    Raises:
      UserError: a path is no directory, or there is neither a run nor an evaluation.
    """
    problems: list[Problem] = []
    run_folders, evaluation_folders = _search(paths)
    if not run_folders and not evaluation_folders:
        raise UserError(
            f"no run in {', '.join(map(str, paths))}: expected directories with {CONFIG_FILE}, {RESULT_FILE} or "
            f"{METRICS_FILE}, such as runs/quickstart"
        )
    labels = _labels(run_folders)
    runs = [_read_run(folder, label, problems) for folder, label in zip(run_folders, labels, strict=True)]
    evaluations = [_read_evaluation(folder, problems) for folder in evaluation_folders]
    return Found(runs, [found for found in evaluations if found.summary], problems)


def file_of_a_run(folder: Path) -> str | None:
    """The first file by which a folder is a run or an evaluation with a report of its own; None where it is neither."""
    return next((name for name in _WITH_A_REPORT if (folder / name).exists()), None)


def _search(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    runs, evaluations = {}, {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a directory: expected a run such as runs/quickstart, or a folder of runs")
        for folder, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if name not in _SKIPPED and name[0] != ".")
            found = Path(folder)
            if _RUN_FILES & set(files):
                runs.setdefault(found.resolve(), found)
            if found.parent.name == "evaluation" and {SUMMARY_FILE, ITEMS_FILE} & set(files):
                evaluations.setdefault(found.resolve(), found)
    return list(runs.values()), list(evaluations.values())


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths below what all have in common where names are not enough."""
    resolved = [folder.resolve() for folder in folders]
    if len({folder.name for folder in resolved}) == len(resolved):
        return [folder.name for folder in resolved]
    common = os.path.commonpath([folder.parent for folder in resolved])
    return [str(folder.relative_to(common)) for folder in resolved]


def _read_run(folder: Path, label: str, problems: list[Problem]) -> Run:
    records: list[dict[str, Any]] = []
    try:
        if (folder / METRICS_FILE).is_file():
            records = read_metrics(folder / METRICS_FILE)
    except (UserError, OSError, RecursionError) as error:
        problems.append(Problem(str(folder / METRICS_FILE), reason(error).removeprefix(f"{folder / METRICS_FILE}, ")))
    samples = [line for line in read_json_lines(folder / SAMPLES_FILE, problems) if "prompt" in line]
    config = _read_config(folder / CONFIG_FILE, problems)
    result = read_json(folder / RESULT_FILE, problems)
    job = "" if (folder / RESULT_FILE).exists() else job_state(folder)
    return Run(folder, label, config, result, records, samples, read_grades(folder, result, problems), job)


def _read_config(path: Path, problems: list[Problem]) -> dict[str, Any]:
    if not path.is_file():
        problems.append(
            Problem(str(path), "not there: the run's settings are unknown, so it is averaged with no other")
        )
        return {}
    try:
        tree = parse_yaml(path.read_bytes(), "found")
        flat = flatten(tree) if isinstance(tree, dict) else {}
    except (OSError, UserError, RecursionError) as error:
        problems.append(Problem(str(path), reason(error)))
        return {}
    if not flat:
        problems.append(Problem(str(path), "empty or no mapping: expected the configuration that a run writes"))
    return flat


def _read_evaluation(folder: Path, problems: list[Problem]) -> Evaluation:
    if not (folder / SUMMARY_FILE).is_file():
        problems.append(Problem(str(folder), f"an evaluation without {SUMMARY_FILE}: it has not finished"))
        return Evaluation(folder, {})
    found = Evaluation(folder, read_json(folder / SUMMARY_FILE, problems))
    if not found.summary:
        return found
    if not isinstance(found.summary.get("task"), str) or number(found.summary, "metrics", "exact", "mean") is None:
        problems.append(
            Problem(str(folder / SUMMARY_FILE), "no task or no metrics.exact: not the summary of an evaluation")
        )
        return Evaluation(folder, {})
    lines = list(read_json_lines(folder / ITEMS_FILE, problems))
    expected = number(found.summary, "items")
    if len(lines) == expected and all("id" in line for line in lines):
        lines.sort(key=lambda line: str(line["id"]))
        found.items = tuple((str(line["id"]), str(line.get("item"))) for line in lines)
        found.own, found.base = _grades(lines, _own_grade), _grades(lines, _base_grade)
    else:
        what = f"{len(lines)} readable items, expected {expected or 0:.0f}: intervals are over seeds only"
        problems.append(Problem(str(folder / ITEMS_FILE), what))
    return found


def _grades(lines: list[dict[str, Any]], grade) -> dict[str, np.ndarray]:
    """Each metric that all items have."""
    columns = {name: [grade(line, name) for line in lines] for name in METRICS}
    return {name: np.array(values, float) for name, values in columns.items() if None not in values}


def _own_grade(line: dict[str, Any], name: str) -> float | None:
    return number(line, "grades", name)


def _base_grade(line: dict[str, Any], name: str) -> float | None:
    where, replies = ("released" if name.startswith("released_") else "grades"), line.get("base_replies")
    replies = replies if isinstance(replies, list) else []
    grades = [number(reply, where, name.removeprefix("released_")) for reply in replies]
    return None if not grades or None in grades else sum(grades) / len(grades)
