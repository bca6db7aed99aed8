"""Runs a graph of jobs on slots, each as a process of its own, and ends them all when asked to."""

import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from unisd_jax.experiments import jobs as of_jobs
from unisd_jax.experiments.jobs import ELSEWHERE, FAILED, FINISHED, GOOD, INTERRUPTED, NOT_RUN, RUNNING, WAITING, Job
from unisd_jax.experiments.slots import Slot, available_gib, peak_gib, resident_gib, total_gib
from unisd_jax.experiments.state import Manifest
from unisd_jax.experiments.status import Screen
from unisd_jax.io import try_lock, write_text_atomic
from unisd_jax.metrics import clock

POLL = 0.2  # seconds between two looks at the processes
GRACE = 300.0  # seconds that a job has to save after Ctrl-C, before it is ended
TERM_GRACE = 10.0  # seconds from there until it is killed
PATIENCE = 300.0  # seconds that a job waits, with none of ours running, for memory that others hold
# A result is worth more than another run begun.
ORDER = {"cache": 0, "evaluate": 1, "train": 2, "report": 3}


@dataclass
class Process:
    """A job at work."""

    job: Job
    slot: Slot
    popen: subprocess.Popen
    started: float = field(default_factory=time.monotonic)
    peak: float = 0.0  # GiB

    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.started


