"""GPQA: graduate-level science questions, four options each; for evaluation only (Rein et al. 2023).

Its authors ask that the questions not be put where models are trained on: keep copies, replies and logs to yourself.
"""

from unisd_jax.data.rows import Row
from unisd_jax.data.tasks import choice, released
from unisd_jax.data.tasks.base import Form, Item, Source, Task

CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def make(row: Row, position: int, form: Form) -> Item:
    """The item of a hub's row: `Question`, `Correct Answer`, three of `Incorrect Answer 1`, and `Explanation`.

    Raises:
      UserError: a field is not as it should be; the message names file, line and field.
    """
    choices = [row.text(name).strip() for name in CHOICES]
    if choices[0] in choices[1:]:
        raise row.wrong(CHOICES[choices.index(choices[0], 1)], "the right answer too", "a wrong one")
    place = row.position(position)
    identifier = row.optional_text("Record ID") or f"at-{place}"
    return choice.make_item(
        f"gpqa-{identifier}", row.text("Question"), choices, 0, place, form,
        explanation=row.optional_text("Explanation"), subject=row.optional_text("High-level domain"),
    )  # fmt: skip


CONFIGS = {"gpqa_main": 448, "gpqa_diamond": 198, "gpqa_extended": 546}
# The hub calls the only split of each config "train".
SOURCE = Source(
    "Idavidrein/gpqa",
    "633f5ee89ab8ad4522a9f850766b73f62147ffdd",
    {f"{config}/train": rows for config, rows in CONFIGS.items()},
    {config: (config,) for config in CONFIGS},
)
TASK = Task(
    "gpqa", make, choice.grade, choice.parse, "choice",
    source=SOURCE, train=None, test="gpqa_main/train", answers=choice.ANSWERS,
    released=released.grade_choice, options=choice.option_replies,
)  # fmt: skip
