"""The form that fits in memory: the logits of one chunk of tokens at a time."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unisd_jax.kernels.fused_linear_logprob.reference import LogprobScores, score_tokens


@functools.partial(jax.jit, static_argnames="chunk_size")
def score_tokens_in_chunks(
    hidden: Float[Array, "N H"],
    head: Float[Array, "V H"],
    targets: Int[Array, " N"],
    temperature: float | Float[Array, ""],
    chunk_size: int,
) -> LogprobScores:
    """`score_tokens` for `chunk_size` tokens at a time, so that only [chunk_size, V] logits exist."""
    tokens = targets.shape[0]
    chunks = -(-tokens // chunk_size)
    padding = chunks * chunk_size - tokens
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(chunks, chunk_size, hidden.shape[1])
    targets = jnp.pad(targets, (0, padding)).reshape(chunks, chunk_size)
    scores = jax.lax.map(lambda chunk: score_tokens(chunk[0], head, chunk[1], temperature), (hidden, targets))
    return jax.tree.map(lambda values: values.reshape(-1)[:tokens], scores)
