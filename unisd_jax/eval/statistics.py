"""How sure a measured mean is: percentile bootstrap over test items."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

# Resampled indices are drawn in blocks of about this many, so that memory does not grow with `samples`.
_BLOCK = 1 << 20

Scores = Float[np.ndarray, " N"] | Int[np.ndarray, " N"] | Bool[np.ndarray, " N"]


class Interval(NamedTuple):
    """A mean and the ends of its interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    before: Scores, after: Scores, *, seed: int = 0, samples: int = 10_000, level: float = 0.95
) -> Interval:
    """Mean of after - before over the same items, with its percentile bootstrap interval.

    An item is drawn together with both of its scores, so what makes it easy or hard in both cancels out.

    Args:
      before: score of each item [N].
      after: scores of the same items in the same order [N].
      seed: of the resampling; the same inputs and seed give the same interval.
      samples: number of resampled sets.
      level: share of the resampled means between the two ends.

    Raises:
      ValueError: the lengths differ, there is no item, a score is not finite, or `samples` or `level` is out
        of range.
    """
    before, after = _scores("before", before), _scores("after", after)
    if len(before) != len(after):
        raise ValueError(f"before has {len(before)} scores and after has {len(after)}: expected the same items in both")
    return mean_interval(after - before, seed=seed, samples=samples, level=level)


def mean_interval(values: Scores, *, seed: int = 0, samples: int = 10_000, level: float = 0.95) -> Interval:
    """Mean of `values` [N] with its percentile bootstrap interval, items drawn with replacement.

    Raises:
      ValueError: no value, a value that is not finite, or `samples` or `level` out of range.
    """
    values = _scores("values", values)
    if samples < 1:
        raise ValueError(f"samples is {samples}: expected at least 1")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}: expected a share between 0 and 1, such as 0.95")
    random, count = np.random.default_rng(seed), len(values)
    block = max(1, _BLOCK // count)
    means = np.concatenate(
        [
            values[random.integers(count, size=(min(block, samples - start), count))].mean(axis=1)
            for start in range(0, samples, block)
        ]
    )
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(values.mean()), float(low), float(high))


def _scores(name: str, values: Scores) -> Float[np.ndarray, " N"]:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"{name} has shape {values.shape}: expected one score per item, [N]")
    if not len(values):
        raise ValueError(f"{name} is empty: expected at least one item")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(f"{name}[{bad[0]}] is {values[bad[0]]}: expected finite scores")
    return values
