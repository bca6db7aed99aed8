"""Grades of replies, and what they come to."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real

import numpy as np

from unisd_jax.data.tasks.base import Grade, Item
from unisd_jax.errors import UserError
from unisd_jax.sandbox import usable_cpus


def grade_all(
    scorers: Sequence[Callable[[str, Item], Grade]],
    texts: Sequence[str],
    items: Sequence[Item],
    *,
    parallel: bool = False,
) -> list[list[Grade]]:
    """The grades of every scorer, one for each text as a reply to its item.

    The scorers see a text one right after the other. `parallel` is for grading that waits for other processes.

    Raises:
      UserError: a grade is not what a task must give.
    """

    def score(text: str, item: Item) -> list[Grade]:
        return [scorer(text, item) for scorer in scorers]

    if parallel:
        with ThreadPoolExecutor(usable_cpus()) as pool:
            rows = list(pool.map(score, texts, items))
    else:
        rows = [score(text, item) for text, item in zip(texts, items, strict=True)]
    columns = zip(*rows, strict=True)
    return [[_checked(grade, column[0], item) for grade, item in zip(column, items, strict=True)] for column in columns]


def means(grades: Sequence[Grade]) -> dict[str, float]:
    """The means of the grades that are numbers."""
    return {name: float(np.mean([grade[name] for grade in grades])) for name in numeric(grades[0])}


def counts(grades: Sequence[Grade]) -> dict[str, dict[str, int]]:
    """How often each category occurs, the most frequent first, by the name of the grade."""
    named = [name for name, value in grades[0].items() if isinstance(value, str)]
    return {name: dict(Counter(grade[name] for grade in grades).most_common()) for name in named}


def numeric(grade: Grade) -> dict[str, float]:
    """The part of a grade that can be averaged."""
    return {name: value for name, value in grade.items() if not isinstance(value, str)}


def has_form(grade: Grade) -> bool:
    """Whether a reply has the form that was asked for; for tasks that grade it."""
    return grade["form"] > 0


def _checked(grade: Grade, first: Grade, item: Item) -> Grade:
    """The grade in plain floats and strings."""
    found = {name: value if isinstance(value, str) else _number(name, value, item) for name, value in grade.items()}
    kinds = [{name: isinstance(value, str) for name, value in each.items()} for each in (grade, first)]
    if kinds[0] != kinds[1] or kinds[0].get("exact", True):
        raise UserError(
            f"the task's grade of a reply to {item.id} has {sorted(grade)}: expected the number 'exact', and for every "
            f"reply the same names and kinds, such as {sorted(first)}"
        )
    return found


def _number(name: str, value: object, item: Item) -> float:
    if not isinstance(value, Real | np.generic) or not math.isfinite(value):
        raise UserError(f"the task's grade of a reply to {item.id} has {name}={value!r}: expected a number or a string")
    return float(value)
