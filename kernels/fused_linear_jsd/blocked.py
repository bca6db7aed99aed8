"""Blocks of the vocabulary: logits are formed again for every sweep, so that memory is that of one block."""

import jax
import jax.numpy as jnp

from unisd_jax.kernels.fused_linear_jsd.chunked import gradient_dtype, logits, no_scores, product, put
from unisd_jax.kernels.fused_linear_jsd.rows import (
    LOG_ZERO,
    WHOLE,
    Normaliser,
    RowScores,
    Settings,
    Shard,
    Statistics,
    columns,
    divergence_terms,
    factors,
    log_probs,
    scale,
    subtract,
)
from unisd_jax.kernels.fused_linear_jsd.tokens import count_tokens, for_each_chunk, padded_size
from unisd_jax.kernels.fused_linear_jsd.types import Operands, Result

# Tokens at a time. Beside a block of logits it decides how often the head is read; above this that no longer shows.
CHUNK = 2048


def score_in_blocks(
    operands: Operands, *, settings: Settings, block: int, chunk_size: int | None = None, shard: Shard = WHOLE
) -> Result:
    """Scores alone, from `block` columns of the vocabulary at a time.

    Two sweeps of two products per token with a teacher, one of one product without. The largest arrays are two
    [chunk_size, block] float32 logits.
    """
    tokens, sizes, room, (hidden, teacher_hidden, targets) = _prepare(operands, chunk_size, shard)

    def chunk(start, size, all_scores):
        rows, teacher_rows, ids = _slices((hidden, teacher_hidden, targets), start, size)
        normalisers = _normalisers(rows, teacher_rows, operands, settings, block, shard)
        new = _sums(rows, teacher_rows, ids, normalisers, operands, settings, block, shard)
        return jax.tree.map(lambda values, some: put(values, some, start), all_scores, new)

    scores, computed = for_each_chunk(chunk, no_scores(settings, room), tokens.number, sizes)
    return Result(jax.tree.map(tokens.restore, scores), {}, None, jnp.asarray(computed, jnp.int32))


def gradients_in_blocks(
    operands: Operands,
    scores: RowScores,
    weights: dict[str, jax.Array],
    *,
    settings: Settings,
    block: int,
    chunk_size: int | None = None,
    head_gradient: bool,
    head_dtype=None,
    shard: Shard = WHOLE,
) -> tuple[jax.Array, jax.Array | None]:
    """Σ_k c_k ∂score_k/∂hidden [N, H] in float32 and, if asked for, the gradient of its sum to the head.

    One sweep: a block of the vocabulary meets all tokens before the next one, so its part of the head's gradient is
    summed in float32 and never needs a float32 array of the whole head. Four products per token, three without head.

    Args:
      operands: as given for the scores.
      scores: with their statistics, [N].
      weights: c [N] by the name of the score.
      settings: what the scores mean.
      block: columns at a time.
      chunk_size: tokens at a time.
      head_gradient: whether to compute the head's.
      head_dtype: of the head's gradient; None: the head's own.
      shard: the part of the vocabulary that the heads here are.
    """
    tokens, sizes, room, (hidden, teacher_hidden, targets) = _prepare(operands, chunk_size, shard)
    scores, weights = jax.tree.map(lambda x: tokens.compact(x, room), (scores, weights))
    dtype, head = gradient_dtype(hidden, operands.student_head), operands.student_head

    def one_block(carry, first, width):
        total, head_total = carry
        own, taught = _head_rows(head, first, width), _head_rows(operands.teacher_head, first, width)
        part = Shard((), shard.offset + first)

        def chunk(start, size, carry):
            total, own_gradient = carry
            rows, teacher_rows, ids, some, c = _slices((hidden, teacher_hidden, targets, scores, weights), start, size)
            teacher_logits = None if teacher_rows is None else logits(teacher_rows, taught)
            found = factors(
                logits(rows, own), teacher_logits, ids, some, settings=settings, wanted=tuple(c), shard=part,
                factor_dtype=jnp.float32,
            )  # fmt: skip
            factor = sum(c[name][:, None] * found[name] for name in c).astype(dtype) / settings.temperature
            step = product("nv,vh->nh", factor, own.astype(dtype))
            total = put(total, jax.lax.dynamic_slice_in_dim(total, start, size) + step, start)
            if head_gradient:
                own_gradient += product("nv,nh->vh", factor, rows.astype(dtype))
            return total, own_gradient

        own_gradient = jnp.zeros((width, head.shape[1]), jnp.float32) if head_gradient else None
        (total, own_gradient), _ = for_each_chunk(chunk, (total, own_gradient), tokens.number, sizes)
        if head_gradient:
            head_total = put(head_total, own_gradient.astype(head_total.dtype), first)
        return total, head_total

    start = (
        jnp.zeros((room, head.shape[1]), jnp.float32),
        jnp.zeros(head.shape, head_dtype or head.dtype) if head_gradient else None,
    )
    total, head_total = _over_blocks(one_block, start, head.shape[0], block)
    if shard.axes:
        total = jax.lax.psum(total, shard.axes)
    return tokens.restore(total), head_total


