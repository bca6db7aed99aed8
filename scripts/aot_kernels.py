"""Compiles the kernels for H200, TPU v5e, v5p and v6e on a machine that has none of them, and checks their memory.

    python scripts/aot_kernels.py [--targets h200,v5e,v5p,v6e] [--quick] [--require] [--json FILE]

Needs the wheels of a target, jax[cuda13] for h200 and jax[tpu] for the others; without them it is skipped. Prints a
table per target with what XLA plans for that chip, in GiB: temporary memory, outputs, and how much less than the plain
form that holds all logits ("naive"). Nothing runs, so no time here says anything about the chip. Exit status 1 when a
gate is missed: at the large shape and alpha 0.5, 7 times less temporary memory than naive (30 times in the low-memory
mode); no [T, V] array in any fused program; every Pallas kernel compiles and is in the program that asked for it.
"""

import argparse
import collections
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

SHAPES = {"S1": (8192, 3584, 152064), "S2": (8192, 896, 151936)}
VOCAB_BLOCK = 4608  # of the low-memory mode
ROWS = 1024  # of a row pass that is compiled by itself
LEAST, LEAST_IN_LOW_MEMORY = 7.0, 30.0
MARK = "@row "
GIB = 2**30
NOTES = """
naive/: temporary memory of the naive form over this one's. [T,V]: how often such an array (a device's part of it, where
there are several) stands in the optimised program. compile s: wall time on this machine.
* Under jax.grad with a bfloat16 head the loss holds the head's gradient in float32, and that counts as temporary; for
value and grad the same array is an output.
A collective inside a loop is counted once."""

# The fields of XLA's GpuTargetConfigProto, from NVIDIA's data sheet and the device properties of the card.
H200 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200" """


class Target(NamedTuple):
    """A chip: how jax describes it, which wheel compiles for it, its Pallas kernels by kind of function."""

    platform: str
    topology: str
    wheels: tuple[str, ...]
    extra: str
    jsd: tuple[str, ...]
    logprob: tuple[str, ...]


GPU_KERNELS, TPU_KERNELS = ("pallas_gpu", "pallas_triton"), ("pallas_tpu",)
TPU = {"wheels": ("libtpu",), "extra": "jax[tpu]", "jsd": TPU_KERNELS, "logprob": TPU_KERNELS}
TARGETS = {
    "h200": Target(
        "cuda", "1x1x8", ("jax_cuda13_plugin", "jax_cuda12_plugin"), "jax[cuda13]", GPU_KERNELS, GPU_KERNELS
    ),
    "v5e": Target("tpu", "v5e:2x2", **TPU),
    "v5p": Target("tpu", "v5p:2x2x1", **TPU),
    "v6e": Target("tpu", "v6e:2x2", **TPU),
}
# What a compiled program calls where a Pallas kernel is in it.
KERNEL_CALLS = re.compile(r'custom_call_target="(mosaic_gpu\w*|__gpu\$xla\.gpu\.triton|tpu_custom_call)"')
COLLECTIVE = re.compile(
    r"= (?P<shape>\(.*?\)|\S+) (?P<kind>all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\("
)
ARRAY = re.compile(r"\w+\[[\d,]*\]")


class Case(NamedTuple):
    """One program. `form`: naive, token, loss, value_and_grad, rows or logprob; `mesh`: its devices, 0 for one."""

    label: str
    form: str
    shape: str = "S1"
    alpha: float = 0.5
    trained: bool = True
    implementation: str = "chunked"
    vocab_block: int | None = None
    mesh: int = 0


def cases(target: Target, quick: bool) -> list[Case]:
    """The programs of a table, naive forms before what is compared with them."""
    found = []
    for trained in (True, False):
        found += differentiated(trained=trained)
        found.append(Case("low memory, per token", "token", trained=trained, vocab_block=VOCAB_BLOCK))
        for name in target.jsd:
            found.append(Case(f"{name}, per token", "token", trained=trained, implementation=name))
            found.append(Case(f"{name}, loss", "loss", trained=trained, implementation=name))
    found.append(Case("low memory, loss", "loss", vocab_block=VOCAB_BLOCK))
    found += [Case(f"{name}, row pass alone", "rows", implementation=name) for name in target.jsd]
    found += [Case("log-probs, naive", "logprob", implementation="reference"), Case("log-probs", "logprob")]
    found += [Case(f"log-probs, {name}", "logprob", implementation=name) for name in target.logprob]
    if not quick:
        found += [
            case for alpha in (0.0, 1.0) for head in (True, False) for case in differentiated(alpha, trained=head)
        ]
        for trained in (True, False):
            found += differentiated(shape="S2", trained=trained)
            found += [Case(f"{name}, loss", "loss", "S2", 0.5, trained, name) for name in target.jsd]
    devices = 8 if target.platform == "cuda" else 4
    forms = {"per token": "token", "loss": "loss", "log-probs": "logprob"}
    return found + [Case(f"{label}, {devices} devices", form, mesh=devices) for label, form in forms.items()]


