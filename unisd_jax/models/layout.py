"""Where arrays live on a mesh: one table from names to the axes `data`, `fsdp` and `tensor`.

`data` holds copies of the weights, each with its rows of the batch; `fsdp` divides rows and weights; `tensor` divides
the weights of each layer. The vocabulary is divided over `tensor` and `fsdp` together, so that neither the output
matrix nor its gradient is ever whole on a device.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

BATCH = ("data", "fsdp")
VOCAB = ("tensor", "fsdp")

# The end of a leaf's path → the mesh axes of each dimension. The same names occur in parameters, adapters, their EMA
# and the optimizer's moments, so one table serves them all. What matches nothing is replicated.
PARAMETERS = (
    (r"(embed|head)/weight", (VOCAB, None)),
    (r"(attention/[qkv]|mlp/(gate|up))/kernel", (None, "fsdp", "tensor")),
    (r"(attention/o|mlp/down)/kernel", (None, "tensor", "fsdp")),
    (r"attention/[qkv]/bias", (None, "tensor")),
    (r"(attention/[qkv]|mlp/(gate|up))/a", (None, "fsdp", None)),
    (r"(attention/[qkv]|mlp/(gate|up))/b", (None, None, ("tensor", "fsdp"))),
    (r"(attention/o|mlp/down)/a", (None, ("tensor", "fsdp"), None)),
    (r"(attention/o|mlp/down)/b", (None, None, "fsdp")),
)
ACTIVATIONS = {
    "stream": (BATCH, None, None),  # [B, S, H]
    "heads": (BATCH, None, "tensor", None),  # [B, S, N, D]
    "inner": (BATCH, None, "tensor"),  # [B, S, inner]
}


def leaf_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The axes of one leaf of a tree of weights; a dimension that its axes do not divide is replicated."""
    for pattern, axes in PARAMETERS:
        if re.search(rf"(^|/){pattern}$", path):
            return fitting_spec(axes, shape, mesh)
    return PartitionSpec()


def fitting_spec(axes: tuple, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """`axes` without those that do not divide their dimension of `shape`."""
    used = (axis if axis and size % _devices(axis, mesh) == 0 else None for axis, size in zip(axes, shape, strict=True))
    return PartitionSpec(*used)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a tree of arrays or shapes."""

    def sharding(path, leaf):
        return NamedSharding(mesh, leaf_spec(path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def place(tree: Any, mesh: Mesh) -> Any:
    """The same tree with every leaf placed where the table says."""
    return jax.tree.map(jax.device_put, tree, tree_shardings(tree, mesh))


def place_rows(arrays: Any, mesh: Mesh | None) -> Any:
    """Whole batches, the same on every host, with the rows divided over the mesh; as they are without one."""
    if mesh is None:
        return arrays

    def one(array):
        spec = fitting_spec((BATCH, *(None,) * (array.ndim - 1)), array.shape, mesh)
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda part: array[part])

    return jax.tree.map(one, arrays)


def constrain(x: Array, name: str, mesh: Mesh | None) -> Array:
    """`x` laid out as the activation `name`; as it is without a mesh."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fitting_spec(ACTIVATIONS[name], x.shape, mesh)))


def lookup(weight: Float[Array, "V H"], ids: Int[Array, "B S"], mesh: Mesh | None) -> Float[Array, "B S H"]:
    """`weight[ids]` from a table whose rows are divided: each device looks up what it has, for all rows that need it.

    Left to the compiler, the whole table would be gathered on every device.
    """
    rows = None if mesh is None else fitting_spec((VOCAB,), weight.shape[:1], mesh)[0]
    if rows is None:
        return weight[ids]
    batch = fitting_spec((BATCH, None), ids.shape, mesh)
    shared = tuple(axis for axis in rows if batch[0] and axis in batch[0])
    others = tuple(axis for axis in rows if axis not in shared)

    def local(weight, ids):
        ids = jax.lax.all_gather(ids, shared, axis=0, tiled=True) if shared else ids
        places = ids - jax.lax.axis_index(rows) * weight.shape[0]
        mine = (places >= 0) & (places < weight.shape[0])
        found = jnp.where(mine[..., None], weight[jnp.where(mine, places, 0)], 0)
        found = jax.lax.psum(found, others)
        return jax.lax.psum_scatter(found, shared, scatter_dimension=0, tiled=True) if shared else found

    specs = PartitionSpec(rows, None), batch
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(*batch, None))(weight, ids)


def path_name(path: tuple) -> str:
    """A leaf's path as names joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _devices(axes: str | tuple[str, ...], mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
