"""The tokens that count, put first and cut into chunks, so that the work follows their number."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unisd_jax.kernels.fused_linear_jsd.rows import WHOLE, Shard


class Tokens(NamedTuple):
    """N tokens, of which at most `number` count: an int where all do. `order` lists those first, N for the others."""

    total: int
    number: jax.Array | int
    order: jax.Array | None
    inverse: jax.Array | None
    mask: jax.Array | None

    def compact(self, values: jax.Array, size: int) -> jax.Array:
        """[N, …] → [size, …]: the tokens that count, then zeros."""
        if self.order is not None:
            values = jnp.take(values, self.order, axis=0, mode="fill", fill_value=0)
        return jnp.pad(values, [(0, size - self.total)] + [(0, 0)] * (values.ndim - 1))

    def restore(self, values: jax.Array) -> jax.Array:
        """Undoes `compact`; zeros at the tokens that do not count."""
        if self.order is None:
            return values[: self.total]
        mask = self.mask.reshape(-1, *[1] * (values.ndim - 1))
        return jnp.where(mask, values[self.inverse], jnp.zeros((), values.dtype))


def count_tokens(total: int, mask: jax.Array | None, shard: Shard = WHOLE) -> Tokens:
    """`Tokens` of a mask [N]; None: all count."""
    if mask is None:
        return Tokens(total, total, None, None, None)
    ranks = jnp.argsort(~mask, stable=True)
    number = jnp.sum(mask, dtype=jnp.int32)
    order = jnp.where(jnp.arange(total) < number, ranks, total)
    if shard.axes and shard.token_axes:
        # Collectives stand inside the loops, so every device has to take the same number of turns.
        number = jax.lax.pmax(number, shard.token_axes)
    return Tokens(total, number, order, jnp.argsort(ranks), mask)


def chunk_sizes(total: int, chunk_size: int | None) -> tuple[int, int]:
    """(tokens in a chunk, tokens in one of the small chunks that the last tokens are done in).

    Of themselves an eighth of the tokens, but 256 to 1024: an eighth of the memory, products that keep a GPU busy, and
    a head's gradient that is not read and written too often.
    """
    size = min(1024, max(256, _round_up(-(-total // 8), 128))) if chunk_size is None else chunk_size
    size = max(1, min(size, _round_up(total, 8)))
    small = size // 8 if size % 8 == 0 and size >= 128 else size
    return size, small


def padded_size(total: int, sizes: tuple[int, int]) -> int:
    """Room for N tokens in whole small chunks."""
    return _round_up(max(total, 1), sizes[1])


def for_each_chunk(
    body: Callable[[jax.Array | int, int, Any], Any], carry: Any, number: jax.Array | int, sizes: tuple[int, int]
) -> tuple[Any, jax.Array | int]:
    """`carry = body(start, size, carry)` over `number` tokens, and the rows it was called for.

    The loops have as many turns as there are tokens for, so they cannot be differentiated in reverse.
    """
    size, small = sizes
    whole = number // size
    rest = -(-(number - whole * size) // small)

    def loop(turns, first, size, carry):
        if isinstance(turns, int) and turns == 0:
            return carry
        return jax.lax.fori_loop(0, turns, lambda i, carry: body(first + i * size, size, carry), carry)

    carry = loop(whole, 0, size, carry)
    carry = loop(rest, whole * size, small, carry)
    return carry, whole * size + rest * small


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
