"""Rows of published data: JSON objects of a file, a parquet table or a hub; their fields are checked when read.

A row that is not as expected is refused with its place and its field; nothing is ever guessed.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from unisd_jax.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


class Row(NamedTuple):
    """One row with fields of several types; `where` names its file and line in messages."""

    where: str
    fields: Mapping[str, Any]

    @property
    def number(self) -> int:
        """Of its line or row, from 1: what `where` ends in."""
        return int(self.where.rpartition(" ")[2])

    def value(self, name: str, kind: type) -> Any:
        """The field `name`.

        Raises:
          UserError: it is missing or not a `kind`.
        """
        if name not in self.fields:
            raise self.wrong(name, "missing", f"a {_KINDS[kind]}; found fields: {listed(tuple(self.fields)) or 'none'}")
        value = self.fields[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.wrong(name, f"a {type(value).__name__}", f"a {_KINDS[kind]}")
        if kind is str:
            self._check_unicode(name, value)
        return value

    def text(self, name: str) -> str:
        """The field `name`, a string with something in it.

        Raises:
          UserError: it is missing, not a string, empty, or not text that UTF-8 can hold.
        """
        value = self.value(name, str)
        if not value.strip():
            raise self.wrong(name, "empty", "a string with something in it")
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
            self._check_unicode(name, value)
        if len(values) < at_least:
            raise UserError(f"{self.where}: field {name!r} has {len(values)} entries, expected at least {at_least}")
        return values

    def position(self, number: int) -> int:
        """The row's place in the published split: its `upstream_index`, or `number` where it does not say.

        Raises:
          UserError: the field is not a whole number from 0.
        """
        position = self.value("upstream_index", int) if self.fields.get("upstream_index") is not None else number
        if position < 0:
            raise self.wrong("upstream_index", str(position), "a number from 0")
        return position

    def wrong(self, name: str, found: str, expected: str) -> UserError:
        """The error for a field that is not as expected, to be raised."""
        return UserError(f"{self.where}: field {name!r} is {short(found)}, expected {expected}")

    def _check_unicode(self, name: str, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a pair, which JSON can write and no tokenizer reads
            found = f"not text (a lone surrogate at character {error.start})"
            raise self.wrong(name, found, "text that UTF-8 can hold") from None


_KINDS = {str: "string", int: "whole number", list: "list", dict: "object"}


def short(text: str, longest: int = 120) -> str:
    """A text for a message, cut where it is long: a row may hold anything."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def listed(names: tuple[str, ...], most: int = 12) -> str:
    """Names for a message, the first `most` of them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(short(repr(name), 30) for name in names[:most]) + more


def reason(error: Exception) -> str:
    """What another library's error says, in one line."""
    return short((str(error).strip() or type(error).__name__).splitlines()[0], 200)


def read_rows(path: Path) -> list[Row]:
    """The rows of a `.parquet` file, or of one with a JSON object a line, read as gzip where its name ends in `.gz`.

    Blank lines are skipped.

    Raises:
      UserError: the file is missing, unreadable or empty, or a line is not a JSON object; the message says which.
    """
    if path.suffix == ".parquet":
        rows = _parquet_rows(path)
    else:
        rows = [Row(f"{path}, line {line}", _object(text, f"{path}, line {line}")) for line, text in _lines(path)]
    if not rows:
        raise UserError(f"{path} holds no items, expected one JSON object a line")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
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


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}), expected one JSON object a line") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: found a JSON {type(value).__name__}, expected an object")
    return value


def _parquet_rows(path: Path) -> list[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"data file {path} is parquet, which needs the extra [hub]: pip install 'unisd_jax[hub]'"
        ) from None
    try:
        # Opened here: the library's own opening is slow, and its messages for a missing file differ by platform.
        with path.open("rb") as file:
            rows = parquet.read_table(file).to_pylist()
    except FileNotFoundError as error:
        raise UserError(f"data file {path} does not exist") from error
    except (pyarrow.ArrowException, ValueError) as error:  # ValueError: among others of text that is not UTF-8
        raise UserError(
            f"data file {path} is not a parquet file ({reason(error)}), expected one for this name"
        ) from error
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror or reason(error)}") from error
    return [Row(f"{path}, row {number}", fields) for number, fields in enumerate(rows, start=1)]
