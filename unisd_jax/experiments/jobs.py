"""A job of an experiment: its command, what it needs first, and the files that tell whether it is finished."""

import dataclasses
import glob
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unisd_jax.errors import ConfigError
from unisd_jax.io import write_text_atomic

# What a job may be in; a job that is one of the last four does not run (again).
WAITING, ELSEWHERE, RUNNING, FINISHED, UNNEEDED, FAILED, NOT_RUN = (
    "waiting",
    "runs elsewhere",
    "running",
    "finished",
    "not needed",
    "failed",
    "not run",
)
INTERRUPTED = "interrupted"
GOOD = FINISHED, UNNEEDED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One command. `key` is a hash of all that its numbers depend on; it is part of `name`, which names the folder.

    `outputs` are patterns of files; `about` says what is trained or measured (mode, task, model, seed, steps).
    `expected_gib` is the first guess of its memory. `device`: it computes on an accelerator where there is one.
    `config` is the text of its configuration file.
    """

    kind: str  # cache | train | evaluate | report
    name: str
    key: str
    command: tuple[str, ...]
    folder: str
    outputs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    experiments: tuple[str, ...] = ()
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    device: bool = True
    expected_gib: float = 2.0
    config: str = dataclasses.field(default="", repr=False)

    @property
    def log(self) -> Path:
        """What the command says, of every attempt."""
        return Path(self.folder) / "log.txt"

    @property
    def lock(self) -> Path:
        """Held while a process works on the job."""
        return Path(self.folder) / "lock"

    @property
    def marker(self) -> Path:
        """Holds the key once the command has succeeded."""
        return Path(self.folder) / "done"

    def words(self, environment: Mapping[str, str] | None = None) -> str:
        """The command as it is typed."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
        return " ".join([*settings, shlex.join(self.command)])

    def record(self) -> dict[str, Any]:
        """Everything but the configuration's text, which lies in the folder, as JSON values."""
        record = dataclasses.asdict(self)
        del record["config"]
        return record


def read_job(record: Mapping[str, Any]) -> Job:
    """The job of a `Job.record`.

    Raises:
      ConfigError: something else.
    """
    names = {field.name for field in dataclasses.fields(Job)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
    try:
        return Job(**{name: value for name, value in values.items() if name in names})
    except TypeError as error:
        raise ConfigError(f"not a job ({error}); expected a list that run_experiments.py --cluster wrote") from None


def write_config(job: Job) -> None:
    """Makes the job's folder with its configuration."""
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    if job.config:
        write_text_atomic(Path(job.folder) / "options.yaml", job.config)


def is_finished(job: Job) -> bool:
    """Whether the command has done its work, whoever ran it and when.

    A training's result is the last file that it writes. An evaluation is found under a name that only it can tell, so
    for all else there is a marker too.
    """
    if job.kind != "train" and not (job.marker.exists() and job.marker.read_text() == job.key):
        return False
    return all(glob.glob(pattern) for pattern in job.outputs)


def is_begun(job: Job) -> bool:
    """Whether an earlier attempt was stopped on the way, so that the same command goes on."""
    return job.log.exists() and not is_finished(job)


def first_states(jobs: Sequence[Job]) -> dict[str, str]:
    """`FINISHED`, `UNNEEDED` or `WAITING` for every job; `jobs` are in an order in which they can run.

    A cache whose users are among `jobs` and all finished is not needed. A report is only as new as what it reports.
    """
    states: dict[str, str] = {}
    for job in jobs:
        fresh = job.kind != "report" or all(states.get(name, FINISHED) in GOOD for name in job.needs)
        states[job.name] = FINISHED if fresh and is_finished(job) else WAITING
    used = {name for job in jobs for name in job.needs}
    wanted = {name for job in jobs if states[job.name] == WAITING for name in job.needs}
    unneeded = (job.name for job in jobs if job.kind == "cache" and job.name in used - wanted)
    return states | {name: UNNEEDED for name in unneeded if states[name] == WAITING}


def layers(jobs: Iterable[Job]) -> list[list[Job]]:
    """The jobs by how many others must follow one another before them."""
    depth: dict[str, int] = {}
    found: list[list[Job]] = []
    for job in jobs:
        depth[job.name] = max((depth[name] + 1 for name in job.needs), default=0)
        found += [[] for _ in range(depth[job.name] + 1 - len(found))]
        found[depth[job.name]].append(job)
    return found


def unfinished_needs(job: Job, by_name: Mapping[str, Job]) -> list[str]:
    """The jobs without which this one cannot run and which are not finished."""
    return [name for name in job.needs if not is_finished(by_name[name])]


def last_lines(path: Path, count: int = 12) -> list[str]:
    """The end of a log, whatever is in it."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]


def last_record(path: Path) -> dict[str, Any]:
    """The newest whole line of a JSON-lines file that may be written to just now; empty without one."""
    for line in reversed(last_lines(path, 2)):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return {}
