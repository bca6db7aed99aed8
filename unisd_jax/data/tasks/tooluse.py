"""ToolUse: which calls of a documented tool answer a request (ToolAlpaca, Tang et al. 2023).

Two calls are the same if the names are and the arguments are equal as JSON values: numbers by value, text without outer
white space, objects in any order. An argument that is empty or null is the same as none. The release compares Python's
text of the values and ignores what is not asked for (its defect E9). Names are compared as the data have them, even the
`[Optional]updateProfile` of one row.

Some published rows have a gold call whose input is no JSON, such as `{"id": ${id from the search}}`: no reply can match
it, so they are left out and counted. So are rows whose `golden_response` makes other calls than their `golden_answer`:
what is demonstrated would be graded wrong.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from unisd_jax.data.rows import Row
from unisd_jax.data.tasks import released
from unisd_jax.data.tasks.base import Form, Grade, Item, Source, Task
from unisd_jax.data.tasks.code_reply import FENCE
from unisd_jax.errors import UserError

# A name and its arguments; None for what is not a JSON object.
Call = tuple[str, dict[str, Any] | None]

# Labels may have a number, and markdown around them.
_ACTION = re.compile(r"^[ \t>*-]*Action(?: ?\d+)?[ \t*]*:(?P<name>[^\n]*)", re.MULTILINE)
_INPUT = re.compile(r"[\s>*-]*Action(?: ?\d+)?[ _]Input(?: ?\d+)?[ \t*]*:[\s*`\"]*(?:json\s*)?(?=\{)")
# The part of the published prompts that says how to reply.
_OPENING, _CLOSING = "Use the following format:", "Begin!"


class _NotJSON(UserError):
    """The input of a gold call is not JSON."""


def make(row: Row, position: int, form: Form) -> Item:
    """The item of a hub's row: `prompt`, `name`, `instruction`, `golden_response`, `golden_answer`.

    Its own `upstream_index`, else the row's number, and a hash make the id: rows have none of their own, and those of
    several sources share numbers.

    Raises:
      UserError: a field is not as it should be; the message names file, line and field.
    """
    prompt, name, instruction = row.text("prompt"), row.text("name").strip(), row.text("instruction").strip()
    gold, response = _gold(row), _response(row)
    if form.answer == "json":
        prompt, completion = _json_prompt(row, prompt, form), _json_completion(gold, response, form)
    else:
        completion = response or "\n".join(f"Action: {action}\nAction Input: {text}" for action, text, _ in gold)
    calls = [(action, _canonical(arguments)) for action, _, arguments in gold]
    number = row.position(row.number)
    digest = hashlib.sha256(_dump([row.fields["prompt"], instruction, gold]).encode()).hexdigest()[:8]
    written = [(action, text) for action, text, _ in gold]  # for the release, which compares the values as text
    details = {"calls": calls, "written": written, "format": form.answer, "name": name}
    return Item(
        f"tooluse-{number}-{digest}", prompt, completion, _answer(calls), details=details,
        question=f"{name}: {instruction}",
    )  # fmt: skip


def skip(row: Row) -> str | None:
    """Rows that no reply, or not their own gold reply, would be right for; see the module."""
    try:
        gold, response = _gold(row), _response(row)
    except _NotJSON:
        return "with a gold call whose input is not JSON"
    except UserError:  # for `make` to tell
        return None
    calls = [(action, _canonical(arguments)) for action, _, arguments in gold]
    differ = response and _answer(react_calls(response)) != _answer(calls)
    return "whose golden_response and golden_answer differ" if differ else None


def parse(text: str, item: Item) -> str | None:
    """The calls of a reply as JSON; None if there is none in the form that was asked for, or one cannot be read."""
    return _answer(_calls(text, item))


def grade(text: str, item: Item) -> Grade:
    """Score one reply.

    Returns:
      exact: the same calls in the same order.
      form: there is a call in the form that was asked for, and all of them can be read.
      action: the same names in the same order.
      arguments: the mean share of right arguments over the calls, taken in order. Those that only the reply or only
        the gold has count as wrong, and all of a call do if its name is another, or it is missing or one too many.
    """
    gold, found, answer = item.details["calls"], _calls(text, item), parse(text, item)
    shares = [_share(*calls) for calls in zip(gold, found, strict=False)]
    return {
        "exact": float(answer == item.answer),
        "form": float(answer is not None),
        "action": float([name for name, _ in found] == [name for name, _ in gold]),
        "arguments": sum(shares) / max(len(gold), len(found)),
    }


def react_calls(text: str) -> list[Call]:
    """The calls of lines `Action: name` and `Action Input: {...}`; what follows an input's JSON does not matter."""
    calls, place = [], 0
    while action := _ACTION.search(text, place):
        place, arguments = action.end(), None
        if label := _INPUT.match(text, place):
            arguments, place = _object_at(text, label.end())
        calls.append((action["name"].strip(" \t\r*`"), arguments))
    return calls


def json_calls(text: str) -> list[Call]:
    """The calls of a reply that is, or has as its only fenced block, an object with the list `tool_calls`."""
    blocks = [block["code"] for block in FENCE.finditer(text)]
    try:
        value = _loads(blocks[0] if len(blocks) == 1 else text)
        listed = value.get("tool_calls") if isinstance(value, dict) else None
        return [_json_call(call) for call in listed] if isinstance(listed, list) else []
    except (ValueError, RecursionError):
        return []


def _calls(text: str, item: Item) -> list[Call]:
    return json_calls(text) if item.details["format"] == "json" else react_calls(text)


