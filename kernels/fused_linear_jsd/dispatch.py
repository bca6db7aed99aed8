"""From the options of a call to the implementation that runs it, on one device or on each device of a mesh."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from unisd_jax.kernels.fused_linear_jsd.blocked import gradients_in_blocks, score_in_blocks
from unisd_jax.kernels.fused_linear_jsd.chunked import Weigh, score_in_chunks
from unisd_jax.kernels.fused_linear_jsd.parallel import TOKENS, VOCAB, WHOLE_ARRAY, on_mesh
from unisd_jax.kernels.fused_linear_jsd.rows import RowScores, Settings, Shard, score_rows
from unisd_jax.kernels.fused_linear_jsd.types import Layout, Operands, Result

# Columns at a time where none are asked for: the backward pass that forms the logits again.
BLOCK = 8192


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
    weights: tuple[jax.Array, ...] = (),
    *,
    jacobians: tuple[str, ...] = (),
    weighed: tuple[str, ...] = (),
    weigh: Weigh | None = None,
) -> Result:
    """Scores, jacobians and the head's gradient, as `score_in_chunks` says; in blocks where `vocab_block` is set."""

    def local(operands, weights, settings, shard):
        if options.vocab_block is None:
            result = score_in_chunks(
                operands, weights, settings=settings, chunk_size=options.chunk_size, jacobians=jacobians,
                weighed=weighed, weigh=weigh, shard=shard, row_pass=_row_pass(options),
            )  # fmt: skip
        else:
            result = _score_in_blocks(options, operands, weights, settings, jacobians, weighed, weigh, shard)
        if shard.token_axes:
            summed = jax.lax.psum((result.head_gradient, result.computed), shard.token_axes)
            result = result._replace(head_gradient=summed[0], computed=summed[1])
        return result

    kinds = Result(TOKENS, TOKENS, VOCAB, WHOLE_ARRAY)
    return on_mesh(local, options.layout, operands, weights, options.settings, kinds)


def gradients(
    options: Options, operands: Operands, scores: RowScores, weights: dict[str, jax.Array], *, head_gradient: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Gradients of Σ_k Σ_t c_kt score_kt from scores with statistics, as `gradients_in_blocks` says."""

    def local(operands, rows, settings, shard):
        scores, weights = rows
        hidden, head = gradients_in_blocks(
            operands, scores, weights, settings=settings, block=options.vocab_block or BLOCK,
            chunk_size=options.chunk_size, head_gradient=head_gradient, shard=shard,
        )  # fmt: skip
        if shard.token_axes and head_gradient:
            head = jax.lax.psum(head.astype(jnp.float32), shard.token_axes).astype(head.dtype)
        return hidden, head

    return on_mesh(local, options.layout, operands, (scores, weights), options.settings, (TOKENS, VOCAB))


def _score_in_blocks(
    options: Options, operands, weights, settings: Settings, jacobians, weighed, weigh, shard: Shard
) -> Result:
    sizes = {"block": options.vocab_block, "chunk_size": options.chunk_size}
    result = score_in_blocks(operands, settings=settings, shard=shard, **sizes)
    again = functools.partial(gradients_in_blocks, operands, result.scores, settings=settings, shard=shard, **sizes)
    ones = jnp.ones(operands.targets.shape, jnp.float32)
    found = {name: again({name: ones}, head_gradient=False)[0] for name in jacobians}
    head = again(weigh(result.scores, weights), head_gradient=True)[1] if weighed else None
    return result._replace(jacobians=found, head_gradient=head)


def _row_pass(options: Options) -> Callable:
    """The row pass of the implementation; the plain one for what a kernel does not have."""
    return score_rows
