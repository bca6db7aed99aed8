"""How the train step's inputs and outputs are laid out over the mesh; parameters follow `models.layout`."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unisd_jax.models.layout import tree_shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch, over every axis that holds different rows."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def jit_step(step: Any, state: Any, mesh: Mesh) -> Any:
    """`step(state, base, views) -> (state, metrics)` compiled; the state keeps its layout and its memory is reused."""
    return jax.jit(step, out_shardings=(tree_shardings(state, mesh), replicated(mesh)), donate_argnums=0)