class Pool:
    """The jobs, their states, and the processes that run now."""

    def __init__(
        self,
        jobs: Sequence[Job],
        slots: Sequence[Slot],
        manifest: Manifest,
        screen: Screen,
        *,
        memory_gib: float | None = None,
    ):
        self.jobs = {job.name: job for job in jobs}
        self.slots, self.manifest, self.screen = slots, manifest, screen
        self.states = of_jobs.first_states(jobs)
        self.running: dict[str, Process] = {}
        self.finished = [record for record in manifest.read().values() if record.get("state") == FINISHED]
        self.note = ""  # why something waits
        self._idle_since = time.monotonic()  # where none of ours runs: since when
        self.was_stopped = False
        self._memory_gib = memory_gib
        self._locks = manifest.path.parent / "jobs" / "slots"

    def run(self) -> dict[str, str]:
        """Runs all that can be run; returns the states. After a signal, the rest is left as it is."""
        self.manifest.add(self.jobs.values(), self.states)
        with _signals() as asked:
            try:
                while not asked and self._step():
                    self.screen.show(self)
                    time.sleep(POLL)
            finally:
                self.was_stopped = bool(asked)
                self._stop(asked)
                self.screen.close()
        return self.states

    # --- Scheduling ---

    def _step(self) -> bool:
        """Looks at what has ended and starts what can start; whether anything is left to wait for."""
        for process in list(self.running.values()):
            status = _ended(process)
            if status is not None:
                self._finish(process, status)
        for job in self.jobs.values():
            lost = [name for name in job.needs if self._need(name) in (FAILED, NOT_RUN)]
            if lost and self.states[job.name] == WAITING and job.kind != "report":
                self._set(job, NOT_RUN)
                self.screen.event("not run", job, f"needs {lost[0]}")
        self.note = ""
        for job in self._ready():
            if self._open_slots(job) and not self._try(job):
                break
        return bool(self.running) or any(state in (WAITING, ELSEWHERE) for state in self.states.values())

    def _ready(self) -> list[Job]:
        def is_ready(job: Job) -> bool:
            enough = (FAILED, NOT_RUN, *GOOD) if job.kind == "report" else GOOD
            is_open = self.states[job.name] in (WAITING, ELSEWHERE)
            return is_open and all(self._need(name) in enough for name in job.needs)

        return sorted(filter(is_ready, self.jobs.values()), key=lambda job: ORDER[job.kind])

    def _need(self, name: str) -> str:
        """The state of a job that another needs; one that is not among ours was looked at before."""
        return self.states.get(name, FINISHED)

    def _try(self, job: Job) -> bool:
        """Starts the job, or sees that it need not; False: no job can start now."""
        lock = try_lock(job.lock)
        if lock is None:
            if self.states[job.name] != ELSEWHERE:
                self._set(job, ELSEWHERE)
                self.screen.event("elsewhere", job, "a process from before, or of another command, works on it")
            return True
        slot_locks: list[int] = []
        try:
            if job.kind != "report" and of_jobs.is_finished(job):
                self._set(job, FINISHED)
                self.screen.event("finished", job, "by the other process")
                return True
            if not self._fits(job):
                return False
            slot, slot_locks = self._free_slot(job)
            if slot is not None:
                self._start(job, slot, [lock, *slot_locks])
            return True
        finally:
            for descriptor in (lock, *slot_locks):
                os.close(descriptor)

    def _open_slots(self, job: Job) -> list[Slot]:
        """The slots for such jobs on which none of ours runs."""
        used = {process.slot.name for process in self.running.values()}
        apart = any(not slot.device for slot in self.slots)
        return [slot for slot in self.slots if slot.name not in used and (not apart or slot.device == job.device)]

    def _free_slot(self, job: Job) -> tuple[Slot | None, list[int]]:
        """A slot where the job can run, and its locks: a job that outlived an earlier command still holds its own."""
        for slot in self._open_slots(job):
            if not slot.exclusive:
                return slot, []
            locks = [try_lock(self._locks / f"{name}.lock") for name in slot.parts or (slot.name,)]
            held = [lock for lock in locks if lock is not None]
            if len(held) == len(locks):
                return slot, held
            for lock in held:
                os.close(lock)
        return None, []

    # --- Memory ---

    def _fits(self, job: Job) -> bool:
        """Whether the job's memory is there, beside what the running ones have yet to take."""
        guarded = self._memory_gib is not None or any(slot.is_cpu and slot.device for slot in self.slots)
        free = available_gib() if guarded else None
        if free is None:
            return True
        needed, is_guess = self._expected_gib(job)
        for process in self.running.values():
            free -= max(0.0, self._expected_gib(process.job)[0] - resident_gib(process.popen.pid))
        if needed <= free or (not self.running and self._may_exceed(needed, is_guess)):
            return True
        self.note = f"{job.name} waits for memory: needs {needed:.1f} GiB, {max(free, 0):.1f} are free"
        return False

    def _may_exceed(self, needed: float, is_guess: bool) -> bool:
        """Whether a job may run alone: its size is a guess, or a larger machine's, or others hold memory for long."""
        if self._memory_gib is not None:
            return False
        if is_guess or needed > (total_gib() or math.inf):
            return True
        return time.monotonic() - self._idle_since >= PATIENCE

    def _expected_gib(self, job: Job) -> tuple[float, bool]:
        """Memory that the job will take, and whether that is no more than a guess."""
        if self._memory_gib is not None:
            return self._memory_gib, False
        measured = [
            record["peak_memory_gib"]
            for record in self.finished
            if record.get("peak_memory_gib")
            and record["kind"] == job.kind
            and record["about"].get("model") == job.about.get("model")
        ]
        return (max(measured), False) if measured else (job.expected_gib, True)

    # --- Processes ---

    def _start(self, job: Job, slot: Slot, locks: list[int]) -> None:
        of_jobs.write_config(job)
        for old in (job, *(other for other in self.jobs.values() if other.kind == "report")):
            old.marker.unlink(missing_ok=True)  # a report is only as new as what it reports
        self.manifest.update(job.name, state=RUNNING, slot=slot.name)
        self.states[job.name] = RUNNING
        words = job.words(slot.environment)
        with open(job.log, "ab") as log:
            log.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} $ {words}\n".encode())
            log.flush()
            try:
                popen = subprocess.Popen(
                    job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=locks,
                    start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"} | slot.environment,
                )  # fmt: skip
            except OSError as error:
                log.write(f"cannot be started: {error}\n".encode())
                self._set(job, FAILED)
                self.screen.event("failed", job, str(error))
                return
        if slot.cores and hasattr(os, "sched_setaffinity"):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(popen.pid, slot.cores)
        self.running[job.name] = Process(job, slot, popen, peak=peak_gib(popen.pid) or 0.0)
        self.screen.event("start", job, f"on {slot.name}")

    def _finish(self, process: Process, status: int, *, stopped: bool = False) -> None:
        """Takes an ended process out, with all that it may have left running."""
        job = process.job
        _signal_group(process.popen.pid, signal.SIGKILL)
        del self.running[job.name]
        self._idle_since = time.monotonic()
        whole = all(self._need(name) in GOOD for name in job.needs)
        if status == 0 and whole:
            write_text_atomic(job.marker, job.key)
        if status == 0 and (of_jobs.is_finished(job) or not whole):
            state, reason = FINISHED, ""
        elif stopped:
            state, reason = INTERRUPTED, ""
        else:
            why = {0: "it wrote no result", -9: "killed, as when memory runs out"}.get(status, f"status {status}")
            state, reason = FAILED, f"{why}, see {job.log}"
        peak = round(process.peak, 3) or None
        took = {"seconds": round(process.seconds(), 1), "peak_memory_gib": peak, "status": status}
        self._set(job, state, **took)
        if state == FINISHED:
            self.finished.append(job.record() | took)
        self.screen.event(state, job, reason or f"after {clock(process.seconds())}")

    def _set(self, job: Job, state: str, **changes: object) -> None:
        self.states[job.name] = state
        self.manifest.update(job.name, state=state, **changes)

    def _stop(self, asked: list[int]) -> None:
        """Ends all processes: SIGINT, so that they save; later SIGTERM, then SIGKILL, at once when asked twice."""
        if not self.running:
            return
        for process in self.running.values():
            _signal(process.popen.pid, signal.SIGINT)
        self.screen.say(f"stopping {len(self.running)} jobs, which save first (once more to stop at once)")
        began, terminated = time.monotonic(), False
        while self.running:
            waited = time.monotonic() - began
            if len(asked) > 1 or waited > GRACE + TERM_GRACE:
                number = signal.SIGKILL
            else:
                number = signal.SIGTERM if waited > GRACE and not terminated else None
            for process in list(self.running.values()):
                if number is not None:
                    _signal_group(process.popen.pid, number)
                status = _ended(process)
                if status is not None:
                    with suppress(OSError):  # a full disk must not keep the others alive
                        self._finish(process, status, stopped=True)
            terminated = terminated or number is not None
            time.sleep(POLL / 4)


def _ended(process: Process) -> int | None:
    """The exit status of a process, None while it runs; looks at the most memory that it has held so far.

    Not the kernel's count of an ended child, which holds what this process had when it made the child.
    """
    popen = process.popen
    process.peak = max(process.peak, peak_gib(popen.pid) or 0.0)
    try:
        process_id, status = os.waitpid(popen.pid, os.WNOHANG)
    except ChildProcessError:
        return popen.returncode if popen.returncode is not None else -1
    if process_id == 0:
        return None
    popen.returncode = os.waitstatus_to_exitcode(status)
    return popen.returncode


def _signal(process_id: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process_id, number)


def _signal_group(process_id: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process_id, number)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that ask to stop, as they come. One that is ignored, as under nohup, stays so."""
    asked: list[int] = []
    earlier = {}

    def ask(number: int, _frame: object) -> None:
        # A terminal that closes says so twice: the kernel and the shell.
        if number != signal.SIGHUP or number not in asked:
            asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            earlier[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
