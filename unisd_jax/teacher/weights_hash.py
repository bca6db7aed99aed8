"""The identity of a checkpoint for cache keys: what its files hold, wherever they lie."""

import hashlib
import json
from pathlib import Path

from unisd_jax.errors import UserError
from unisd_jax.io import write_json_atomic


def weights_hash(path: str | Path, memo_dir: str | Path) -> str:
    """The sha256 over `config.json` and all `*.safetensors` of a checkpoint directory.

    Each file is read once and remembered in `memo_dir` by its path, size and time of change.

    Raises:
      UserError: the directory has no configuration or no weights.
    """
    path = Path(path).resolve()
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise UserError(f"model.path: {path} is not a checkpoint, expected config.json and *.safetensors in it")
    return _files_hash(path, [path / "config.json", *sorted(path.glob("*.safetensors"))], memo_dir)


def adapter_hash(path: str | Path, memo_dir: str | Path) -> str:
    """The same of an adapter in PEFT's format: its `adapter_config.json` and all `*.safetensors`."""
    path = Path(path).resolve()
    return _files_hash(path, [path / "adapter_config.json", *sorted(path.glob("*.safetensors"))], memo_dir)


def _files_hash(path: Path, files: list[Path], memo_dir: str | Path) -> str:
    # One memo for each checkpoint: runs with different models do not overwrite each other's.
    memo = Path(memo_dir) / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.json"
    known = _read_memo(memo)
    entries = {}
    for file in files:
        status = file.stat()
        name = f"{file} {status.st_size} {status.st_mtime_ns}"
        entries[name] = known[name] if name in known else _file_hash(file)
    if entries != known:
        write_json_atomic(memo, entries)
    whole = "".join(f"{file.name} {digest}\n" for file, digest in zip(files, entries.values(), strict=True))
    return hashlib.sha256(whole.encode()).hexdigest()


def _file_hash(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _read_memo(memo: Path) -> dict[str, str]:
    """What was remembered; nothing if the memo is missing or damaged, as it can be made again."""
    try:
        value = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    valid = isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values())
    return value if valid else {}