def differentiated(alpha: float = 0.5, *, shape: str = "S1", trained: bool) -> list[Case]:
    """The naive form, and ours without options."""
    forms = {"naive": "naive", "per token": "token", "loss": "loss", "value and grad": "value_and_grad"}
    return [Case(label, form, shape, alpha, trained) for label, form in forms.items()]


def program(case: Case, devices: list) -> tuple[Any, tuple]:
    """(function, abstract arguments placed on the target's devices) of a case."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

    from unisd_jax.kernels import Layout, fused_linear_logprob

    layout, tokens, vocab = None, SingleDeviceSharding(devices[0]), SingleDeviceSharding(devices[0])
    if case.mesh:
        mesh = Mesh(np.array(devices[: case.mesh]).reshape(2, -1), ("data", "tensor"))
        layout = Layout(mesh, ("data",), ("tensor",))
        tokens, vocab = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("data", "tensor"))

    def array(sharding, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    total, depth, width = SHAPES[case.shape]
    hidden, head = array(tokens, total, depth), array(vocab, width, depth)
    targets, weights = array(tokens, total, dtype=jnp.int32), array(tokens, total, dtype=jnp.float32)
    options = {"implementation": case.implementation, "vocab_block": case.vocab_block, "layout": layout}
    if case.form == "rows":
        logits = array(tokens, ROWS, width, dtype=jnp.float32)
        return row_pass(case), (logits, logits, array(tokens, ROWS, dtype=jnp.int32))
    if case.form == "logprob":
        return lambda *arrays: fused_linear_logprob(*arrays, **options), (hidden, head, targets)
    return loss_and_gradients(case, options), (hidden, head, hidden, head, targets, weights)


def row_pass(case: Case):
    """The kernel by itself: [ROWS, V] logits of both to scores and bfloat16 factors."""
    import jax.numpy as jnp

    from unisd_jax.kernels.fused_linear_jsd.rows import Settings

    module = importlib.import_module(f"unisd_jax.kernels.fused_linear_jsd.{case.implementation}")
    options = {"settings": Settings(case.alpha), "wanted": ("divergence",), "factor_dtype": jnp.bfloat16}
    return lambda *logits: module.score_rows(*logits, **options)


def loss_and_gradients(case: Case, options: dict):
    """The weighted sum of clipped divergences with its gradients, of hidden states and, if trained, of the head."""
    import jax
    import jax.numpy as jnp

    from unisd_jax.kernels import fused_linear_jsd, fused_linear_jsd_loss, fused_linear_jsd_value_and_grad

    options = options | {"alpha": case.alpha, "ceiling": 0.5}
    if case.form == "naive":
        options["implementation"] = "reference"
    if case.form == "value_and_grad":
        return lambda *arrays: fused_linear_jsd_value_and_grad(*arrays, head_gradient=case.trained, **options)

    def per_token(*arrays):
        *arrays, weights = arrays
        return jnp.sum(weights * fused_linear_jsd(*arrays, **options).clipped_divergence)

    def loss(*arrays):
        return fused_linear_jsd_loss(*arrays, **options)[0]

    return jax.value_and_grad(per_token if case.form == "token" else loss, (0, 1) if case.trained else (0,))


def compile_case(case: Case, target: Target, devices: list) -> dict[str, Any]:
    """What XLA says of the compiled program; `error` where it does not compile."""
    import jax

    row, started = case._asdict(), time.perf_counter()
    try:
        function, arguments = program(case, devices)
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(target.platform,))
    except Exception as error:  # one row that says why, the rest of the table all the same
        return row | {"error": one_line(error)}
    try:
        compiled = lowered.compile()
    except Exception as error:
        row["error"] = one_line(error)
        if needed := re.search(r"total memory required .*?\(([\d.]+)G\) exceeds", row["error"]):
            arrays = jax.tree.leaves((arguments, jax.eval_shape(function, *arguments)))
            row["temp"] = float(needed[1]) * GIB - sum(array.size * array.dtype.itemsize for array in arrays)
        return row
    memory, text = compiled.memory_analysis(), compiled.as_text()
    total, _, width = SHAPES[case.shape]
    if case.mesh:
        total, width = total // 2, width // (case.mesh // 2)
    return row | {
        "temp": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "mentions": len(re.findall(rf"\[(?:{total},{width}|{width},{total})\]", text)),
        "kernel_calls": len(KERNEL_CALLS.findall(text)),
        "collectives": collectives(text) if case.mesh else {},
        "seconds": time.perf_counter() - started,
    }


def one_line(error: Exception) -> str:
    """An error's kind and message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:1500]


