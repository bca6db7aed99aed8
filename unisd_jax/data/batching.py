"""Ragged token lists to padded arrays, in few shapes."""

from collections.abc import Sequence

import numpy as np


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `length`."""
    return -(-length // multiple) * multiple


def pad_prompts(
    prompts: Sequence[Sequence[int]], *, pad_id: int, multiple: int = 1, at_least: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded `(ids [B, P] int32, mask [B, P] bool)`; P is the longest length or `at_least`, rounded up."""
    return _pad(prompts, round_up(max(at_least, *map(len, prompts)), multiple), pad_id, left=True)


def pad_contexts(
    rows: Sequence[Sequence[Sequence[int]]], *, pad_id: int, multiple: int = 1, at_least: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded `(ids [B, K, P] int32, mask [B, K, P] bool)` of K prompts a row, P as in `pad_prompts`."""
    flat = pad_prompts([prompt for row in rows for prompt in row], pad_id=pad_id, multiple=multiple, at_least=at_least)
    ids, mask = (array.reshape(len(rows), len(rows[0]), -1) for array in flat)
    return ids, mask


def pad_completions(completions: Sequence[Sequence[int]], *, pad_id: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded `(ids [B, length] int32, mask [B, length] bool)`.

    Raises:
      ValueError: a completion is longer than `length`; nothing is ever cut.
    """
    return _pad(completions, length, pad_id, left=False)


def _pad(rows: Sequence[Sequence[int]], length: int, pad_id: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"row {index} has {len(row)} tokens, more than {length}")
        place = slice(length - len(row), None) if left else slice(0, len(row))
        ids[index, place] = row
        mask[index, place] = True
    return ids, mask
