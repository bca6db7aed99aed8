"""From where the options point to checked items, with a line on every row that was left out."""

from collections import Counter
from typing import NamedTuple

from unisd_jax.data.rows import short
from unisd_jax.data.sources import Place, find_rows, parse_split
from unisd_jax.data.tasks.base import Form, Item, Task, identity
from unisd_jax.errors import ConfigError, UserError


class Loaded(NamedTuple):
    """Items, and a line that says where they are from and what was left out."""

    items: list[Item]
    note: str


_ANYWHERE, _USUAL = Place(), Form()


def load_items(
    task: Task, side: str, *, place: Place = _ANYWHERE, split: str | None = None, form: Form = _USUAL,
    limit: int | None = None,
) -> Loaded:  # fmt: skip
    """The items of a task for `side`, "train" or "test"; of `split` where the task's own is not wanted.

    Raises:
      ConfigError: the task is not for training, does not know the form or the split, or has no data of its own.
      UserError: a file or a row is malformed; the message names file, line and field.
    """
    if form.answer not in task.answers:
        raise ConfigError(f"data.form.answer is {form.answer}; task {task.name!r} has {', '.join(task.answers)}")
    if side == "train" and task.train is None:
        raise ConfigError(f"task {task.name!r} is for evaluation only and never trained on: set another data.task")
    wanted = parse_split(split or (task.train if side == "train" else task.test), task, f"data.{side}_split")
    found = find_rows(task, wanted, place, side)
    items, skipped, position = {}, Counter(), -1
    chosen = range(len(found.rows))[wanted.rows]
    # Positions count from the start of the split: a slice of it must not shuffle the options another way.
    for number, row in enumerate(found.rows[: chosen.stop]):
        reason = task.skip(row)
        position += not reason
        if number not in chosen:
            continue
        if reason:
            skipped[reason] += 1
            continue
        item = task.make(row, position, form)
        if item.id in items:
            raise UserError(
                f"{row.where}: id {short(repr(item.id))} was already used in an earlier line, expected another"
            )
        items[item.id] = item
        if len(items) == limit:
            break
    if not items:
        left = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
        raise UserError(f"{found.origin}: no item is left of {len(found.rows)} rows{f' ({left})' if left else ''}")
    return Loaded(list(items.values()), _note(task, side, wanted.name, found, len(items), skipped))


def without_test_questions(train: list[Item], test: list[Item]) -> tuple[list[Item], int]:
    """The training items that no test item asks too, and how many were left out; published splits do overlap."""
    asked = {identity(item) for item in test}
    kept = [item for item in train if identity(item) not in asked]
    return kept, len(train) - len(kept)


def _note(task: Task, side: str, split: str, found, items: int, skipped: Counter) -> str:
    published = "" if found.published in (None, len(found.rows)) else f" of the {found.published} published"
    left = "".join(f", {number} left out: {reason}" for reason, number in skipped.items())
    return f"{side}: {items} items of {task.name} {split} from {found.origin} ({len(found.rows)} rows{published}{left})"
