"""Running a view: one set of weights over (prompt, completion) pairs, all rows at once or part by part."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unisd_jax.kernels.fused_linear_logprob import LogprobScores, fused_linear_logprob
from unisd_jax.models.decoder import Model
from unisd_jax.models.lora import Dropout, Lora
from unisd_jax.types import Completions, Prompts


def completion_hidden(
    model: Model,
    params: dict[str, Any],
    lora: Lora | None,
    prompts: Prompts,
    completions: Completions,
    dropout: Dropout | None = None,
) -> Float[Array, "B T H"]:
    """The states that predict each completion token; the last token itself is not fed."""
    ids = jnp.concatenate([prompts.ids, completions.ids[:, :-1]], axis=1)
    mask = jnp.concatenate([prompts.mask, completions.mask[:, :-1]], axis=1)
    return model.hidden(params, ids, mask, lora=lora, dropout=dropout)[:, prompts.ids.shape[1] - 1 :]


def sampled_token_scores(
    hidden: Float[Array, "*B H"], head: Float[Array, "V H"], ids: Int[Array, "*B"], *, temperature: float = 1.0
) -> LogprobScores:
    """Log-prob of each given token and the entropy at its place, in chunks and without gradient; shaped like `ids`."""
    scores = fused_linear_logprob(hidden.reshape(-1, hidden.shape[-1]), head, ids.reshape(-1), temperature=temperature)
    return jax.tree.map(lambda values: values.reshape(ids.shape), scores)


def completion_scores(
    model: Model,
    params: dict[str, Any],
    lora: Lora | None,
    prompts: Prompts,
    completions: Completions,
    *,
    temperature: float = 1.0,
) -> LogprobScores:
    """`sampled_token_scores` of a view's completion tokens, each field [B, T]."""
    hidden = completion_hidden(model, params, lora, prompts, completions)
    return sampled_token_scores(hidden, model.head(params), completions.ids, temperature=temperature)


def map_rows(function: Callable[[Any], Any], rows: Any, parts: int) -> Any:
    """`function` of `parts` equal parts of the batch, one after the other; its results are joined in the old order."""
    if parts == 1:
        return function(rows)
    results = jax.lax.map(function, jax.tree.map(lambda x: split_rows(x, parts), rows))
    return jax.tree.map(join_rows, results)


def split_rows(x: Array, parts: int) -> Array:
    """[B, …] → [parts, B/parts, …], row i to part i mod parts, so that a batch sharded over rows stays where it is."""
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def join_rows(x: Array) -> Array:
    """Undoes `split_rows`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
