"""The benchmarks by name, one module each."""

import difflib

from unisd_jax.data.tasks import cos_e, jsonl, mbpp, scienceqa, short_answers
from unisd_jax.data.tasks.base import Item, Task
from unisd_jax.errors import ConfigError

TASKS: dict[str, Task] = {
    task.name: task for task in (short_answers.TASK, jsonl.TASK, mbpp.TASK, cos_e.TASK, scienceqa.TASK)
}

__all__ = ["TASKS", "Item", "Task", "get_task"]


def get_task(name: str) -> Task:
    """The task called `name`.

    Raises:
      ConfigError: there is none; the message names the nearest one.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)
    raise ConfigError(f"unknown task {name!r}, did you mean {near[0]!r}? Known tasks: {', '.join(sorted(TASKS))}")