def _normalisers(rows, teacher_rows, operands: Operands, settings: Settings, block: int, shard: Shard):
    """(student's, teacher's) log Σ exp, carried over the blocks as a running maximum and a sum relative to it."""
    pairs = [(rows, operands.student_head)]
    if teacher_rows is not None:
        pairs.append((teacher_rows, operands.teacher_head))

    def add(carry, first, width):
        part = Shard((), shard.offset + first)
        return tuple(
            _add_exponentials(state, scale(logits(x, _head_rows(head, first, width)), settings, part)[0])
            for state, (x, head) in zip(carry, pairs, strict=True)
        )

    size = rows.shape[0]
    empty = jnp.full(size, LOG_ZERO, jnp.float32), jnp.zeros(size, jnp.float32)
    found = []
    for largest, total in _over_blocks(add, (empty,) * len(pairs), operands.student_head.shape[0], block):
        if shard.axes:
            whole = jax.lax.pmax(largest, shard.axes)
            largest, total = whole, jax.lax.psum(total * jnp.exp(largest - whole), shard.axes)
        found.append(Normaliser(largest, jnp.log(total)))
    return (*found, None)[:2]


def _add_exponentials(state, scaled):
    largest, total = state
    new = jnp.maximum(largest, jnp.max(scaled, axis=-1))
    return new, total * jnp.exp(largest - new) + jnp.sum(jnp.exp(scaled - new[:, None]), axis=-1)


def _sums(rows, teacher_rows, ids, normalisers, operands: Operands, settings: Settings, block: int, shard: Shard):
    """`RowScores` of some tokens from their normalisers."""
    own_normaliser, taught_normaliser = normalisers
    owned = (ids >= 0) & (ids < (settings.vocab_size or _whole_vocabulary(operands, shard)))

    def add(carry, first, width):
        part = Shard((), shard.offset + first)
        here = columns(width, part) == ids[:, None]
        scaled = scale(logits(rows, _head_rows(operands.student_head, first, width)), settings, part)[0]
        ls = log_probs(scaled, own_normaliser)
        new = {"logp": jnp.where(here, scaled, 0.0), "entropy": -jnp.exp(ls) * ls}
        if teacher_rows is not None:
            taught = logits(teacher_rows, _head_rows(operands.teacher_head, first, width))
            scaled = scale(taught, settings, part)[0]
            terms = divergence_terms(ls, log_probs(scaled, taught_normaliser), settings)
            new |= {"divergence": terms.entries, "influence": terms.influence, "taught": jnp.where(here, scaled, 0.0)}
            if settings.entry_ceiling is not None:
                new["capped"] = terms.capped.astype(jnp.float32)
        return {name: carry[name] + jnp.sum(values, axis=-1) for name, values in new.items()}

    names = ["logp", "entropy"] + ([] if teacher_rows is None else ["divergence", "influence", "taught"])
    names += [] if settings.entry_ceiling is None else ["capped"]
    zeros = {name: jnp.zeros(rows.shape[0], jnp.float32) for name in names}
    sums = _over_blocks(add, zeros, operands.student_head.shape[0], block)
    sums = jax.lax.psum(sums, shard.axes) if shard.axes else sums
    logp = jnp.where(owned, subtract(sums["logp"], own_normaliser), jnp.nan)
    taught = None if teacher_rows is None else jnp.where(owned, subtract(sums["taught"], taught_normaliser), jnp.nan)
    capped = sums["capped"] > 0 if "capped" in sums else None
    statistics = Statistics(own_normaliser, taught_normaliser, sums.get("influence"))
    return RowScores(sums.get("divergence"), logp, taught, sums["entropy"], capped, statistics)


def _over_blocks(body, carry, vocab: int, block: int):
    """`carry = body(carry, first, width)` over the columns, the last block as narrow as they leave it."""
    block = min(block, vocab)
    whole = vocab // block
    carry = jax.lax.fori_loop(0, whole, lambda i, carry: body(carry, i * block, block), carry)
    return body(carry, whole * block, vocab % block) if vocab % block else carry


def _prepare(operands: Operands, chunk_size: int | None, shard: Shard):
    total = operands.targets.shape[0]
    size = max(1, min(CHUNK if chunk_size is None else chunk_size, total))
    sizes = (size, size // 8) if size % 8 == 0 and size >= 128 else (size, size)
    tokens, room = count_tokens(total, operands.mask, shard), padded_size(total, sizes)
    arrays = operands.student_hidden, operands.teacher_hidden, operands.targets
    return tokens, sizes, room, jax.tree.map(lambda x: tokens.compact(x, room), arrays)


def _slices(arrays, start, size):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), arrays)


def _head_rows(head: jax.Array | None, first, width: int) -> jax.Array | None:
    return None if head is None else jax.lax.dynamic_slice_in_dim(head, first, width)


def _whole_vocabulary(operands: Operands, shard: Shard):
    return operands.student_head.shape[0] * (jax.lax.axis_size(shard.axes) if shard.axes else 1)
