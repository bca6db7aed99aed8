"""Which arrays these are, bit for bit, without bringing them to the host."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unisd_jax.models.layout import path_name


def named_leaves(tree: Any) -> dict[str, jax.Array]:
    """Every leaf under its path, joined by dots."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path).replace("/", "."): leaf for path, leaf in flat}


def checksums(leaves: dict[str, jax.Array]) -> dict[str, list]:
    """Shape, dtype and the sum of the 32-bit words of every array: cheap, exact, and the same however it is sharded."""
    return {
        name: [list(leaf.shape), str(leaf.dtype), int(_word_sum(jnp.asarray(leaf)))] for name, leaf in leaves.items()
    }


@functools.partial(jax.jit)
def _word_sum(leaf: jax.Array) -> jax.Array:
    words = leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf.view(f"uint{8 * leaf.dtype.itemsize}")
    # Weighted by position, so that exchanged values are seen too; arithmetic is modulo 2^32. The positions are made
    # axis by axis: numbered in one row, a leaf that is divided would first be gathered.
    places, step = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        places += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * np.uint32(step % 2**32)
        step *= leaf.shape[axis]
    return jnp.sum(words.astype(jnp.uint32) * (2 * places + 1), dtype=jnp.uint32)
