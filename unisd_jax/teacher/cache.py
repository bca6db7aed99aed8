"""What is made once for a run and read by later ones: records in a folder that is named by what they depend on.

Records are appended as they are made, so a run that was stopped goes on where it was; a finished folder holds a
checksum. The release names its caches by model and dataset only and returns whatever it finds (spec A8, A23).

    <root>/<kind>/<hash of the key>/   key.json, records.jsonl and, once finished, manifest.json
    <root>/<kind>/<hash of the key>.lock
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from unisd_jax.io import try_flock, write_json_atomic

RECORDS, KEY, MANIFEST = "records.jsonl", "key.json", "manifest.json"
LOCK_POLL = 0.5  # seconds


class Damaged(Exception):
    """A cache folder that is not what this module writes."""


class RecordCache:
    """One cache folder: `records` by id, `complete` when nothing is left to make, which is for `finish` to say.

    Until then this process holds the lock; `finish` or `close` lets it go.
    """

    def __init__(self, folder: Path, total: int, records: dict[str, Any], lock: int | None):
        self.folder, self.total, self.records = folder, total, records
        self.complete = lock is None
        self._lock = lock

    def add(self, records: Mapping[str, Any]) -> None:
        """Appends records (JSON values by id) and returns once they are on the disk.

        Raises:
          ValueError: the cache is complete, or a value is not JSON.
        """
        if self._lock is None:
            raise ValueError(f"cache {self.folder} is complete or closed; nothing can be added to it")
        lines = [
            json.dumps({"id": name, "value": value}, sort_keys=True, allow_nan=False) + "\n"
            for name, value in records.items()
        ]
        _append(self.folder / RECORDS, "".join(lines).encode())
        self.records.update(records)

    def finish(self) -> None:
        """Seals the cache with the count and the checksum of its records, and lets the lock go.

        Raises:
          ValueError: there are fewer or more records than announced.
        """
        if len(self.records) != self.total:
            raise ValueError(f"cache {self.folder} holds {len(self.records)} records, expected {self.total}")
        data = _read(self.folder / RECORDS)
        manifest = {"count": len(self.records), "sha256": hashlib.sha256(data).hexdigest()}
        write_json_atomic(self.folder / MANIFEST, manifest)
        self.complete = True
        self.close()

    def close(self) -> None:
        """Lets another process build; what was added stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RecordCache":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_cache(root: str | Path, kind: str, key: Mapping[str, Any], total: int) -> RecordCache:
    """Opens the cache of `key`, whatever state it is in: absent, unfinished, complete or damaged.

    A damaged folder is moved aside, with a printed line, and a new one is begun. While another process makes this
    cache, this one waits.

    Args:
      root: the folder of all caches.
      kind: what the records are, such as "negatives".
      key: all that the records depend on, as JSON values.
      total: how many records a complete cache holds.
    """
    folder = cache_folder(root, kind, key)
    try:
        # Any number of processes may read a complete cache, so without the lock.
        return RecordCache(folder, total, _load_complete(folder, key, total), None)
    except Damaged:
        pass  # Or unfinished, or absent: judged under the lock.
    folder.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(folder)
    try:
        try:
            complete = (folder / MANIFEST).exists()
            records = _load_complete(folder, key, total) if complete else _load_unfinished(folder, key)
        except Damaged as damage:
            _move_aside(folder, damage)
            complete, records = False, {}
        if complete:
            os.close(lock)
            return RecordCache(folder, total, records, None)
        folder.mkdir(exist_ok=True)
        if not (folder / KEY).exists():
            write_json_atomic(folder / KEY, dict(key))
        return RecordCache(folder, total, records, lock)
    except BaseException:
        os.close(lock)
        raise


def cache_folder(root: str | Path, kind: str, key: Mapping[str, Any]) -> Path:
    """Where the cache of `key` lies."""
    return Path(root) / kind / hashlib.sha256(_canonical(key).encode()).hexdigest()[:16]


def read_records(folder: Path) -> dict[str, Any]:
    """The records of a cache that another process has open, as they are now; writes nothing."""
    data = _read(folder / RECORDS)
    return _parse(data[: data.rfind(b"\n") + 1])


def is_complete(root: str | Path, kind: str, key: Mapping[str, Any]) -> bool:
    """Whether the cache of `key` is finished; writes nothing and does not read the records."""
    return (cache_folder(root, kind, key) / MANIFEST).exists()


