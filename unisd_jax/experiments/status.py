"""What is said while jobs run: a live table on a terminal, a line for each event anywhere else."""

import errno
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from unisd_jax.experiments.jobs import FAILED, GOOD, INTERRUPTED, NOT_RUN, Job, last_lines, last_record
from unisd_jax.metrics import clock

if TYPE_CHECKING:
    from unisd_jax.experiments.pool import Pool, Process

LINE_EVERY = 60.0  # seconds between two lines on how far everything is
SHOWN = 12  # lines of a failed job's log


def tell(text: str, stream: TextIO | None = None) -> None:
    """Prints a line. A terminal that is gone or a pipe that nobody reads must not end what runs: then, silence."""
    with _silence_if_lost(stream or sys.stdout):
        print(text, file=stream or sys.stdout, flush=True)


@contextmanager
def _silence_if_lost(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Screen:
    """Where events, the table and the summary go."""

    def __init__(self):
        self._console = Console(file=sys.stdout)
        # rich takes FORCE_COLOR, which CI systems set, for a terminal: ask the stream itself as well.
        self._is_terminal = self._console.is_terminal and sys.stdout.isatty()
        self._live: Live | None = None
        self._shown, self._line = 0.0, time.monotonic()

    def event(self, what: str, job: Job, detail: str = "") -> None:
        """One thing that happened to a job."""
        self.say(f"{time.strftime('%H:%M:%S')}  {what:<11}  {job.name}{f'  {detail}' if detail else ''}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live is None:
            tell(text)
            return
        with _silence_if_lost(sys.stdout):
            self._console.print(Text(text), soft_wrap=True)

    def show(self, pool: "Pool") -> None:
        """How far everything is, now and then."""
        now = time.monotonic()
        if self._is_terminal and now - self._shown >= 1:
            self._shown = now
            with _silence_if_lost(sys.stdout):
                if self._live is None:
                    self._live = Live(console=self._console, auto_refresh=False, transient=True)
                    self._live.start()
                self._live.update(_table(pool), refresh=True)
        elif not self._is_terminal and now - self._line >= LINE_EVERY:
            self._line = now
            self.say(f"{time.strftime('%H:%M:%S')}  {overview(pool)}")

    def close(self) -> None:
        """Takes the table away; the events stay."""
        if self._live is not None:
            with _silence_if_lost(sys.stdout):
                self._live.stop()
            self._live = None


def overview(pool: "Pool") -> str:
    """How many jobs are in which state, how long the rest will take, and what it waits for."""
    counts = Counter(pool.states.values())
    parts = [f"{number} {state}" for state, number in counts.items()]
    left = time_left(pool)
    note = f"; {pool.note}" if pool.note else ""
    return f"{', '.join(parts)}; ETA {'-' if left is None else clock(left)}{note}"


def summary(jobs: Sequence[Job], states: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    """The lines at the end: the counts and, of each failure, the end of its log and the command that repeats it."""
    counts = Counter(states.values())
    lines = [", ".join(f"{number} {state}" for state, number in counts.items())]
    for job in jobs:
        state = states[job.name]
        if state == NOT_RUN:
            lost = [name for name in job.needs if states[name] in (FAILED, NOT_RUN)]
            lines.append(f"not run: {job.name}, which needs {lost[0]} ({states[lost[0]]})")
        elif state in (FAILED, INTERRUPTED):
            lines += ["", f"{state}: {job.name}"]
            if state == FAILED:
                lines += [f"    {line}" for line in last_lines(job.log, SHOWN)]
            lines += [f"    log: {job.log}", f"    again: {job.words(environment)}"]
    return lines


# --- Times ---


def time_left(pool: "Pool") -> float | None:
    """Seconds until all is done, going by what such jobs took; None while none of a kind has ended."""
    total = 0.0
    for job in pool.jobs.values():
        if pool.states[job.name] in (*GOOD, FAILED, NOT_RUN):
            continue
        process = pool.running.get(job.name)
        left = _typical(job, pool.finished) if process is None else _left(process, pool.finished)
        if left is None:
            return None
        total += left
    return total / max(1, sum(slot.device for slot in pool.slots))


def _typical(job: Job, finished: Sequence[Mapping[str, Any]]) -> float | None:
    """What jobs such as this one took: the same thing if one is known, else others of the kind."""
    alike = [record for record in finished if record["kind"] == job.kind and record.get("seconds")]
    names = ("mode", "task", "model", "steps")
    same = [record for record in alike if all(record["about"].get(name) == job.about.get(name) for name in names)]
    times = [record["seconds"] for record in same or alike]
    # Nothing is known of a report before the first; it takes seconds.
    return statistics.mean(times) if times else (0.0 if job.kind == "report" else None)


def _left(process: "Process", finished: Sequence[Mapping[str, Any]]) -> float | None:
    typical, job = _typical(process.job, finished), process.job
    step, steps = progress(job)
    if typical is None and step:
        record = last_record(_metrics(job))
        return (steps - step) * float(record.get("seconds_step") or 0)
    return None if typical is None else max(0.0, typical - process.seconds())


def progress(job: Job) -> tuple[int, int]:
    """Steps that a training has done, and all of them; (0, 0) for other jobs."""
    if job.kind != "train":
        return 0, 0
    return int(last_record(_metrics(job)).get("step") or 0), int(job.about.get("steps") or 0)


def _metrics(job: Job) -> Path:
    return Path(job.folder).parents[1] / job.name / "metrics.jsonl"


def _table(pool: "Pool") -> Table:
    table = Table(caption=Text(overview(pool)), caption_justify="left", expand=True)
    table.add_column("running", overflow="ellipsis", no_wrap=True, ratio=1)
    for heading in ("on", "step", "time", "ETA"):
        table.add_column(heading, justify="right", no_wrap=True)
    for process in pool.running.values():
        step, steps = progress(process.job)
        left = _left(process, pool.finished)
        table.add_row(
            Text(process.job.name), process.slot.name, f"{step}/{steps}" if steps else "",
            clock(process.seconds()), "-" if left is None else clock(left),
        )  # fmt: skip
    return table