def collectives(text: str) -> dict[str, int]:
    """Kind and shape of each collective of a program -> how often it stands there; a loop's body counts once."""
    found: collections.Counter[str] = collections.Counter()
    for match in COLLECTIVE.finditer(text):
        found[f"{match['kind']} {' '.join(ARRAY.findall(match['shape']))}"] += 1
    return dict(found)


def describe_devices(target: Target) -> list:
    """The devices that are compiled for."""
    from jax.experimental import topologies

    if target.platform == "cuda":
        description = {"topology_name": "", "target_config": H200, "topology": target.topology}
    else:
        description = {"topology_name": target.topology}
    return list(topologies.get_topology_desc(platform=target.platform, **description).devices)


def compile_target(name: str, quick: bool) -> int:
    """Prints one JSON line per program; runs in a process of its own, because the environment differs by target."""
    import jax

    target = TARGETS[name]
    devices = describe_devices(target)
    print(MARK + json.dumps({"jax": jax.__version__, "device": devices[0].device_kind}), flush=True)
    for case in cases(target, quick):
        print(MARK + json.dumps(compile_case(case, target, devices)), flush=True)
        jax.clear_caches()
    return 0


def missing_wheels(name: str) -> str | None:
    """What to install before this target can be compiled for."""
    target = TARGETS[name]
    if any(importlib.util.find_spec(wheel) for wheel in target.wheels):
        return None
    return f"needs {' or '.join(target.wheels)}: pip install '{target.extra}'"


