"""What an output directory knows of its jobs: the manifest jobs.json, and locks that last as long as who holds them."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unisd_jax.errors import UserError
from unisd_jax.experiments.jobs import Job
from unisd_jax.io import try_lock, write_json_atomic

FORMAT = 1


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock `path`; writes nothing."""
    if not path.exists():
        return False
    descriptor = try_lock(path)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


class Manifest:
    """jobs.json: every job that was ever planned here, with its command, its state and what it took.

    Several processes may change it. It is a record: what is to be done is read from the outputs themselves.
    """

    def __init__(self, output_dir: str | Path):
        self.path = Path(output_dir) / "jobs.json"

    def read(self) -> dict[str, dict[str, Any]]:
        """The records by name; none where nothing was planned yet.

        Raises:
          UserError: the file is not a manifest.
        """
        try:
            tree = json.loads(self.path.read_text(encoding="utf-8"))
            return dict(tree["jobs"])
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.path} is not a list of jobs; move it away, or choose another --output-dir"
            ) from None

    def add(self, jobs: Iterable[Job], states: dict[str, str]) -> None:
        """Records jobs and their states; what earlier attempts took is kept."""
        with self._changed() as records:
            for job in jobs:
                records[job.name] = records.get(job.name, {}) | job.record() | {"state": states[job.name]}

    def update(self, name: str, **changes: Any) -> None:
        """Changes fields of one job's record."""
        with self._changed() as records:
            records[name] = records.get(name, {}) | changes

    @contextmanager
    def _changed(self) -> Iterator[dict[str, dict[str, Any]]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name("jobs.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = self.read()
            yield records
            write_json_atomic(self.path, {"format": FORMAT, "jobs": records})
