"""Reading the fields of a parsed `config.json`; every error is one line that names the field and what is supported."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from unisd_jax.errors import UserError


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def integer(hf: dict[str, Any], field: str, default: int | None = None) -> int:
    """A positive integer; null counts as missing where there is a default."""
    value = hf.get(field)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {field} is {value!r}; expected a positive integer")
    return value


def number(hf: dict[str, Any], field: str, default: float | None = None) -> float:
    """A positive number."""
    value = hf.get(field, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise UserError(f"config.json: {field} is {value!r}; expected a positive number")
    return float(value)


def boolean(hf: dict[str, Any], field: str, default: bool) -> bool:
    """true or false; null counts as missing."""
    value = hf.get(field)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"config.json: {field} is {value!r}; expected true or false")
    return default if value is None else value


def mapping(hf: dict[str, Any], field: str) -> dict[str, Any]:
    """A nested object; null and missing are an empty one."""
    value = hf.get(field)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"config.json: {field} is {value!r}; expected an object")
    return value or {}


def refuse(hf: dict[str, Any], field: str, supported: tuple) -> None:
    """Refuses a field whose value is not among the supported ones; null and missing count as the first of them."""
    value = hf.get(field)
    if value is not None and value not in supported:
        names = ", ".join("null" if name is None else str(name) for name in supported)
        raise UserError(f"config.json: {field} is {value!r}; supported: {names}")


def refuse_unknown(hf: dict[str, Any], known: Collection[str], where: str) -> None:
    """Refuses fields that are not among the known ones, unless they are null."""
    unknown = sorted(field for field, value in hf.items() if value is not None and field not in known)
    if unknown:
        raise UserError(f"config.json: {where} has {unknown[0]!r}; supported: {', '.join(sorted(known))}")
