"""Versions of the weights as files, for a server that reads the same file system.

A version is a folder that is there as a whole or not at all: safetensors, or an adapter in PEFT's format, and a
manifest. Weights go from the devices to the file one tensor at a time.
"""

import contextlib
import errno
import functools
import hashlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unisd_jax.errors import UserError
from unisd_jax.io import replaced_folder, write_json_atomic
from unisd_jax.models import Lora, Model, iter_hf_tensors, merge, save_peft
from unisd_jax.models.hf_io import leaf_at, leaf_paths, split_shards, stored_shapes, write_shards
from unisd_jax.models.peft_io import stored_factors
from unisd_jax.models.safetensors_io import Entry
from unisd_jax.rollout.folders import SYNC, release

BASE = "base"  # the weights that adapters are put on
MANIFEST, FORMAT = "manifest.json", "unisd_jax/weights/1"
HEAD, EMBEDDING = "lm_head.weight", ("embed", "weight")
SHARD_BYTES = 5 * 10**9
Kind = Literal["weights", "adapter"]
Fetch = Callable[[jax.Array], np.ndarray]


class Manifest(NamedTuple):
    """What a folder holds. `content` is of the tensors' names, types, shapes and bytes; `size` counts their bytes."""

    owner: str
    version: int
    content: str
    kind: Kind
    dtype: str
    size: int
    tensors: dict[str, list[int]]


class Published(NamedTuple):
    """A version on disk, and how long it took to bring it to the host and to write it there."""

    folder: Path
    manifest: Manifest
    seconds_convert: float
    seconds_write: float

    @property
    def label(self) -> str:
        """What the server is told to call this version."""
        return f"{self.manifest.owner}/{self.manifest.version}/{self.manifest.content}"


