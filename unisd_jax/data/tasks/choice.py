"""What multiple-choice benchmarks share: seeded order of the options, one form of prompt and reply, a strict parser."""

import random
import re
from collections.abc import Sequence
from string import ascii_uppercase

from unisd_jax.data.tasks.base import Item
from unisd_jax.data.tasks.jsonl import Row
from unisd_jax.errors import UserError

SEED = 42

_STATEMENT = re.compile(
    r"""^[\s>\#*_`-]*              # quote, heading, bullet or bold marks
        (?:final\s+)?answer[*_`]*\s*:[\s*_`]*
        [(\[<"'*_`]*([A-Z])(?![^\W_])[)\]>"'*_`]*   # the letter, bare or wrapped
        (?P<rest>.*)$""",
    re.IGNORECASE | re.VERBOSE,
)
_PUNCTUATION = " .,:;-–—*_`()[]<>\"'"
# What follows the letter names another one: "or B", ", B", "/ B".
_ALTERNATIVE = re.compile(r"\W*((?i:or|and)\b|[,/&|-])\W*[A-Z]\b")


def make_item(
    identifier: str,
    question: str,
    choices: Sequence[str],
    gold: int,
    position: int,
    *,
    context: str = "",
    explanation: str = "",
    **more: object,
) -> Item:
    """The item of a question whose right choice is `choices[gold]`; `position` is its place in the upstream split.

    The letters A, B, ... go to the choices in an order drawn from the position alone; `details` holds the options in
    that order and whatever else is given.
    """
    order = shuffled(len(choices), position)
    options = [choices[index].strip() for index in order]
    letter = ascii_uppercase[order.index(gold)]
    reasoning = " ".join(explanation.split())
    completion = f"Reasoning: {reasoning}\nAnswer: {letter}" if reasoning else f"Answer: {letter}"
    details = {"options": options, **more}
    return Item(identifier, make_prompt(question, options, context), completion, letter, details=details)


def shuffled(count: int, position: int) -> list[int]:
    """The order of `count` options for the row at `position`; Python's own generator, so that it is the reference's."""
    order = list(range(count))
    random.Random(SEED + position).shuffle(order)
    return order


def make_prompt(question: str, options: Sequence[str], context: str = "") -> str:
    """The user message: question, context if there is any, lettered options, and the form of the reply."""
    letters = ascii_uppercase[: len(options)]
    named = f"{', '.join(letters[:-1])} or {letters[-1]}"
    parts = [
        "Answer this multiple-choice question. Exactly one option is right.",
        f"Question: {question.strip()}",
        *([f"Context: {context.strip()}"] if context.strip() else []),
        "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)),
        "Reason briefly, in three sentences at most, and end with the letter of the right option. "
        "Reply in this form and write nothing after it:\n"
        f"Reasoning: <your reasoning>\nAnswer: <{named}>",
    ]
    return "\n\n".join(parts)


def parse(text: str, item: Item) -> str | None:
    """The letter that the reply's last line of the form `Answer: X` states; None without one or if X is no option.

    Markdown around the line and the letter is accepted, and after the letter punctuation or the option's own text. A
    word that begins with a letter or follows one ("A student") states nothing; two letters ("A or B") are no answer.
    """
    options = item.details["options"]
    for line in reversed(text.splitlines()):
        statement = _STATEMENT.match(line)
        if not statement:
            continue
        letter, rest = statement[1].upper(), statement["rest"].strip()
        valid = dict(zip(ascii_uppercase, options, strict=False))
        if letter in valid and rest.lstrip(_PUNCTUATION).casefold().startswith(valid[letter].casefold()):
            return letter
        if _ALTERNATIVE.match(rest):
            return None
        if not re.match(r"\w", rest):
            return letter if letter in valid else None
    return None


def grade(text: str, item: Item) -> dict[str, float]:
    """`exact`: the reply states the right letter; `form`: it states one at all, see `parse`."""
    letter = parse(text, item)
    return {"exact": float(letter == item.answer), "form": float(letter is not None)}


def position_of(row: Row, number: int) -> int:
    """The row's place in the upstream split: its `upstream_index`, or `number` where the file does not say.

    Raises:
      UserError: the field is not a whole number from 0.
    """
    position = row.value("upstream_index", int) if row.fields.get("upstream_index") is not None else number
    if position < 0:
        raise UserError(f"{row.where}: field 'upstream_index' is {position}, expected a number from 0")
    return position


def choices_of(row: Row) -> list[str]:
    """The field `choices`.

    Raises:
      UserError: it is not a list of 2 to 26 strings.
    """
    choices = row.texts("choices", at_least=2)
    if len(choices) > len(ascii_uppercase):
        raise UserError(f"{row.where}: field 'choices' has {len(choices)} entries, expected at most 26: one a letter")
    return choices
