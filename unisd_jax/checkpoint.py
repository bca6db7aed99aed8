"""Checkpoints that are whole or not used: orbax writes them, a checksum of every array says whether they came back.

A checkpoint of step n holds the train state, the data iterator's place and a record of what it belongs to. Steps are
tried from the newest backwards; one that cannot be read is moved aside, never silently.
"""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from unisd_jax.errors import UserError
from unisd_jax.models.checksums import checksums, named_leaves
from unisd_jax.parallel import multihost
from unisd_jax.types import TrainState

FORMAT = "unisd_jax/1"


class Restored(NamedTuple):
    """A checkpoint read back: the state, the data iterator's place, and what was recorded beside them."""

    state: TrainState
    data: dict[str, Any]
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in `directory`; saving is asynchronous, the newest `keep` stay.

    `say` receives one line for everything a user should know.
    """

    def __init__(self, directory: str | Path, *, keep: int, say: Callable[[str], None] = print):
        self.directory = Path(directory).absolute()
        self.say = say
        # orbax reports an unreadable checkpoint with its own tracebacks; `restore` says it in one line instead.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        _ignore_closed_loops()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, state: TrainState, *, data: dict[str, Any], record: dict[str, Any]) -> None:
        """Starts writing the checkpoint of `state.step`; a step that is already there is left as it is."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        leaves = named_leaves(state)
        meta = {"format": FORMAT, "record": record, "data": data, "checksums": checksums(leaves)}
        meta |= {"digest": _digest(meta)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(leaves), meta=ocp.args.JsonSave(meta))
        with self._writing():
            self._manager.save(step, args=args)

    def restore(self, like: TrainState) -> Restored | None:
        """The newest readable checkpoint with the shapes and sharding of `like`; None if there is none at all.

        Raises:
          UserError: there are checkpoints but none can be read, or they belong to another program or model.
        """
        self._manager.reload()
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps and _holds_files(self.directory):
            raise UserError(
                f"{self.directory} holds files but no checkpoint of this program; "
                "choose another name or output_dir, or move it away"
            )
        if not steps and _holds_files(self._damaged):
            raise UserError(
                f"every checkpoint of this run was damaged (see {self._damaged}); "
                f"delete {self.directory.parent} to start afresh"
            )
        for step in steps:
            restored, problem = None, "another process could not read it"
            try:
                restored, expected = self._read(step, like)
            except UserError:
                raise
            except Exception as error:  # whatever orbax, tensorstore or the file system make of a damaged file
                problem = _reason(error)
            # All processes have read on their own until here; a sum over a divided array needs all of them.
            if not any(multihost.largest(int(restored is None))):
                if checksums(named_leaves(restored.state)) == expected:
                    return restored
                problem = "its arrays are not the ones that were saved"
            self._move_aside(step, problem)
        if steps:
            raise UserError(
                f"none of the checkpoints in {self.directory} can be read (steps {steps}, moved to "
                f"{self._damaged}); delete {self.directory.parent} to start afresh"
            )
        return None

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._writing():
            self._manager.close()

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def read(self, step: int, like: TrainState) -> TrainState:
        """The state after `step` updates, with the shapes and sharding of `like`; for looking back at a run.

        Raises:
          UserError: there is no such checkpoint, it cannot be read, or it belongs to another program or model.
        """
        self._manager.reload()
        if step not in self._manager.all_steps():
            raise UserError(f"{self.directory} has no checkpoint of step {step}; it has {self._manager.all_steps()}")
        try:
            restored, expected = self._read(step, like)
        except UserError:
            raise
        except Exception as error:  # whatever orbax, tensorstore or the file system make of a damaged file
            raise UserError(f"{self.directory}/{step} cannot be read ({_reason(error)})") from error
        if checksums(named_leaves(restored.state)) != expected:
            raise UserError(f"{self.directory}/{step}: its arrays are not the ones that were saved")
        return restored.state

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever orbax and tensorstore make of a full disk; often from their threads
            if isinstance(error, jax.errors.JaxRuntimeError) and multihost.process_count() > 1:
                raise  # of a collective: another process is gone
            raise UserError(f"{self.directory}: a checkpoint could not be written ({_reason(error)})") from error

    @property
    def _damaged(self) -> Path:
        return self.directory.parent / "damaged_checkpoints"

    def _read(self, step: int, like: TrainState) -> tuple[Restored, dict[str, list]]:
        """The checkpoint and the checksums it should have. Waits for no other process: one of them may fail."""
        folder = self.directory / str(step)
        meta = ocp.JsonCheckpointHandler().restore(folder / "meta")
        digest = meta.pop("digest", None)
        whole = digest == _digest(meta)
        if meta.get("format") != FORMAT and (whole or digest is None):
            raise UserError(f"{self.directory}/{step}: not a checkpoint of this program (format {FORMAT} expected)")
        if not whole:
            raise ValueError("its record is not the one that was saved")
        leaves = named_leaves(like)
        _check_same_leaves(meta["checksums"], leaves, self.directory / str(step))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, leaves)
        handler = ocp.StandardCheckpointHandler()
        found = handler.restore(folder / "state", args=ocp.args.StandardRestore(abstract))
        _, structure = jax.tree.flatten(like)
        state = jax.tree.unflatten(structure, [found[name] for name in leaves])
        return Restored(state, meta["data"], meta["record"]), meta["checksums"]

    def _move_aside(self, step: int, problem: str) -> None:
        target = self._damaged / str(step)
        if multihost.is_main():
            self._damaged.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(self.directory / str(step), target)
        multihost.wait_for_all(f"the damaged checkpoint {step}")
        self._manager.reload()
        self.say(f"checkpoint of step {step} cannot be read ({problem}); moved to {target}, trying the one before")


def _ignore_closed_loops() -> None:
    """No traceback from reads and writes still under way when orbax, at the first that fails, closes their loop."""
    earlier = sys.unraisablehook

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            earlier(unraisable)

    report.ignores_closed_loops = True
    if not hasattr(earlier, "ignores_closed_loops"):
        sys.unraisablehook = report


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    # tensorstore wraps the cause in paths and adds details in brackets: it stands last before the first bracket.
    text = " ".join(str(error).split()).partition(" [")[0] or type(error).__name__
    return text if len(text) <= 240 else f"{text[:120]} ... {text[-115:]}"


def _check_same_leaves(saved: dict[str, list], leaves: dict[str, jax.Array], where: Path) -> None:
    needed = {name: [list(leaf.shape), str(np.dtype(leaf.dtype))] for name, leaf in leaves.items()}
    for name in needed | saved:
        found, expected = saved[name][:2] if name in saved else "missing", needed.get(name, "none")
        if found != expected:
            raise UserError(
                f"{where}: {name} is {found}, this run needs {expected}; "
                "the checkpoint belongs to another model or configuration: choose another name or output_dir"
            )


def _holds_files(directory: Path) -> bool:
    # What a killed save has left is removed by orbax, in its own time.
    return directory.is_dir() and any(
        path.is_file() and ".orbax-checkpoint-tmp" not in str(path.relative_to(directory))
        for path in directory.rglob("*")
    )
