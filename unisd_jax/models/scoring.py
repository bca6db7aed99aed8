"""Running a view: one set of weights over (prompt, completion) pairs, all rows at once or part by part."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unisd_jax.kernels import LogprobScores
from unisd_jax.models.decoder import Model
from unisd_jax.models.head import sampled_token_scores
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
    return model.hidden(params, ids, mask, lora=lora, dropout=dropout, first=prompts.ids.shape[1] - 1)


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
    return sampled_token_scores(
        hidden, model.head(params), completions.ids, completions.mask, temperature=temperature,
        options=model.head_options,
    )  # fmt: skip


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
