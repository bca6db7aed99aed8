"""Few shapes for batches of all lengths: each bucket is one padded length for every view, so one program to compile."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unisd_jax.data.batching import round_up
from unisd_jax.data.pipeline import Example, Examples, is_context


class Lengths(NamedTuple):
    """Padded prompt lengths of the views, in tokens; 0 for a view that is not there."""

    student: int
    teacher: int
    contexts: int
    negative: int


class Buckets(NamedTuple):
    """`lengths[i]` hold every example whose prompts together have at most `edges[i]` tokens."""

    edges: tuple[float, ...]
    lengths: tuple[Lengths, ...]

    def index(self, examples: Sequence[Example]) -> int:
        """The first bucket that holds all of `examples`."""
        longest = max(sum(prompt_lengths(example)) for example in examples)
        return next(index for index, edge in enumerate(self.edges) if longest <= edge)


def length_buckets(examples: Sequence[Example], *, number: int, multiple: int) -> Buckets:
    """At most `number` buckets, evenly spaced from the shortest to the longest of `examples`; none without examples.

    Evenly in length, not in count: a few long items cost only their own batches. Lengths are rounded up to `multiple`.
    """
    if not len(examples):
        return Buckets((), ())
    sizes = _sizes(examples)
    totals = sizes.sum(axis=1)
    found: dict[Lengths, float] = {}
    for edge in np.linspace(totals.min(), totals.max(), number + 1)[1:]:
        longest = sizes[totals <= edge].max(axis=0)
        # A later edge with the same lengths takes the place of an earlier one.
        found[Lengths(*(round_up(int(length), multiple) for length in longest))] = float(edge)
    return Buckets(tuple(found.values()), tuple(found))


def prompt_lengths(example: Example) -> Lengths:
    """Unpadded lengths of one example's prompts; the longest of its contexts."""
    teacher, negative = (0 if ids is None else len(ids) for ids in (example.teacher, example.negative))
    return Lengths(len(example.student), teacher, max(map(len, example.contexts), default=0), negative)


def _sizes(examples: Sequence[Example]) -> np.ndarray:
    """`prompt_lengths` of every example, [examples, 4]; a table has them without its examples being built."""
    if not isinstance(examples, Examples):
        return np.array([prompt_lengths(example) for example in examples])
    columns = dict(zip(examples.names, examples.lengths.T, strict=True))
    absent = np.zeros(len(examples), np.int32)
    contexts = [column for name, column in columns.items() if is_context(name)]
    longest = np.max(contexts, axis=0) if contexts else absent
    return np.stack([columns["student"], columns.get("teacher", absent), longest, columns.get("negative", absent)], 1)
