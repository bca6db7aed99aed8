"""How fast the engines sample, what a sync of weights costs, and how much of a training step waits for completions.

    python scripts/bench_rollout.py --model DIR [--dtype float32] [--batches 4,16,32] [--steps 6] [--out FILE]

In one run: both engines sample the same prompts to the same lengths (greedy, stop tokens ignored); weights are
published several times, split into convert, write and load; the embedded task is trained on for some steps with either
engine, with and without sampling ahead. On a machine with a GPU the same command measures it there (make rollout-env
first).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unisd_jax import train
from unisd_jax.config import Config, load_config
from unisd_jax.data.chat import load_chat
from unisd_jax.errors import UserError, report_error
from unisd_jax.io import write_json_atomic
from unisd_jax.metrics import read_metrics
from unisd_jax.models import load_hf
from unisd_jax.provenance import environment
from unisd_jax.rollout import JaxSampler, RolloutEngine, Sampling
from unisd_jax.rollout.engines import make_engine

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SYNCS = 5
# The short runs: plain self-distillation of adapters on the embedded task, one shape of batch, nothing evaluated.
TRAINING = (
    "data.max_prompt_length=128", "data.length_multiple=8", "data.length_buckets=1", "teacher.placement=turns",
    "model.lora.rank=16", "model.lora.dropout=0", "train.batch_size=16", "rollout.temperature=1",
    "optimizer.learning_rate=1e-5", "objective.importance.level=token", "evaluation.enabled=false",
    "evaluation.drift_tokens=0",
)  # fmt: skip


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint directory")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batches", default="4,16,32", help="rows sampled at a time, comma-separated")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--steps", type=int, default=6, help="training steps of each run; 0: no training")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("overrides", nargs="*", help="options of the engine: rollout.vllm.cache_gib=1 ...")
    return parser.parse_args(argv)


def options(arguments: argparse.Namespace, folder: str, *more: str) -> list[str]:
    """Overrides of a configuration."""
    words = [f"model.path={arguments.model}", f"model.dtype={arguments.dtype}", f"output_dir={folder}"]
    return [f"--{word}" for word in (*words, *arguments.overrides, *more)]


def sampling_speed(engine: RolloutEngine, vocabulary: int, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Completion tokens per second: the best of three, and after which time the first was there."""
    rng = np.random.default_rng(batch)
    prompts = rng.integers(100, vocabulary, (4, batch, arguments.prompt)).astype(np.int32)
    sampling, seconds = Sampling(arguments.completion, (), 0, temperature=0.0), []
    for ids in prompts:  # new ones each time: a cache of prefixes would be measured instead
        began = time.monotonic()
        rollout = engine.generate(ids, np.ones(ids.shape, bool), sampling, key=jax.random.key(0), version=0)
        jax.block_until_ready(rollout.ids)
        seconds.append(time.monotonic() - began)
    return {"rows": batch, "tokens_per_second": batch * arguments.completion / min(seconds[1:]), "first": seconds[0]}


def sync_costs(engine: RolloutEngine, params: Any, vocabulary: int) -> dict[str, float]:
    """Medians of convert, write and load in seconds per GB (10^9 bytes), and the gaps after loading."""
    found = []
    for version in range(1, SYNCS + 1):
        changed = params | {"norm": {"scale": params["norm"]["scale"] * (1 + 0.01 * version)}}
        engine.publish(changed, version)
        ids = np.full((1, 4), vocabulary - 1, np.int32)
        engine.generate(ids, np.ones(ids.shape, bool), Sampling(1, (), 0), key=jax.random.key(0), version=version)
        found.append(engine.measurements())
    size = found[0]["sync_gib"] * 2**30 / 1e9
    costs = {"gb": size, "probe_gap": max(x["probe_gap"] for x in found)}
    costs["probe_gap_max"] = max(x["probe_gap_max"] for x in found)
    for part in ("convert", "write", "load"):
        costs[f"{part}_seconds_per_gb"] = statistics.median(x[f"seconds_sync_{part}"] for x in found) / size
    return costs


