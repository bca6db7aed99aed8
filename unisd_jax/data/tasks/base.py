"""What a task is: items to learn from and a way to grade a completion."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Item(NamedTuple):
    """One question: `prompt` is the user message, `completion` the gold reply and demonstration, `answer` is graded."""

    id: str
    prompt: str
    completion: str
    answer: str


class Task(NamedTuple):
    """A benchmark: `load(split, path)` reads the items of "train" or "test"; `grade(text, item)` scores one reply.

    `grade` returns fractions in [0, 1] and always has the key "exact".
    """

    name: str
    load: Callable[[str, Path | None], list[Item]]
    grade: Callable[[str, Item], dict[str, float]]
