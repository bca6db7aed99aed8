"""Grades of replies, and what they come to."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from unisd_jax.data.tasks.base import Grade, Item


def grade_all(
    grade: Callable[[str, Item], Grade], texts: Sequence[str], items: Sequence[Item], *, parallel: bool = False
) -> list[Grade]:
    """The grade of each text as a reply to its item; `parallel` where grading waits for other processes."""
    if not parallel:
        return [grade(text, item) for text, item in zip(texts, items, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(grade, texts, items))


def means(grades: Sequence[Grade]) -> dict[str, float]:
    """The means of the grades that are numbers."""
    return {name: float(np.mean([grade[name] for grade in grades])) for name in numeric(grades[0])}


def counts(grades: Sequence[Grade]) -> dict[str, dict[str, int]]:
    """How often each category occurs, the most frequent first, by the name of the grade."""
    named = [name for name, value in grades[0].items() if isinstance(value, str)]
    return {name: dict(Counter(grade[name] for grade in grades).most_common()) for name in named}


def numeric(grade: Grade) -> dict[str, float]:
    """The part of a grade that can be averaged."""
    return {name: float(value) for name, value in grade.items() if not isinstance(value, str)}
