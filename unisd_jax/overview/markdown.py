"""Blocks as Markdown; of a chart its numbers."""

from collections.abc import Iterator, Sequence

from unisd_jax.markdown import table
from unisd_jax.overview.blocks import Block, Cell, Charts, Heading, Replies, Table, Text


def render_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The whole file."""
    parts = [f"# {title}", *(part for block in blocks for part in _parts(block))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _parts(block: Block) -> Iterator[str]:
    match block:
        case Heading(text, level):
            yield f"{'#' * level} {_plain(text)}"
        case Text(text, warning):
            yield f"> {_plain(text)}" if warning else _plain(text)
        case Table():
            yield from _table(block)
        case Charts(_, charts):
            for chart in charts:
                yield from _table(chart.numbers)
        case Replies(title, parts):
            yield f"#### {_plain(title)}"
            for label, text in parts:
                yield f"{label}:\n\n{_fenced(text)}"


def _table(found: Table) -> Iterator[str]:
    yield f"{_plain(found.caption)}:"
    yield table(
        [_plain(heading).replace("|", r"\|") for heading in found.headings],
        [[_cell(cell) for cell in row] for row in found.rows],
    )


def _cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return _plain(cell)
    text = f"**{_plain(cell.text)}** (best)" if cell.best else _plain(cell.text)
    if cell.notes and cell.notes[0].startswith("["):
        text += f" {cell.notes[0]}"
    rest = [note for note in cell.notes if not note.startswith("[")]
    return f"{text} ({_plain('; '.join(rest))})" if rest else text


def _plain(text: str) -> str:
    """No tag; code stays as it is, in which nothing is a tag."""
    parts = text.split("`")
    return "`".join(
        part if place % 2 else part.replace("<", "&lt;").replace("*", r"\*") for place, part in enumerate(parts)
    )


def _fenced(text: str) -> str:
    """A code block that no backticks in `text` can close."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
