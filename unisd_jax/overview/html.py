"""Blocks as one HTML file that needs nothing else: no script, no font, no image from elsewhere."""

import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from unisd_jax.overview.blocks import Block, Cell, Charts, Heading, Replies, Table, Text

STYLE = Path(__file__).with_name("style.css")
# Whatever the page holds, the browser is told to fetch nothing and to run nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render_html(title: str, blocks: Sequence[Block]) -> str:
    """The whole page."""
    anchors = list(_anchors(blocks))
    contents = "".join(
        f'<li><a href="#{anchor}">{escape(block.text)}</a></li>'
        for block, anchor in zip(blocks, anchors, strict=True)
        if isinstance(block, Heading) and block.level == 2
    )
    body = "\n".join(part for block, anchor in zip(blocks, anchors, strict=True) for part in _parts(block, anchor))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1><nav aria-label="Contents"><ul>{contents}</ul></nav></header>\n'
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _anchors(blocks: Sequence[Block]) -> Iterator[str]:
    """One for each block, of headings alone not empty, none twice."""
    seen: dict[str, int] = {}
    for block in blocks:
        name = (
            re.sub(r"[^a-z0-9]+", "-", block.text.lower()).strip("-") or "section" if isinstance(block, Heading) else ""
        )
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 or not name else f"{name}-{seen[name]}"


def _parts(block: Block, anchor: str) -> Iterator[str]:
    match block:
        case Heading(text, level):
            name = _raw(text)
            link = f'<a class="anchor" href="#{anchor}" aria-label="link to {name}">#</a>'
            yield f'<h{level} id="{anchor}">{name} {link}</h{level}>'
        case Text(text, warning):
            yield f"<p{' class=warning' if warning else ''}>{_inline(text)}</p>"
        case Table():
            yield _table(block)
        case Charts(legend, charts):
            entries = "".join(f"<li>{sign}{_inline(name)}</li>" for sign, name in legend.entries)
            figures = "".join(
                f"<figure><figcaption>{_inline(chart.title)}</figcaption>{chart.svg}"
                f"<details><summary>numbers</summary>{_table(chart.numbers)}</details></figure>"
                for chart in charts
            )
            yield f'<ul class="legend">{entries}</ul><div class="charts">{figures}</div>'
        case Replies(title, parts):
            told = "".join(f'<dt>{_raw(label)}</dt><dd dir="auto">{_raw(text)}</dd>' for label, text in parts)
            yield f"<details class=replies><summary>{_inline(title)}</summary><dl>{told}</dl></details>"


def _table(found: Table) -> str:
    head = "".join(
        f'<th scope="col"{" class=word" if place < found.left else ""}>{_inline(text)}</th>'
        for place, text in enumerate(found.headings)
    )
    rows = "".join(f"<tr>{_row(row, found.left)}</tr>" for row in found.rows)
    heat = any(isinstance(cell, Cell) and cell.heat is not None for row in found.rows for cell in row)
    # Only what can be scrolled to with a pointer can also be scrolled to with the keyboard.
    return (
        f'<div class="box" role="region" tabindex="0" aria-label="{_raw(found.caption)}">'
        f"<table{' class=heat' if heat else ''}><caption>{_inline(found.caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(row: Sequence[str | Cell], left: int) -> Iterator[str]:
    cells = []
    for place, cell in enumerate(row):
        cell = Cell(cell) if isinstance(cell, str) else cell
        classes = [name for name, holds in (("word", place < left), ("best", cell.best)) if holds]
        classes += ["none"] if cell.text in ("not measured", "not set") else []
        kind = f' class="{" ".join(classes)}"' if classes else ""
        style = "" if cell.heat is None else f' style="--heat:{100 * cell.heat:.0f}%"'
        notes = "".join(f"<small>{_inline(note)}</small>" for note in cell.notes)
        text = _inline(cell.text) + ('<span class="mark" title="best"> best</span>' if cell.best else "")
        tag = 'th scope="row"' if place == 0 else "td"
        cells.append(f"<{tag}{kind}{style}>{text}{notes}</{tag.split()[0]}>")
    return "".join(cells)


def _inline(text: str) -> str:
    """Escaped, with what is in backticks as code."""
    # Long names of options and runs may break where a reader would break them.
    parts = re.sub(r"([_/])", r"\1<wbr>", _raw(text)).split("`")
    if len(parts) % 2 == 0:  # one backtick without another is itself
        parts[-2:] = [f"{parts[-2]}`{parts[-1]}"]
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))


def _raw(text: str) -> str:
    """Escaped, without the characters that HTML forbids."""
    return escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", text))
