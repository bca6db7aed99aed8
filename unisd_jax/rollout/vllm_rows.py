"""The rows of a batch as requests to a server, and its answers as rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unisd_jax.rollout.protocol import Sampling
from unisd_jax.rollout.vllm_http import Completion


class Request(NamedTuple):
    """`n` completions of one prompt, for the rows from `row` on."""

    row: int
    prompt: Sequence[int]
    n: int
    seed: int


def requests(
    prompts: Sequence[list[int]], rows: Sequence[int], first: int, *, most: int, greedy: bool
) -> list[Request]:
    """One request for each run of equal prompts, of at most `most`.

    Row r of the whole batch has the seed `first` + r, however the rows are put together: choice i of a request is drawn
    from the request's seed + i.
    """
    found: list[Request] = []
    for row, prompt in zip(rows, prompts, strict=True):
        last = found[-1] if found else None
        if last is not None and last.prompt == prompt and last.n < most and last.row + last.n == row:
            found[-1] = last._replace(n=last.n + 1)
        else:
            found.append(Request(row, prompt, 1, 0 if greedy else first + row))
    return found


def padded(completions: Sequence[Completion], sampling: Sampling) -> tuple[np.ndarray, ...]:
    """(ids, mask, logps, stopped) as a Rollout has them."""
    shape = len(completions), sampling.max_completion_length
    ids, logps = np.full(shape, sampling.pad_id, np.int32), np.zeros(shape, np.float32)
    mask, stopped = np.zeros(shape, bool), np.zeros(shape[:1], bool)
    for row, completion in enumerate(completions):
        length = len(completion.ids)
        ids[row, :length], logps[row, :length], mask[row, :length] = completion.ids, completion.logps, True
        stopped[row] = completion.stopped
    return ids, mask, logps, stopped
