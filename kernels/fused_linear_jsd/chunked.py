"""Chunks of tokens with whole rows of logits: the fewest products, and the memory of one chunk's rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unisd_jax.kernels.fused_linear_jsd.rows import (
    WHOLE,
    Normaliser,
    RowScores,
    Settings,
    Shard,
    Statistics,
    score_rows,
)
from unisd_jax.kernels.fused_linear_jsd.tokens import chunk_sizes, count_tokens, for_each_chunk, padded_size
from unisd_jax.kernels.fused_linear_jsd.types import Operands, Result

Weigh = Callable[[RowScores, Any], dict[str, jax.Array]]


def score_in_chunks(
    operands: Operands,
    beside: Any = None,
    *,
    settings: Settings,
    chunk_size: int | None = None,
    jacobians: tuple[str, ...] = (),
    weighed: tuple[str, ...] = (),
    weigh: Weigh | None = None,
    shard: Shard = WHOLE,
    row_pass: Callable = score_rows,
) -> Result:
    """Scores, the student's jacobians per token, and Σ_t c_t ∂score_t/∂student_head with c from `weigh`.

    A chunk of n tokens holds two [n, V] float32 logits and, with gradients, one [n, V] factor for each score in the
    dtype of the products. Two products per token for the scores, one for each jacobian, one for the head's gradient.

    Args:
      operands: the arrays, whole or this device's part.
      beside: a tree of arrays [N, …] whose rows `weigh` is given.
      settings: what the scores mean.
      chunk_size: tokens per chunk; None: as `chunk_sizes` finds.
      jacobians: of which scores.
      weighed: the scores whose gradient the head is wanted of.
      weigh: (scores of n tokens, their rows of `beside`) → the weight c [n] of each score in `weighed`, by name.
      shard: the part of the vocabulary that the heads here are.
      row_pass: computes scores and factors of a chunk, as `score_rows` does.
    """
    student_head, teacher_head = operands.student_head, operands.teacher_head
    total, (width, depth) = operands.targets.shape[0], student_head.shape
    tokens, sizes = count_tokens(total, operands.mask, shard), chunk_sizes(total, chunk_size)
    room = padded_size(total, sizes)
    arrays = (operands.student_hidden, operands.teacher_hidden, operands.targets, beside)
    arrays = jax.tree.map(lambda x: tokens.compact(x, room), arrays)
    names = tuple(dict.fromkeys((*jacobians, *weighed)))
    dtype = gradient_dtype(operands.student_hidden, student_head)

    def chunk(start, size, carry):
        scores, found, head_gradient = carry
        rows, teacher_rows, ids, own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), arrays)
        teacher_logits = None if teacher_rows is None else logits(teacher_rows, teacher_head)
        options = {"settings": settings, "wanted": names, "factor_dtype": dtype}
        if shard.axes:
            options["shard"] = shard
        new, factors = row_pass(logits(rows, student_head), teacher_logits, ids, **options)
        scores = jax.tree.map(lambda all_, some: put(all_, some, start), scores, new)
        for name in jacobians:
            gradient = product("nv,vh->nh", factors[name], student_head.astype(dtype))
            found = found | {name: put(found[name], gradient / settings.temperature, start)}
        if weighed:
            head_gradient += _head_gradient(factors, weigh(new, own), rows)
        return scores, found, head_gradient

    carry = (
        no_scores(settings, room),
        {name: jnp.zeros((room, depth), jnp.float32) for name in jacobians},
        None if not weighed else jnp.zeros((width, depth), jnp.float32),
    )
    (scores, found, head_gradient), computed = for_each_chunk(chunk, carry, tokens.number, sizes)
    if shard.axes:
        found = jax.lax.psum(found, shard.axes)
    scores, found = jax.tree.map(tokens.restore, (scores, found))
    head_gradient = None if head_gradient is None else head_gradient / settings.temperature
    return Result(scores, found, head_gradient, jnp.asarray(computed, jnp.int32))


def logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """hidden @ head.T, [n, V] float32."""
    return product("nh,vh->nv", hidden, head)


def product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum of two arrays, summed in float32."""
    dtype = jnp.promote_types(a.dtype, b.dtype)
    # GPU and TPU would round float32 inputs to TF32 or bfloat16 before they multiply them.
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(axes, a, b, precision=precision, preferred_element_type=jnp.float32)


def gradient_dtype(hidden: jax.Array, head: jax.Array):
    """bfloat16 where both inputs are, else float32: the dtype in which factors enter the products of the gradient."""
    return jnp.bfloat16 if {hidden.dtype, head.dtype} == {jnp.dtype(jnp.bfloat16)} else jnp.float32


def _head_gradient(factors: dict[str, jax.Array], weights: dict[str, jax.Array], rows: jax.Array) -> jax.Array:
    """(Σ_k c_k factor_k)ᵀ rows. A single weight is moved to the rows, which are far fewer numbers."""
    if len(weights) == 1:
        ((name, weight),) = weights.items()
        factor, rows = factors[name], rows.astype(jnp.float32) * weight[:, None]
    else:
        factor = sum(weight[:, None] * factors[name].astype(jnp.float32) for name, weight in weights.items())
        factor = factor.astype(next(iter(factors.values())).dtype)
    return product("nv,nh->vh", factor, rows.astype(factor.dtype))


def no_scores(settings: Settings, size: int) -> RowScores:
    """Room for the scores of `size` tokens."""
    zeros = jnp.zeros(size, jnp.float32)
    normaliser = Normaliser(zeros, zeros)
    taught = None if settings.alpha is None else zeros
    capped = None if settings.entry_ceiling is None else jnp.zeros(size, bool)
    return RowScores(
        taught, zeros, taught, zeros, capped, Statistics(normaliser, None if taught is None else normaliser, taught)
    )


def put(values: jax.Array, rows: jax.Array, start) -> jax.Array:
    """`values` with `rows` from row `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(values, rows, start, axis=0)
