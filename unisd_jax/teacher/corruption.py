"""Wrong replies by rule, without a model: the good reply with one thing changed and its form kept.

Each family has its own changes. None is proven wrong here: `negatives.rule_negatives` asks the task.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Literal

from unisd_jax.teacher.corruption_code import code_mutations
from unisd_jax.teacher.corruption_tools import tool_mutations

Family = Literal["text", "choice", "code", "tools"]

# The letter of an `Answer: B` line, of a JSON field, or of a reply that is nothing else.
CHOICES = (
    r"(?im)^[ \t*]*(?:final )?answer[ \t*]*:[ \t*(\[]*([A-Z])\b",
    r'(?i)"answer"\s*:\s*"([A-Z])"',
    r"(?i)^\s*[(\[]?([A-Z])[)\].]*\s*$",
)
NUMBER = re.compile(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?!\w|[.,]\d)")


def corruptions(completion: str, answer: str, *, family: Family, peers: Sequence[str], rng: random.Random) -> list[str]:
    """Replies that differ from `completion` in one thing and should be wrong, each once; kinds of change take turns.

    Args:
      completion: the good reply.
      answer: what is graded of it.
      family: how replies of this task look.
      peers: choice: the letters of this question. text: other items' answers, the best first. tools: other items' good
        replies.
      rng: the order of changes of one kind.
    """
    if family == "choice":
        kinds = [list(_choices(completion, answer, peers))]
    elif family == "code":
        kinds = code_mutations(completion)
    elif family == "tools":
        kinds = tool_mutations(completion, peers)
    else:
        kinds = _texts(completion, answer, peers, rng)
    if family in ("code", "tools"):
        for kind in kinds:
            rng.shuffle(kind)
    in_turn = [text for texts in zip_longest(*kinds) for text in texts if text is not None]
    return [text for text in dict.fromkeys(in_turn) if text.strip() and text != completion]


def _choices(completion: str, answer: str, letters: Sequence[str]) -> Iterator[str]:
    """The other letters in order, at the place of the last answer."""
    right = answer.strip().casefold()
    for pattern in CHOICES:
        if found := [match for match in re.finditer(pattern, completion) if match.group(1).casefold() == right]:
            start, end = found[-1].span(1)
            lower = completion[start:end].islower()
            for letter in letters:
                if letter.casefold() != right:
                    yield completion[:start] + (letter.lower() if lower else letter) + completion[end:]
            return


def _texts(completion: str, answer: str, peers: Sequence[str], rng: random.Random) -> list[list[str]]:
    """Numbers changed; the answer replaced by another item's, the most similar kind of answer first."""
    answer = answer.strip()
    escape = _json_inner if _is_json(completion) else str
    places = _places(completion, escape(answer))
    if not places:
        return [_numbers(completion, 0, len(completion), rng)]
    others = [peer.strip() for peer in peers if peer.strip() and peer.strip().casefold() != answer.casefold()]
    others.sort(key=lambda peer: _unlikeness(peer, answer))
    # In a worked solution the answer comes at the end; where that is not it, everywhere will do.
    last, everywhere = (
        [_with_replaced(completion, chosen, escape(peer)) for peer in others] for chosen in (places[-1:], places)
    )
    return [_numbers(completion, *places[-1], rng), last, everywhere]


def _places(text: str, part: str) -> list[tuple[int, int]]:
    """Where `part` stands as whole words."""
    return [match.span() for match in re.finditer(rf"(?<!\w){re.escape(part)}(?!\w)", text)] if part else []


def _with_replaced(text: str, places: Sequence[tuple[int, int]], new: str) -> str:
    for start, end in reversed(places):
        text = text[:start] + new + text[end:]
    return text


def _numbers(text: str, start: int, end: int, rng: random.Random) -> list[str]:
    """The last number between `start` and `end` made a little larger or smaller."""
    found = list(NUMBER.finditer(text, start, end))
    if not found:
        return []
    last = found[-1]
    whole, _, fraction = last.group().partition(".")
    steps = [1, -1, 2, 10]
    rng.shuffle(steps)
    # The last digit is what changes: 3.5 becomes 3.6, not 4.5.
    scale = 10 ** len(fraction)
    values = [int(whole.replace(",", "") + fraction) + step for step in steps]
    comma = "," if "," in whole else ""
    shown = []
    for value in values:
        if value >= 0:
            digits = f".{value % scale:0{len(fraction)}d}" if fraction else ""
            shown.append(f"{value // scale:{comma}d}{digits}")
    return [text[: last.start()] + value + text[last.end() :] for value in shown]


def _unlikeness(peer: str, answer: str) -> tuple[bool, ...]:
    def kind(text: str) -> tuple[bool, ...]:
        return (text.replace(".", "", 1).isdigit(), text[:1].isupper(), " " in text)

    return tuple(one != other for one, other in zip(kind(peer), kind(answer), strict=True))


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _json_inner(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
