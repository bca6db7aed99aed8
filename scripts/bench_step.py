"""Tokens per second and model-FLOPs utilisation of a training step's phases on this machine, with random weights.

    python scripts/bench_step.py [--model tiny] [--mode unisd_star] [--trainable lora] [--batch 4] [--completion 128] …
    python scripts/bench_step.py --model qwen2.5-7b --batch 8 --completion 1024 --prompt 512 --remat layer     # a GPU

Phases: `rollout` samples the completions, `scoring` runs the teacher's views without gradient, `step` is the whole
train step, scoring included; `update` is what is left of it without scoring. FLOPs are those that the mathematics needs
(unisd_jax/models/flops.py): no recomputation, no padding. They are divided by the chip's bfloat16 peak, or, where that
is not known (a CPU), by the fastest matrix product measured in this process. All rows have full length, so that nothing
is masked. Prints a table and writes `benchmarks/results/step-<date>-<device>-<model>.json`.
"""

import argparse
import datetime
import functools
import os
import resource
import statistics
import sys
from pathlib import Path
from typing import Any

import bench_timing
import jax
import jax.numpy as jnp
import numpy as np
from aot_step import MODELS

from unisd_jax.config import Config, load_config
from unisd_jax.experiment import step_settings
from unisd_jax.inputs import configured_model
from unisd_jax.io import write_json_atomic
from unisd_jax.losses import loss_mask
from unisd_jax.models import Model, ModelConfig, init_lora, merge
from unisd_jax.models.flops import body_flops, head_flops, peak_flops
from unisd_jax.models.layout import VOCAB, place
from unisd_jax.optim import adamw
from unisd_jax.parallel.mesh import build_mesh
from unisd_jax.parallel.sharding import batch_sharding, jit_step
from unisd_jax.provenance import environment
from unisd_jax.rollout.jax_sampler import sample
from unisd_jax.rollout.protocol import Sampling
from unisd_jax.step import init_state, train_step, weights
from unisd_jax.teacher.scoring import ContextScoring, Network, context_disagreement, score_primary_and_negative
from unisd_jax.types import Completions, Contexts, Prompts, Views

