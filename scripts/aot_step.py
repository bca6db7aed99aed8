"""Compiles whole train steps at real models' sizes for chips that this machine does not have, and reads their memory.

    python scripts/aot_step.py [--models qwen2.5-7b] [--modes unisd_star] [--targets h200x8,v5p-8,v6e-8] [--a.b=c ...]

Needs the chips' wheels, as scripts/aot_kernels.py does. Nothing runs, so no time is measured. Prints, for each model,
mode and set of chips, with adapters and with all weights trained, what one device holds; the batch has --rows examples
per device. Exit status 1 when a step does not compile, or does not fit into nine tenths of a device's memory.
`--logits` compiles each step also with all logits in one chunk, to see what the fused head saves.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from aot_attention import pretend_hopper
from aot_kernels import GIB, MARK, TARGETS, describe_devices, environment, missing_wheels, one_line

QWEN = {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": QWEN
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-1.5b": QWEN
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-3b": QWEN
    | {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-7b": QWEN
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "llama-3.1-8b": {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 5e5}
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "max_position_embeddings": 131072}
    | {"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 8192}},
    "gemma-3-4b": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
    }
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}
    | {"sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "internlm3-8b": {"model_type": "internlm3", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 5e7}
    | {"hidden_size": 4096, "intermediate_size": 10240, "num_hidden_layers": 48, "num_attention_heads": 32}
    | {"num_key_value_heads": 2, "head_dim": 128, "vocab_size": 128512, "tie_word_embeddings": False}
    | {"rope_scaling": {"rope_type": "dynamic", "factor": 6.0}, "max_position_embeddings": 32768},
}


class Chips(NamedTuple):
    """Some chips of one kind as a mesh (data, fsdp, tensor), and a chip's memory in GiB."""

    target: str
    mesh: tuple[int, int, int]
    memory: float
    topology: str


CHIPS = {
    "h200": Chips("h200", (1, 1, 1), 140.4, "1x1x8"),
    "h200x8": Chips("h200", (1, 8, 1), 140.4, "1x1x8"),
    # Compiled as for the H200, which differs from it in memory and bandwidth only.
    "h100x8": Chips("h200", (1, 8, 1), 79.1, "1x1x8"),
    "h100x8-data": Chips("h200", (8, 1, 1), 79.1, "1x1x8"),
    # Google counts the cores of a v5p, two a chip that act as one device, and the chips of a v6e.
    "v5p-8": Chips("v5p", (1, 4, 1), 95.0, "v5p:2x2x1"),
    "v5p-8-data": Chips("v5p", (4, 1, 1), 95.0, "v5p:2x2x1"),
    "v6e-8": Chips("v6e", (1, 8, 1), 31.2, "v6e:2x4"),
}
USABLE = 0.9


def step_and_arguments(case: dict[str, Any], overrides: list[str], devices: list):
    """(jitted train step, its abstract arguments laid out over the chips) of a case."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh

    from unisd_jax.config import load_config
    from unisd_jax.experiment import step_settings
    from unisd_jax.inputs import configured_model
    from unisd_jax.models import Model, ModelConfig, init_lora
    from unisd_jax.models.layout import VOCAB, tree_shardings
    from unisd_jax.optim import adamw
    from unisd_jax.parallel.mesh import AXES
    from unisd_jax.parallel.sharding import batch_sharding, jit_step
    from unisd_jax.step import init_state, train_step
    from unisd_jax.types import Completions, Contexts, Prompts, Views

    chips = CHIPS[case["chips"]]
    sizes = dict(zip(AXES, chips.mesh, strict=True))
    options = [f"--mesh.{axis}={size}" for axis, size in sizes.items()]
    rows = case["rows"] * sizes["data"] * sizes["fsdp"]
    options += [f"--train.batch_size={rows}", f"--model.trainable={case['trainable']}", "--train.remat=layer"]
    # Past what a mode's own file says: shapes are given here, not by data.
    config = load_config(case["config"], ["--model.path=none", "--name=aot", *options, *overrides])
    count = int(np.prod(chips.mesh))
    mesh = Mesh(np.array(devices[:count]).reshape(chips.mesh), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    multiple = int(np.prod([sizes[axis] for axis in VOCAB]))
    dtype = jnp.dtype(config.model.dtype)
    model, params = Model.build(ModelConfig.from_hf(MODELS[case["model"]]), dtype=dtype, vocab_multiple=multiple)
    backend = {"cuda": "gpu"}.get(TARGETS[chips.target].platform, "tpu")
    model = configured_model(model, config, mesh, backend=backend)
    if case["logits"]:
        model = dataclasses.replace(
            model, head_options=model.head_options._replace(chunk_size=rows * case["completion"])
        )
    settings, lora = step_settings(config), config.model.lora
    optimizer = adamw(lambda step: 1e-5, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)

    def start(params):
        adapter = init_lora(jax.random.key(0), params, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
        whole = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        return init_state(adapter if case["trainable"] == "lora" else whole, optimizer, settings)

    contexts = config.teacher.contexts.num_auxiliary_contexts

    def batch():
        student, teacher = (
            Prompts(jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length), bool))
            for length in (case["prompt"], case["teacher_prompt"])
        )
        shape, others = (rows, case["completion"]), (rows, contexts, case["teacher_prompt"])
        return Views(
            student=student,
            teacher=teacher,
            completions=Completions(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool)),
            sampler_logps=jnp.zeros(shape, jnp.float32),
            contexts=Contexts(jnp.zeros(others, jnp.int32), jnp.ones(others, bool)) if contexts else None,
            negative=teacher if settings.objective.contrast_weight > 0 else None,
        )

    def laid_out(tree, shardings):
        return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)

    state, views = jax.eval_shape(start, params), jax.eval_shape(batch)
    arguments = (
        laid_out(state, tree_shardings(state, mesh)),
        laid_out(params, tree_shardings(params, mesh)),
        laid_out(views, jax.tree.map(lambda _: batch_sharding(mesh), views)),
    )
    step = functools.partial(train_step, model=model, optimizer=optimizer, settings=settings)
    return jit_step(step, state, mesh), arguments


def compile_case(case: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The case with a device's memory in GiB: what stays, what is temporary."""
    chips, started = CHIPS[case["chips"]], time.perf_counter()
    target = TARGETS[chips.target]._replace(topology=chips.topology)
    if target.platform == "cuda":
        pretend_hopper()
    try:
        step, arguments = step_and_arguments(case, overrides, describe_devices(target))
        memory = step.trace(*arguments).lower(lowering_platforms=(target.platform,)).compile().memory_analysis()
    except Exception as error:  # one row that says why, the rest of the table all the same
        return case | {"error": one_line(error)}
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    seconds = time.perf_counter() - started
    return case | {"kept": kept / GIB, "temporary": memory.temp_size_in_bytes / GIB, "seconds": seconds}


