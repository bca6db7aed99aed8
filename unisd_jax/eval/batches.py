"""Batches for evaluation: rows of similar length together, in few shapes, always the same ones for the same rows."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from unisd_jax.data.batching import pad_completions, pad_prompts, round_up


class Rows(NamedTuple):
    """Some rows by their numbers, and the shape they are padded to, one length per column."""

    numbers: list[int]
    lengths: tuple[int, ...]


def length_batches(lengths: Sequence[Sequence[int]], *, size: int, multiple: int) -> Iterator[Rows]:
    """Every row once, the shortest first, at most `size` at a time.

    Args:
      lengths: of each row, one number per column (prompt, completion).
      size: rows of a batch.
      multiple: what lengths are rounded up to. A column has the length of its longest row, or a half, a quarter, ... of
        it: few shapes, and short rows are not padded to the length of the longest.
    """
    if not lengths:
        return
    table = np.array(lengths)
    longest = table.max(axis=0)
    order = sorted(range(len(table)), key=lambda row: (*table[row].cumsum()[::-1], row))
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        needed = table[numbers].max(axis=0)
        yield Rows(numbers, tuple(_shape(int(n), int(most), multiple) for n, most in zip(needed, longest, strict=True)))


def padded_views(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], rows: Rows, *, size: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(prompt ids, prompt mask, ids, mask) of a batch of exactly `size` rows, whose filling has no completion token."""
    numbers = filled(rows.numbers, size)
    ids, mask = pad_completions([completions[row] for row in numbers], pad_id=pad_id, length=rows.lengths[1])
    mask[len(rows.numbers) :] = False
    return (*pad_prompts([prompts[row] for row in numbers], pad_id=pad_id, at_least=rows.lengths[0]), ids, mask)


def filled(rows: Sequence[Any], size: int) -> list[Any]:
    """`rows` and as many times the first of them as are missing from `size`."""
    return [*rows, *[rows[0]] * (size - len(rows))]


def _shape(needed: int, longest: int, multiple: int) -> int:
    shape = max(longest, 1)
    while shape // 2 >= max(needed, 1) and shape > multiple:
        shape = -(-shape // 2)
    return round_up(max(shape, needed), multiple)