def stale(root: str | Path, kind: str, key: Mapping[str, Any]) -> str:
    """How the most similar other cache of this kind differs, such as "model: ab12 -> cd34"; empty if there is none.

    For the caller to say why it builds anew although a cache lies there.
    """
    own = cache_folder(root, kind, key)
    differences = []
    for path in sorted(own.parent.glob(f"*/{KEY}")):
        if path.parent.name == own.name or not re.fullmatch(r"[0-9a-f]{16}", path.parent.name):
            continue
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(other, dict):
            differences.append(_differences(_flat(other), _flat(json.loads(_canonical(key)))))
    return ", ".join(min(differences, key=len, default=[]))


def text_hash(items: Iterable[Any]) -> str:
    """The sha256 of strings, or of lists of strings, in order: where one ends and the next begins counts."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item).encode() + b"\n")
    return digest.hexdigest()


def _load_complete(folder: Path, key: Mapping[str, Any], total: int) -> dict[str, Any]:
    """The records of a finished folder.

    Raises:
      Damaged: the folder is not finished, or holds something else than it should.
    """
    manifest = _json(_read(folder / MANIFEST), MANIFEST)
    data = _read(folder / RECORDS)
    _check_key(folder, key)
    found = {"count": total, "sha256": hashlib.sha256(data).hexdigest()}
    if manifest != found:
        raise Damaged(f"{MANIFEST} says {manifest}, expected {found}")
    return _parse(data)


def _load_unfinished(folder: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """The records so far, after cutting off a last line that was not written to its end.

    Raises:
      Damaged: the folder holds something else than it should.
    """
    data = _read(folder / RECORDS)
    if data or (folder / KEY).exists():
        _check_key(folder, key)
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(folder / RECORDS, whole)
    return _parse(data[:whole])


def _check_key(folder: Path, key: Mapping[str, Any]) -> None:
    if _canonical(_json(_read(folder / KEY), KEY)) != _canonical(key):
        raise Damaged(f"{KEY} is not the key that the folder is named after")


def _parse(data: bytes) -> dict[str, Any]:
    records = {}
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        record = _json(line, f"{RECORDS}, line {number}")
        if not isinstance(record, dict) or record.keys() != {"id", "value"} or not isinstance(record["id"], str):
            raise Damaged(f"{RECORDS}, line {number}: not a record")
        records[record["id"]] = record["value"]
    return records


def _json(data: bytes, what: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{what}: not JSON ({error})") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _append(path: Path, data: bytes) -> None:
    """All of `data` at the end of the file and on the disk, or, after an error, nothing of it."""
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:
            # A full disk: half a line here would be damage in the middle after the next call.
            os.truncate(path, before)
            raise


def _take_lock(folder: Path) -> int:
    """An open file whose lock this process holds; the lock goes with the process, however it ends.

    Waits, and says so, while another process holds it: runs that start together share what the first one makes.
    """
    path = folder.with_name(f"{folder.name}.lock")
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _wait_for_lock(lock, folder)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _wait_for_lock(lock: int, folder: Path) -> None:
    said = ""
    while True:
        if try_flock(lock):
            return
        owner = os.pread(lock, 64, 0).decode(errors="replace").strip() or "unknown"
        if owner != said:
            print(f"waiting for process {owner}, which is making cache {folder}", flush=True)
            said = owner
        time.sleep(LOCK_POLL)


def _move_aside(folder: Path, damage: Damaged) -> None:
    aside, number = folder.with_name(f"{folder.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged-{number}")
    os.replace(folder, aside)
    print(f"cache {folder} is damaged ({damage}): moved to {aside.name}, starting afresh")


def _canonical(value: Any) -> str:
    return json.dumps(dict(value) if isinstance(value, Mapping) else value, sort_keys=True, allow_nan=False)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, part in value.items():
        flat |= _flat(part, f"{prefix}{name}.") if isinstance(part, Mapping) else {f"{prefix}{name}": part}
    return flat


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    missing = object()

    def text(value: Any) -> str:
        shown = "none" if value is missing else str(value)
        return shown if len(shown) <= 24 else f"{shown[:12]}..."

    pairs = [(name, old.get(name, missing), new.get(name, missing)) for name in sorted({*old, *new})]
    return [f"{name}: {text(before)} -> {text(after)}" for name, before, after in pairs if before != after]
