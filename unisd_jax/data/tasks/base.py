"""What a task is: items to learn from and a way to grade a completion."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

Family = Literal["text", "choice", "code", "tools"]


class Item(NamedTuple):
    """One question: `prompt` is the user message, `completion` the gold reply and demonstration, `answer` is graded.

    `negative` is a wrong reply that came with the data; `details` holds what only the task itself reads (tests,
    options).
    """

    id: str
    prompt: str
    completion: str
    answer: str
    negative: str | None = None
    details: Mapping[str, Any] = MappingProxyType({})


def whole_text(text: str) -> str | None:
    """The answer of a free-form reply: all of it, case and runs of white space aside; None if it is empty."""
    return " ".join(text.casefold().split()) or None


class Task(NamedTuple):
    """A benchmark: `load(split, path)` reads the items of "train" or "test"; `grade(text, item)` scores one reply.

    `grade` returns fractions in [0, 1] and always has the key "exact". `parse(text, item)` is the canonical answer a
    reply gives, None if it gives none; two replies with the same value agree. `family` says how wrong replies are made
    for it.
    """

    name: str
    load: Callable[[str, Path | None], list[Item]]
    grade: Callable[[str, Item], dict[str, float]]
    parse: Callable[[str, Item], str | None] = lambda text, item: whole_text(text)
    family: Family = "text"
