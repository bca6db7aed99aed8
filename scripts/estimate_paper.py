"""Estimates the hours of the paper's recipes, on machines that none has been run on: from counts and assumptions.

    python scripts/estimate_paper.py [--models qwen2.5-7b] [--tasks scienceqa] [--modes unisd_star] [--preset launcher]

Counted: the FLOPs of every pass over the shapes that a step has, padding and recomputation included, and the bytes that
sampling must read for each token. Assumed, and printed: the lengths, and which shares of a chip's peak, of its memory's
and of its links' speed are reached. Not counted: evaluations, caches, compilation, loading, the adapters' own products.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

from aot_step import MODELS

from unisd_jax.config import Config, load_config
from unisd_jax.errors import UserError, report_error
from unisd_jax.models import ModelConfig
from unisd_jax.models.flops import body_flops, head_flops, layer_weights, peak_flops

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GIB = 2**30
BYTES = 2  # of a bfloat16


class Machine(NamedTuple):
    """Devices of one kind, bytes per second of each one's memory and links, and whether they divide the weights."""

    kind: str
    devices: int
    memory: float
    link: float
    divided: bool


# From the makers' data sheets; with the meshes of docs/paper.md, where the v6e alone divides the weights.
MACHINES = {
    "h200": Machine("H200", 1, 4.8e12, 450e9, False),
    "h100x8": Machine("H100", 8, 3.35e12, 450e9, False),
    "v5p-8": Machine("TPU v5p", 4, 2.765e12, 600e9, False),
    "v6e-8": Machine("TPU v6 lite", 8, 1.64e12, 448e9, True),
}


class Work(NamedTuple):
    """A step: padded lengths in tokens, tokens until all rows stop (0: none is sampled), and passes over the model.

    `views` are the teacher's; `passes` the student's, forward and backward, and `recomputed` those of its layers alone.
    """

    rows: int
    prompt: int
    teacher_prompt: int
    completion: int
    decoded: int
    views: int
    passes: int
    recomputed: int


def work_of(config: Config, *, prompt: int, teacher_prompt: int, decoded: int) -> Work:
    """What a step of a configuration computes."""
    distilled, own = config.objective.loss != "nll", config.rollout.source == "student"
    contrast = config.objective.contrast.contrastive_weight > 0
    views = 1 + config.teacher.contexts.num_auxiliary_contexts + contrast if distilled else 0
    # Forward and backward, and once without dropout, to be compared with the sampler.
    passes = 2 + (own and config.model.lora.dropout > 0)
    sampled = 0 if config.rollout.source == "gold" else decoded
    shape = config.train.batch_size, prompt, teacher_prompt, config.rollout.max_completion_length
    return Work(*shape, sampled, views, passes, int(config.train.remat == "layer"))


def step_flops(model: ModelConfig, work: Work) -> float:
    """Of all devices: the prompts that are read before sampling, the views, the student's passes."""
    student = body_flops(model, [work.prompt + work.completion] * work.rows)
    view = body_flops(model, [work.teacher_prompt + work.completion] * work.rows)
    head = head_flops(model, work.rows * work.completion)
    read = body_flops(model, [work.prompt] * work.rows) if work.decoded else 0
    return read + work.views * (view + head) + work.passes * (student + head) + work.recomputed * student


def token_seconds(model: ModelConfig, work: Work, machine: Machine, share: float) -> float:
    """Sampling one token of every row: all weights and the cache are read, divided weights are fetched first."""
    weights = BYTES * (model.num_layers * layer_weights(model) + model.vocab_size * model.hidden_size)
    seen = work.prompt + work.decoded / 2
    cache = -(-work.rows // machine.devices) * seen * cache_bytes(model)
    fetched = weights * (1 - 1 / machine.devices) if machine.divided else 0.0
    return (weights + cache) / (share * machine.memory) + fetched / (share * machine.link)


def cache_bytes(model: ModelConfig) -> int:
    """Keys and values of one token."""
    return 2 * BYTES * model.num_layers * model.num_kv_heads * model.head_dim


def sampling_gib(model: ModelConfig, machine: Machine, rows: int, length: int) -> tuple[float, float]:
    """What sampling adds to a device's memory: (the layers with the adapters merged, the cache)."""
    copy = BYTES * model.num_layers * layer_weights(model) / (machine.devices if machine.divided else 1)
    return copy / GIB, -(-rows // machine.devices) * length * cache_bytes(model) / GIB


def step_seconds(model: ModelConfig, work: Work, machine: Machine, shares: tuple[float, float]) -> tuple[float, float]:
    """(sampling, all the rest) of a step; `shares`: of the peak, and of the memory's and links' speed."""
    compute = step_flops(model, work) / (machine.devices * peak_flops(machine.kind) * shares[0])
    return work.decoded * token_seconds(model, work, machine, shares[1]), compute


def main() -> int:
    """Prints the table; the exit status is 2 for a recipe that there is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="qwen2.5-7b", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--tasks", default="scienceqa", help="files of configs/paper")
    parser.add_argument("--modes", default="unisd_star", help="files of configs/modes")
    parser.add_argument("--machines", default=",".join(MACHINES))
    parser.add_argument("--preset", default="launcher")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the student's padded prompt")
    parser.add_argument("--teacher-prompt", type=int, default=768, help="of every other prompt")
    parser.add_argument("--decoded", type=int, default=512, help="of the longest reply of a batch")
    parser.add_argument(
        "--compute", type=float, nargs=2, default=(0.25, 0.45), help="share of the peak, least and most"
    )
    parser.add_argument("--memory", type=float, nargs=2, default=(0.3, 0.7), help="of the memory's and links' speed")
    options = parser.parse_args()
    lengths = {name: getattr(options, name) for name in ("prompt", "teacher_prompt", "decoded")}
    low, high = zip(options.compute, options.memory, strict=True)
    print(
        "ESTIMATE, not measured. Prompts {prompt} | {teacher_prompt}, longest reply {decoded} tokens;".format(**lengths)
    )
    print(f"{low[0]:.0%} to {high[0]:.0%} of the peak, {low[1]:.0%} to {high[1]:.0%} of memory's and links' speed")
    heads = ("model", 14), ("task", 11), ("mode", 24), ("machine", 8)
    print("".join(f"{head:<{width}}" for head, width in heads), end="")
    print(f"{'steps':>6}{'s/step':>14}{'hours':>14}{'copy + cache GiB':>18}")
    for name, task, mode, place in itertools.product(
        *(value.split(",") for value in (options.models, options.tasks, options.modes, options.machines))
    ):
        files = [CONFIGS / "modes" / f"{mode}.yaml", *(CONFIGS / "paper" / f"{file}.yaml" for file in (name, task))]
        try:
            config = load_config(files, [f"--preset={options.preset}"])
        except UserError as error:
            return report_error(error)
        model, work, machine = ModelConfig.from_hf(MODELS[name]), work_of(config, **lengths), MACHINES[place]
        least, most = (sum(step_seconds(model, work, machine, shares)) for shares in (high, low))
        hours = f"{config.train.steps * least / 3600:.1f} to {config.train.steps * most / 3600:.1f}"
        longest = config.data.max_prompt_length + work.completion
        memory = "{:.1f} + {:.1f}".format(*sampling_gib(model, machine, work.rows, longest)) if work.decoded else "-"
        print(f"{name:<14}{task:<11}{mode:<24}{place:<8}{config.train.steps:>6}", end="")
        print(f"{f'{least:.1f} to {most:.1f}':>14}{hours:>14}{memory:>18}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
