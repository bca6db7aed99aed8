"""How the train step's inputs and outputs are laid out over the mesh; parameters follow `models.layout`."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unisd_jax.kernels import Layout
from unisd_jax.models.layout import BATCH, VOCAB, tree_shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch, over every axis that holds different rows."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def head_layout(mesh: Mesh) -> Layout | None:
    """How the fused kernels divide tokens and vocabulary; None on one device.

    The vocabulary is divided as the output matrix is, over `fsdp` too: each of its devices scores the tokens of all.
    """
    used = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    tokens, vocab = (tuple(axis for axis in axes if axis in used) for axes in (("data",), VOCAB))
    return Layout(mesh, tokens, vocab) if used else None


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def jit_step(step: Any, state: Any, mesh: Mesh) -> Any:
    """`step(state, base, views) -> (state, metrics)` compiled; the state keeps its layout and its memory is reused."""
    return jax.jit(step, out_shardings=(tree_shardings(state, mesh), replicated(mesh)), donate_argnums=0)
