"""Token ids of many rows as one table: int32 arrays in memory, or files that are mapped into it.

A row has the same named segments as every other, of any length. Rows are kept in parts, each one array:

    [number of rows | lengths of the segments, row after row | their token ids in the same order | sha256 of all before]

On disk a part is one file of just these numbers, whole or not there: a run that was stopped goes on with the parts it
has, and several processes can make a share each. A part that does not fit its checksum is made again.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from unisd_jax.errors import UserError
from unisd_jax.io import write_bytes_atomic

# One thread prepares what the encoder in another one works on; the encoder itself uses all cores.
WORKERS = 4
PART_ROWS, MOST_PARTS = 1024, 256  # a mapped part keeps a file open
KEPT_FOLDERS, KEPT_SECONDS = 8, 24 * 3600
CHECKSUM = 8  # int32 words of a sha256

Columns = Sequence[Sequence[np.ndarray]]  # [segment][row] -> ids [length] int32


class TokenTable:
    """`segment(row, name)` are a row's token ids, `lengths` [rows, segments] int32 how many; `names` the segments."""

    def __init__(self, names: Sequence[str], parts: Sequence[np.ndarray], part_rows: int):
        self.names, self._parts, self._part_rows = tuple(names), parts, part_rows
        lengths = [_lengths(part, len(self.names)) for part in parts]
        self.lengths = np.concatenate(lengths) if parts else np.zeros((0, len(self.names)), np.int32)
        self._starts = [1 + own.size + np.cumsum(own, dtype=np.int64) - own.ravel() for own in lengths]

    def __len__(self) -> int:
        return len(self.lengths)

    def segment(self, row: int, name: str) -> np.ndarray:
        """The ids [length] of one segment of one row, int32 and read-only."""
        column, (part, place) = self.names.index(name), divmod(row, self._part_rows)
        start = self._starts[part][place * len(self.names) + column]
        return self._parts[part][start : start + self.lengths[row, column]]


def pack(columns: Columns) -> np.ndarray:
    """One part from its segments' ids."""
    rows = [ids for row in zip(*columns, strict=True) for ids in row]
    body = np.concatenate([[len(columns[0])], [len(ids) for ids in rows], *rows], dtype=np.int32, casting="same_kind")
    part = np.concatenate([body, _checksum(body)])
    part.flags.writeable = False
    return part


def build_table(
    names: Sequence[str],
    rows: int,
    make: Callable[[range], Columns],
    *,
    folder: Path | None = None,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> TokenTable:
    """The table of `rows` rows: read from `folder` where it is there, made and put there where it is not.

    Args:
      names: of the segments.
      rows: how many there are.
      make: the columns of some of the rows; several threads call it.
      folder: where the parts are kept, named by all that they depend on; None: nowhere, then every process makes all.
      share: (index, count) of the processes that make the parts together.
      wait: returns once all processes have come here.

    Raises:
      UserError: from `make`, in every process alike.
      OSError: the folder cannot be written.
    """
    part_rows = max(PART_ROWS, -(-rows // MOST_PARTS))
    ranges = [range(start, min(start + part_rows, rows)) for start in range(0, rows, part_rows)]
    if folder is None or not ranges:
        with ThreadPoolExecutor(WORKERS) as pool:
            return TokenTable(names, list(pool.map(lambda own: pack(make(own)), ranges)), part_rows)
    parts, is_new, (index, count) = _Parts(folder, len(names), ranges, make), not folder.exists(), share
    if count > 1:
        # What fails here fails again below, in all processes, so that none is left waiting for another.
        with suppress(UserError, OSError):
            parts.fill(range(index, len(ranges), count))
        wait()
    parts.fill(range(len(ranges)))
    with suppress(OSError):  # it may be a folder that can only be read
        os.utime(folder)
    if is_new and index == 0:
        remove_old(folder.parent)
    return TokenTable(names, [parts.found[number] for number in range(len(ranges))], part_rows)


def remove_old(root: Path) -> None:
    """Removes the tables that were not used for longest beyond `KEPT_FOLDERS`; none that was used within a day."""
    used = {}
    for folder in root.iterdir():
        if re.fullmatch(r"[0-9a-f]{64}", folder.name):
            with suppress(OSError):  # another process may be removing it
                used[folder] = folder.stat().st_mtime
    for folder in sorted(used, key=used.get, reverse=True)[KEPT_FOLDERS:]:
        if used[folder] < time.time() - KEPT_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


class _Parts:
    """The parts in one folder; `found` holds by number those that have been read or made."""

    def __init__(self, folder: Path, segments: int, ranges: Sequence[range], make: Callable[[range], Columns]):
        self.folder, self.segments, self.ranges, self.make = folder, segments, ranges, make
        self.found: dict[int, np.ndarray] = {}

    def fill(self, numbers: Sequence[int]) -> None:
        """Reads those of `numbers` that are not found yet, or makes them."""
        missing = [number for number in numbers if number not in self.found]
        began, made = time.monotonic(), []
        with ThreadPoolExecutor(WORKERS) as pool:
            for number, (part, is_new) in zip(missing, pool.map(self._part, missing), strict=True):
                self.found[number] = part
                made += [number] * is_new
        if len(made) > 1:
            rows, seconds = sum(len(self.ranges[number]) for number in made), time.monotonic() - began
            print(f"tokenised {rows} of {self.ranges[-1].stop} items in {seconds:.1f} s", flush=True)

    def _part(self, number: int) -> tuple[np.ndarray, bool]:
        """(one part, whether it had to be made)."""
        part = self._read(number)
        if part is not None:
            return part, False
        part = pack(self.make(self.ranges[number]))
        write_bytes_atomic(self._path(number), part.tobytes())
        written = self._read(number)
        return (part if written is None else written), True

    def _read(self, number: int) -> np.ndarray | None:
        """The part as it is on the disk, mapped; None where it is missing or damaged, which is said."""
        try:
            part = np.memmap(self._path(number), np.int32, mode="r")
        except FileNotFoundError:
            return None
        except ValueError:  # empty, or half a number at its end
            part = None
        if part is not None and _is_whole(part, len(self.ranges[number]), self.segments):
            return part.view(np.ndarray)
        print(f"token cache {self._path(number)} is damaged: made again", flush=True)
        return None

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.int32"


def _lengths(part: np.ndarray, segments: int) -> np.ndarray:
    return part[1 : 1 + part[0] * segments].reshape(-1, segments)


def _checksum(body: np.ndarray) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(body).digest(), np.int32)


def _is_whole(part: np.ndarray, rows: int, segments: int) -> bool:
    """Whether an array is an undamaged part of so many rows and segments."""
    head = 1 + rows * segments
    if len(part) < head + CHECKSUM or part[0] != rows:
        return False
    if not np.array_equal(_checksum(part[:-CHECKSUM]), part[-CHECKSUM:]):
        return False
    return head + _lengths(part, segments).sum(dtype=np.int64) + CHECKSUM == len(part)
