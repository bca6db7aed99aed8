"""The device mesh: axes `data`, `fsdp` and `tensor`."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from unisd_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")


def build_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first data·fsdp·tensor devices; over all of them where several processes run together.

    Raises:
      ConfigError: there are fewer devices than that, or a process would have none.
    """
    wanted, devices = data * fsdp * tensor, jax.devices()
    if wanted > len(devices):
        raise ConfigError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {data} x {fsdp} x {tensor} = {wanted} devices, found {len(devices)}"
        )
    if jax.process_count() > 1 and wanted != len(devices):
        raise ConfigError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {data} x {fsdp} x {tensor} = {wanted} devices, but the "
            f"{jax.process_count()} processes of this run have {len(devices)}: all must be used"
        )
    grid = np.array(devices[:wanted]).reshape(data, fsdp, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
