"""Adapters in the files of the `peft` library: `adapter_config.json` and `adapter_model.safetensors`.

PEFT keeps A as [r, in] and B as [out, r], one pair per matrix, and adds lora_alpha / r · B·A.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from unisd_jax.errors import UserError
from unisd_jax.io import replaced_folder, write_json_atomic
from unisd_jax.models.decoder import Model
from unisd_jax.models.families import canonical_name, tensor_names
from unisd_jax.models.hf_fields import json_object
from unisd_jax.models.lora import TARGETS, Lora, LoraFactors, adapted_kernel
from unisd_jax.models.safetensors_io import Entry, TensorFile, new_tensor_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Read here, or without influence on what a finished adapter computes. Any other field must be unset.
UNDERSTOOD = {
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "bias", "init_lora_weights",
    "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "exclude_modules", "megatron_core", "eva_config", "qalora_group_size", "loftq_config",
}  # fmt: skip
# Ways to start an adapter that leave the base's weights as they are; the others store a difference to other weights.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def save_peft(path: str | Path, model: Model, lora: Lora, *, base: str) -> None:
    """Writes `lora`, which may be an EMA teacher's, as an adapter of the model `base`; replaces `path` as a whole.

    `base` is a directory or a hub id, also with a revision (org/name@revision).

    Adapted matrices of unequal rank are filled up with zeros to the largest, for PEFT's scale depends on the rank.
    """
    rank = max(factors.a.shape[-1] for factors in lora.factors.values())
    tensors = dict(stored_factors(model, lora, rank))
    name, _, revision = (base, "", "") if Path(base).is_dir() else base.partition("@")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(lora.scale * rank),
        "lora_dropout": 0.0,
        "target_modules": sorted({_module(model, target, 0).split(".")[-1] for target in lora.factors}),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    entries = [Entry(name, value.shape, value.dtype) for name, value in tensors.items()]
    with replaced_folder(path) as folder:
        with new_tensor_file(folder / WEIGHTS, entries) as append:
            for value in tensors.values():
                append(value)
        write_json_atomic(folder / CONFIG, config)


def load_peft(path: str | Path, model: Model, params: dict[str, Any]) -> Lora:
    """The adapter in the directory `path`, for weights of the shapes of `params`.

    Raises:
      UserError: not an adapter of this model, one that LoRA's plain form cannot express, or a damaged one.
    """
    path = Path(path)
    config = _read_config(path)
    rank, alpha = _positive(path, config, "r"), _positive(path, config, "lora_alpha")
    _check_targets(path, model, config.get("target_modules"))
    file = TensorFile(path / WEIGHTS)
    places = {_canonical(model, name): name for name in file.names}
    factors = {}
    for target in TARGETS.values():
        names = [
            f"{_module(model, target, layer)}.lora_{side}" for side in "AB" for layer in range(model.config.num_layers)
        ]
        if not any(name in places for name in names):
            continue
        stored = [_tensor(file, places, name) for name in names]
        factors[target] = _stack(path, stored, adapted_kernel(params, target).shape, rank, names)
        for name in names:
            del places[name]
    if places:
        raise UserError(f"{path}: holds {sorted(places.values())[0]}, for which this model has no adapter")
    if not factors:
        raise UserError(f"{path}: {WEIGHTS} holds no adapted matrix")
    return Lora(factors, float(alpha / (rank**0.5 if config.get("use_rslora") else rank)))


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).exists() or not (path / WEIGHTS).exists():
        raise UserError(f"{path} is not an adapter of peft's: expected {CONFIG} and {WEIGHTS} there")
    config = json_object(path / CONFIG)
    expected = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": PLAIN_STARTS}
    for field, allowed in expected.items():
        if config.get(field, allowed[0]) not in allowed:
            raise UserError(f"{path / CONFIG}: {field} is {config[field]!r}; supported: {allowed}")
    for field, value in config.items():
        if field not in UNDERSTOOD and value:
            raise UserError(f"{path / CONFIG}: {field} is {value!r}; supported is LoRA without it")
    return config


def _positive(path: Path, config: dict[str, Any], field: str) -> int | float:
    value = config.get(field)
    kinds = int if field == "r" else int | float
    if not isinstance(value, kinds) or isinstance(value, bool) or value <= 0:
        raise UserError(f"{path / CONFIG}: {field} is {value!r}; expected a positive number")
    return value


def _check_targets(path: Path, model: Model, modules: Any) -> None:
    """A list of modules must name what has an adapter here; an expression is judged by the tensors it led to."""
    known = {_module(model, target, 0).split(".")[-1] for target in TARGETS.values()}
    for module in modules if isinstance(modules, list) else []:
        if str(module).split(".")[-1] not in known:
            raise UserError(f"{path / CONFIG}: target_modules holds {module!r}; known: {', '.join(sorted(known))}")


def stored_factors(model: Model, lora: Lora, rank: int) -> Iterator[tuple[str, np.ndarray]]:
    """An adapter under PEFT's names and layout, filled up with zeros to `rank`."""
    for target, (a, b) in lora.factors.items():
        more = rank - a.shape[-1]
        wide = np.pad(np.asarray(a, np.float32), ((0, 0), (0, 0), (0, more)))
        tall = np.pad(np.asarray(b, np.float32), ((0, 0), (0, more), (0, 0)))
        for layer in range(model.config.num_layers):
            module = f"{PREFIX}{_module(model, target, layer)}"
            yield f"{module}.lora_A.weight", np.ascontiguousarray(wide[layer].T)
            yield f"{module}.lora_B.weight", np.ascontiguousarray(tall[layer].T)


def _canonical(model: Model, name: str) -> str:
    """`model.layers.0.mlp.up_proj.lora_A` for the tensor of that factor; other names as they are."""
    found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight", name)
    module = None if found is None else canonical_name(model.config, f"{found[1]}.weight")
    return name if module is None else f"{module.removesuffix('.weight')}.{found[2]}"


def _tensor(file: TensorFile, places: dict[str, str], name: str) -> np.ndarray:
    if name not in places:
        raise UserError(f"{file.path}: tensor {PREFIX}{name}.weight is missing")
    value = file.view(places[name]).astype(np.float32)
    if not np.isfinite(value).all():
        raise UserError(f"{file.path}: tensor {places[name]} holds NaN or infinity")
    return value


def _stack(path: Path, stored: list[np.ndarray], kernel: tuple[int, ...], rank: int, names: list[str]) -> LoraFactors:
    layers, inputs, outputs = kernel
    shapes = [(rank, inputs)] * layers + [(outputs, rank)] * layers
    for value, shape, name in zip(stored, shapes, names, strict=True):
        if value.shape != shape:
            raise UserError(f"{path}: tensor {PREFIX}{name}.weight is {value.shape}; expected {shape}")
    a, b = np.stack(stored[:layers]), np.stack(stored[layers:])
    return LoraFactors(jnp.asarray(a.swapaxes(1, 2)), jnp.asarray(b.swapaxes(1, 2)))


def _module(model: Model, target: str, layer: int) -> str:
    """`model.layers.0.mlp.up_proj` for the target "mlp/up" in layer 0."""
    return tensor_names(model.config, ("layers", *target.split("/"), "kernel"))[layer].removesuffix(".weight")


def _whole(value: float) -> int | float:
    return round(value) if abs(value - round(value)) < 1e-9 else value
