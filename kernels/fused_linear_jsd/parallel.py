"""Tokens and vocabulary divided over a mesh: each device runs an implementation on its part."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from unisd_jax.kernels.fused_linear_jsd.rows import WHOLE, Settings, Shard
from unisd_jax.kernels.fused_linear_jsd.types import Layout, Operands

TOKENS, VOCAB, WHOLE_ARRAY = "tokens", "vocab", "whole"


def on_mesh(
    local: Callable[[Operands, Any, Settings, Shard], Any],
    layout: Layout | None,
    operands: Operands,
    rows: Any,
    settings: Settings,
    kinds: Any,
) -> Any:
    """`local(operands, rows, settings, shard)` on each device's part of the arrays.

    `rows` are arrays [N, …]; `kinds` says of each output, as a prefix of its tree, what its first axis is. Tokens and
    vocabulary that cannot be divided evenly are padded, with a mask and with columns that count as probability 0.
    """
    if layout is None:
        return local(operands, rows, settings, WHOLE)
    total, vocab = operands.targets.shape[0], operands.student_head.shape[0]
    more_tokens, more_columns = -total % _devices(layout, layout.tokens), -vocab % _devices(layout, layout.vocab)
    if more_tokens:
        mask = jnp.ones(total, bool) if operands.mask is None else operands.mask
        hidden, head, teacher_hidden, teacher_head, targets, _ = operands
        hidden, teacher_hidden, targets, mask, rows = jax.tree.map(
            lambda x: _pad(x, more_tokens), (hidden, teacher_hidden, targets, mask, rows)
        )
        operands = Operands(hidden, head, teacher_hidden, teacher_head, targets, mask)
    if more_columns:
        heads = jax.tree.map(lambda x: _pad(x, more_columns), (operands.student_head, operands.teacher_head))
        operands = operands._replace(student_head=heads[0], teacher_head=heads[1])
        settings = dataclasses.replace(settings, vocab_size=settings.vocab_size or vocab)

    def on_device(operands, rows):
        offset = jax.lax.axis_index(layout.vocab) * operands.student_head.shape[0] if layout.vocab else 0
        return local(operands, rows, settings, Shard(layout.vocab, offset, layout.tokens))

    specs = {TOKENS: PartitionSpec(layout.tokens), VOCAB: PartitionSpec(layout.vocab), WHOLE_ARRAY: PartitionSpec()}
    tokens, columns = specs[TOKENS], specs[VOCAB]
    run = jax.shard_map(
        on_device, mesh=layout.mesh, in_specs=(Operands(tokens, columns, tokens, columns, tokens, tokens), tokens),
        out_specs=jax.tree.map(specs.get, kinds), check_vma=False,
    )  # fmt: skip
    sizes = {TOKENS: total, VOCAB: vocab, WHOLE_ARRAY: None}
    found = run(operands, rows)
    return jax.tree.map(lambda kind, part: _cut(part, sizes[kind]), kinds, found)


def _cut(arrays: Any, size: int | None) -> Any:
    return jax.tree.map(lambda x: x[:size] if x.ndim else x, arrays)


def _pad(x: jax.Array, more: int) -> jax.Array:
    return jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1))


def _devices(layout: Layout, axes: tuple[str, ...]) -> int:
    size = 1
    for axis in axes:
        size *= layout.mesh.shape[axis]
    return size
