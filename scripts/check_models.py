"""Compares our forward passes and greedy tokens with numbers that another implementation computed.

    python scripts/check_models.py DIR [--devices N]

DIR holds checkpoint folders NAME and beside each a NAME.npz: `input_ids` and `attention_mask` (left-padded), `logits`
and `last_hidden` (after the final norm), and `greedy`, the tokens that follow. All is float32; N fake CPU devices form
a mesh data x fsdp x tensor. Exit status 1 where a number is off by more than 2e-4 or a token differs, 2 for bad input.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unisd_jax.errors import UserError, report_error

TOLERANCE = 2e-4
ARRAYS = ("input_ids", "attention_mask", "logits", "last_hidden", "greedy")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="fake CPU devices of the mesh")
    options = parser.parse_args(arguments)
    # jax reads these when it is imported.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if "xla_force_host_platform_device_count" not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={options.devices}".strip()
    try:
        names = model_names(options.directory)
        shape = mesh_shape(options.devices)
        print("mesh " + " x ".join(f"{axis} {size}" for axis, size in shape.items()))
        print(f"{'model':20} {'family':12} {'logits':>9} {'hidden':>9}  greedy tokens")
        return int(not all([check(options.directory, name, shape) for name in names]))
    except UserError as error:
        return report_error(error)


def model_names(directory: Path) -> list[str]:
    """The folders of `directory` that can be compared."""
    configs = sorted(directory.glob("*/config.json"))
    names = [path.parent.name for path in configs if (directory / f"{path.parent.name}.npz").exists()]
    if not names:
        raise UserError(f"{directory}: no folder NAME with a config.json and a NAME.npz beside it")
    return names


def mesh_shape(devices: int) -> dict[str, int]:
    """`devices` divided among the axes, factor by factor: 2 are tensor 2, 8 are 2 x 2 x 2."""
    sizes, axes = {"data": 1, "fsdp": 1, "tensor": 1}, ("tensor", "fsdp", "data")
    turn, factor = 0, 2
    while devices > 1:
        if devices % factor:
            factor += 1
            continue
        sizes[axes[turn % 3]] *= factor
        devices //= factor
        turn += 1
    return sizes


def check(directory: Path, name: str, shape: dict[str, int]) -> bool:
    """Prints one row of the table; whether all of it is within the tolerance."""
    import numpy as np

    with np.load(directory / f"{name}.npz") as file:
        if missing := [array for array in ARRAYS if array not in file.files]:
            raise UserError(f"{directory / name}.npz has no array {missing[0]}; expected {', '.join(ARRAYS)}")
        expected = {array: file[array] for array in ARRAYS}
    # Whole rows over again, so that the devices share them evenly.
    rows = -(-len(expected["input_ids"]) // (shape["data"] * shape["fsdp"])) * shape["data"] * shape["fsdp"]
    expected = {key: np.resize(value, (rows, *value.shape[1:])) for key, value in expected.items()}
    family, hidden, logits, greedy = run(directory / name, expected, shape)
    mask = expected["attention_mask"].astype(bool)
    worst = [
        float(np.max(np.abs(found - expected[key])[mask]))
        for key, found in (("logits", logits), ("last_hidden", hidden))
    ]
    equal, total = int(np.sum(greedy == expected["greedy"])), greedy.size
    # NaN is a failure: no comparison with it holds.
    good = all(error <= TOLERANCE for error in worst) and equal == total
    print(
        f"{name:20} {family:12} {worst[0]:9.2e} {worst[1]:9.2e}  {equal} of {total}{'' if good else '  MISSED'}",
        flush=True,
    )
    return good


def run(path: Path, batch: dict[str, Any], shape: dict[str, int]) -> tuple[str, Any, Any, Any]:
    """(family, hidden states, logits, greedy tokens) of the checkpoint, on a mesh where there are several devices."""
    import dataclasses

    import jax
    import numpy as np

    from unisd_jax.models import load_hf
    from unisd_jax.parallel.mesh import build_mesh
    from unisd_jax.rollout import JaxSampler, Sampling

    mesh = build_mesh(**shape)
    model, params = load_hf(path, mesh=mesh)
    model = dataclasses.replace(model, mesh=mesh if mesh.size > 1 else None)
    ids, mask = batch["input_ids"].astype(np.int32), batch["attention_mask"].astype(bool)
    hidden = jax.jit(model.hidden)(params, ids, mask)
    logits = jax.jit(model.logits)(params, hidden)
    sampler = JaxSampler(model)
    sampler.publish(params, 0)
    sampling = Sampling(batch["greedy"].shape[1], (), 0, temperature=0.0)
    rollout = sampler.generate(ids, mask, sampling, key=jax.random.key(0), version=0)
    return model.config.family, *(np.asarray(x) for x in (hidden, logits, rollout.ids))


if __name__ == "__main__":
    sys.exit(main())
