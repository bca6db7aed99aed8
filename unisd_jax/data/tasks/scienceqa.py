"""ScienceQA, the questions without an image: school science with a lecture and a worked solution (Lu et al. 2022)."""

from unisd_jax.data.rows import Row
from unisd_jax.data.tasks import choice, released
from unisd_jax.data.tasks.base import Form, Item, Source, Task


def make(row: Row, position: int, form: Form) -> Item:
    """The item of a hub's row: `question`, `choices`, `answer` (an index), `hint`, `lecture`, `solution`.

    The lecture is background. The hint is the passage that some questions are about: shown, unlike in the release (its
    defect A6), unless `form.hint` is off.

    Raises:
      UserError: a field is not as it should be; the message names file, line and field.
    """
    choices, gold = choice.choices_of(row), row.value("answer", int)
    if not 0 <= gold < len(choices):
        raise row.wrong("answer", str(gold), f"an index into the {len(choices)} choices")
    place = row.position(position)
    # The hub's rows carry no id: the problem number of the original file where it is given, else the place.
    number = row.optional_text("pid")
    return choice.make_item(
        f"scienceqa-{number}" if number else f"scienceqa-at-{place}",
        row.text("question"), choices, gold, place, form,
        lecture=row.optional_text("lecture"),
        hint=row.optional_text("hint"),
        explanation=row.optional_text("solution"),
        subject=row.optional_text("subject"),
        topic=row.optional_text("topic"),
    )  # fmt: skip


def skip(row: Row) -> str | None:
    """No model here sees an image; positions count the rows that are left, as in the release."""
    return "with an image" if row.fields.get("has_image") is True or row.fields.get("image") is not None else None


SOURCE = Source(
    "derek-thomas/ScienceQA",
    "f18b0a70359ebfb41f658fd564208d0355b013f4",
    {"train": 12726, "validation": 4241, "test": 4241},
    {"": ("scienceqa",)},
)
TASK = Task(
    "scienceqa", make, choice.grade, choice.parse, "choice",
    source=SOURCE, skip=skip, answers=choice.ANSWERS, released=released.grade_choice, options=choice.option_replies,
)  # fmt: skip
