"""GSM8K: grade-school word problems with worked solutions that end in `#### <number>` (Cobbe et al. 2021)."""

import json
import re
from decimal import Decimal, InvalidOperation

from unisd_jax.data.rows import Row
from unisd_jax.data.tasks import json_reply, released
from unisd_jax.data.tasks.base import Form, Grade, Item, Source, Task

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_NUMBER = re.compile(r"[-−]?\$?\d[\d,]*(?:\.\d+)?|[-−]?\$?\.\d+")


def make(row: Row, position: int, form: Form) -> Item:
    """The item of a hub's row: `question`, and `answer` with the solution, `####` and the number.

    The calculator's notes in the solutions (`<<48/2=24>>`) are left out; the release shows them (its defect A19).

    Raises:
      UserError: a field is not as it should be; the message names file, line and field.
    """
    question, answer = row.text("question").strip(), row.text("answer")
    solution, mark, number = answer.rpartition("####")
    value = canonical(number.strip()) if mark else None
    if value is None:
        raise row.wrong("answer", f"{answer[-40:]!r} at its end", "the solution, then '####' and a number")
    steps = solution.strip() if form.as_released else _CALCULATOR.sub("", solution).strip()
    details = {"format": form.answer}
    completion = _completion(steps if form.reasoning else "", value, form)
    identifier = f"gsm8k-{row.position(position)}"
    return Item(identifier, _prompt(question, form), completion, value, details=details, question=question)


def parse(text: str, item: Item) -> str | None:
    """The number after the reply's last `####`, or the JSON reply's `answer`; None if it has another form."""
    if item.details["format"] == "json":
        found = json_reply.answer(text)
        return canonical(str(found)) if isinstance(found, str | int | float) and not isinstance(found, bool) else None
    _, mark, after = text.rpartition("####")
    number = _NUMBER.search(after) if mark else None
    return canonical(number[0]) if number else None


def grade(text: str, item: Item) -> Grade:
    """`exact`: the number is right; `form`: there is one where it was asked for, see `parse`."""
    value = parse(text, item)
    return {"exact": float(value == item.answer), "form": float(value is not None)}


def canonical(text: str) -> str | None:
    """A number as its plain decimal digits: `$1,234.50` is 1234.5; None if the text is no number."""
    bare = text.strip().replace("−", "-").replace("$", "").rstrip(".%")
    if not re.fullmatch(r"-?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?(e[+-]?\d{1,3})?", bare, re.IGNORECASE):
        return None
    try:
        value = Decimal(bare.replace(",", ""))
    except InvalidOperation:
        return None
    digits = f"{value:f}"  # as many as there are: `normalize` would round to 28
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) if value else "0"


def _prompt(question: str, form: Form) -> str:
    think = "Work it out step by step. " if form.reasoning else ""
    if form.answer == "json":
        shape = ({"reasoning": "<your steps>"} if form.reasoning else {}) | {"answer": "<the number>"}
        how = f"{think}Reply with JSON of this form and nothing else:\n{json.dumps(shape)}"
    elif form.reasoning:
        how = f"{think}Then write the final number alone on the last line, in this form:\n#### <the number>"
    else:
        how = "Reply with the final number alone, in this form:\n#### <the number>"
    return f"Solve this problem.\n\nQuestion: {question}\n\n{how}"


def _completion(steps: str, value: str, form: Form) -> str:
    if form.answer == "json":
        return json.dumps(({"reasoning": steps} if steps else {}) | {"answer": value}, ensure_ascii=False)
    return f"{steps}\n#### {value}" if steps else f"#### {value}"


SOURCE = Source(
    "openai/gsm8k",
    "740312add88f781978c0658806c59bc2815b9866",
    {"main/train": 7473, "main/test": 1319},
    {"main": ("gsm8k", "main")},
    {"main/train": "gsm8k:1.0.0/train", "main/test": "gsm8k:1.0.0/test"},
)
TASK = Task(
    "gsm8k", make, grade, parse,
    source=SOURCE, train="main/train", test="main/test", answers=("free", "json"), released=released.grade_number,
)  # fmt: skip
