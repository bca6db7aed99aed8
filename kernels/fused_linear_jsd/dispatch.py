"""From the options of a call to the implementation that runs it, on one device or on each device of a mesh."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unisd_jax.kernels.fused_linear_jsd.blocked import gradients_in_blocks, score_in_blocks
from unisd_jax.kernels.fused_linear_jsd.chunked import Weigh, put, score_in_chunks
from unisd_jax.kernels.fused_linear_jsd.parallel import TOKENS, VOCAB, WHOLE_ARRAY, on_mesh
from unisd_jax.kernels.fused_linear_jsd.rows import RowScores, Settings, Shard, score_rows
from unisd_jax.kernels.fused_linear_jsd.tokens import chunk_sizes, count_tokens, for_each_chunk, padded_size
from unisd_jax.kernels.fused_linear_jsd.types import Layout, Operands, Result


@dataclasses.dataclass(frozen=True)
class Options:
    """The static part of a call."""

    settings: Settings
    implementation: str = "chunked"
    chunk_size: int | None = None
    vocab_block: int | None = None
    layout: Layout | None = None
    interpret: bool = False


def score(
    options: Options,
    operands: Operands,
    beside: Any = None,
    *,
    jacobians: tuple[str, ...] = (),
    weighed: tuple[str, ...] = (),
    weigh: Weigh | None = None,
) -> Result:
    """Scores, jacobians and the head's gradient, as `score_in_chunks` says; in blocks where `vocab_block` is set."""

    def local(operands, beside, settings, shard):
        if options.vocab_block is None:
            result = score_in_chunks(
                operands, beside, settings=settings, chunk_size=options.chunk_size, jacobians=jacobians,
                weighed=weighed, weigh=weigh, shard=shard, row_pass=_row_pass(options),
            )  # fmt: skip
        else:
            result = _score_in_blocks(options, operands, beside, settings, jacobians, weighed, weigh, shard)
        if shard.token_axes:
            summed = jax.lax.psum((result.head_gradient, result.computed), shard.token_axes)
            result = result._replace(head_gradient=summed[0], computed=summed[1])
        return result

    kinds = Result(TOKENS, TOKENS, VOCAB, WHOLE_ARRAY)
    return on_mesh(local, options.layout, operands, beside, options.settings, kinds)


def gradients(
    options: Options,
    operands: Operands,
    scores: RowScores,
    weights: dict[str, jax.Array],
    *,
    head_gradient: bool,
    head_dtype=None,
) -> tuple[jax.Array, jax.Array | None]:
    """Gradients of Σ_k Σ_t c_kt score_kt from scores with statistics, as `gradients_in_blocks` says."""

    def local(operands, rows, settings, shard):
        scores, weights = rows
        hidden, head = gradients_in_blocks(
            operands, scores, weights, settings=settings, block=options.vocab_block or _block(operands),
            chunk_size=options.chunk_size, head_gradient=head_gradient, head_dtype=head_dtype, shard=shard,
        )  # fmt: skip
        if shard.token_axes and head_gradient:
            head = jax.lax.psum(head.astype(jnp.float32), shard.token_axes).astype(head.dtype)
        return hidden, head

    return on_mesh(local, options.layout, operands, (scores, weights), options.settings, (TOKENS, VOCAB))


def _score_in_blocks(
    options: Options, operands, beside, settings: Settings, jacobians, weighed, weigh, shard: Shard
) -> Result:
    sizes = {"block": options.vocab_block, "chunk_size": options.chunk_size}
    result = score_in_blocks(operands, settings=settings, shard=shard, **sizes)
    again = functools.partial(gradients_in_blocks, operands, result.scores, settings=settings, shard=shard, **sizes)
    ones = jnp.ones(operands.targets.shape, jnp.float32)
    found = {name: again({name: ones}, head_gradient=False)[0] for name in jacobians}
    head = None
    if weighed:
        _, head = again(weigh(result.scores, beside), head_gradient=True, head_dtype=jnp.float32)
    return result._replace(jacobians=found, head_gradient=head)


def _block(operands: Operands) -> int:
    """Columns at a time where none are asked for, when a backward pass forms the logits again."""
    return min(8192, max(512, operands.student_head.shape[0] // 8))


def _row_pass(options: Options) -> Callable:
    """The row pass of the implementation. A Pallas kernel is imported only where it is asked for."""
    if options.implementation in ("auto", "chunked"):
        return score_rows
    kernel = importlib.import_module(f"unisd_jax.kernels.fused_linear_jsd.{options.implementation}")
    return functools.partial(kernel.score_rows, interpret=options.interpret)


def log_probs_on_chip(options: Options, operands: Operands) -> RowScores:
    """Log-probs and entropies, without gradient and without teacher, from a GPU kernel that writes no logits."""
    kernel = importlib.import_module("unisd_jax.kernels.fused_linear_logprob.pallas_gpu")

    def local(operands, _, settings, shard):
        total = operands.targets.shape[0]
        sizes = chunk_sizes(total, options.chunk_size or total)
        tokens, room = count_tokens(total, operands.mask), padded_size(total, sizes)
        hidden, targets = (tokens.compact(x, room) for x in (operands.student_hidden, operands.targets))

        def chunk(start, size, all_scores):
            rows, ids = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (hidden, targets))
            scores = kernel.score_tokens(
                rows, operands.student_head, ids, temperature=settings.temperature, soft_cap=settings.soft_cap,
                vocab_size=settings.vocab_size, interpret=options.interpret,
            )  # fmt: skip
            return tuple(put(values, some, start) for values, some in zip(all_scores, scores, strict=True))

        empty = (jnp.zeros(room, jnp.float32),) * 2
        (logp, entropy), _ = for_each_chunk(chunk, empty, tokens.number, sizes)
        return RowScores(None, tokens.restore(logp), None, tokens.restore(entropy))

    return on_mesh(local, options.layout, operands, None, options.settings, TOKENS)
