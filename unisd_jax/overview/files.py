"""Files that may be damaged, and the numbers in them: what cannot be read is named, never a reason to stop."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """Something that is not in the report, and why."""

    where: str
    what: str


def number(tree: Any, *names: str) -> float | None:
    """The finite number at `tree[names[0]][names[1]]…`, None where there is none."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    real = isinstance(tree, int | float) and not isinstance(tree, bool)
    try:
        return float(tree) if real and math.isfinite(tree) else None
    except OverflowError:
        return None


def mapping(tree: Any, *names: str) -> dict[str, Any]:
    """The mapping at `tree[names[0]][names[1]]…`, empty where there is none."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def read_json(path: Path, problems: list[Problem]) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file, or none that can be read, which `problems` then says."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        problems.append(Problem(str(path), f"not JSON: {reason(error)}"))
        return {}
    if not isinstance(value, dict):
        problems.append(Problem(str(path), f"a JSON {type(value).__name__}, expected an object"))
        return {}
    return value


def read_json_lines(path: Path, problems: list[Problem]) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; the others are counted."""
    if not path.is_file():
        return
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        problems.append(Problem(str(path), reason(error)))
        return
    damaged = 0
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            yield value
        else:
            damaged += 1
    if damaged:
        problems.append(Problem(str(path), f"{damaged} lines are no JSON objects and were skipped"))


def reason(error: Exception) -> str:
    """Its message, as one line."""
    return " ".join(str(error).split()) or type(error).__name__
