"""Wrong tool calls: another action, or an argument with another value, another name or missing.

Read in both forms that tasks use: lines `Action: name` and `Action Input: {...}`, and JSON objects with the fields
`Action` and `Action_Input`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

ACTION = re.compile(r'(?m)^[ \t]*Action[ \t]*:[ \t]*(\S[^\n]*?)[ \t]*$|"Action"\s*:\s*"([^"\n]+)"')
INPUT = re.compile(r'(?m)^[ \t]*Action[ _]Input[ \t]*:\s*(?=\{)|"Action_Input"\s*:\s*(?=\{)')


def tool_mutations(completion: str, peers: Sequence[str]) -> list[list[str]]:
    """Replies with one wrong thing each, by kind: action, value of an argument, name of an argument, missing argument.

    Args:
      completion: the good reply.
      peers: other items' good replies, whose actions and arguments are borrowed.
    """
    actions = [name for peer in peers for _, _, name in _actions(peer)]
    lent = [pair for peer in peers for _, arguments in _inputs(peer) for pair in arguments.items()]
    wrong_actions = [
        completion[:start] + new + completion[end:]
        for start, end, old in _actions(completion)
        for new in dict.fromkeys(actions)
        if new != old
    ]
    values, names, missing = [], [], []
    for start, arguments in _inputs(completion):
        for key, value in arguments.items():
            values += [_edited(completion, start, key, value, key, new) for new in _other_values(value, lent)]
            new_names = dict.fromkeys(name for name, _ in lent if name not in arguments)
            names += [_edited(completion, start, key, value, name, value) for name in new_names]
            missing.append(_without(completion, start, key, value))
    return [wrong_actions, *([text for text in kind if text is not None] for kind in (values, names, missing))]


def _actions(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and name of every action."""
    for match in ACTION.finditer(text):
        group = 1 if match.group(1) is not None else 2
        yield *match.span(group), match.group(group)


def _inputs(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Start and arguments of every action's input that is a JSON object."""
    for match in INPUT.finditer(text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, match.end())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield match.end(), value


def _other_values(value: Any, lent: Sequence[tuple[str, Any]]) -> list[Any]:
    """Values of the same type: a number near it, the opposite truth, another item's text."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value - 1] if value > 0 else [value + 1]
    return [other for _, other in lent if type(other) is type(value) and other != value][:8]


def _edited(text: str, start: int, key: str, value: Any, new_key: str, new_value: Any) -> str | None:
    """The text with one argument changed where it is written; None if it is not written as JSON usually is."""
    found = _pair(key, value).search(text, start)
    if found is None:
        return None
    changed = f"{_dump(new_key)}{found.group('colon')}{_dump(new_value)}"
    return text[: found.start("pair")] + changed + text[found.end("pair") :]


def _without(text: str, start: int, key: str, value: Any) -> str | None:
    found = _pair(key, value).search(text, start)
    if found is None:
        return None
    if found.group("after"):
        return text[: found.start("pair")] + text[found.end("after") :]
    return text[: found.start()] + text[found.end("pair") :]


def _pair(key: str, value: Any) -> re.Pattern[str]:
    pair = rf"(?P<pair>{re.escape(_dump(key))}(?P<colon>\s*:\s*){re.escape(_dump(value))})"
    return re.compile(rf"(?:,\s*)?{pair}(?P<after>\s*,\s*)?(?=\s*[}}\"])")


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
