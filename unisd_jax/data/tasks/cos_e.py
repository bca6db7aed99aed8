"""CoS-E v1.11: common-sense questions with five options, each with a person's explanation (Rajani et al. 2019)."""

from pathlib import Path

from unisd_jax.data.tasks import choice, jsonl
from unisd_jax.data.tasks.base import Item, Task
from unisd_jax.errors import UserError


def load(split: str, path: Path | None) -> list[Item]:
    """The items of a file of the hub's rows: `id`, `question`, `choices`, `answer`, `abstractive_explanation`.

    Raises:
      ConfigError: no file was given.
      UserError: the file or a row is malformed; the message names file, line and field.
    """
    rows = jsonl.read_rows("cos_e", split, path)
    return jsonl.distinct((row, _item(row, choice.position_of(row, number))) for number, row in enumerate(rows))


def _item(row: jsonl.Row, position: int) -> Item:
    choices, answer = choice.choices_of(row), row.text("answer")
    if answer not in choices:
        raise UserError(f"{row.where}: field 'answer' is {answer!r}, expected one of the texts in 'choices'")
    # Some rows repeat a choice: the first occurrence is the right one, as in the reference.
    gold = choices.index(answer)
    explanation = row.optional_text("abstractive_explanation")
    return choice.make_item(row.text("id"), row.text("question"), choices, gold, position, explanation=explanation)


TASK = Task("cos_e", load, choice.grade, choice.parse, "choice")