def training(arguments: argparse.Namespace, folder: str, engine: str, staleness: int) -> dict[str, Any]:
    """Median seconds of a step of a short run, the first two left out, and the share of it spent waiting."""
    name = f"{engine}-{staleness}"
    words = [f"name={name}", f"rollout.engine={engine}", f"rollout.staleness={staleness}", *TRAINING]
    words += [f"train.steps={arguments.steps}", f"rollout.max_completion_length={arguments.completion}"]
    train.run(load_config(CONFIGS / "modes" / "plain.yaml", options(arguments, folder, *words)))
    lines = read_metrics(Path(folder) / name / "metrics.jsonl")[2:]
    found = {"engine": engine, "staleness": staleness}
    for part in ("step", "rollout", "waiting", "update"):
        found[part] = statistics.median(line[f"seconds_{part}"] for line in lines)
    return found | {"waiting_share": found["waiting"] / found["step"]}


def served(arguments: argparse.Namespace, folder: str) -> Config:
    """The configuration of the engine that is measured by itself."""
    longest = arguments.prompt + arguments.completion
    more = ["rollout.engine=vllm", "name=served", f"rollout.vllm.max_length={max(longest, 256)}"]
    return load_config(CONFIGS / "base.yaml", options(arguments, folder, *more))


def bench(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Everything, as JSON has it."""
    model, params = load_hf(arguments.model, dtype=arguments.dtype)
    chat = load_chat(arguments.model)
    batches = [int(batch) for batch in arguments.batches.split(",")]
    vocabulary, found = model.config.vocab_size, {"sampling": [], "training": []}
    ids = chat.prompt_ids([{"role": "user", "content": "Name the seven days of the week, and then the twelve months."}])
    engines: dict[str, RolloutEngine] = {"jax": JaxSampler(model)}
    config = served(arguments, folder)
    engines["vllm"] = make_engine(config, model, arguments.model, [(ids, ids)], pad_id=0, folder=Path(folder))
    try:
        for name, engine in engines.items():
            engine.publish(params, 0)
            for batch in batches:
                row = {"engine": name} | sampling_speed(engine, vocabulary, batch, arguments)
                found["sampling"].append(row)
                print(json.dumps(row), flush=True)
        engines["vllm"].measurements()
        found["sync"] = sync_costs(engines["vllm"], params, vocabulary)
        print(json.dumps(found["sync"]), flush=True)
    finally:
        engines["vllm"].close()
    for engine in ("jax", "vllm") if arguments.steps else ():
        for staleness in (0, 1):
            found["training"].append(training(arguments, folder, engine, staleness))
            print(json.dumps(found["training"][-1]), flush=True)
    return found


def report(found: dict[str, Any]) -> None:
    """The tables of docs/rollouts.md."""
    print(f"\n{'rows':>6}{'jax tok/s':>12}{'vllm tok/s':>12}{'ratio':>8}")
    speeds = {(row["engine"], row["rows"]): row["tokens_per_second"] for row in found["sampling"]}
    for rows in dict.fromkeys(row["rows"] for row in found["sampling"]):
        ours, theirs = speeds["jax", rows], speeds["vllm", rows]
        print(f"{rows:>6}{ours:>12.1f}{theirs:>12.1f}{theirs / ours:>8.2f}")
    sync = found["sync"]
    parts = ", ".join(f"{part} {sync[f'{part}_seconds_per_gb']:.2f}" for part in ("convert", "write", "load"))
    print(f"\nsync of {sync['gb']:.2f} GB, seconds per GB: {parts}")
    print(
        f"\n{'engine':>7}{'staleness':>11}{'step s':>9}{'rollout s':>11}{'waiting s':>11}{'share':>8}{'update s':>10}"
    )
    for row in found["training"]:
        seconds = f"{row['step']:>9.2f}{row['rollout']:>11.2f}{row['waiting']:>11.2f}"
        print(f"{row['engine']:>7}{row['staleness']:>11}{seconds}{row['waiting_share']:>8.0%}{row['update']:>10.2f}")


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; returns the exit status."""
    arguments = parse_arguments(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = bench(arguments, folder)
        report(found)
        if arguments.out:
            settings = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
            write_json_atomic(arguments.out, found | {"settings": settings} | environment())
    except (UserError, OSError) as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
