"""MedMCQA: questions of Indian medical entrance exams, four options each, most with an explanation (Pal et al. 2022).

The labels of its test split are hidden, so it is evaluated on validation.
"""

from unisd_jax.data.rows import Row
from unisd_jax.data.tasks import choice, released
from unisd_jax.data.tasks.base import Form, Item, Source, Task

OPTIONS = ("opa", "opb", "opc", "opd")


def make(row: Row, position: int, form: Form) -> Item:
    """The item of a hub's row: `id`, `question`, `opa` to `opd`, `cop` (index of the right one), `exp`.

    Raises:
      UserError: a field is not as it should be; the message names file, line and field.
    """
    gold = row.value("cop", int)
    if not 0 <= gold < len(OPTIONS):
        raise row.wrong("cop", str(gold), "an index from 0 to 3 (the hub hides the labels of its test split as -1)")
    choices = [row.text(name) for name in OPTIONS]
    return choice.make_item(
        row.text("id"), row.text("question"), choices, gold, row.position(position), form,
        explanation=row.optional_text("exp"), subject=row.optional_text("subject_name"),
    )  # fmt: skip


SOURCE = Source(
    "openlifescienceai/medmcqa",
    "91c6572c454088bf71b679ad90aa8dffcd0d5868",
    {"train": 182822, "validation": 4183, "test": 6150},
    {"": ("medmcqa",)},
)
TASK = Task(
    "medmcqa", make, choice.grade, choice.parse, "choice",
    source=SOURCE, test="validation", answers=choice.ANSWERS,
    released=released.grade_choice, options=choice.option_replies,
)  # fmt: skip
