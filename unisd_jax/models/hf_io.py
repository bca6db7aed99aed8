"""Hugging Face checkpoints in and out: `config.json` + safetensors on disk, a nested dict of arrays in memory.

Weights go from the file to the devices, and back, one tensor at a time, so that the host never holds a model.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unisd_jax.errors import UserError
from unisd_jax.io import replaced_folder, write_json_atomic
from unisd_jax.models.config import ModelConfig
from unisd_jax.models.decoder import Model
from unisd_jax.models.families import canonical_name, tensor_names
from unisd_jax.models.hf_fields import json_object
from unisd_jax.models.loading import load_leaf
from unisd_jax.models.safetensors_io import Entry, TensorFile, new_tensor_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def load_hf(path: str | Path, *, dtype: Any = jnp.float32, mesh: jax.sharding.Mesh | None = None):
    """Reads a checkpoint directory; returns `(model, params)`, sharded over `mesh` if one is given.

    On a mesh the vocabulary is filled up with rows of zeros until `tensor` × `fsdp` devices can share it evenly. Where
    several processes share the mesh, each calls this and reads its own part.

    Raises:
      UserError: no such directory, not a Hugging Face checkpoint, an unsupported architecture, missing, surplus or
        misshapen tensors, a damaged file, or a weight that is not finite.
    """
    path = Path(path)
    multiple = 1 if mesh is None else mesh.shape["tensor"] * mesh.shape["fsdp"]
    model, shapes = Model.build(read_config(path), dtype=dtype, vocab_multiple=multiple)
    tensors = _Tensors(path, model.config)
    surplus = set(tensors.places) - {name for keys in leaf_paths(shapes) for name in tensor_names(model.config, keys)}
    if surplus:
        raise UserError(f"{path}: holds {sorted(surplus)[0]}, which {model.config.family} has no place for")
    params: dict[str, Any] = {}
    for keys in leaf_paths(shapes):
        stored = [tensors.view(name, shape) for name, shape in stored_shapes(model.config, keys, leaf_at(shapes, keys))]
        leaf, bad = load_leaf(keys, stored, leaf_at(shapes, keys), mesh)
        if bad is not None:
            raise UserError(f"{path}: tensor {tensor_names(model.config, keys)[bad]} holds NaN or infinity")
        _put(params, keys, leaf)
    return model, params


def save_hf(
    path: str | Path,
    model: Model,
    params: dict[str, Any],
    *,
    source: str | Path | None = None,
    shard_bytes: int = 5 * 10**9,
    fetch: Callable[[jax.Array], np.ndarray] = np.asarray,
    write: bool = True,
) -> None:
    """Writes a checkpoint directory that `load_hf` and `transformers` can load; replaces `path` as a whole.

    `source` is the directory the model came from: its config, tokenizer, chat template and generation settings are
    carried over. Without it only the weights and a config are written. Files hold up to `shard_bytes` of weights.

    `fetch` brings one array to the host. Where several processes share the arrays, all of them call this with a `fetch`
    that gathers, and all but one with `write` off.
    """
    entries = list(_entries(model.config, params))
    tensors = iter_hf_tensors(model, params, fetch=fetch)
    if not write:
        for _ in tensors:
            pass
        return
    with replaced_folder(path) as folder:
        write_shards(folder, split_shards(entries, shard_bytes), tensors)
        write_json_atomic(folder / "config.json", _exported_config(model.config, source, entries[0].dtype))
        for name in TOKENIZER_FILES if source is not None else ():
            if (Path(source) / name).exists():
                shutil.copyfile(Path(source) / name, folder / name)


def hf_tensors(model: Model, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """A parameter tree, or anything of its shape such as a gradient, under Hugging Face's names and layout."""
    return dict(iter_hf_tensors(model, params))


def iter_hf_tensors(
    model: Model, params: dict[str, Any], *, fetch: Callable[[jax.Array], np.ndarray] = np.asarray
) -> Iterator[tuple[str, np.ndarray]]:
    """`hf_tensors` one by one; the host holds the tensor it is given and no other."""
    for keys in leaf_paths(params):
        leaf = jnp.asarray(leaf_at(params, keys))
        for layer, name in enumerate(tensor_names(model.config, keys)):
            value = leaf
            if keys[0] == "layers":
                value = _layer(leaf, layer, transpose=keys[-1] == "kernel")
            value = fetch(value)
            yield name, value[: model.config.vocab_size] if keys[-1] == "weight" else value


