"""What one or two models say of given completions, as sums over each completion's tokens."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unisd_jax.eval.batches import length_batches, padded_views
from unisd_jax.models import Model, completion_hidden, completion_scores, divergence_scores
from unisd_jax.models.layout import place_rows
from unisd_jax.parallel.multihost import gather
from unisd_jax.types import Completions, Prompts

Ids = Sequence[int]
Sums = dict[str, float]


class Network(NamedTuple):
    """A model with its weights."""

    model: Model
    params: dict[str, Any]


class Pairs(NamedTuple):
    """Prompts and the completions to be scored after them, as token ids."""

    prompts: Sequence[Ids]
    completions: Sequence[Ids]


def logprob_sums(
    network: Network, pairs: Pairs, *, pad_id: int, batch_size: int, length_multiple: int
) -> list[dict[str, float]]:
    """For each completion: `tokens`, and the sum of their log-probs at temperature 1, `logp` (nats)."""

    def score(*views):
        return {"logp": token_logps(network.params, *views, model=network.model)}

    found = _sums(score, pairs, network.model, pad_id=pad_id, batch_size=batch_size, length_multiple=length_multiple)
    return [sums for _, sums in sorted(pair for batch in found for pair in batch.items())]


def distance_sums(
    adapted: Network,
    base: Network,
    pairs: Pairs,
    *,
    pad_id: int,
    batch_size: int,
    length_multiple: int,
    known: Mapping[int, Sums] | None = None,
    record: Callable[[Mapping[int, Sums]], None] = lambda sums: None,
) -> list[dict[str, float]]:
    """How far two models with one vocabulary are apart on each completion: sums over its tokens, in nats.

    `tokens`; `logp_adapted` and `logp_base` of the tokens themselves; `jsd`, the Jensen-Shannon divergence at each
    place (at most ln 2); `kl_from_base` = KL(base ‖ adapted); `kl_to_base` = KL(adapted ‖ base); `entropy_adapted`,
    `entropy_base`. Logits are formed a chunk of tokens at a time (`head.chunk_size`), never as [tokens, vocabulary].
    Completions that are `known` are not scored again; `record` gets the sums of each new batch, by place.
    """

    def score(*views):
        return _distances(adapted.params, base.params, *views, model=adapted.model, base_model=base.model)

    found = dict(known or {})
    for batch in _sums(
        score, pairs, adapted.model, pad_id=pad_id, batch_size=batch_size, length_multiple=length_multiple, known=found
    ):
        record(batch)
        found |= batch
    return [found[row] for row in range(len(pairs.completions))]


@functools.partial(jax.jit, static_argnames="model")
def token_logps(
    params: dict[str, Any],
    prompt_ids: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    model: Model,
) -> Float[Array, "B T"]:
    """log p of each completion token at temperature 1; 0 where the mask is off."""
    return completion_scores(model, params, None, Prompts(prompt_ids, prompt_mask), Completions(ids, mask)).logp


@functools.partial(jax.jit, static_argnames=("model", "base_model"))
def _distances(
    params: dict[str, Any],
    base: dict[str, Any],
    prompt_ids: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    model: Model,
    base_model: Model,
) -> dict[str, Float[Array, "B T"]]:
    def states(model, params):
        hidden = completion_hidden(model, params, None, Prompts(prompt_ids, prompt_mask), Completions(ids, mask))
        return hidden, model.head(params)

    def distance(student, teacher, alpha):
        return divergence_scores(*student, *teacher, ids, mask, alpha=alpha, options=model.head_options)

    own, others = states(model, params), states(base_model, base)
    forward, reverse = distance(own, others, 0.0), distance(others, own, 0.0)
    return {
        "logp_adapted": forward.student_logp,
        "logp_base": reverse.student_logp,
        "jsd": distance(own, others, 0.5).divergence,
        "kl_from_base": forward.divergence,
        "kl_to_base": reverse.divergence,
        "entropy_adapted": forward.student_entropy,
        "entropy_base": reverse.student_entropy,
    }


def _sums(
    score: Callable[..., dict[str, Array]],
    pairs: Pairs,
    model: Model,
    *,
    pad_id: int,
    batch_size: int,
    length_multiple: int,
    known: Mapping[int, Sums] | None = None,
) -> Iterator[dict[int, Sums]]:
    """Per batch: each row's sums of the scores [B, T] that `score` gives, by place. A row without tokens has zeros."""
    lengths = [(len(prompt), len(ids)) for prompt, ids in zip(*pairs, strict=True)]
    for rows in length_batches(lengths, size=batch_size, multiple=length_multiple):
        if known and all(row in known for row in rows.numbers):
            continue
        views = padded_views(*pairs, rows, size=batch_size, pad_id=pad_id)
        scores = score(*place_rows(views, model.mesh))
        sums = {name: gather(jnp.sum(jnp.where(views[3], values, 0.0), axis=1)) for name, values in scores.items()}
        yield {
            row: {"tokens": len(pairs.completions[row])} | {name: float(values[at]) for name, values in sums.items()}
            for at, row in enumerate(rows.numbers)
        }
