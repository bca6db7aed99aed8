"""The proof that a server has the weights it should have: it scores a fixed batch, and so does the trainer.

Nothing that a server answers to a change of its weights shows that they arrived; only what it computes with them does.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from unisd_jax.errors import UserError
from unisd_jax.models import Lora, Model, completion_hidden, sampled_token_scores
from unisd_jax.models.layout import place_rows
from unisd_jax.types import Completions, Prompts

BOUNDS = {"float32": 0.002, "bfloat16": 1.0}


class Probe(NamedTuple):
    """Some prompts, each with a completion; arrays of the host."""

    prompts: Prompts
    completions: Completions

    def rows(self) -> list[tuple[list[int], list[int]]]:
        """The ids of each row's prompt and of its completion, without padding."""
        (prompts, seen), (completions, said) = self
        return [(prompts[i][seen[i]].tolist(), completions[i][said[i]].tolist()) for i in range(len(prompts))]


class Gap(NamedTuple):
    """How far the log-probs of two programs are apart, in nats."""

    mean: float
    largest: float


def make_probe(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    pad_id: int,
    prompt_length: int = 48,
    completion_length: int = 12,
    rows: int = 6,
) -> Probe:
    """The first `rows` of `sequences` (prompt, completion): ends of prompts and beginnings of completions.

    Raises:
      UserError: no sequence has both a prompt and a completion.
    """
    usable = [(list(prompt), list(completion)) for prompt, completion in sequences if len(prompt) and len(completion)]
    if not usable:
        raise UserError("no training item has tokens in its prompt and in its completion; expected one for the probe")
    pairs = [(prompt[-prompt_length:], completion[:completion_length]) for prompt, completion in usable[:rows]]
    shape = len(pairs), prompt_length
    prompts = Prompts(np.full(shape, pad_id, np.int32), np.zeros(shape, bool))
    shape = len(pairs), completion_length
    completions = Completions(np.full(shape, pad_id, np.int32), np.zeros(shape, bool))
    for row, (prompt, completion) in enumerate(pairs):
        prompts.ids[row, -len(prompt) :], prompts.mask[row, -len(prompt) :] = prompt, True
        completions.ids[row, : len(completion)], completions.mask[row, : len(completion)] = completion, True
    return Probe(prompts, completions)


def probe_logps(
    model: Model, params: dict[str, Any], probe: Probe, *, lora: Lora | None = None, head: Array | None = None
) -> Float[Array, "B T"]:
    """Log-probs of the probe's completions at temperature 1, 0 at padding; `head` stands in for the model's own."""
    head = model.head(params) if head is None else head
    # As exactly as vLLM does it: on a GPU jax would multiply float32 in TF32, beyond the bound on the gap.
    with jax.default_matmul_precision("highest"):
        return _logps(params, head, lora, *place_rows(probe, model.mesh), model=model)


def probe_gap(found: np.ndarray, expected: np.ndarray, mask: np.ndarray) -> Gap:
    """The distance of two sets of log-probs where `mask` is on; infinite where one of them is no number."""
    found, expected = (np.asarray(values, np.float32)[mask] for values in (found, expected))
    with np.errstate(invalid="ignore"):
        distance = np.abs(found - expected)
    distance[~np.isfinite(distance)] = np.inf
    return Gap(float(distance.mean()), float(distance.max()))


def bound(option: float | None, dtype: str) -> float:
    """The largest gap that a server with the right weights may have, which computes in `dtype`."""
    return BOUNDS[dtype] if option is None else option


@functools.partial(jax.jit, static_argnames="model")
def _logps(params, head, lora, prompts, completions, *, model):
    hidden = completion_hidden(model, params, lora, prompts, completions)
    return sampled_token_scores(
        hidden, head, completions.ids, completions.mask, options=model.head_options
    ).logp  # fmt: skip
