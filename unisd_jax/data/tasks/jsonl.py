"""The user's own data: one JSON object a line with `prompt`, `completion` and optionally `id` and `answer`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from unisd_jax.data.tasks.base import Item, Task
from unisd_jax.errors import ConfigError, UserError


class Record(NamedTuple):
    """One checked line of a JSONL file; `fields` holds the strings that were asked for."""

    line: int
    fields: dict[str, str]


def read_records(path: Path, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> list[Record]:
    """Read a JSONL file whose named fields are all non-empty strings; other fields are ignored, blank lines skipped.

    A line without `id` gets the id "line-<number>"; ids are unique.

    Raises:
      UserError: the file is missing, unreadable or empty, or a line is malformed; the message names file and line.
    """
    records, first_lines = [], {}
    for line, text in _numbered_lines(path):
        where = f"{path}, line {line}"
        fields = _checked_fields(_parse_object(text, where), where, required, (*optional, "id"))
        identifier = fields.setdefault("id", f"line-{line}")
        if identifier in first_lines:
            raise UserError(f"{where}: id {identifier!r} was already used in line {first_lines[identifier]}")
        first_lines[identifier] = line
        records.append(Record(line, fields))
    if not records:
        raise UserError(f"{path} holds no items, expected one JSON object a line with {_listed(required)}")
    return records


def load(split: str, path: Path | None) -> list[Item]:
    """The items of the file `path`; `split` only serves the message when there is none.

    Raises:
      ConfigError: no file was given.
      UserError: see `read_records`.
    """
    if path is None:
        raise ConfigError(f"task 'jsonl' has no data of its own: set data.{split}_path to the {split} file")
    return [
        Item(fields["id"], fields["prompt"], fields["completion"], fields.get("answer", fields["completion"]))
        for _, fields in read_records(Path(path), ("prompt", "completion"), ("answer",))
    ]


def grade(text: str, item: Item) -> dict[str, float]:
    """`exact`: the reply is the item's answer, white space around both aside."""
    return {"exact": float(text.strip() == item.answer.strip())}


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number, from 1, and text of every line that is not blank."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"data file {path} does not exist") from error
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror}") from error
    # Split bytes, not text: str.splitlines would also cut at separators that JSON allows inside a string.
    for line, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {line}: not UTF-8 text ({error.reason} at byte {error.start})") from error
        if text.strip():
            yield line, text


def _parse_object(text: str, where: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}), expected one JSON object a line") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: found a JSON {type(value).__name__}, expected an object")
    return value


def _checked_fields(
    found: dict[str, object], where: str, required: tuple[str, ...], optional: tuple[str, ...]
) -> dict[str, str]:
    missing = [name for name in required if name not in found]
    if missing:
        has = _listed(tuple(found)) if found else "none"
        raise UserError(f"{where}: field {missing[0]!r} is missing, expected {_listed(required)}; found fields: {has}")
    fields = {name: found[name] for name in (*required, *optional) if name in found}
    for name, value in fields.items():
        if not isinstance(value, str):
            raise UserError(f"{where}: field {name!r} is a {type(value).__name__}, expected a string")
        if not value.strip():
            raise UserError(f"{where}: field {name!r} is empty")
    return fields


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)


TASK = Task("jsonl", load, grade)
