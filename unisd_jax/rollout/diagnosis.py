"""Which weights are wrong where a server does not compute what the trainer does: in the files, or in the server."""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from unisd_jax.errors import UserError
from unisd_jax.models import Lora, LoraFactors, Model, load_peft, merge
from unisd_jax.models.families import tensor_names
from unisd_jax.models.hf_io import leaf_at, leaf_paths
from unisd_jax.models.loading import load_leaf
from unisd_jax.models.peft_io import stored_factors
from unisd_jax.models.safetensors_io import TensorFile
from unisd_jax.rollout.probe import Probe, probe_gap, probe_logps
from unisd_jax.rollout.weights import Published, published_tensors

UNKNOWN = "its files are right, which tensors differ in the server cannot be told"
HEAD = ("head", "weight")
# Weights by their keys; the output head has keys of its own also where it is the embedding.
Flat = dict[tuple, Any]


class Guess(NamedTuple):
    """What a server may have done, and the weights it would then have: (params, output head, adapter)."""

    text: str
    make: Callable[[], tuple[dict[str, Any], Any, Lora | None]]


def explain(
    model: Model,
    params: dict[str, Any],
    lora: Lora | None,
    probe: Probe,
    found: np.ndarray,
    published: Published,
    previous: Published | None,
    *,
    tolerance: float,
) -> str:
    """One clause that says which weights differ, as far as the files and the server's log-probs `found` tell.

    First the files are compared with what the trainer would write now. If they are right, the trainer scores the probe
    with the mistakes that a server may make, parts of `previous` among them, until one gives what was found. For a run
    of one process.
    """
    adapter = jax.tree.map(np.asarray, lora) if published.manifest.kind == "adapter" else None

    def trainers() -> Iterator[tuple[str, np.ndarray]]:
        if adapter is None:
            return published_tensors(model, params, lora, published.manifest.dtype, np.asarray)
        return stored_factors(model, adapter, max(factors.a.shape[-1] for factors in adapter.factors.values()))

    try:
        wrong = wrong_files(trainers, published.folder, previous)
        if wrong is not None:
            return wrong
        if not np.isfinite(found[probe.completions.mask]).all():
            return "its files are right, the server's log-probs are no numbers"
        if adapter is None:
            params, lora = merge(params, lora), None
            stages = _weight_guesses(model, params, previous)
        else:
            stages = _adapter_guesses(model, params, adapter, previous)
        expected = np.asarray(probe_logps(model, params, probe, lora=lora))
        best = functools.partial(_best, model, probe, found, expected, tolerance)
        return next(filter(None, map(best, stages)), UNKNOWN)
    except UserError as error:
        return str(error)
    except jax.errors.JaxRuntimeError:
        # The search holds a second copy of the weights. That there is no room must not hide that the server is wrong.
        return f"{UNKNOWN} (the search needs more memory than there is)"


def wrong_files(
    trainers: Callable[[], Iterator[tuple[str, np.ndarray]]], folder: Path, previous: Published | None
) -> str | None:
    """How the tensors in a folder differ from those that `trainers` yields; None if they are the same.

    Raises:
      UserError: a file is damaged.
    """
    stored, first, wrong, names = _stored(folder), None, 0, set()
    for name, value in trainers():
        names.add(name)
        if name not in stored or not _same(stored[name], value):
            wrong += 1
            first = first or (name, "is missing" if name not in stored else None, value)
    surplus = sorted(set(stored) - names)
    if first is None and not surplus:
        return None
    name, text, value = first or (surplus[0], "is surplus", None)
    if text is None:
        text = _difference(name, stored[name], value, trainers, previous)
    count = wrong + len(surplus)
    return f"{folder} is not what the trainer has: {name} {text}" + (f", {count} tensors are wrong" * (count > 1))


def _difference(
    name: str,
    stored: np.ndarray,
    value: np.ndarray,
    trainers: Callable[[], Iterator[tuple[str, np.ndarray]]],
    previous: Published | None,
) -> str:
    """What a tensor in a file is instead of `value`."""
    if _same(stored, value.T):
        return "is transposed"
    if stored.shape != value.shape or stored.dtype != value.dtype:
        return f"is {stored.dtype} {stored.shape}, expected {value.dtype} {value.shape}"
    old = {} if previous is None or not previous.folder.is_dir() else _stored(previous.folder)
    if name in old and _same(stored, old[name]):
        return f"is still that of version {previous.manifest.version}"
    for other, another in trainers():
        if _same(stored, another):
            return f"equals the trainer's {other}"
    return "has other values"


def _weight_guesses(model: Model, params: dict[str, Any], previous: Published | None) -> Iterator[Iterable[Guess]]:
    """Parts of the previous version, then single tensors of it, then layers and matrices that were mixed up."""
    leaves = {keys: leaf_at(params, keys) for keys in leaf_paths(params)} | {HEAD: model.head(params)}
    current = {keys: jax.device_put(leaf, leaf.sharding) for keys, leaf in leaves.items()}

    def guess(text: str, change: Callable[[], Flat]) -> Guess:
        def make():
            # Laid out, and bound to devices, as all the others, so that one compiled program scores every guess.
            parts = {keys: jax.device_put(leaf, current[keys].sharding) for keys, leaf in change().items()}
            changed = current | parts
            head = changed[HEAD]
            if model.config.tied_embeddings:
                del changed[HEAD]
            return traverse_util.unflatten_dict(changed), head, None

        return Guess(text, make)

    old = None if previous is None else _previous_weights(model, current, previous.folder)
    if old is not None:
        still = f"still has version {previous.manifest.version}'s"
        yield [guess(f"{still} {text}", change) for text, change in _groups(model, current, old)]
        yield [guess(f"{still} {text}", change) for text, change in _tensors(model, current, old)]
    yield [guess(text, change) for text, change in _mixed_up(model, current)]


