"""What multiple-choice benchmarks share: seeded order of the options, one form of prompt and reply, strict parsers."""

import json
import random
import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Literal

from unisd_jax.data.rows import Row
from unisd_jax.data.tasks import json_reply
from unisd_jax.data.tasks.base import Form, Grade, Item, whole_text

ANSWERS = ("free", "letter", "json")
Rule = Literal["answer_line", "option_text", "letter", "json", "none"]

# Possessive where two parts could share a run of marks: a model that repeats itself must not be read in square time.
_STATEMENT = re.compile(
    r"""^[\s>\#*_`-]*              # quote, heading, bullet or bold marks
        (?:final\s+)?answer[*_`]*\s*:[\s*_`]*+
        [(\[<"'*_`]*+([A-Z])(?![^\W_])[)\]>"'*_`]*   # the letter, bare or wrapped
        (?P<rest>.*)$""",
    re.IGNORECASE | re.VERBOSE,
)
_PUNCTUATION = " .,:;-–—*_`()[]<>\"'"
# What follows the letter names another one: "or B", ", B", "/ B".
_ALTERNATIVE = re.compile(r"(\W*+(?i:or|and)\b|[^\w,/&|-]*+[,/&|-])\W*+[A-Z]\b")


def make_item(
    identifier: str,
    question: str,
    choices: Sequence[str],
    gold: int,
    position: int,
    form: Form,
    *,
    lecture: str = "",
    hint: str = "",
    explanation: str = "",
    **more: object,
) -> Item:
    """The item of a question whose right choice is `choices[gold]`; `position` is its place in the published split.

    The letters A, B, ... go to the choices in an order drawn from `form.option_seed` and the position alone. The
    lecture is background and the hint a part of the question; both are shown if `form` says so.
    """
    order = shuffled(len(choices), form.option_seed + position)
    options = [choices[index].strip() for index in order]
    letter = ascii_uppercase[order.index(gold)]
    passage = hint if form.hint else ""
    asked = _asked(question, options, passage)
    prompt = make_prompt(question, options, form, passage=passage, lecture=lecture if form.lecture else "")
    completion = gold_reply(letter, " ".join(explanation.split()), form)
    details = {"options": options, "format": form.answer, **more}
    same = "\n".join([question, passage, *sorted(options, key=whole_text)])
    return Item(identifier, prompt, completion, letter, details=details, question=asked, same=same)


