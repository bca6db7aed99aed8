"""Compiles a mode's train step at a real model's size for a chip that this machine does not have, and reads its memory.

    python scripts/aot_step.py [--config FILE] [--target h200] [--batch 4] [--completion 1024] … [--a.b=c …]

Needs the chip's wheels, as scripts/aot_kernels.py does. Nothing runs, so no time is measured. Prints what the program
holds on the device with the fused head and with all logits in one chunk; exit status 1 above --limit GB with the first.
"""

import argparse
import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import Any

from aot_kernels import TARGETS, describe_devices, environment, missing_wheels

COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "model_type": "qwen2"}
MODELS = {
    "qwen2.5-0.5b": COMMON
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-7b": COMMON
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}
GB = 1e9


def step_and_arguments(options: argparse.Namespace, overrides: list[str], device: Any, chunk_size: int | None):
    """(train step, its abstract arguments on `device`) of the configuration."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from unisd_jax.config import load_config
    from unisd_jax.experiment import step_settings
    from unisd_jax.models import HeadOptions, Model, ModelConfig, init_lora
    from unisd_jax.optim import adamw
    from unisd_jax.step import init_state, train_step
    from unisd_jax.types import Completions, Contexts, Prompts, Views

    config = load_config(options.config, ["--model.path=none", "--data.task=short_answers", "--name=aot", *overrides])
    model, params = Model.build(ModelConfig.from_hf(MODELS[options.model]), dtype=jnp.bfloat16)
    model = dataclasses.replace(model, head_options=HeadOptions(chunk_size=chunk_size), remat=config.train.remat)
    settings, lora = step_settings(config), config.model.lora
    optimizer = adamw(lambda step: 1e-5, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)

    def state(params):
        adapter = init_lora(jax.random.key(0), params, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
        student = adapter if config.model.trainable == "lora" else params
        return init_state(student, optimizer, settings)

    rows, contexts = options.batch, config.teacher.contexts.num_auxiliary_contexts

    def batch():
        prompts = {
            length: Prompts(jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length), bool))
            for length in (options.prompt, options.teacher_prompt)
        }
        shape = (rows, options.completion)
        others = (rows, contexts, options.teacher_prompt)
        return Views(
            student=prompts[options.prompt], teacher=prompts[options.teacher_prompt],
            completions=Completions(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool)),
            sampler_logps=jnp.zeros(shape, jnp.float32),
            contexts=Contexts(jnp.zeros(others, jnp.int32), jnp.ones(others, bool)) if contexts else None,
            negative=prompts[options.teacher_prompt] if settings.objective.contrast_weight > 0 else None,
        )  # fmt: skip

    placed = SingleDeviceSharding(device)
    arguments = (jax.eval_shape(state, params), params, jax.eval_shape(batch))
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), arguments)
    step = functools.partial(train_step, model=model, optimizer=optimizer, settings=settings)
    return step, arguments


def device_memory(step: Any, arguments: tuple, platform: str) -> tuple[float, float]:
    """(weights, state and batch; temporary) in bytes, of the compiled step, which takes over its state's memory."""
    import jax

    traced = jax.jit(step, donate_argnums=0).trace(*arguments)
    memory = traced.lower(lowering_platforms=(platform,)).compile().memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept, memory.temp_size_in_bytes


def main() -> int:
    """The exit status: 1 when the step does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/modes/unisd_star.yaml"))
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-7b")
    parser.add_argument("--target", choices=TARGETS, default="h200")
    parser.add_argument("--batch", type=int, default=4, help="examples")
    parser.add_argument("--completion", type=int, default=1024, help="tokens")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the student's prompt")
    parser.add_argument("--teacher-prompt", type=int, default=512, help="tokens of every other prompt")
    parser.add_argument("--limit", type=float, default=80.0, help="GB")
    parser.add_argument("--require", action="store_true", help="fail where the wheels of the target are missing")
    options, overrides = parser.parse_known_args()
    if reason := missing_wheels(options.target):
        print(f"{options.target}: skipped, {reason}")
        return int(options.require)
    os.environ.update(environment(options.target))
    target = TARGETS[options.target]
    device = describe_devices(target)[0]
    lengths = f"{options.batch} x ({options.prompt} | {options.teacher_prompt}) + {options.completion} tokens"
    print(f"{options.config.stem}, {options.model}, {lengths}, {device.device_kind}; GB")
    whole = options.batch * options.completion
    fits = True
    for name, chunk_size in {"fused head": None, "all logits": whole}.items():
        kept, temporary = device_memory(*step_and_arguments(options, overrides, device, chunk_size), target.platform)
        print(f"{name}: held {kept / GB:6.1f}  temporary {temporary / GB:6.1f}  in all {(kept + temporary) / GB:6.1f}")
        fits &= chunk_size is not None or kept + temporary <= options.limit * GB
    return int(not fits)


if __name__ == "__main__":
    sys.exit(main())
