"""How the release scores replies, its slips included: numbers to set beside the published ones, never our own.

Written anew from the specification of its behaviour (spec 3.3 to 3.6), whose numbers name the defects (E2, E9). What is
unsafe or ends the release's evaluation is left out: code runs in the sandbox (S1 to S3), and a JSON call without its
keys is no call (E7). All of it takes a time that grows with the length of a reply, not with its square.
"""

import json
import re
from collections.abc import Callable
from string import ascii_uppercase
from typing import Any, Literal

from unisd_jax.data.tasks import code_reply
from unisd_jax.data.tasks.base import Grade, Item
from unisd_jax.sandbox import Outcome

Rule = Literal[
    "answer_line", "the_answer_is", "answer_anywhere", "line_start", "last_capital",
    "first_character", "json", "json_text", "none",
]  # fmt: skip
Category = Literal["passed", "timeout", "execution_error", "assertion"]
# A name and the text of its input.
Call = tuple[str, str]

# --- multiple choice ---

# In the order in which they are tried, each with the valid letters put in; only the first four take the first match.
_FREE_RULES: tuple[tuple[Rule, str], ...] = (
    ("answer_line", r"(?m)^Answer:\s*\(?([{}])"),
    ("the_answer_is", r"[Tt]he answer is\s*\(?([{}])"),
    ("answer_anywhere", r"ANSWER:\s*\(?([{}])"),
    ("line_start", r"(?m)^([{}])[.)\s]"),
)
_JSON_BLOCK = re.compile(r"```(?:json)?[^\S\n]*\n(.*?)```", re.DOTALL)


def grade_choice(text: str, item: Item) -> Grade:
    """`exact`: the letter is the right one; `form`: there is one, as nearly always (E2); `rule`: see `letter`."""
    found, rule = letter(text, len(item.details["options"]), item.details["format"])
    return {"exact": float(found == item.answer), "form": float(found is not None), "rule": rule}


def letter(text: str, number_of_choices: int, answer_form: str) -> tuple[str | None, Rule]:
    """The letter of a reply and the rule that found it (spec 3.3): the first that matches.

    Args:
      text: the reply.
      number_of_choices: how many letters from A on are valid.
      answer_form: "free", "letter" or "json", as the reply was asked for.
    """
    text, letters = text.strip(), ascii_uppercase[:number_of_choices]
    if answer_form == "letter":
        first = text[:1].upper()
        return (first, "first_character") if first in tuple(letters) else (None, "none")
    return _json_letter(text, letters) if answer_form == "json" else _free_letter(text, letters)


def _free_letter(text: str, letters: str) -> tuple[str | None, Rule]:
    """No boundary after the letter, articles taken for letters, the first line before a correction (E2)."""
    for rule, pattern in _FREE_RULES:
        if match := re.search(pattern.format(letters), text):
            return match[1], rule
    capitals = re.findall(rf"\b[{letters}]\b", text)
    return (capitals[-1], "last_capital") if capitals else (None, "none")


def _json_letter(text: str, letters: str) -> tuple[str | None, Rule]:
    """Any answer that begins with a valid letter (E21), even in JSON that was cut off."""
    for candidate in [text, *_JSON_BLOCK.findall(text)]:
        value = _loads(candidate)
        answer = value.get("answer") if isinstance(value, dict) else None
        first = answer.strip().upper()[:1] if isinstance(answer, str) else ""
        if first in tuple(letters):
            return first, "json"
    match = re.search(rf'"answer"\s*:\s*"([{letters}])"', text, re.IGNORECASE)
    return (match[1].upper(), "json_text") if match else (None, "none")


# --- GSM8K ---

# Groups of three or plain digits: `12,34` is 12, `1e5` is 1 and 5 (E20).
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_PHRASES = ("the answer is", "The answer is", "final answer is", "Final answer is", "answer:", "Answer:")
_TOLERANCE = 1e-4


def grade_number(text: str, item: Item) -> Grade:
    """`exact`: the number is right; `form`: there is one anywhere."""
    found = number(text)
    exact = found is not None and same_number(found, _normal(item.answer))
    return {"exact": float(exact), "form": float(found is not None)}


def number(text: str) -> str | None:
    """The number of a reply as the release writes it (spec 3.6).

    The first one after the last `####`, else after the last of the first phrase that has one, else the last of all,
    which may be from reasoning that was cut off (E20).
    """
    for mark in ("####", *_PHRASES):
        _, found, after = text.rpartition(mark)
        if found and (match := _NUMBER.search(after)):
            return _normal(match[0])
    numbers = _NUMBER.findall(text)
    return _normal(numbers[-1]) if numbers else None


def same_number(one: str, other: str) -> bool:
    """Whether two normalised numbers are the same text or nearly the same value."""
    return one == other or abs(float(one) - float(other)) < _TOLERANCE


def _normal(text: str) -> str:
    """A number without its marks and in at most six decimals; as it is if it is too long for a float."""
    bare = re.sub(r"[,$%]", "", text.strip()).rstrip(".")
    value = float(bare)
    if abs(value) == float("inf"):
        return bare
    return str(int(value)) if value.is_integer() else f"{value:.6f}".rstrip("0").rstrip(".")


# --- tool use ---