def run_case(case: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`compile_case` in a process of its own: the environment differs by chip, and memory is given back."""
    command = [sys.executable, __file__, "--case", json.dumps(case), *overrides]
    done = subprocess.run(
        command, env=os.environ | environment(CHIPS[case["chips"]].target), capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        return case | {"error": f"exit status {done.returncode}: {done.stderr.strip()[-600:]}"}
    return json.loads(lines[-1].removeprefix(MARK))


def print_row(row: dict[str, Any]) -> bool:
    """One line of the table; returns whether the step fits, or says that nothing was asked of it."""
    chips = CHIPS[row["chips"]]
    name = f"{row['model']:<13} {row['mode']:<11} {row['trainable']:<5} {row['chips']:<7}"
    form = " all logits" if row["logits"] else ""
    if "error" in row:
        print(f"{name} does not compile{form}: {row['error']}", flush=True)
        return bool(row["logits"])
    whole, limit = row["kept"] + row["temporary"], USABLE * chips.memory
    fits = whole <= limit
    numbers = f"{row['kept']:9.1f} {row['temporary']:9.1f} {whole:9.1f} {chips.memory:9.1f}"
    print(f"{name}{numbers}  {'fits' if fits else 'DOES NOT FIT'}{form}   ({row['seconds']:.0f} s)", flush=True)
    return fits or bool(row["logits"])


def main() -> int:
    """The exit status: 1 when a step does not compile or fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="qwen2.5-7b", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--modes", default="unisd_star", help="files of configs/modes")
    parser.add_argument("--trainable", default="lora,full")
    parser.add_argument("--targets", default="h200x8,v5p-8,v6e-8", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--rows", type=int, default=1, help="examples per device")
    parser.add_argument("--completion", type=int, default=1024, help="tokens")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the student's prompt")
    parser.add_argument("--teacher-prompt", type=int, default=512, help="tokens of every other prompt")
    parser.add_argument("--logits", action="store_true", help="also with all logits in one chunk")
    parser.add_argument("--require", action="store_true", help="fail where the wheels of a target are missing")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    if options.case:
        print(MARK + json.dumps(compile_case(json.loads(options.case), overrides)))
        return 0
    lengths = {name: getattr(options, name) for name in ("rows", "completion", "prompt", "teacher_prompt")}
    print(
        f"{options.rows} x ({options.prompt} | {options.teacher_prompt}) + {options.completion} tokens per device; GiB"
    )
    print(f"{'model':<13} {'mode':<11} {'':<5} {'chips':<7}{'kept':>9} {'temporary':>9} {'in all':>9} {'device':>9}")
    rows, good = [], True
    chosen = [getattr(options, name).split(",") for name in ("models", "modes", "trainable")]
    for chips in options.targets.split(","):
        if reason := missing_wheels(CHIPS[chips].target):
            print(f"{chips}: skipped, {reason}")
            good &= not options.require
            continue
        for model, mode, trainable, logits in itertools.product(*chosen, (False, True)[: 1 + options.logits]):
            case = lengths | {"model": model, "mode": mode, "trainable": trainable, "chips": chips, "logits": logits}
            config = Path(__file__).resolve().parents[1] / "configs" / "modes" / f"{mode}.yaml"
            rows.append(run_case(case | {"config": str(config)}, overrides))
            good &= print_row(rows[-1])
    if options.json:
        options.json.write_text(json.dumps([row | {"overrides": overrides} for row in rows], indent=1) + "\n")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
