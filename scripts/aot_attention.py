"""Compiles a decoder's gradient with every form of attention for chips that this machine does not have.

    python scripts/aot_attention.py [--targets h200,v5e] [--require]

Needs the wheels of a target, as scripts/aot_kernels.py does; without them it is skipped. Nothing runs. Exit status 1
when a program does not compile, holds an array [..., 4096, 4096], or lacks the kernel it was asked for.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
from typing import Any, NamedTuple

from aot_kernels import GIB, TARGETS, describe_devices, environment, missing_wheels, one_line

LENGTH = 4096
SQUARE = re.compile(rf"\w+\[(?:\d+,)*{LENGTH},{LENGTH}\]")
KERNELS = {"cudnn": re.compile(r'custom_call_target="__cudnn\$fmha'), "splash": re.compile("tpu_custom_call")}
FUSED = {"cuda": "cudnn", "tpu": "splash"}
COMMON: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8,
    "max_position_embeddings": LENGTH,
}  # fmt: skip
MODELS = {
    "llama": COMMON | {"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 2},
    "gemma": COMMON
    | {"model_type": "gemma3_text", "num_hidden_layers": 6, "num_key_value_heads": 4, "sliding_window": 1024},
}


class Case(NamedTuple):
    """One program: a model of `MODELS`, "fused" or "xla" attention, and over how many devices its heads are divided."""

    model: str
    attention: str
    devices: int = 1
    remat: str = "none"


CASES = [
    Case("llama", "fused"),
    Case("llama", "fused", devices=2),
    Case("llama", "fused", remat="layer"),
    Case("llama", "fused", remat="products"),
    Case("gemma", "fused"),
    Case("gemma", "fused", devices=2),
    Case("gemma", "fused", remat="layer"),
    Case("llama", "xla"),
]


def compile_case(case: Case, devices: list, platform: str) -> Any:
    """The compiled gradient of a sum over the hidden states, by all bfloat16 weights."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from unisd_jax.models import Model, ModelConfig
    from unisd_jax.models.layout import tree_shardings

    mesh = Mesh(np.array(devices[: case.devices]).reshape(1, 1, -1), ("data", "fsdp", "tensor"))
    model, shapes = Model.build(ModelConfig.from_hf(MODELS[case.model]), dtype=jnp.bfloat16)
    attention = FUSED[platform] if case.attention == "fused" else case.attention
    model = dataclasses.replace(model, attention=attention, remat=case.remat, mesh=mesh)

    def placed(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    params = jax.tree.map(placed, shapes, tree_shardings(shapes, mesh))
    rows = NamedSharding(mesh, PartitionSpec())
    batch = [placed(jax.ShapeDtypeStruct((2, LENGTH), dtype), rows) for dtype in (jnp.int32, jnp.bool_)]
    gradient = jax.jit(jax.grad(lambda *arrays: jnp.sum(model.hidden(*arrays).astype(jnp.float32))))
    return gradient.trace(params, *batch).lower(lowering_platforms=(platform,)).compile()


def check_case(case: Case, devices: list, platform: str) -> bool:
    """Prints a row of the table; whether the program is as it should be."""
    try:
        compiled = compile_case(case, devices, platform)
    except Exception as error:  # one row that says why, the rest of the table all the same
        print(f"{case.model:6} {case.attention:6} {case.devices:7} {case.remat:9} {one_line(error)[:300]}", flush=True)
        return False
    text = compiled.as_text()
    squares, temporary = SQUARE.findall(text), compiled.memory_analysis().temp_size_in_bytes / GIB
    kernels = len(KERNELS[FUSED[platform]].findall(text))
    good = not squares and (kernels > 0) == (case.attention == "fused")
    row = f"{temporary:9.3f} {kernels:7} {len(squares):7} {'' if good else 'MISSED'}"
    print(f"{case.model:6} {case.attention:6} {case.devices:7} {case.remat:9} {row}", flush=True)
    return good


def pretend_hopper() -> None:
    """cuDNN's limits are those of the target, not of the machine that compiles."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    fused.check_cudnn_version = lambda: 91000
    fused.check_compute_capability = lambda capability: float(capability) <= 9.0
    fused.is_cuda_compute_capability_equal = lambda capability: capability == "9.0"


def compile_target(name: str) -> int:
    """The table of one target, in a process of its own because the environment differs by target."""
    target = TARGETS[name]
    devices = describe_devices(target)
    if target.platform == "cuda":
        pretend_hopper()
    print(f"{name}: {devices[0].device_kind}, 2 x {LENGTH} tokens, bfloat16")
    print(f"{'model':6} {'form':6} {'devices':>7} {'remat':9} {'temp GiB':>9} {'kernels':>7} [S, S]", flush=True)
    return int(not all([check_case(case, devices, target.platform) for case in CASES]))


def main() -> int:
    """The exit status: 1 when a program is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="h200,v5e", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--require", action="store_true", help="fail where the wheels of a target are missing")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        return compile_target(options.compile)
    failed = False
    for name in options.targets.split(","):
        if reason := missing_wheels(name):
            print(f"{name}: skipped, {reason}")
            failed |= options.require
            continue
        command = [sys.executable, __file__, "--compile", name]
        failed |= bool(subprocess.run(command, env=os.environ | environment(name), check=False).returncode)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