# Possessive: a label's spaces must not be shared out between its parts in every way.
_ACTION = re.compile(r"Action\s*+(?:\d++\s*+)?:")
_INPUT = re.compile(r"\nAction\s*+(?:\d++\s*+)?Input\s*+(?:\d++\s*+)?:")
_NEXT = re.compile(rf"\n(?=Thought|{_ACTION.pattern})")


def grade_tools(text: str, item: Item) -> Grade:
    """Score one reply's calls against the row's own (spec 3.5).

    Returns:
      exact: action and arguments are both right: the release's `full`.
      form: there is a call; one that cannot be read counts.
      action: as many calls as there should be, with the same names in order.
      arguments: the mean of `input_score` over the calls, even where names differ (E9); 0 for another number of calls.
    """
    gold = item.details["written"]
    found = json_calls(text) if item.details["format"] == "json" else react_calls(text)
    action = [name.strip() for name, _ in found] == [name.strip() for name, _ in gold]
    arguments = 0.0
    if len(found) == len(gold):
        pairs = zip(found, gold, strict=True)
        arguments = sum(input_score(given, right) for (_, given), (_, right) in pairs) / len(gold)
    exact = action and arguments == 1
    return {"exact": float(exact), "form": float(bool(found)), "action": float(action), "arguments": arguments}


def react_calls(text: str) -> list[Call]:
    """The calls of a reply in lines: from `Action:` over `Action Input:` to the next thought, action or the end.

    Both parts may have several lines, so what follows an input's JSON belongs to it and spoils it (E9). Each label is
    looked for after the one before it, which finds what the release's one expression does without its backtracking.
    """
    calls, place = [], 0
    while (action := _ACTION.search(text, place)) and (label := _INPUT.search(text, action.end())):
        following = _NEXT.search(text, label.end())
        place = following.start() if following else len(text)
        calls.append((text[action.end() : label.start()].strip(), text[label.end() : place].strip().strip('"')))
    return calls


def json_calls(text: str) -> list[Call]:
    """The calls of a JSON reply, their inputs written as JSON again; of any other reply those of `react_calls`.

    The release's evaluation ends at a call without its keys (E7); here that is a reply of another form.
    """
    try:
        value = json.loads(text)
        calls = [
            (call["Action"].strip(), json.dumps(call["Action_Input"], ensure_ascii=False))
            for call in value["tool_calls"]
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        calls = []
    return calls or react_calls(text)


def input_score(given: str, gold: str) -> float:
    """The share of the gold arguments that the given ones have, compared as Python writes the values (E9).

    What is no JSON object has no arguments, so two such inputs are alike. A missing argument is the text `None`, and
    arguments that are not asked for cost nothing unless none is.
    """
    given_arguments, arguments = _object(given), _object(gold)
    if not arguments:
        return float(not given_arguments)
    same = [
        str(given_arguments.get(key)).strip() == str(value).strip()
        for key, value in arguments.items()
        if value is not None and value != ""
    ]
    return sum(same) / len(same) if same else 1.0


def _object(text: str) -> dict[str, Any]:
    value = _loads(text)
    return value if isinstance(value, dict) else {}


# --- code ---

_CODE_BLOCKS = [re.compile(rf"```{tag}[^\S\n]*\n(.*?)```", re.DOTALL) for tag in ("python", r"\w*+")]
# What the sandbox says of an exception: where, its type, its own text.
_SAID = re.compile(r"(?:line \d+: )?\w+:(?P<own>.*)", re.DOTALL)


def grade_code(text: str, program: Callable[[str], str]) -> Grade:
    """Score one reply, whose code runs in the sandbox as `program(code)` (spec 3.4).

    Returns:
      exact: the tests pass.
      form: the code is not all of the reply; outer white space is enough (E17).
      outcome: see `category`.
    """
    code = extract_code(text)
    # White space at the end means nothing to Python: without it the program is mostly the one that we run anyway.
    outcome = category(code_reply.verdict(program(code.rstrip())))
    return {"exact": float(outcome == "passed"), "form": float(code != text), "outcome": outcome}


def extract_code(text: str) -> str:
    """The code of a reply: the key `code` of a JSON object, else the first fenced block, else all of it.

    Blocks for Python come before others. A fence that is not closed is no fence, so it stays in the code (E18).
    """
    value = _loads(text)
    if isinstance(value, dict) and isinstance(value.get("code"), str):
        return value["code"]
    for block in _CODE_BLOCKS:
        if match := block.search(text):
            return match[1]
    return text.strip()


def category(outcome: Outcome) -> Category:
    """How the release counts the end of a program (E17).

    "timeout" is its `num_timeouts`, with every error that speaks of one; "execution_error" its `num_exec_errors`. An
    error without a text of its own, as a plain assertion is, counts in neither and is "assertion" here. The release
    itself passes a program that catches the timeout, and stops for good when one calls `sys.exit` (S2).
    """
    if outcome.kind == "pass":
        return "passed"
    said = _SAID.fullmatch(outcome.message)
    own = (said["own"] if said else outcome.message).strip()
    if outcome.kind == "timeout" or (said and "Timeout" in own):
        return "timeout"
    return "execution_error" if own else "assertion"


def _loads(text: str) -> Any:
    """A JSON value; None of what is none, or is nested more deeply than Python reads or writes."""
    try:
        value = json.loads(text)
        str(value)
    except (ValueError, RecursionError):
        return None
    return value