def _json_call(call: Any) -> Call:
    action, arguments = (call.get("Action"), call.get("Action_Input")) if isinstance(call, dict) else (None, None)
    return (
        action.strip() if isinstance(action, str) else "",
        _canonical(arguments) if isinstance(arguments, dict) else None,
    )


def _object_at(text: str, start: int) -> tuple[dict[str, Any] | None, int]:
    """The arguments that begin at `start`, and where they end."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        return _canonical(value), end
    except (ValueError, RecursionError):
        return None, start


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _loads(text: str) -> Any:
    """A JSON value; Python alone would accept NaN, and half characters that no tokenizer reads.

    Raises:
      ValueError: the text is not JSON.
      RecursionError: it is too deeply nested.
    """
    value = _DECODER.decode(text)
    _dump(value).encode()
    return value


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _canonical(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of which equal ones have the same JSON text when keys are sorted."""
    values = {key: _canonical_value(value) for key, value in arguments.items()}
    return {key: value for key, value in values.items() if value is not None and value != ""}


def _canonical_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical_value(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_canonical_value(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip() if isinstance(value, str) else value


def _answer(calls: Sequence[Call]) -> str | None:
    """None without a call, or with one that cannot be read."""
    if not calls or any(not name or arguments is None for name, arguments in calls):
        return None
    return json.dumps([{"Action": name, "Action_Input": arguments} for name, arguments in calls], sort_keys=True)


def _share(gold: Call, found: Call) -> float:
    """The part of the arguments that both have alike."""
    (name, right), (found_name, given) = gold, found
    if name != found_name or given is None:
        return 0.0
    # As text: True equals 1 in Python, not in JSON.
    right, given = ({key: json.dumps(x, sort_keys=True) for key, x in part.items()} for part in (right, given))
    keys = right.keys() | given.keys()
    return sum(right.get(key) == given.get(key) for key in keys) / len(keys) if keys else 1.0


def _gold(row: Row) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, input as it is written, and arguments of every gold call."""
    calls = row.value("golden_answer", list)
    if not calls:
        raise row.wrong("golden_answer", "empty", "at least one call")
    return [_gold_call(row, f"golden_answer[{place}]", call) for place, call in enumerate(calls)]


def _gold_call(row: Row, name: str, call: Any) -> tuple[str, str, dict[str, Any]]:
    if not isinstance(call, dict):
        raise row.wrong(name, f"a {type(call).__name__}", "an object with 'Action' and 'Action_Input'")
    fields = Row(f"{row.where}, {name}", call)
    action, text = fields.text("Action").strip(), fields.text("Action_Input").strip()
    if action != action.strip("*`") or "\n" in action:
        raise fields.wrong("Action", repr(action), "a name on one line, without marks around it")
    try:
        arguments = _loads(text)
    except (ValueError, RecursionError):
        raise _NotJSON(f"{fields.where}: field 'Action_Input' is not JSON ({text[:60]!r})") from None
    if not isinstance(arguments, dict):
        raise fields.wrong("Action_Input", f"the JSON of a {type(arguments).__name__}", "that of an object")
    try:
        _dump(_canonical(arguments))
    except RecursionError:
        raise fields.wrong("Action_Input", "nested too deeply", "arguments that can be compared") from None
    return action, text, arguments


def _response(row: Row) -> str:
    """The gold reply as published; empty where the row has only the calls."""
    lines = row.value("golden_response", list)
    for name, line in ((f"golden_response[{place}]", line) for place, line in enumerate(lines)):
        Row(row.where, {name: line}).value(name, str)
    return "\n".join(lines).strip()


def _json_prompt(row: Row, prompt: str, form: Form) -> str:
    """The published prompt with another paragraph on how to reply."""
    before, opening, rest = prompt.partition(_OPENING)
    _, closing, after = rest.partition(_CLOSING)
    if not opening or not closing:
        expected = f"the part on the reply from {_OPENING!r} to {_CLOSING!r}, which data.form.answer=json replaces"
        raise row.wrong("prompt", f"without {_CLOSING if opening else _OPENING!r}", expected)
    thought = {"Thought": "<why this call is made>"} if form.reasoning else {}
    call = thought | {"Action": "<a name from the documentation>", "Action_Input": {"<parameter>": "<value>"}}
    how = (
        f"Reply with one JSON object of this form and nothing else:\n{_dump({'tool_calls': [call]})}\n"
        "List every call that is needed, in the order in which they are made. The parameters are those of the "
        "documentation, their values come from the question; a call without parameters has {} as its Action_Input."
    )
    return f"{before}{how}\n\n{_CLOSING}{after}"


def _json_completion(gold: Sequence[tuple[str, str, dict[str, Any]]], response: str, form: Form) -> str:
    """The gold calls in the form that the prompt asks for; without a thought where the row has none.

    The release keeps the first call only (its defect A20): `form.as_released`.
    """
    action = _ACTION.search(response)
    thought = response[: action.start()].strip().removeprefix("Thought:").strip() if action and form.reasoning else ""
    calls = [{"Action": name, "Action_Input": arguments} for name, _, arguments in gold]
    calls[0] = ({"Thought": thought} if thought else {}) | calls[0]
    return _dump({"tool_calls": calls[:1] if form.as_released else calls})


SOURCE = Source("Ahren09/ToolAlpaca", None, {"train": 4046, "test": 68}, {"": ("tooluse",)})
TASK = Task(
    "tooluse", make, grade, parse, "tools", source=SOURCE, train="train", test="test", skip=skip,
    answers=("free", "json"), released=released.grade_tools,
)  # fmt: skip