def _groups(model: Model, current: Flat, old: Flat) -> Iterator[tuple[str, Callable[[], Flat]]]:
    def part(chosen: Callable[[tuple], bool]) -> Callable[[], Flat]:
        return lambda: {keys: leaf for keys, leaf in old.items() if chosen(keys)}

    def one_layer(layer: int) -> Callable[[], Flat]:
        return lambda: {keys: current[keys].at[layer].set(old[keys][layer]) for keys in _stacked(current)}

    yield "weights, all of them", lambda: old
    yield "output head", part(lambda keys: keys == HEAD)
    yield "embedding", part(lambda keys: keys[0] == "embed")
    yield "final norm", part(lambda keys: keys[0] == "norm")
    yield "layers, all of them", part(lambda keys: keys[0] == "layers")
    for module in dict.fromkeys(keys[:-1] for keys in _stacked(current)):
        yield f"{'/'.join(module[1:])} in all layers", part(lambda keys, module=module: keys[:-1] == module)
    for layer in range(model.config.num_layers):
        yield f"layer {layer}", one_layer(layer)


def _tensors(model: Model, current: Flat, old: Flat) -> Iterator[tuple[str, Callable[[], Flat]]]:
    for keys in _stacked(current):
        for layer, name in enumerate(tensor_names(model.config, keys)):
            yield name, lambda keys=keys, layer=layer: {keys: current[keys].at[layer].set(old[keys][layer])}


def _mixed_up(model: Model, current: Flat) -> Iterator[tuple[str, Callable[[], Flat]]]:
    layers = list(range(model.config.num_layers))
    for layer in layers[:-1]:
        order = np.array([*layers[:layer], layer + 1, layer, *layers[layer + 2 :]])
        text = f"has layers {layer} and {layer + 1} exchanged"
        yield text, lambda order=order: {keys: current[keys][order] for keys in _stacked(current)}
    for keys in _stacked(current):
        if keys[-1] == "kernel" and current[keys].shape[1] == current[keys].shape[2]:
            text = f"has {'/'.join(keys[1:-1])} transposed in all layers"
            yield text, lambda keys=keys: {keys: current[keys].swapaxes(1, 2)}
            for layer, name in enumerate(tensor_names(model.config, keys)):
                yield (
                    f"has {name} transposed",
                    lambda keys=keys, layer=layer: {keys: current[keys].at[layer].set(current[keys][layer].T)},
                )


def _adapter_guesses(
    model: Model, params: dict[str, Any], lora: Lora, previous: Published | None
) -> Iterator[Iterable[Guess]]:
    """No adapter at all, or parts of the previous one."""

    def guess(text: str, factors: dict[str, LoraFactors]) -> Guess:
        return Guess(text, lambda: (params, None, Lora(factors, lora.scale) if factors else None))

    yield [guess("answers without the adapter", {})]
    if previous is None or previous.manifest.kind != "adapter" or not previous.folder.is_dir():
        return
    old = jax.tree.map(np.asarray, load_peft(previous.folder, model, params).factors)
    new, still = lora.factors, f"still has version {previous.manifest.version}'s adapter"
    yield [
        guess(f"{still}, all of it", old),
        *(guess(f"{still} of {path} in all layers", new | {path: old[path]}) for path in new),
        *(
            guess(f"{still} of layer {layer}", jax.tree.map(functools.partial(_with_layer, layer), new, old))
            for layer in range(model.config.num_layers)
        ),
    ]


def _best(
    model: Model, probe: Probe, found: np.ndarray, expected: np.ndarray, tolerance: float,
    guesses: Iterable[Guess],
) -> str | None:  # fmt: skip
    """The guess that comes closest to what was found, if within `tolerance`; the first of several that are the same."""
    # Most guesses are refuted by the row that is worst off.
    worst = int(np.where(probe.completions.mask, np.abs(found - expected), 0).max(axis=1).argmax())
    fitting = []
    for text, make in guesses:
        params, head, lora = make()
        for rows in (slice(worst, worst + 1), slice(None)):
            part, values = jax.tree.map(lambda array: array[rows], (probe, found))  # noqa: B023
            logps = np.asarray(probe_logps(model, params, part, lora=lora, head=head))
            gap = probe_gap(values, logps, part.completions.mask)
            if gap.largest > tolerance:
                break
        else:
            fitting.append((gap.mean, text))
    if not fitting:
        return None
    smallest, text = min(fitting, key=lambda fit: fit[0])
    rivals = any(smallest < mean < 2 * smallest for mean, _ in fitting)
    return f"its files are right, the server {'most likely ' * rivals}{text}"


def _previous_weights(model: Model, current: Flat, folder: Path) -> Flat | None:
    """The weights in the files of an earlier version; None if they are no longer there."""
    stored, old = _stored(folder) if folder.is_dir() else {}, {}
    for keys, leaf in current.items():
        names = tensor_names(model.config, keys)
        if not set(names) <= set(stored):
            return None
        views = [stored[name] for name in names]
        old[keys], _ = load_leaf(keys, views, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model.mesh)
    return old


def _stored(folder: Path) -> dict[str, np.ndarray]:
    files = [TensorFile(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: file.view(name) for file in files for name in file.names}


def _stacked(flat: Flat) -> list[tuple]:
    return [keys for keys in flat if keys[0] == "layers"]


def _with_layer(layer: int, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    mixed = np.array(new)
    mixed[layer] = old[layer]
    return mixed


def _same(stored: np.ndarray, value: np.ndarray) -> bool:
    return stored.shape == value.shape and stored.dtype == value.dtype and np.array_equal(stored, value)
