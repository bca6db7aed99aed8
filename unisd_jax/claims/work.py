"""Many things to be made by a few processes, each on a core of its own; what is there already is not made again."""

import contextlib
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from unisd_jax.claims.runs import Settings
from unisd_jax.claims.variants import Variant
from unisd_jax.interrupt import Interrupted
from unisd_jax.io import write_json_atomic


class Task(NamedTuple):
    """Something to be made, by name: `work(settings, variants, *arguments)` makes it and returns JSON.

    `depends` is all that it depends on beside its name; it is there if its mark and `output` are. Each `phase` begins
    when the one before is over.
    """

    name: str
    work: Callable[..., Any]
    arguments: tuple
    depends: str
    phase: int = 0
    output: Path | None = None


def work_off(tasks: Sequence[Task], settings: Settings, variants: dict[str, Variant], jobs: int) -> list[str]:
    """Makes what is not there yet, `jobs` at a time; the names of what failed."""
    waiting = [task for task in tasks if not is_made(settings, task)]
    print(f"{len(tasks) - len(waiting)} of {len(tasks)} are there already", flush=True)
    failed: list[str] = []
    context, started, done = multiprocessing.get_context("spawn"), time.monotonic(), 0
    free = context.Queue()
    for core in range(jobs):
        free.put(core)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    with ProcessPoolExecutor(jobs, context, _take_core, (free, jobs)) as pool:
        try:
            for phase in sorted({task.phase for task in waiting}):
                part = [task for task in waiting if task.phase == phase]
                left: dict[Future, Task] = {pool.submit(_run, task, settings, variants): task for task in part}
                while left:
                    for future in wait(left, return_when=FIRST_COMPLETED).done:
                        task = left.pop(future)
                        done += 1
                        line, passed = _said(task, future, settings)
                        failed += [] if passed else [task.name]
                        to_go = (time.monotonic() - started) / done * (len(waiting) - done) / 60
                        print(f"[{done}/{len(waiting)}] {line}; about {to_go:.0f} min to go", flush=True)
                if failed:
                    break
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)  # a training saves
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
    return failed


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _said(task: Task, future: Future, settings: Settings) -> tuple[str, bool]:
    error = future.exception()
    if isinstance(error, Interrupted | KeyboardInterrupt):
        raise KeyboardInterrupt
    if error is None:
        return f"{task.name}: {future.result():.0f} s", True
    return f"{task.name} FAILED: {error} (see {_log(settings, task)})", False


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _take_core(free, jobs: int) -> None:
    """Each worker has a core of its own, so that times can be compared, and ends with the command."""
    os.setsid()  # Ctrl-C in a terminal is for the command, which passes it on
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # while it waits for work
    threading.Thread(target=_end_with_parent, daemon=True).start()
    core = free.get()
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if 1 < jobs <= len(allowed):
        os.sched_setaffinity(0, {allowed[core]})


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(task: Task, settings: Settings, variants: dict[str, Variant]) -> float:
    """Makes one thing with what it says in a log, and marks it as made; its seconds."""
    started, log = time.monotonic(), _log(settings, task)
    log.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            found = task.work(settings, variants, *task.arguments)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    seconds = time.monotonic() - started
    write_json_atomic(mark(settings, task), {"seconds": seconds, "found": found})
    return seconds


def is_made(settings: Settings, task: Task) -> bool:
    """Whether there is nothing left to do for it."""
    return mark(settings, task).exists() and (task.output is None or task.output.exists())


def mark(settings: Settings, task: Task) -> Path:
    """Where it is written that something is made, and what came out: named by all that it depends on."""
    key = hashlib.sha256(task.depends.encode()).hexdigest()[:8]
    return settings.out / "made" / f"{_word(task.name)}-{key}.json"


def _log(settings: Settings, task: Task) -> Path:
    return settings.out / "logs" / f"{_word(task.name)}.txt"


def _word(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_").replace("=", "")
