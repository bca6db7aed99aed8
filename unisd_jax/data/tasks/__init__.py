"""The benchmarks by name, one module each, and a user's own task from a file."""

import difflib
import importlib.util
from pathlib import Path

from unisd_jax.data.tasks import (
    cos_e,
    gpqa,
    gsm8k,
    humaneval,
    jsonl,
    mbpp,
    medmcqa,
    scienceqa,
    short_answers,
    tooluse,
)
from unisd_jax.data.tasks.base import Form, Item, Source, Task
from unisd_jax.errors import ConfigError

_MODULES = short_answers, jsonl, mbpp, tooluse, scienceqa, cos_e, medmcqa, gsm8k, gpqa, humaneval
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _MODULES}

__all__ = ["TASKS", "Form", "Item", "Source", "Task", "get_task"]


def get_task(name: str) -> Task:
    """The task called `name`, or the `TASK` of the Python file that `name` is the path of.

    Raises:
      ConfigError: there is none; the message names the nearest one, or what is wrong with the file.
    """
    if name in TASKS:
        return TASKS[name]
    if name.endswith(".py"):
        return _own_task(Path(name))
    near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)
    raise ConfigError(
        f"unknown task {name!r}, did you mean {near[0]!r}? Known tasks: {', '.join(sorted(TASKS))}; or the path of a "
        "Python file with a TASK of your own"
    )


def _own_task(path: Path) -> Task:
    if not path.is_file():
        raise ConfigError(f"data.task: the file {path} does not exist, expected Python with a TASK")
    spec = importlib.util.spec_from_file_location(f"unisd_task_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code may fail in any way
        raise ConfigError(f"data.task: {path} cannot be run ({type(error).__name__}: {error})") from error
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        raise ConfigError(f"data.task: {path} has no TASK that is a unisd_jax.data.tasks.Task, found {task!r:.60}")
    return task
