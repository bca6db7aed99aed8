"""Hugging Face checkpoints in and out: `config.json` + safetensors on disk, a nested dict of arrays in memory."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unisd_jax.errors import UserError
from unisd_jax.io import write_json_atomic
from unisd_jax.models.config import ModelConfig
from unisd_jax.models.decoder import Model
from unisd_jax.models.families import tensor_names
from unisd_jax.models.layout import place

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def load_hf(path: str | Path, *, dtype: Any = jnp.float32, mesh: jax.sharding.Mesh | None = None):
    """Reads a checkpoint directory; returns `(model, params)`, sharded over `mesh` if one is given.

    Raises:
      UserError: no such directory, not a Hugging Face checkpoint, an unsupported architecture, missing, surplus or
        misshapen tensors, a damaged file, or a weight that is not finite.
    """
    path = Path(path)
    model, shapes = Model.build(read_config(path), dtype=dtype)
    tensors = _TensorFiles(path)
    surplus = set(tensors.names) - {name for keys in _leaves(shapes) for name in tensor_names(model.config, keys)}
    surplus -= {"lm_head.weight"} if model.config.tied_embeddings else set()
    if surplus:
        raise UserError(f"{path}: holds {sorted(surplus)[0]}, which {model.config.family} has no place for")

    params: dict[str, Any] = {}
    for keys in _leaves(shapes):
        value = _read_leaf(tensors, model, keys, _at(shapes, keys))
        _put(params, keys, value)
    if mesh is None:
        return model, jax.tree.map(jnp.asarray, params)
    return model, place(params, mesh)


def save_hf(path: str | Path, model: Model, params: dict[str, Any], *, source: str | Path | None = None) -> None:
    """Writes a checkpoint directory that `load_hf` and `transformers` can load; replaces `path` as a whole.

    `source` is the directory the model came from: its config, tokenizer, chat template and generation settings are
    carried over. Without it only the weights and a config are written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(hf_tensors(model, params), partial / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_hf()
    if source is not None:
        config = json.loads((Path(source) / "config.json").read_text())
        for name in TOKENIZER_FILES:
            if (Path(source) / name).exists():
                shutil.copyfile(Path(source) / name, partial / name)
    config.pop("torch_dtype", None)
    write_json_atomic(partial / "config.json", config | {"dtype": str(_at(params, ("embed", "weight")).dtype)})
    with open(partial / "model.safetensors", "rb+") as file:
        os.fsync(file.fileno())
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)


def hf_tensors(model: Model, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """A parameter tree, or anything of its shape such as a gradient, under Hugging Face's names and layout."""
    tensors = {}
    for keys in _leaves(params):
        names, value = tensor_names(model.config, keys), np.asarray(_at(params, keys))
        rows = value if keys[0] == "layers" else value[None]
        for name, row in zip(names, rows, strict=True):
            tensors[name] = np.ascontiguousarray(row.T if keys[-1] == "kernel" else row)
    return tensors


def read_config(path: str | Path) -> ModelConfig:
    """The architecture of the checkpoint in `path`.

    Raises:
      UserError: `path` is not a checkpoint directory, or its architecture is not supported.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"model.path: {path} is not a directory; expected a Hugging Face checkpoint directory")
    try:
        hf = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"model.path: {path} has no config.json; expected a Hugging Face checkpoint") from None
    except ValueError as error:
        raise UserError(f"{path / 'config.json'}: not JSON ({error})") from None
    if not isinstance(hf, dict):
        raise UserError(f"{path / 'config.json'}: not a JSON object")
    try:
        return ModelConfig.from_hf(hf)
    except UserError as error:
        raise UserError(f"{path}/{error}") from None


class _TensorFiles:
    """The tensors of all `*.safetensors` files of a directory, read one at a time."""

    def __init__(self, path: Path):
        self.path = path
        files = sorted(path.glob("*.safetensors"))
        if not files:
            hint = " (it has .bin files: convert them first)" if list(path.glob("*.bin")) else ""
            raise UserError(f"model.path: {path} has no *.safetensors file{hint}")
        self.names: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a readable safetensors file ({error})") from None
            self.names |= dict.fromkeys(opened.keys(), opened)

    def read(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise UserError(f"{self.path}: tensor {name} is missing")
        value = self.names[name].get_tensor(name)
        if not np.isfinite(value.astype(np.float32)).all():
            raise UserError(f"{self.path}: tensor {name} holds NaN or infinity")
        return value


def _read_leaf(tensors: _TensorFiles, model: Model, keys: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
    stacked = keys[0] == "layers"
    dtype = ml_dtypes.bfloat16 if shape.dtype == jnp.bfloat16 else np.dtype(shape.dtype)
    leaf = np.empty(shape.shape if stacked else (1, *shape.shape), dtype)
    for row, name in zip(leaf, tensor_names(model.config, keys), strict=True):
        value, target = tensors.read(name), row.T if keys[-1] == "kernel" else row
        if value.shape != target.shape:
            raise UserError(f"{tensors.path}: tensor {name} is {value.shape}, config.json says {target.shape}")
        target[...] = value
    return leaf if stacked else leaf[0]


def _leaves(tree: dict[str, Any], prefix: tuple = ()) -> Iterator[tuple]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*prefix, key))
        elif value is not None:
            yield (*prefix, key)


def _at(tree: dict[str, Any], keys: tuple) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def _put(tree: dict[str, Any], keys: tuple, value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value
