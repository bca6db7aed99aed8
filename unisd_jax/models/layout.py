"""Where every parameter lives on a mesh: one table from names to the axes `data`, `fsdp` and `tensor`."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The end of a leaf's path → the mesh axis of each dimension. The same names occur in parameters, adapters, their EMA
# and the optimizer's moments, so one table serves them all. What matches nothing is replicated.
RULES = (
    (r"(embed|head)/weight", ("tensor", "fsdp")),
    (r"(attention/[qkv]|mlp/(gate|up))/kernel", (None, "fsdp", "tensor")),
    (r"(attention/o|mlp/down)/kernel", (None, "tensor", "fsdp")),
    (r"attention/[qkv]/bias", (None, "tensor")),
    (r"(attention/[qkv]|mlp/(gate|up))/a", (None, "fsdp", None)),
    (r"(attention/[qkv]|mlp/(gate|up))/b", (None, None, "tensor")),
    (r"(attention/o|mlp/down)/a", (None, "tensor", None)),
    (r"(attention/o|mlp/down)/b", (None, None, "fsdp")),
)


def leaf_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The axes of one leaf; a dimension that its axis does not divide is replicated."""
    for pattern, axes in RULES:
        if re.search(rf"(^|/){pattern}$", path):
            return PartitionSpec(
                *(
                    axis if axis and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(axes, shape, strict=True)
                )
            )
    return PartitionSpec()


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a tree of arrays or shapes."""

    def sharding(path, leaf):
        return NamedSharding(mesh, leaf_spec(path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def place(tree: Any, mesh: Mesh) -> Any:
    """The same tree with every leaf placed where the table says."""
    return jax.tree.map(jax.device_put, tree, tree_shardings(tree, mesh))


def path_name(path: tuple) -> str:
    """A leaf's path as names joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
