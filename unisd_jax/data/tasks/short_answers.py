"""The embedded task: short questions to be answered in one fixed JSON form that the question states.

The data are made by `scripts/make_short_answers.py`. A small chat model answers most of these questions in a sentence
and ignores the form, so that exact match starts near zero and rises with what the student takes from its teacher.
"""

import json
import re
from pathlib import Path

from unisd_jax.data.rows import Row
from unisd_jax.data.tasks.base import Form, Item, Task, whole_text
from unisd_jax.errors import ConfigError

FORM = 'Reply only with JSON: {"answer": "___"}'


def embedded_path(split: str) -> Path:
    """The package's own file of "train" or "test".

    Raises:
      ConfigError: there is no such split.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"task 'short_answers' has no split {split!r}, expected 'train' or 'test'")
    return Path(__file__).with_name(f"short_answers_{split}.jsonl")


def make(row: Row, position: int, form: Form) -> Item:
    """The item of a row with `question`, `answer` and optionally `id` and `example`, what other items are shown of it.

    Raises:
      UserError: a field is not as it should be; the message names file, line and field.
    """
    question, answer = row.text("question"), row.text("answer")
    identifier = row.text("id") if row.fields.get("id") is not None else f"line-{row.number}"
    completion = json.dumps({"answer": answer}, ensure_ascii=False)
    example = row.optional_text("example") or None
    return Item(identifier, f"{question} {FORM}", completion, answer, question=question, example=example)


def grade(text: str, item: Item) -> dict[str, float]:
    """Score one reply.

    Returns:
      exact: the whole reply is the form and its answer is right, case and outer white space aside.
      form: the whole reply is a JSON object whose only key is "answer", with a string.
      contains: the answer stands somewhere in the reply as whole words, case aside.
    """
    given = _parse_form(text)
    right = given is not None and given.strip().casefold() == item.answer.strip().casefold()
    anywhere = re.search(rf"(?<!\w){re.escape(item.answer.strip())}(?!\w)", text, re.IGNORECASE)
    return {"exact": float(right), "form": float(given is not None), "contains": float(anywhere is not None)}


def parse(text: str, item: Item) -> str | None:
    """The answer inside the form; of a reply in another form all of it."""
    return whole_text(_parse_form(text) or text)


def _parse_form(text: str) -> str | None:
    """The answer inside a reply that is exactly the form, else None."""
    try:
        # Objects become tuples of pairs: told from arrays, and a repeated key is seen.
        value = json.loads(text.strip(), object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, tuple) or len(value) != 1:
        return None
    key, given = value[0]
    return given if key == "answer" and isinstance(given, str) else None


TASK = Task("short_answers", make, grade, parse, embedded=embedded_path)
