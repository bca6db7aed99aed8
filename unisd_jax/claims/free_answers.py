"""The embedded questions without any form: whatever says the answer is right. A task with many valid replies."""

from unisd_jax.data.rows import Row
from unisd_jax.data.tasks import Form, Item, Task
from unisd_jax.data.tasks import short_answers as strict


def make(row: Row, position: int, form: Form) -> Item:
    """The question alone; its gold reply, one of many that would do, is the answer in one sentence."""
    item = strict.make(row, position, form)
    return item._replace(prompt=item.question, completion=f"It is {item.answer}.")


def grade(text: str, item: Item) -> dict[str, float]:
    """`exact`: the reply says the answer, in whatever words; `gold`: it is the gold reply."""
    said = strict.grade(text, item)["contains"]
    return {"exact": said, "gold": float(text.strip() == item.completion)}


TASK = Task("free_answers", make, grade, embedded=strict.embedded_path)