def shuffled(count: int, seed: int) -> list[int]:
    """The order of `count` options; Python's own generator, so that it is the release's (spec 1.2)."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def make_prompt(question: str, options: Sequence[str], form: Form, *, passage: str = "", lecture: str = "") -> str:
    """The user message: background, question, lettered options, and the form of the reply."""
    parts = [
        "Answer this multiple-choice question. Exactly one option is right.",
        *([f"Background: {lecture.strip()}"] if lecture.strip() else []),
        _asked(question, options, passage),
        _instruction(ascii_uppercase[: len(options)], form),
    ]
    return "\n\n".join(parts)


def gold_reply(letter: str, reasoning: str, form: Form) -> str:
    """The right reply in the form that the prompt asks for, and so the demonstration too.

    Where there is no explanation it has no reasoning. The release always demonstrates in the free form, and with the
    bare letter where there is no explanation (its defects A12 and A13): `form.as_released`.
    """
    if form.as_released:
        return f"Reasoning: {reasoning}\nAnswer: {letter}" if reasoning else letter
    return _reply(letter, reasoning if form.reasoning else "", form.answer)


def option_replies(item: Item) -> list[str]:
    """One reply per option, without reasoning and in the form that is asked for; they differ in the letter alone."""
    letters = ascii_uppercase[: len(item.details["options"])]
    return [_reply(letter, "", item.details["format"]) for letter in letters]


def parse(text: str, item: Item) -> str | None:
    """The letter that a reply states in the form it was asked for; None without one or if it is no option."""
    return read(text, item)[0]


def read(text: str, item: Item) -> tuple[str | None, Rule]:
    """The letter as `parse` has it, and the rule that found it.

    "answer_line" and "option_text" are those of `stated_letter`; "letter" and "json" read the replies of that name;
    "none" finds no letter.
    """
    asked = item.details["format"]
    if asked == "free":
        return stated_letter(text, item.details["options"])
    given = json_reply.answer(text) if asked == "json" else text.strip(" \n\t.()[]*`\"'")
    letter = given.strip().upper() if isinstance(given, str) else ""
    is_option = len(letter) == 1 and letter in ascii_uppercase[: len(item.details["options"])]
    return (letter, asked) if is_option else (None, "none")


def stated_letter(text: str, options: Sequence[str]) -> tuple[str | None, Rule]:
    """The letter of the reply's last line of the form `Answer: X`, and whether the option's own text follows it.

    Markdown around the line and the letter is accepted, and after the letter punctuation or the option's own text. A
    word that begins with a letter or follows one ("A student") states nothing; two letters ("A or B") are no answer.
    """
    for line in reversed(text.splitlines()):
        statement = _STATEMENT.match(line)
        if not statement:
            continue
        letter, rest = statement[1].upper(), statement["rest"].strip()
        valid = dict(zip(ascii_uppercase, options, strict=False))
        if letter in valid and rest.lstrip(_PUNCTUATION).casefold().startswith(valid[letter].casefold()):
            return letter, "option_text"
        if _ALTERNATIVE.match(rest):
            return None, "none"
        if not re.match(r"\w", rest):
            return (letter, "answer_line") if letter in valid else (None, "none")
    return None, "none"


def grade(text: str, item: Item) -> Grade:
    """`exact`: the reply states the right letter; `form`: it states one at all; `rule`: what found it, see `read`.

    Some rows repeat an option: each letter with the text of the right one is right.
    """
    (letter, rule), options = read(text, item), item.details["options"]
    gold = options[ascii_uppercase.index(item.answer)]
    right = letter is not None and options[ascii_uppercase.index(letter)] == gold
    return {"exact": float(right), "form": float(letter is not None), "rule": rule}


def choices_of(row: Row) -> list[str]:
    """The field `choices`.

    Raises:
      UserError: it is not a list of 2 to 26 strings.
    """
    choices = row.texts("choices", at_least=2)
    if len(choices) > len(ascii_uppercase):
        raise row.wrong("choices", f"a list of {len(choices)} entries", "at most 26: one a letter")
    return choices


def _reply(letter: str, reasoning: str, answer: str) -> str:
    if answer == "letter":
        return letter
    if answer == "json":
        return json.dumps(({"reasoning": reasoning} if reasoning else {}) | {"answer": letter}, ensure_ascii=False)
    return f"Reasoning: {reasoning}\nAnswer: {letter}" if reasoning else f"Answer: {letter}"


def _asked(question: str, options: Sequence[str], passage: str) -> str:
    """The question with what belongs to it, as the prompt shows it and as other items are shown it."""
    lettered = "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
    parts = [*([f"Context: {passage.strip()}"] if passage.strip() else []), f"Question: {question.strip()}", lettered]
    return "\n\n".join(parts)


def _instruction(letters: str, form: Form) -> str:
    named = f"{', '.join(letters[:-1])} or {letters[-1]}"
    if form.answer == "letter":
        return f"Reply with the letter of the right option and nothing else: {named}."
    if form.answer == "json":
        shape = {"reasoning": "<your reasoning>"} if form.reasoning else {}
        think = "Reason in three sentences at most. " if form.reasoning else ""
        return f"{think}Reply with JSON of this form and nothing else:\n{json.dumps(shape | {'answer': f'<{named}>'})}"
    if not form.reasoning:
        return f"Reply with the letter of the right option in this form and write nothing else:\nAnswer: <{named}>"
    return (
        "Reason briefly, in three sentences at most, and end with the letter of the right option. "
        f"Reply in this form and write nothing after it:\nReasoning: <your reasoning>\nAnswer: <{named}>"
    )
