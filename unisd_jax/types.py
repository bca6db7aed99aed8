"""The pytrees between data, rollout, scoring and the train step. B batch, P prompt tokens, T completion tokens."""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

from unisd_jax.errors import UserError as UserError


class Prompts(NamedTuple):
    """Left-padded prompts of one view."""

    ids: Int[Array, "B P"]
    mask: Bool[Array, "B P"]


class Contexts(NamedTuple):
    """Left-padded prompts of the K auxiliary views."""

    ids: Int[Array, "B K P"]
    mask: Bool[Array, "B K P"]


class Completions(NamedTuple):
    """Right-padded completions, shared by all views of an example."""

    ids: Int[Array, "B T"]
    mask: Bool[Array, "B T"]


class Views(NamedTuple):
    """Who scores what: every view is (prompts, the same completions).

    `teacher` is None where no teacher is asked (sft); `sampler_logps` is None where nothing was sampled by the student;
    `contexts` and `negative` are None where no mechanism asks for them.
    """

    student: Prompts
    teacher: Prompts | None
    completions: Completions
    sampler_logps: Float[Array, "B T"] | None
    contexts: Contexts | None = None
    negative: Prompts | None = None


class TrainState(NamedTuple):
    """Everything training changes; what a checkpoint holds.

    `student` is an adapter (`Lora`) or a full parameter tree in float32, `teacher` its EMA or None for a
    frozen teacher. `step` counts optimizer updates and is the policy version of the weights.
    """

    step: Int[Array, ""]
    student: Any
    teacher: Any
    optimizer: Any
