"""One leaf of the parameters from its stored tensors, straight onto the devices that hold it.

A leaf of stacked layers is allocated once and filled in place, layer by layer: beside the leaf itself there is never
more than one layer's matrix.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unisd_jax.models.layout import leaf_spec


def load_leaf(
    keys: tuple[str, ...], stored: Sequence[np.ndarray], shape: jax.ShapeDtypeStruct, mesh: Mesh | None
) -> tuple[Any, int | None]:
    """The leaf at `keys`, and which of its `stored` tensors holds NaN or infinity (the leaf is then incomplete)."""
    spec = PartitionSpec() if mesh is None else leaf_spec("/".join(keys), shape.shape, mesh)
    if keys[0] == "layers":
        return _stacked(stored, shape, mesh, spec, transpose=keys[-1] == "kernel")
    leaf = _single(stored[0], shape, mesh, spec)
    return leaf, None if _all_finite(leaf, leaf.dtype) else 0


def _single(stored: np.ndarray, shape: jax.ShapeDtypeStruct, mesh: Mesh | None, spec: PartitionSpec) -> jax.Array:
    """A copy of `stored` in the leaf's type, with rows of zeros where the leaf has more of them."""
    copies: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        # Devices that hold the same part share one copy on the host.
        if str(index) not in copies:
            sizes = [len(range(*axis.indices(size))) for axis, size in zip(index, shape.shape, strict=True)]
            rows = stored[index]
            copies[str(index)] = np.zeros(sizes, shape.dtype)
            with np.errstate(over="ignore"):  # becomes infinity, which is refused
                copies[str(index)][: len(rows)] = rows
        return copies[str(index)]

    if mesh is None:
        return jnp.asarray(part((slice(None),) * stored.ndim))
    return jax.make_array_from_callback(shape.shape, NamedSharding(mesh, spec), part)


def _stacked(
    stored: Sequence[np.ndarray],
    shape: jax.ShapeDtypeStruct,
    mesh: Mesh | None,
    spec: PartitionSpec,
    *,
    transpose: bool,
) -> tuple[jax.Array, int | None]:
    axes = (*spec, *(None,) * (len(shape.shape) - len(spec)))[1:]
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(None, *axes))
    stored_sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(*(axes[::-1] if transpose else axes)))
    leaf = _empty(shape.shape, shape.dtype, sharding)
    for layer, view in enumerate(stored):
        leaf, finite = _write_layer(leaf, view, layer, stored_sharding, _writer(sharding, transpose))
        if not finite:
            return leaf, layer
    return leaf, None


def _write_layer(
    leaf: jax.Array, view: np.ndarray, layer: int, sharding: NamedSharding | None, write: Callable
) -> tuple[jax.Array, bool]:
    """The leaf with one more layer, and whether that is finite; nothing else of it is left in memory."""
    if sharding is None:
        value = jnp.asarray(view)
    else:
        value = jax.make_array_from_callback(view.shape, sharding, view.__getitem__)
    finite = _all_finite(value, leaf.dtype)
    # Waiting keeps the next layer from being read while this one is still in memory.
    leaf, finite = jax.block_until_ready((write(leaf, value, layer), finite))
    return leaf, bool(finite)


@functools.cache
def _writer(sharding: NamedSharding | None, transpose: bool):
    def write(leaf, value, layer):
        value = value.T if transpose else value
        return jax.lax.dynamic_update_index_in_dim(leaf, value.astype(leaf.dtype), layer, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None):
    zeros = jnp.zeros(shape, dtype)
    return zeros if sharding is None else jax.lax.with_sharding_constraint(zeros, sharding)


@functools.partial(jax.jit, static_argnames="dtype")
def _all_finite(value: jax.Array, dtype: Any):
    """Whether `value` is finite as `dtype`, for which a float32 may be too large."""
    # NaN and infinity times zero are NaN. XLA would write a mask of isfinite to memory, half the size of a bfloat16.
    return jnp.sum(value.astype(dtype) * 0) == 0