def read_config(path: str | Path) -> ModelConfig:
    """The architecture of the checkpoint in `path`.

    Raises:
      UserError: `path` is not a checkpoint directory, or its architecture is not supported.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"model.path: {path} is not a directory; expected a Hugging Face checkpoint directory")
    if not (path / "config.json").exists():
        raise UserError(f"model.path: {path} has no config.json; expected a Hugging Face checkpoint")
    hf = json_object(path / "config.json")
    try:
        return ModelConfig.from_hf(hf)
    except UserError as error:
        raise UserError(f"{path}/{error}") from None


class _Tensors:
    """Where each of a checkpoint's tensors lies, under the name this program gives it."""

    def __init__(self, path: Path, config: ModelConfig):
        self.path = path
        self.places: dict[str, tuple[TensorFile, str]] = {}
        for file in _weight_files(path):
            for stored in file.names:
                name = canonical_name(config, stored)
                if name is not None:
                    self.places[name] = file, stored

    def view(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self.places:
            raise UserError(f"{self.path}: tensor {name} is missing")
        file, stored = self.places[name]
        value = file.view(stored)
        if value.shape != shape:
            raise UserError(f"{self.path}: tensor {stored} is {value.shape}, config.json says {shape}")
        return value


def _weight_files(path: Path) -> list[TensorFile]:
    if (path / WEIGHTS).exists():
        return [TensorFile(path / WEIGHTS)]
    if (path / INDEX).exists():
        return _indexed_files(path)
    files = sorted(file for file in path.glob("*.safetensors") if file.name != "adapter_model.safetensors")
    if not files:
        hint = " (it has .bin files: convert them first)" if list(path.glob("*.bin")) else ""
        raise UserError(f"model.path: {path} has no *.safetensors file{hint}")
    return [TensorFile(file) for file in files]


def _indexed_files(path: Path) -> list[TensorFile]:
    places = json_object(path / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{path / INDEX}: weight_map is not an object that maps tensors to files")
    files = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not (path / name).exists():
            raise UserError(f"{path}: {name}, which {INDEX} names, is missing; fetch the checkpoint again")
        files[name] = TensorFile(path / name)
    held = {name: set(file.names) for name, file in files.items()}
    for tensor, name in places.items():
        if tensor not in held[name]:
            raise UserError(f"{path}: {INDEX} says that {tensor} is in {name}, which does not hold it")
    return list(files.values())


def _entries(config: ModelConfig, params: dict[str, Any]) -> Iterator[Entry]:
    """What `iter_hf_tensors` will yield, in its order."""
    for keys in leaf_paths(params):
        leaf = leaf_at(params, keys)
        for name, shape in stored_shapes(config, keys, leaf):
            yield Entry(name, shape, np.dtype(leaf.dtype))


def stored_shapes(config: ModelConfig, keys: tuple, leaf: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape on disk of the tensors that make up a leaf: [out, in] for matrices, no padded vocabulary."""
    shape = leaf.shape[1:] if keys[0] == "layers" else leaf.shape
    if keys[-1] == "kernel":
        shape = shape[::-1]
    if keys[-1] == "weight":
        shape = (config.vocab_size, *shape[1:])
    for name in tensor_names(config, keys):
        yield name, shape


def split_shards(entries: list[Entry], shard_bytes: int) -> list[list[Entry]]:
    """The tensors of each file, in order; a file ends before the tensor that would not fit."""
    shards: list[list[Entry]] = [[]]
    room = shard_bytes
    for entry in entries:
        if entry.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.nbytes
    return shards


def write_shards(folder: Path, shards: list[list[Entry]], tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """Writes the tensors, which come in the order of their entries, and an index if there is more than one file."""
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, entries in zip([WEIGHTS] if len(shards) == 1 else files, shards, strict=True):
        with new_tensor_file(folder / file, entries) as append:
            for _, value in itertools.islice(tensors, len(entries)):
                append(value)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entries in shards for entry in entries)},
            "weight_map": {entry.name: file for file, entries in zip(files, shards, strict=True) for entry in entries},
        }
        write_json_atomic(folder / INDEX, index)


def _exported_config(config: ModelConfig, source: str | Path | None, dtype: np.dtype) -> dict[str, Any]:
    hf = {} if source is None else json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    if "text_config" in hf:
        # Of a model that also sees, only the text part is written; the ids stand where transformers looks for them.
        found = hf["text_config"] | hf
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        hf = config.to_hf() | {name: found[name] for name in ids if name in found}
    hf = hf or config.to_hf()
    hf.pop("torch_dtype", None)
    return hf | {"dtype": str(dtype)}


@jax.jit(static_argnames="transpose")
def _layer(leaf: jax.Array, layer: int | jax.Array, *, transpose: bool) -> jax.Array:
    value = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    return value.T if transpose else value


def leaf_paths(tree: dict[str, Any], prefix: tuple = ()) -> Iterator[tuple]:
    """Where a tree's leaves are, as the keys that lead to each."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaf_paths(value, (*prefix, key))
        elif value is not None:
            yield (*prefix, key)


def leaf_at(tree: dict[str, Any], keys: tuple) -> Any:
    """The leaf to which `keys` lead."""
    for key in keys:
        tree = tree[key]
    return tree


def _put(tree: dict[str, Any], keys: tuple, value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value
