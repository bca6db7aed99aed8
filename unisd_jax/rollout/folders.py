"""Where the versions of the weights lie: a folder that was asked for, shared memory, or the run's own."""

import contextlib
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from unisd_jax.errors import ConfigError
from unisd_jax.io import try_flock

SYNC = "sync"  # in a run's directory, where shared memory has no room
SHARED_MEMORY = Path("/dev/shm")
SERVER_SEGMENTS = 5 * 10**8  # bytes that a server itself has in shared memory
# The folder of a process, and what lies there: versions, the base of adapters, parts of what is being written.
_LEFT, _OWN = re.compile(r"unisd-.+-\d+"), re.compile(r"v\d{8}|base|\..*")
_held: dict[Path, int] = {}  # locks of this process' own folders


def sync_folder(option: str | None, run_dir: Path, *, needed: int, owner: str, processes: int = 1) -> Path:
    """Where the versions of a run go: into `option`, else into shared memory if there is room, else below `run_dir`.

    `needed` bytes are what a process has there at a time, `processes` the number of those on this machine.

    What processes that are gone have left in shared memory is removed.

    Raises:
      ConfigError: `option` is not a folder that can be written.
    """
    if option is not None:
        folder = Path(option).absolute() / owner  # runs that share the option do not share versions
        if not _writable(folder):
            raise ConfigError(f"rollout.vllm.sync_dir: {option} is not a folder in which files can be made")
        return folder
    if SHARED_MEMORY.is_dir():
        for left in SHARED_MEMORY.glob("unisd-*"):
            _remove_if_left(left)
        folder = SHARED_MEMORY / f"unisd-{owner}-{os.getpid()}"
        room = needed * processes + SERVER_SEGMENTS
        if shutil.disk_usage(SHARED_MEMORY).free >= room and _writable(folder):
            if folder not in _held:
                _held[folder] = _held_folder(folder)
            return folder
    return run_dir.absolute() / SYNC / owner


def release(folder: Path) -> None:
    """Gives up this process' hold on a folder in shared memory, if it has one."""
    lock = _held.pop(folder, None)
    if lock is not None:
        os.close(lock)


def _locked(folder: Path) -> int | None:
    """A lock of a folder, which ends with this process, also in another container; None if someone has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    if try_flock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _held_folder(folder: Path) -> int:
    """The lock of a folder of this process, which another may have taken for left and removed before it was held."""
    while True:
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            lock = _locked(folder)
            if lock is not None and os.path.samestat(os.fstat(lock), folder.stat()):
                return lock
            if lock is not None:
                os.close(lock)
        time.sleep(0.01)


def _remove_if_left(folder: Path) -> None:
    """Removes a folder whose process is gone: whatever run it was, its weights would stay in memory."""
    with contextlib.suppress(OSError):
        if not _LEFT.fullmatch(folder.name) or not all(_OWN.fullmatch(path.name) for path in folder.iterdir()):
            return  # somebody's own
        lock = _locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