class Publisher:
    """Writes the versions of one run into `folder`, which holds nothing else; weights are stored as `dtype`.

    `base` is what adapters say they belong to, a directory or a hub id.
    """

    def __init__(self, folder: Path, model: Model, *, owner: str, dtype: Any, base: str):
        self.folder = folder
        self.model = model
        self.owner = owner
        self.dtype = jnp.dtype(dtype)
        self.base = base
        self._newest: Path | None = None
        self._has_written = False

    def write(
        self,
        params: dict[str, Any],
        version: int,
        *,
        lora: Lora | None = None,
        kind: Kind = "weights",
        fetch: Fetch = np.asarray,
        name: str | None = None,
    ) -> Published:
        """Writes `params` with `lora` added, or `lora` alone; of the earlier versions only the newest stays.

        With a `name` it is no version: it stays beside them until `close`.

        Where several processes share the arrays, all of them call this with a `fetch` that gathers, and each writes.

        Raises:
          UserError: a weight is not finite, the weights are not of the model's shapes, or the disk is full.
        """
        started = time.perf_counter()
        if kind == "adapter":
            lora = jax.tree.map(fetch, lora)
            tensors = _adapter_tensors(self.model, lora)
            entries = [Entry(name, value.shape, value.dtype) for name, value in tensors.items()]
            stream = _Stream(iter(tensors.items()), entries)
            stream.digest.update(repr(lora.scale).encode())
        else:
            entries = planned_tensors(self.model, self.dtype)
            stream = _Stream(published_tensors(self.model, params, lora, self.dtype, fetch), entries)
        stream.seconds = time.perf_counter() - started
        target, size = self.folder / (name or f"v{version:08}"), sum(entry.nbytes for entry in entries)
        if name is None:
            self._remove(lambda folder: folder != self._newest)
        with _appearing(target, size) as folder:
            if kind == "adapter":
                stream.drain()
                save_peft(folder, self.model, lora, base=self.base)
            else:
                write_shards(folder, split_shards(entries, SHARD_BYTES), iter(stream))
            content, shapes = stream.digest.hexdigest()[:12], {entry.name: list(entry.shape) for entry in entries}
            manifest = Manifest(self.owner, version, content, kind, str(entries[0].dtype), size, shapes)
            write_json_atomic(folder / MANIFEST, {"format": FORMAT} | manifest._asdict())
        self._newest, self._has_written = target if name is None else self._newest, True
        return Published(target, manifest, stream.seconds, time.perf_counter() - started - stream.seconds)

    def remove_before(self, version: int) -> None:
        """Removes the versions older than `version`."""
        self._remove(lambda folder: int(folder.name[1:]) < version)

    def close(self) -> None:
        """Removes all versions; a publisher that has written nothing leaves those of others alone."""
        if self._has_written:
            self._remove(lambda folder: True)
            shutil.rmtree(self.folder / BASE, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()
            if self.folder.parent.name == SYNC:
                self.folder.parent.rmdir()
        release(self.folder)

    def _remove(self, chosen: Callable[[Path], bool]) -> None:
        for folder in self.folder.glob("v????????"):
            if re.fullmatch(r"v\d{8}", folder.name) and chosen(folder):
                shutil.rmtree(folder, ignore_errors=True)


class _Stream:
    """Tensors on their way to a file: compared with the plan and hashed; `seconds` is the time they took to arrive."""

    def __init__(self, tensors: Iterator[tuple[str, np.ndarray]], plan: list[Entry]):
        self.tensors, self.plan = tensors, plan
        self.digest = hashlib.sha256()
        self.seconds = 0.0

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for entry in self.plan:
            started = time.perf_counter()
            name, value = next(self.tensors)
            self.seconds += time.perf_counter() - started
            if (name, value.shape, value.dtype) != entry:
                expected = f"{entry.name}, {entry.dtype} {entry.shape}"
                raise UserError(f"the weights hold {name}, {value.dtype} {value.shape}; expected was {expected}")
            self.digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            self.digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            yield name, value

    def drain(self) -> None:
        for _ in self:
            pass


def published_tensors(
    model: Model, params: dict[str, Any], lora: Lora | None, dtype: Any, fetch: Fetch = np.asarray
) -> Iterator[tuple[str, np.ndarray]]:
    """What a version of kind "weights" consists of, one tensor at a time: Hugging Face's names, adapters merged.

    An output head that is the embedding stands there as a tensor of its own: a running vLLM server on CPU holds a copy
    of it, which it renews only from `lm_head.weight`.

    Raises:
      UserError: a weight is missing, of another shape or not finite.
    """
    finite: list[bool] = []

    def converted(value: jax.Array) -> np.ndarray:
        value, sound = _converted(value, dtype)
        finite.append(bool(fetch(sound)))
        return fetch(value)

    shapes = _shapes(model)
    _check_same_leaves(params, shapes)
    for keys in leaf_paths(shapes):
        tree = _merged_leaf(params, lora, keys)
        for key in reversed(keys):
            tree = {key: tree}
        for name, value in iter_hf_tensors(model, tree, fetch=converted):
            if not finite.pop():
                raise UserError(f"the weights hold NaN or infinity as {jnp.dtype(dtype)}: tensor {name}")
            yield name, value
            if keys == EMBEDDING and model.config.tied_embeddings:
                yield HEAD, value


def planned_tensors(model: Model, dtype: Any) -> list[Entry]:
    """Name, shape and type of all that `published_tensors` yields, in its order, from the model's configuration."""
    dtype, shapes, entries = jnp.dtype(dtype), _shapes(model), []
    for keys in leaf_paths(shapes):
        stored = list(stored_shapes(model.config, keys, leaf_at(shapes, keys)))
        entries += [Entry(name, shape, dtype) for name, shape in stored]
        if keys == EMBEDDING and model.config.tied_embeddings:
            entries.append(Entry(HEAD, stored[0][1], dtype))
    return entries


def needed_bytes(model: Model, dtype: Any) -> int:
    """The size of a version of kind "weights" on disk."""
    return sum(entry.nbytes for entry in planned_tensors(model, dtype))


@contextlib.contextmanager
def _appearing(target: Path, size: int) -> Iterator[Path]:
    """`replaced_folder` that leaves nothing behind after an error, and says what a full disk lacks."""
    try:
        with replaced_folder(target) as partial:
            yield partial
    except BaseException as error:
        for left in target.parent.glob(f".*{target.name}.*"):
            shutil.rmtree(left, ignore_errors=True)
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(target.parent).free if target.parent.exists() else 0
        raise UserError(
            f"{target.parent}: no room for a version of the weights, {size / 1e9:.3g} GB are needed and "
            f"{free / 1e9:.3g} GB free; name another folder as rollout.vllm.sync_dir"
        ) from None


@functools.cache
def _shapes(model: Model) -> dict[str, Any]:
    return Model.build(model.config, vocab_multiple=model.vocab_multiple)[1]


def _check_same_leaves(params: dict[str, Any], shapes: dict[str, Any]) -> None:
    found = {"/".join(keys): tuple(leaf_at(params, keys).shape) for keys in leaf_paths(params)}
    expected = {"/".join(keys): tuple(leaf_at(shapes, keys).shape) for keys in leaf_paths(shapes)}
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise UserError(f"the weights' {name} is {found.get(name)}, the model's {expected.get(name)}")


def _merged_leaf(params: dict[str, Any], lora: Lora | None, keys: tuple) -> Any:
    path = "/".join(keys[1:-1])
    if lora is not None and path in lora.factors and keys[-1] == "kernel":
        params = merge(params, Lora({path: lora.factors[path]}, lora.scale))
    return leaf_at(params, keys)


@functools.partial(jax.jit, static_argnames="dtype")
def _converted(value: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    value = value.astype(dtype)
    # NaN and infinity times zero are NaN.
    return value, jnp.sum(value * 0) == 0


def _adapter_tensors(model: Model, lora: Lora) -> dict[str, np.ndarray]:
    tensors = dict(stored_factors(model, lora, max(factors.a.shape[-1] for factors in lora.factors.values())))
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise UserError(f"the adapter holds NaN or infinity: tensor {name}")
    return tensors
