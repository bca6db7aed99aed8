"""What a training keeps beside its result: the grades of its test items, and its state as a job of a sweep."""

import os
from pathlib import Path

import numpy as np

from unisd_jax.io import try_flock
from unisd_jax.overview.blocks import code
from unisd_jax.overview.files import Problem, mapping, number, read_json

BEFORE_FILE, AFTER_FILE = "before.json", "after.json"


def read_grades(folder: Path, result: dict, problems: list[Problem]) -> tuple[np.ndarray, np.ndarray] | None:
    """Whether each test item was right before and after training [N]; None where that is not there or is damaged.

    Runs of earlier versions did not write the second file, which is no damage.
    """
    items, before, after = (number(result, name) for name in ("items", "before", "after"))
    if items is None or before is None or after is None or not (folder / AFTER_FILE).is_file():
        return None
    old = _grades(folder / BEFORE_FILE, items, before, problems)
    new = _grades(folder / AFTER_FILE, items, after, problems)
    return None if old is None or new is None else (old, new)


def job_state(folder: Path) -> str:
    """What the jobs.json of a sweep says of an unfinished run in it; empty where there is none or it cannot be read."""
    home = folder.resolve()
    record = mapping(read_json(home.parent / "jobs.json", []), "jobs", home.name)
    # The path as it was named, for who reads it; "." and ".." have no name of their own.
    named = home if folder.name in ("", "..") else folder
    of_job = named.parent / "jobs" / home.name
    match record.get("state"):
        case "failed":
            log = of_job / "log.txt"
            return f"failed, see {code(str(log))}" if os.path.isfile(log) else "failed"
        case "running" | "runs elsewhere":
            return "running" if _is_held(of_job / "lock") else "stopped, no process here holds its lock"
        case "interrupted":
            return "stopped"
        case "waiting" | "not run" as state:
            return state
    return ""


def _grades(path: Path, items: float, mean: float, problems: list[Problem]) -> np.ndarray | None:
    """The grades of one file, if they are those that the result sums up."""
    known = len(problems)
    rows = read_json(path, problems).get("grades")
    if len(problems) > known:
        return None
    values = [number(row, "exact") for row in rows] if isinstance(rows, list) else []
    graded = [value for value in values if value is not None]
    if not len(graded) == len(values) == items or not graded:
        what = f"{len(graded)} graded items of {len(values)}, expected {items:.0f}"
    elif abs(sum(graded) / len(graded) - mean) > 1e-6:
        what = f"a mean of {sum(graded) / len(graded):.4f}, but the result says {mean:.4f}"
    else:
        return np.array(graded)
    problems.append(Problem(str(path), f"{what}: its grades are not used"))
    return None


def _is_held(lock: Path) -> bool:
    """Whether a process works on the job; the record may be of one that was killed, and is believed if in doubt."""
    try:
        with open(lock, "rb") as file:
            return not try_flock(file.fileno())
    except OSError:
        return True
