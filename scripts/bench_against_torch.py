"""Sampler and train step on this machine, beside torch where there is one; ratios from one run.

    python scripts/bench_against_torch.py --model models/smollm2-135m-instruct [--torch-python ENV/bin/python]

The two engines take turns in fresh processes, `--rounds` times, with the same weights, tokens and loss (the first loss
of both is compared). The train step is the whole one: frozen teacher over its longer prompt, student with LoRA on all
projections forward and backward, forward KL over the full vocabulary at the completion tokens, clipped AdamW.
Prints a table and writes `benchmarks/results/torch-<date>-<device>.json`.
"""

import argparse
import datetime
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_timing

# Two pieces of the step, to see where its time goes: one product of the MLP, and attention with its gradient.
PIECES = {
    "20 products 2048x576 @ 576x1536": {"tokens": 2048, "inputs": 576, "outputs": 1536, "calls": 20},
    "attention + gradient, 4 x 512": {"batch": 4, "length": 512, "heads": 9, "kv_heads": 3, "dim": 64},
}
SAMPLER = {"batch": 8, "prompt": 64, "new": 64}
STEPS = {
    "step, 16 x (56 | 96) + 16": {"batch": 16, "student": 56, "teacher": 96, "completion": 16},
    "step, 4 x (384 | 384) + 128": {"batch": 4, "student": 384, "teacher": 384, "completion": 128},
}


