"""How much memory loading and exporting a checkpoint take beside the weights themselves.

    python scripts/measure_loading.py [--gb 3] [--dtype bfloat16] [--folder /tmp]

Makes a random sharded bfloat16 checkpoint of that size in a temporary folder, then loads and exports it in a fresh
process on the CPU while this one watches that process's anonymous memory (`RssAnon` in /proc, Linux only). Anonymous
memory leaves out the pages of the memory-mapped files, which the kernel takes back when it needs room; the weights
themselves are in it, because the device here is the host. Exit status 1 if loading or exporting took more beside the
weights than 1.1 times the largest tensor plus 64 MiB for compiled programs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SHARE, CONSTANT = 1.1, 64 * 2**20
HIDDEN, INNER, VOCABULARY, HEADS = 2048, 8192, 32_000, 16
SHARD_BYTES = 10**9


def make_checkpoint(path: Path, gigabytes: float) -> None:
    """A Llama with as many layers as make it that large, written tensor by tensor."""
    import jax.numpy as jnp
    import numpy as np

    from unisd_jax.io import write_json_atomic
    from unisd_jax.models.safetensors_io import Entry, new_tensor_file
    from unisd_jax.testing import tiny_config

    matrices = {"self_attn." + name: (HIDDEN, HIDDEN) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    matrices |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    norms = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    layer_bytes = 2 * sum(rows * columns for rows, columns in matrices.values())
    layers = max(1, round((gigabytes * 10**9 - 4 * VOCABULARY * HIDDEN) / layer_bytes))
    config = tiny_config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_layers=layers, num_heads=HEADS,
        num_kv_heads=HEADS, head_dim=HIDDEN // HEADS,
    )  # fmt: skip
    top = {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    files = [top] + [
        {f"model.layers.{n}.{name}": shape for name, shape in (matrices | norms).items()} for n in range(layers)
    ]
    rng, places = np.random.default_rng(0), {}
    for number, shapes in enumerate(files):
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        entries = [Entry(f"{name}.weight", shape, np.dtype(jnp.bfloat16)) for name, shape in shapes.items()]
        with new_tensor_file(path / file, entries) as append:
            for entry in entries:
                # Random bits without the exponent's highest: every value is finite.
                append(rng.integers(0, 2**16, entry.shape, np.uint16) & np.uint16(0xBFFF))
                places[entry.name] = file
    write_json_atomic(path / "config.json", config.to_hf())
    write_json_atomic(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def load_and_export(path: Path, dtype: str) -> None:
    """What is measured; prints (stage, anonymous memory as it ends, bytes) after each stage."""
    import jax
    import jax.numpy as jnp

    from unisd_jax.models import load_hf, save_hf
    from unisd_jax.models.hf_io import iter_hf_tensors

    def report(stage: str, size: int = 0) -> None:
        print(stage, _anonymous(os.getpid()), size, flush=True)

    jax.block_until_ready(jnp.zeros(()))
    report("start")
    model, params = jax.block_until_ready(load_hf(path, dtype=jnp.dtype(dtype)))
    report("load", sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
    save_hf(path / "export", model, params, source=path, shard_bytes=SHARD_BYTES)
    report("export")
    report("largest", max(value.nbytes for _, value in iter_hf_tensors(model, params)))


def watch(path: Path, dtype: str) -> dict[str, dict[str, float]]:
    """Per stage of `load_and_export` in a new process: seconds, peak of anonymous memory, and what it printed."""
    command = [sys.executable, __file__, "--measure", str(path), "--dtype", dtype]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    stages: dict[str, dict[str, float]] = {}
    seen = [0]

    def sample() -> None:
        while child.poll() is None:
            seen.append(_anonymous(child.pid))
            time.sleep(0.002)

    threading.Thread(target=sample, daemon=True).start()
    started, first = time.monotonic(), 0
    for line in child.stdout:
        stage, held, size = line.split()
        ended, last = time.monotonic(), len(seen)
        stages[stage] = {
            "seconds": ended - started, "peak": max(seen[first:last] or [0]), "held": int(held), "size": int(size),
        }  # fmt: skip
        started, first = ended, last
    if child.wait():
        raise SystemExit(f"measure_loading: the measured process ended with status {child.returncode}")
    return stages


def main() -> int:
    """Prints the table; the exit status is 1 when too much memory was taken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=3.0, help="size of the checkpoint in units of 10^9 bytes")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the loaded weights")
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes; twice the checkpoint's size")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        load_and_export(arguments.measure, arguments.dtype)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        make_checkpoint(Path(folder), arguments.gb)
        stages = watch(Path(folder), arguments.dtype)
    largest = stages["largest"]["size"]
    limit = SHARE * largest + CONSTANT
    extra = {
        "load": stages["load"]["peak"] - stages["start"]["held"] - stages["load"]["size"],
        "export": stages["export"]["peak"] - stages["load"]["held"],
    }
    print(f"weights {_mib(stages['load']['size'])}, largest tensor {_mib(largest)}, allowed beside them {_mib(limit)}")
    for stage, size in extra.items():
        print(f"{stage:7}{stages[stage]['seconds']:7.1f} s, beside the weights {_mib(size)}")
    return int(max(extra.values()) > limit)


def _anonymous(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def _mib(size: float) -> str:
    return f"{size / 2**20:.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
