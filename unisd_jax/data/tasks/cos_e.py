"""CoS-E v1.11: common-sense questions with five options, each with a person's explanation (Rajani et al. 2019)."""

from unisd_jax.data.rows import Row
from unisd_jax.data.tasks import choice, released
from unisd_jax.data.tasks.base import Form, Item, Source, Task


def make(row: Row, position: int, form: Form) -> Item:
    """The item of a hub's row: `id`, `question`, `choices`, `answer` (a text), `abstractive_explanation`.

    Raises:
      UserError: a field is not as it should be; the message names file, line and field.
    """
    choices, answer = choice.choices_of(row), row.text("answer")
    if answer not in choices:
        raise row.wrong("answer", repr(answer), "one of the texts in 'choices'")
    explanation = row.optional_text("abstractive_explanation")
    # Some rows repeat a choice: the first occurrence is the right one, as in the release.
    gold, question = choices.index(answer), row.text("question")
    return choice.make_item(
        row.text("id"), question, choices, gold, row.position(position), form, explanation=explanation
    )


SOURCE = Source(
    "Salesforce/cos_e",
    "f01396594b768e0026841176bf770afe58b82fba",
    {"v1.11/train": 9741, "v1.11/validation": 1221, "v1.0/train": 7610, "v1.0/validation": 950},
    {"v1.11": ("cos_e", "v1.11"), "v1.0": ("cos_e_v1_0", "v1.0")},
    {"v1.11/train": "cos_e:0.0.1/train", "v1.11/validation": "cos_e:0.0.1/validation"},
)
# There is no test split with explanations.
TASK = Task(
    "cos_e", make, choice.grade, choice.parse, "choice",
    source=SOURCE, train="v1.11/train", test="v1.11/validation", answers=choice.ANSWERS,
    released=released.grade_choice, options=choice.option_replies,
)  # fmt: skip
