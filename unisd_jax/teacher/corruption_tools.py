"""Wrong tool calls: another action, or an argument with another value, another name or missing.

Read in both forms that tasks use: lines `Action: name` and `Action Input: {...}`, and JSON objects with the fields
`Action` and `Action_Input`. All but the changed part stays as it is written: other spacing would tell wrong from right.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

ACTION = re.compile(r'(?m)^[ \t]*Action[ \t]*:[ \t]*(\S[^\n]*?)[ \t]*$|"Action"\s*:\s*"([^"\n]+)"')
INPUT = re.compile(r'(?m)^[ \t]*Action[ _]Input[ \t]*:\s*(?=\{)|"Action_Input"\s*:\s*(?=\{)')
SPACE = re.compile(r"\s*")


class Argument(NamedTuple):
    """One argument, and where its key and its value stand in the text."""

    key: str
    value: Any
    key_span: tuple[int, int]
    value_span: tuple[int, int]


def tool_mutations(completion: str, peers: Sequence[str]) -> list[list[str]]:
    """Replies with one wrong thing each, by kind: action, value of an argument, name of an argument, missing argument.

    Args:
      completion: the good reply.
      peers: other items' good replies, whose actions and arguments are borrowed.
    """
    actions = [name for peer in peers for _, _, name in _actions(peer)]
    lent = [argument for peer in peers for arguments in _inputs(peer) for argument in arguments]
    lent_names = list(dict.fromkeys(argument.key for argument in lent))
    wrong_actions = [
        _put(completion, (start, end), new)
        for start, end, old in _actions(completion)
        for new in dict.fromkeys(actions)
        if new != old
    ]
    values, names, missing = [], [], []
    for arguments in _inputs(completion):
        own = [argument.key for argument in arguments]
        for place, argument in enumerate(arguments):
            others = _other_values(argument.value, lent)
            values += [_put(completion, argument.value_span, _dump(other)) for other in others]
            names += [_put(completion, argument.key_span, _dump(name)) for name in lent_names if name not in own]
            missing.append(_without(completion, arguments, place))
    return [wrong_actions, values, names, missing]


def _actions(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and name of every action."""
    for match in ACTION.finditer(text):
        group = 1 if match.group(1) is not None else 2
        yield *match.span(group), match.group(group)


def _inputs(text: str) -> Iterator[list[Argument]]:
    """The arguments of every action whose input is a JSON object."""
    for match in INPUT.finditer(text):
        try:
            yield _arguments(text, match.end())
        except (ValueError, RecursionError):
            continue


def _arguments(text: str, start: int) -> list[Argument]:
    """The members of the JSON object that begins at `start`.

    Raises:
      ValueError: it is not JSON.
      RecursionError: it is too deeply nested.
    """
    decoder = json.JSONDecoder()
    decoder.raw_decode(text, start)  # so that below only places have to be found
    arguments, place = [], _skip(text, start + 1)
    while text[place] != "}":
        key, key_end = decoder.raw_decode(text, place)
        value_start = _skip(text, _skip(text, key_end) + 1)
        value, value_end = decoder.raw_decode(text, value_start)
        arguments.append(Argument(key, value, (place, key_end), (value_start, value_end)))
        place = _skip(text, value_end)
        if text[place] == ",":
            place = _skip(text, place + 1)
    return arguments


def _skip(text: str, place: int) -> int:
    return SPACE.match(text, place).end()


def _other_values(value: Any, lent: Sequence[Argument]) -> list[Any]:
    """Values of the same type: a number near it, the opposite truth, another item's text."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value - 1] if value > 0 else [value + 1]
    return [other.value for other in lent if type(other.value) is type(value) and other.value != value][:8]


def _without(text: str, arguments: Sequence[Argument], place: int) -> str:
    """The text without one argument and the comma after it, or before it if it is the last."""
    start, end = arguments[place].key_span[0], arguments[place].value_span[1]
    if place + 1 < len(arguments):
        end = arguments[place + 1].key_span[0]
    elif place > 0:
        start = arguments[place - 1].value_span[1]
    return _put(text, (start, end), "")


def _put(text: str, span: tuple[int, int], new: str) -> str:
    return text[: span[0]] + new + text[span[1] :]


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
