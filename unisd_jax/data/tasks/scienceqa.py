"""ScienceQA, the questions without an image: school science with a lecture and a worked solution (Lu et al. 2022)."""

from pathlib import Path

from unisd_jax.data.tasks import choice, jsonl
from unisd_jax.data.tasks.base import Item, Task
from unisd_jax.errors import UserError


def load(split: str, path: Path | None) -> list[Item]:
    """The items of a file of the hub's rows: `question`, `choices`, `answer` (an index), `lecture`, `solution`.

    Rows with an image are left out, since no model here sees it; positions count the rows that are left. The lecture is
    the context of the question. The hint is not shown, as in the reference, although some questions refer to it; it
    stands in `details`.

    Raises:
      ConfigError: no file was given.
      UserError: the file or a row is malformed, or every row has an image; the message names file, line and field.
    """
    rows = [row for row in jsonl.read_rows("scienceqa", split, path) if not _has_image(row)]
    if not rows:
        raise UserError(f"{path} holds only questions with an image, expected some without: see data.{split}_path")
    return jsonl.distinct((row, _item(row, split, choice.position_of(row, number))) for number, row in enumerate(rows))


def _has_image(row: jsonl.Row) -> bool:
    return row.fields.get("has_image") is True or row.fields.get("image") is not None


def _item(row: jsonl.Row, split: str, position: int) -> Item:
    choices, gold = choice.choices_of(row), row.value("answer", int)
    if not 0 <= gold < len(choices):
        raise UserError(f"{row.where}: field 'answer' is {gold}, expected an index into the {len(choices)} choices")
    # The hub's rows carry no id: the problem number of the original file where it is given, else the place.
    number = row.optional_text("pid")
    return choice.make_item(
        f"scienceqa-{number}" if number else f"scienceqa-{split}-{position}",
        row.text("question"),
        choices,
        gold,
        position,
        context=row.optional_text("lecture"),
        explanation=row.optional_text("solution"),
        hint=row.optional_text("hint"),
    )


TASK = Task("scienceqa", load, choice.grade, choice.parse, "choice")