def environment(name: str) -> dict[str, str]:
    """What jax must find in the environment when it is imported."""
    if TARGETS[name].platform == "cuda":
        return {"JAX_PLATFORMS": "cpu,cuda", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    # No chip is asked for its metadata, and none can be taken from another process.
    return {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def run_target(name: str, quick: bool) -> tuple[dict, list[dict], str | None]:
    """(jax version and chip, rows, what went wrong) of a target, a line on stderr for each row that is there."""
    command = [sys.executable, __file__, "--compile", name, *(["--quick"] if quick else [])]
    rows: list[dict] = []
    with subprocess.Popen(
        command, env=os.environ | environment(name), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        other = collections.deque(maxlen=20)
        for line in process.stdout:
            if not line.startswith(MARK):
                other.append(line)
                continue
            rows.append(json.loads(line.removeprefix(MARK)))
            if "label" in rows[-1] and sys.stderr.isatty():
                print(f"\r\033[K{name}: {len(rows) - 1} compiled", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    problem = f"exit status {process.returncode}: {''.join(other)[-1500:]}" if process.returncode else None
    return (rows[0] if rows else {}), rows[1:], problem


def add_ratios(rows: list[dict]) -> None:
    """Puts into each row how many times less temporary memory than the naive form of the same sums it takes."""
    naive = {kind(row): row for row in rows if is_naive(row)}
    for row in rows:
        base = naive.get(kind(row))
        ours = not (is_naive(row) or row["mesh"] or row["form"] == "rows")
        if ours and base and "temp" in base and "temp" in row:
            row["times_less"] = base["temp"] / max(row["temp"], 1)


def is_naive(row: dict) -> bool:
    """Whether all logits are held."""
    return row["form"] == "naive" or row["implementation"] == "reference"


def kind(row: dict) -> tuple:
    """Rows with the same are compared with each other."""
    return row["shape"], row["alpha"], row["trained"], row["form"] == "logprob"


def gates(rows: list[dict]) -> list[tuple[str, bool]]:
    """(what is asked for, whether it is so) for one target."""
    found = []
    for row in rows:
        label = name_of(row)
        if "error" in row:
            # A chip on which the naive form does not fit is no failure of ours.
            found += [] if is_naive(row) else [(f"{label} compiles", False)]
            continue
        if row["implementation"].startswith("pallas"):
            found.append((f"{label}: its kernel is in the program", row["kernel_calls"] > 0))
        if not is_naive(row) and row["form"] != "rows":
            found.append((f"{label}: no [T, V] array", row["mentions"] == 0))
        if (least := least_ratio(row)) and "times_less" in row:
            found.append((f"{label}: {least:.0f} times less than naive", row["times_less"] >= least))
    return found


def least_ratio(row: dict) -> float | None:
    """The gate on temporary memory, where there is one.

    Not for the loss with a trained head: under jax.grad it holds the head's gradient in float32.
    """
    if row["shape"] != "S1" or row["alpha"] != 0.5 or is_naive(row) or row["form"] in ("rows", "logprob"):
        return None
    if row["vocab_block"]:
        return LEAST_IN_LOW_MEMORY
    return None if row["form"] == "loss" and row["trained"] else LEAST


def name_of(row: dict) -> str:
    """Shape and form of a row, as the table and the gates call it."""
    if row["form"] in ("rows", "logprob"):
        return f"{row['shape']} {row['label']}"
    return f"{row['shape']} alpha {row['alpha']:g}, {'trained' if row['trained'] else 'frozen'} head, {row['label']}"


def print_table(name: str, about: dict, rows: list[dict]) -> None:
    """One target's rows and its collectives."""
    print(f"\n{name}: {about.get('device')}, jax {about.get('jax')}, bfloat16; GiB")
    print(f"{'':<60} {'temp':>7} {'output':>7} {'naive/':>7} {'[T,V]':>6} {'kernels':>7} {'compile s':>9}")
    for row in rows:
        if "error" in row:
            too_much = f"{row['temp'] / GIB:7.2f}, more than the chip has" if "temp" in row else None
            print(f"{name_of(row):<60} {too_much or row['error'][:200]}")
            continue
        ratio = f"{row['times_less']:7.1f}" if "times_less" in row else f"{'-':>7}"
        memory = f"{row['temp'] / GIB:7.2f} {row['output'] / GIB:7.2f}"
        mark = " *" if row["form"] == "loss" and row["trained"] and not row["vocab_block"] else ""
        counts = f"{row['mentions']:6} {row['kernel_calls']:7}"
        print(f"{name_of(row) + mark:<60} {memory} {ratio} {counts} {row['seconds']:9.1f}")
    for row in rows:
        if row.get("collectives"):
            print(f"collectives of {name_of(row)}:")
            print("\n".join(f"  {count} x {what}" for what, count in row["collectives"].items()))


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 when a gate is missed, or a target is skipped in spite of --require."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, of %(default)s")
    parser.add_argument("--quick", action="store_true", help="only the large shape at alpha 0.5")
    parser.add_argument("--require", action="store_true", help="fail where the wheels of a target are missing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.compile:
        return compile_target(options.compile, options.quick)
    names = options.targets.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"--targets has {', '.join(unknown)}; expected some of {', '.join(TARGETS)}")
    failures, record = [], {}
    for name in names:
        if reason := missing_wheels(name):
            print(f"{name}: skipped, {reason}")
            failures += [f"{name} was skipped"] if options.require else []
            continue
        about, rows, problem = run_target(name, options.quick)
        add_ratios(rows)
        print_table(name, about, rows)
        checked = gates(rows)
        missed = [what for what, reached in checked if not reached] + ([problem] if problem else [])
        print(f"{name}: {len(checked) - len(missed) + bool(problem)} of {len(checked)} gates reached", flush=True)
        failures += [f"{name}: {what}" for what in missed]
        record[name] = about | {"rows": rows, "missed": missed}
    if record:
        print(NOTES)
    if options.json:
        from unisd_jax.io import write_json_atomic

        write_json_atomic(options.json, record)
    for what in failures:
        print(f"MISSED {what}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