TINY = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_size": 256}
TINY |= {"intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
TINY |= {"vocab_size": 8192, "tie_word_embeddings": False}
GIB = 2**30


def random_params(shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    """Weights of a plausible size, made on the devices: norms around 1, matrices around 0."""

    def draw(path, shape, key):
        noise = 0.02 * jax.random.normal(key, shape.shape, shape.dtype)
        return noise + 1 if path[-1].key == "scale" else noise

    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = (
        jax.jit(functools.partial(draw, path, shape))(key) for (path, shape), key in zip(leaves, keys, strict=True)
    )
    return place(jax.tree.unflatten(jax.tree.structure(shapes), list(drawn)), mesh)


def batch(options: argparse.Namespace, config: Config, vocabulary: int) -> Views:
    """Views of full length, with what the mode asks for."""
    rng, rows = np.random.default_rng(0), options.batch

    def tokens(*shape):
        return rng.integers(0, vocabulary, shape).astype(np.int32), np.ones(shape, bool)

    contexts, negative = (
        config.teacher.contexts.num_auxiliary_contexts,
        config.objective.contrast.contrastive_weight > 0,
    )
    return Views(
        student=Prompts(*tokens(rows, options.prompt)),
        teacher=Prompts(*tokens(rows, options.teacher_prompt)),
        completions=Completions(*tokens(rows, options.completion)),
        sampler_logps=None,
        contexts=Contexts(*tokens(rows, contexts, options.teacher_prompt)) if contexts else None,
        negative=Prompts(*tokens(rows, options.teacher_prompt)) if negative else None,
    )


def score_teacher(state, base, views: Views, *, model: Model, settings):
    """What the train step scores without gradient."""
    teacher = Network(model, *weights(base if state.teacher is None else state.teacher, base))
    objective, parts = settings.objective, settings.micro_batches
    taught = score_primary_and_negative(teacher, views, settings=objective, micro_batches=parts)
    if objective.agreement is None:
        return taught
    mask = loss_mask(views.completions.mask, objective.skip_tokens)
    scoring = ContextScoring(settings.views_per_pass, parts)
    return taught, context_disagreement(teacher, views, mask, settings=objective, scoring=scoring)[0]


def phase_flops(model: ModelConfig, views: Views, config: Config, adapter: int) -> dict[str, float]:
    """Model FLOPs of each phase; `adapter`: entries of the adapter, 0 where all weights are trained."""
    rows, length = views.completions.ids.shape
    completions = head_flops(model, rows * length)
    student = body_flops(model, [views.student.ids.shape[1] + length] * rows)
    prompts = [view.ids.shape[-1] for view in (views.teacher, views.negative) if view is not None]
    prompts += [views.contexts.ids.shape[-1]] * views.contexts.ids.shape[1] if views.contexts else []
    scoring = sum(body_flops(model, [prompt + length] * rows) for prompt in prompts)
    # The primary view's head belongs to the divergence, which is part of the update.
    scoring += (len(prompts) - 1) * completions
    if views.negative is not None:
        scoring += completions
    tokens = rows * (views.student.ids.shape[1] + length)
    # Backward: the gradient to the inputs, and to the weights where they are trained.
    passes = 2 if adapter else 3
    update = passes * (student + completions) + completions + 6 * adapter * tokens
    return {"rollout": student + completions, "scoring": scoring, "update": update, "step": scoring + update}


def seconds(call: Any, repeats: int) -> float:
    """The median time of `repeats` calls."""
    return statistics.median(bench_timing.seconds(call, repeats))


def measured_peak(dtype: Any) -> float:
    """FLOP/s of the best of a few large matrix products on one device."""
    x = jnp.ones((2048, 2048), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    best = min(seconds(lambda: multiply(x, x).block_until_ready(), 3) for _ in range(2))
    return 2 * 2048**3 / best


def measure(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Seconds, FLOPs and memory of each phase."""
    mesh = build_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    hf = TINY if options.model == "tiny" else MODELS[options.model]
    dtype, multiple = jnp.dtype(config.model.dtype), int(np.prod([mesh.shape[axis] for axis in VOCAB]))
    model, shapes = Model.build(ModelConfig.from_hf(hf), dtype=dtype, vocab_multiple=multiple)
    model = configured_model(model, config, mesh, backend=jax.default_backend())
    base, settings, lora = random_params(shapes, mesh), step_settings(config), config.model.lora
    optimizer = adamw(lambda step: 1e-5, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)
    if config.model.trainable == "lora":
        key = jax.random.key(1)
        student = init_lora(key, base, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    else:
        student = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), base)
    adapter = sum(leaf.size for leaf in jax.tree.leaves(student)) if config.model.trainable == "lora" else 0
    state = place(init_state(student, optimizer, settings), mesh)
    views = jax.device_put(batch(options, config, model.config.vocab_size), batch_sharding(mesh))

    sampled = merge(*weights(state.student, base))
    sampling = Sampling(options.completion, stop_ids=(), pad_id=0)
    rollout = functools.partial(sample, model=model, sampling=sampling)
    times = {
        "rollout": seconds(
            lambda: jax.block_until_ready(rollout(sampled, *views.student, jax.random.key(0))), options.repeats
        )
    }
    del sampled
    score = jax.jit(functools.partial(score_teacher, model=model, settings=settings))
    times["scoring"] = seconds(lambda: jax.block_until_ready(score(state, base, views)), options.repeats)
    step = functools.partial(train_step, model=model, optimizer=optimizer, settings=settings)
    compiled = jit_step(step, state, mesh).lower(state, base, views).compile()
    held = [state]

    def run():
        held[0], metrics = compiled(held[0], base, views)
        return float(metrics["loss"])

    times["step"] = seconds(run, options.repeats)
    times["update"] = times["step"] - times["scoring"]
    memory, planned = jax.local_devices()[0].memory_stats() or {}, compiled.memory_analysis()
    kept = planned.argument_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes
    return {
        "seconds": times,
        "flops": phase_flops(model.config, views, config, adapter),
        "attention": model.attention,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "peak_memory_gib": memory["peak_bytes_in_use"] / GIB if "peak_bytes_in_use" in memory else None,
        "planned_memory_gib": (kept + planned.temp_size_in_bytes) / GIB,
        "process_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "devices": mesh.size,
    }


def main() -> int:
    """Measures, prints the table, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", *MODELS), default="tiny", help="a shape; the weights are random")
    parser.add_argument("--mode", default="unisd_star", help="a file of configs/modes")
    parser.add_argument("--trainable", choices=("lora", "full"), default="lora")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the student's prompt")
    parser.add_argument("--teacher-prompt", type=int, default=128, help="tokens of every other prompt")
    parser.add_argument("--completion", type=int, default=128, help="tokens")
    parser.add_argument("--remat", choices=("none", "products", "layer"), default="none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options, overrides = parser.parse_known_args()
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    settings = [f"--model.dtype={dtype}", f"--model.trainable={options.trainable}", f"--train.remat={options.remat}"]
    settings += ["--model.path=none", f"--train.batch_size={options.batch}", "--train.micro_batches=1"]
    file = Path(__file__).resolve().parents[1] / "configs" / "modes" / f"{options.mode}.yaml"
    config = load_config(file, [*settings, *overrides])
    if config.objective.loss == "nll":
        parser.error(f"--mode {options.mode} has no teacher to score with")
    found = measure(options, config)
    device = jax.devices()[0].device_kind
    known = peak_flops(device)
    peak = known or measured_peak(jnp.dtype(dtype))
    rows, length = options.batch, options.completion
    print(f"{options.model}, {options.mode}, {options.trainable}, {dtype}, {device} x {found['devices']}")
    print(f"peak {peak / 1e12:.2f} TFLOP/s per device ({'data sheet' if known else 'measured here'})")
    print(f"{'phase':<10} {'seconds':>9} {'completion tokens/s':>20} {'TFLOP':>9} {'MFU':>7}")
    table = {}
    for phase, took in found["seconds"].items():
        flops = found["flops"][phase]
        share = flops / took / peak / found["devices"]
        table[phase] = {"seconds": took, "tokens_per_second": rows * length / took, "flops": flops, "mfu": share}
        print(f"{phase:<10} {took:9.3f} {rows * length / took:20.0f} {flops / 1e12:9.3f} {share:7.1%}")
    shown = found["peak_memory_gib"]
    print(
        f"memory per device: {'not counted by this runtime' if shown is None else f'{shown:.1f} GiB at its peak'}",
        end="",
    )
    print(f", {found['planned_memory_gib']:.1f} GiB planned for the step")
    today = datetime.date.today().isoformat()
    record = {"date": today, "load_at_end": os.getloadavg(), "peak_flops": peak, "peak_is_measured": known is None}
    record |= {"options": vars(options) | {"out": str(options.out), "dtype": dtype}, "overrides": overrides}
    path = options.out / f"step-{today}-{device.replace(' ', '-').lower()}-{options.model}-{options.trainable}.json"
    write_json_atomic(path, record | {"phases": table} | found | environment())
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
