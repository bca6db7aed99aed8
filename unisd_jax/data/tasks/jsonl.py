"""The user's own data: one JSON object a line with `prompt`, `completion` and optionally `id`, `answer`, `negative`.

The other tasks read their files with what is here too; a name that ends in `.gz` is read as gzip.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from unisd_jax.data.tasks.base import Item, Task
from unisd_jax.errors import ConfigError, UserError


class Record(NamedTuple):
    """One checked line of a JSONL file; `fields` holds the strings that were asked for."""

    line: int
    fields: dict[str, str]


class Row(NamedTuple):
    """One JSON object of a file with fields of several types; `where` names file and line in messages."""

    where: str
    fields: dict[str, object]

    def value(self, name: str, kind: type) -> object:
        """The field `name`.

        Raises:
          UserError: it is missing or not a `kind`.
        """
        if name not in self.fields:
            has = _listed(tuple(self.fields)) if self.fields else "none"
            raise UserError(f"{self.where}: field {name!r} is missing, expected a {_KINDS[kind]}; found fields: {has}")
        value = self.fields[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{self.where}: field {name!r} is a {type(value).__name__}, expected a {_KINDS[kind]}")
        return value

    def text(self, name: str) -> str:
        """The field `name`, a string with something in it.

        Raises:
          UserError: it is missing, not a string or empty.
        """
        value = self.value(name, str)
        if not value.strip():
            raise UserError(f"{self.where}: field {name!r} is empty, expected a string with something in it")
        return value

    def optional_text(self, name: str) -> str:
        """The field `name` without outer white space; empty where it is missing or null.

        Raises:
          UserError: it is anything but a string.
        """
        return "" if self.fields.get(name) is None else self.value(name, str).strip()

    def texts(self, name: str, at_least: int = 0) -> list[str]:
        """The field `name`, a list of strings that have something in them.

        Raises:
          UserError: it is missing, not such a list, or shorter than `at_least`.
        """
        values = self.value(name, list)
        for place, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                found = "empty" if isinstance(value, str) else f"a {type(value).__name__}"
                raise UserError(f"{self.where}: field {name!r}[{place}] is {found}, expected a string with text")
        if len(values) < at_least:
            raise UserError(f"{self.where}: field {name!r} has {len(values)} entries, expected at least {at_least}")
        return values


_KINDS = {str: "string", int: "whole number", list: "list"}


def read_rows(task: str, split: str, path: Path | None) -> list[Row]:
    """The objects of the file that the benchmark `task` was given for `split`.

    Raises:
      ConfigError: no file was given.
      UserError: the file is missing, unreadable or empty, or a line is not a JSON object; the message says which.
    """
    path = _required(task, split, path)
    rows = []
    for line, text in _numbered_lines(path):
        where = f"{path}, line {line}"
        rows.append(Row(where, _parse_object(text, where)))
    if not rows:
        raise UserError(f"{path} holds no items, expected one JSON object a line")
    return rows


def distinct(items: Iterable[tuple[Row, Item]]) -> list[Item]:
    """The items, each made from its row, after a check that no id occurs twice.

    Raises:
      UserError: one does; the message names the second row.
    """
    found: dict[str, Item] = {}
    for row, item in items:
        if item.id in found:
            raise UserError(f"{row.where}: id {item.id!r} was already used in an earlier line, expected another")
        found[item.id] = item
    return list(found.values())


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
    records = read_records(_required("jsonl", split, path), ("prompt", "completion"), ("answer", "negative"))
    return [
        Item(
            fields["id"],
            fields["prompt"],
            fields["completion"],
            fields.get("answer", fields["completion"]),
            fields.get("negative"),
        )
        for _, fields in records
    ]


def grade(text: str, item: Item) -> dict[str, float]:
    """`exact`: the reply is the item's answer, white space around both aside."""
    return {"exact": float(text.strip() == item.answer.strip())}


def _required(task: str, split: str, path: Path | None) -> Path:
    if path is None:
        raise ConfigError(f"task {task!r} has no data of its own: set data.{split}_path to the {split} file")
    return Path(path)


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number, from 1, and text of every line that is not blank."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except FileNotFoundError as error:
        raise UserError(f"data file {path} does not exist") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"data file {path} is not a whole gzip file ({error}), expected one for the name .gz"
        ) from error
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
