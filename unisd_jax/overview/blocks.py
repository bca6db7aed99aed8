"""What a report consists of, whichever form it is written in. `backticks` in texts are code."""

from collections.abc import Sequence
from typing import NamedTuple


class Cell(NamedTuple):
    """A cell of a table.

    Fields:
      text: the value.
      notes: what stands smaller below it.
      best: whether it is set off as the best of its column.
      heat: 0 to 1 where the cell is part of a heat map.
    """

    text: str
    notes: tuple[str, ...] = ()
    best: bool = False
    heat: float | None = None


class Heading(NamedTuple):
    """A heading of level 2 or 3; those of level 2 are in the table of contents."""

    text: str
    level: int = 2


class Text(NamedTuple):
    """A paragraph; a warning is set off."""

    text: str
    warning: bool = False


class Table(NamedTuple):
    """Rows under headings; the first `left` columns hold words, the others numbers."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    left: int = 1


class Chart(NamedTuple):
    """A drawing (SVG), and its numbers for whoever does not see it."""

    title: str
    svg: str
    numbers: Table


class Legend(NamedTuple):
    """Which sign (SVG) stands for what."""

    entries: Sequence[tuple[str, str]]


class Charts(NamedTuple):
    """Charts side by side under one legend."""

    legend: Legend
    charts: Sequence[Chart]


class Replies(NamedTuple):
    """What a model was asked and said: (label, text as it came) under a title."""

    title: str
    parts: Sequence[tuple[str, str]]


Block = Heading | Text | Table | Charts | Replies


def code(text: str) -> str:
    """`text` as code within a paragraph or cell."""
    return f"`{text.replace('`', chr(39))}`"