def measure_jax(work: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every workload in this process, each after one call that compiles."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from unisd_jax.models import init_lora, load_hf
    from unisd_jax.models.attention import causal_attention
    from unisd_jax.optim import adamw
    from unisd_jax.parallel.mesh import build_mesh
    from unisd_jax.parallel.sharding import jit_step
    from unisd_jax.rollout.jax_sampler import sample
    from unisd_jax.rollout.protocol import Sampling
    from unisd_jax.step import StepSettings, init_state, train_step
    from unisd_jax.types import Completions, Prompts, Views

    model, base = load_hf(work["model"], dtype=jnp.dtype(work["dtype"]))

    def tokens(seed, shape):
        return np.random.default_rng(seed).integers(100, model.config.vocab_size, shape).astype(np.int32)

    def seconds(call):
        return bench_timing.seconds(call, work["repeats"])

    def normal(seed, *shape):
        return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

    results: dict[str, Any] = {"versions": {"jax": jax.__version__}, "device": jax.devices()[0].device_kind}
    shape = work["sampler"]
    prompts = tokens(0, (shape["batch"], shape["prompt"]))
    sampling = Sampling(shape["new"], stop_ids=(), pad_id=0)
    run = functools.partial(sample, base, prompts, prompts > 0, jax.random.key(0), model=model, sampling=sampling)
    results["sampler"] = {"seconds": seconds(lambda: jax.block_until_ready(run()))}

    product, mix = work["pieces"].values()
    x = jnp.asarray(normal(4, product["tokens"], product["inputs"]))
    weight = jnp.asarray(normal(5, product["inputs"], product["outputs"]))
    multiply = jax.jit(jnp.matmul)

    def products():
        for _ in range(product["calls"]):
            multiply(x, weight).block_until_ready()

    batch, length, dim = mix["batch"], mix["length"], mix["dim"]
    query = jnp.asarray(normal(6, batch, length, mix["heads"], dim))
    key, value = (jnp.asarray(normal(seed, batch, length, mix["kv_heads"], dim)) for seed in (7, 8))
    attend = functools.partial(causal_attention, scale=dim**-0.5)
    gradient = jax.jit(jax.grad(lambda *heads: jnp.sum(attend(*heads) ** 2), argnums=(0, 1, 2)))
    calls = (products, lambda: jax.block_until_ready(gradient(query, key, value)))
    results |= {name: {"seconds": seconds(call)} for name, call in zip(work["pieces"], calls, strict=True)}

    optimizer = adamw(lambda _: 1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)
    for name, shape in work["steps"].items():
        targets = ("q", "k", "v", "o", "gate", "up", "down")
        lora = init_lora(jax.random.key(0), base, rank=work["rank"], alpha=2.0 * work["rank"], targets=targets)
        state = init_state(lora, optimizer, StepSettings())
        prompts = [tokens(seed, (shape["batch"], shape[who])) for seed, who in ((1, "student"), (2, "teacher"))]
        student, teacher = (Prompts(ids, ids > 0) for ids in prompts)
        ids = tokens(3, (shape["batch"], shape["completion"]))
        views = Views(student, teacher, Completions(ids, ids > 0), None)
        step = functools.partial(train_step, model=model, optimizer=optimizer, settings=StepSettings())
        step = jit_step(step, state, build_mesh())
        held = [state]

        def call(step=step, views=views, held=held):
            held[0], metrics = step(held[0], base, views)
            return float(metrics["loss"])

        results[name] = {"loss": call(), "seconds": seconds(call)}
    results["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return results


def main() -> int:
    """Runs the engines in turn, prints the table and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="Hugging Face checkpoint directory")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights (jax)")
    parser.add_argument("--torch-python", help="an interpreter with torch and transformers; without it only jax runs")
    parser.add_argument("--rounds", type=int, default=3, help="how often each engine runs, in turns")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of a workload in each run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_jax(json.loads(arguments.measure))))
        return 0
    work = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "rank": 16,
        "repeats": arguments.repeats,
        "pieces": PIECES,
        "sampler": SAMPLER,
        "steps": STEPS,
    }
    runs: dict[str, list] = {"jax": []} | ({"torch": []} if arguments.torch_python else {})
    for _ in range(arguments.rounds):
        runs["jax"].append(run_engine([sys.executable, __file__, "--measure", json.dumps(work)]))
        if arguments.torch_python:
            script = str(Path(__file__).with_name("bench_torch.py"))
            runs["torch"].append(run_engine([arguments.torch_python, script, json.dumps(work)]))
    rows = table_rows(runs)
    print_table(rows)
    for engine, results in runs.items():
        print(f"peak memory of the {engine} process: {max(result['peak_memory_gib'] for result in results):.1f} GiB")
    print(f"written: {write_record(arguments.out, work, runs, rows)}")
    return 0


def run_engine(command: list[str]) -> dict[str, Any]:
    """One engine in a fresh process; its last line of output is its result."""
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"error: {' '.join(command[:2])} failed:\n{finished.stderr[-2000:]}")
    return json.loads(finished.stdout.strip().splitlines()[-1])


def table_rows(runs: dict[str, list]) -> list[dict[str, Any]]:
    """Median over all timed calls; tokens/s counts sampled tokens, or all tokens scored by both networks."""
    tokens_of = {"sampler": SAMPLER["batch"] * SAMPLER["new"]} | {
        name: shape["batch"] * (shape["student"] + shape["teacher"] + 2 * shape["completion"])
        for name, shape in STEPS.items()
    }
    rows = []
    for name in ("sampler", *STEPS, *PIECES):
        tokens = tokens_of.get(name)
        row: dict[str, Any] = {"workload": name}
        for engine, results in runs.items():
            median = statistics.median(value for result in results for value in result[name]["seconds"])
            row[engine] = {"seconds": median} | ({"tokens_per_second": tokens / median} if tokens else {})
            if name in STEPS:
                row[engine]["first_loss"] = results[0][name]["loss"]
        if "torch" in row:
            row["jax_over_torch_speed"] = row["torch"]["seconds"] / row["jax"]["seconds"]
            if name in STEPS:
                apart = abs(row["jax"]["first_loss"] - row["torch"]["first_loss"])
                assert apart < 1e-3 * abs(row["torch"]["first_loss"]), f"{name}: the two losses differ: {row}"
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Seconds, tokens/s and the ratio, a line per workload."""
    print(f"{'workload':<32} {'jax s':>8} {'tok/s':>8} {'torch s':>8} {'tok/s':>8} {'speed jax/torch':>16}")
    for row in rows:
        cells = [f"{row['workload']:<32}"]
        for engine in ("jax", "torch"):
            found = row.get(engine)
            rate = f"{found['tokens_per_second']:8.0f}" if found and "tokens_per_second" in found else f"{'-':>8}"
            cells += [f"{found['seconds']:8.2f}" if found else f"{'-':>8}", rate]
        cells.append(f"{row['jax_over_torch_speed']:16.2f}" if "torch" in row else f"{'-':>16}")
        print(" ".join(cells))


def write_record(folder: Path, work: dict, runs: dict[str, list], rows: list[dict]) -> Path:
    """Everything needed to read the numbers later."""
    from unisd_jax.io import write_json_atomic
    from unisd_jax.provenance import environment

    today = datetime.date.today().isoformat()
    device = runs["jax"][0]["device"].replace(" ", "-").lower()
    record = {
        "date": today,
        "cpu": cpu_name(),
        "load_at_end": os.getloadavg(),
        "work": work | {"model": Path(work["model"]).name},
        "rows": rows,
        "runs": runs,
    }
    path = folder / f"torch-{today}-{device}.json"
    write_json_atomic(path, record | environment())
    return path


def cpu_name() -> str | None:
    """The processor as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None


if __name__ == "__main__":
    sys.exit(main())
