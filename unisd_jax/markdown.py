"""Tables for reports."""

from collections.abc import Sequence
from typing import Any


def table(headings: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; empty without rows."""
    if not rows:
        return ""
    escaped = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [headings, ["---"] * len(headings), *escaped])
