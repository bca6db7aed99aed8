"""How sure a measured mean or difference is: bootstraps over test items and seeds, Wilson, McNemar; pass@k."""

import math
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int

# Resampled indices are drawn in blocks of about this many, so that memory does not grow with `samples`.
_BLOCK = 1 << 20

Scores = Float[np.ndarray, " N"] | Int[np.ndarray, " N"] | Bool[np.ndarray, " N"]
SeedScores = Float[np.ndarray, "S N"] | Int[np.ndarray, "S N"] | Bool[np.ndarray, "S N"]


class Interval(NamedTuple):
    """A mean and the ends of its interval, in the unit of the values."""

    mean: float
    low: float
    high: float


class McNemar(NamedTuple):
    """Items that only the second side solves, those that only the first does, and how likely that is by chance."""

    gained: int
    lost: int
    p_value: float


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
    _require_same_length(before, after)
    return mean_interval(after - before, seed=seed, samples=samples, level=level)


def mean_interval(values: Scores, *, seed: int = 0, samples: int = 10_000, level: float = 0.95) -> Interval:
    """Mean of `values` [N] with its percentile bootstrap interval, items drawn with replacement.

    Raises:
      ValueError: no value, a value that is not finite, or `samples` or `level` out of range.
    """
    return _bootstrap(_scores("values", values)[None], seed=seed, samples=samples, level=level)


def ratio_interval(
    numerators: Scores, denominators: Scores, *, seed: int = 0, samples: int = 10_000, level: float = 0.95
) -> Interval:
    """Sum of numerators / sum of denominators, pooled over items [N], with its percentile bootstrap interval.

    For means over the tokens of all items: an item is drawn with all of its tokens, which are not independent.

    Raises:
      ValueError: the lengths differ, a denominator is negative or all are 0, or as `mean_interval`.
    """
    numerators, denominators = _scores("numerators", numerators), _scores("denominators", denominators)
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} numerators and {len(denominators)} denominators: expected as many")
    if denominators.min() < 0 or not denominators.any():
        raise ValueError("denominators are negative or all 0: expected counts, at least one of them above 0")
    if samples < 1:
        raise ValueError(f"samples is {samples}: expected at least 1")
    _require_level(level)
    random, count = np.random.default_rng(seed), len(numerators)
    block, found = max(1, _BLOCK // count), []
    for start in range(0, samples, block):
        items = random.integers(count, size=(min(block, samples - start), count))
        sums = numerators[items].sum(axis=1), denominators[items].sum(axis=1)
        drawn = sums[1] > 0  # a draw of nothing but empty items says nothing
        found.append(sums[0][drawn] / sums[1][drawn])
    ratio = numerators.sum() / denominators.sum()
    drawn = np.concatenate(found)
    low, high = np.quantile(drawn if len(drawn) else [ratio], [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(ratio), float(low), float(high))


def seeds_interval(scores: SeedScores, *, seed: int = 0, samples: int = 10_000, level: float = 0.95) -> Interval:
    """Mean over several seeds' runs on the same items [S, N], with an interval for other seeds and other items.

    Seeds and items are both drawn with replacement, all seeds of a draw with the same items; one seed gives what
    `mean_interval` gives. Few seeds say little about others: the share of the variance that comes from them is too
    small by the factor (S - 1) / S.

    Raises:
      ValueError: no seed, no item, a score that is not finite, or `samples` or `level` out of range.
    """
    return _bootstrap(_seed_scores("scores", scores), seed=seed, samples=samples, level=level)


def paired_seeds_interval(
    before: SeedScores, after: SeedScores, *, seed: int = 0, samples: int = 10_000, level: float = 0.95
) -> Interval:
    """Mean of after [S2, N] - before [S1, N] over the same items, with an interval for other seeds and other items.

    Both sides of a draw have the same items, and seeds of their own: seeds with the same number share nothing.

    Raises:
      ValueError: the items differ in number, or as `seeds_interval`.
    """
    before, after = _seed_scores("before", before), _seed_scores("after", after)
    if before.shape[1] != after.shape[1]:
        raise ValueError(
            f"before has {before.shape[1]} scores per seed and after has {after.shape[1]}: expected the same items"
        )
    return _bootstrap(after, before, seed=seed, samples=samples, level=level)


def wilson_interval(successes: int, total: int, *, level: float = 0.95) -> Interval:
    """Share of `successes` in `total` with Wilson's interval, which holds for few items and shares near 0 and 1.

    Raises:
      ValueError: `total` is below 1, `successes` is not between 0 and `total`, or `level` is out of range.
    """
    if total < 1:
        raise ValueError(f"total is {total}: expected at least 1")
    if not 0 <= successes <= total:
        raise ValueError(f"successes is {successes}: expected 0 to {total}, the total")
    _require_level(level)
    ends = scipy.stats.binomtest(int(successes), int(total)).proportion_ci(level, method="wilson")
    return Interval(successes / total, float(ends.low), float(ends.high))


def newcombe_interval(before: Scores, after: Scores, *, level: float = 0.95) -> Interval:
    """Mean of after - before of two 0/1 scores of the same items [N], with Newcombe's interval.

    Built from Wilson's intervals of both means and the correlation of the scores (Newcombe 1998, "Improved confidence
    intervals for the difference between binomial proportions based on paired data", method 10). It has a width where
    no item changed, of which resampling knows nothing.

    Raises:
      ValueError: the lengths differ, there is no item, a score is neither 0 nor 1, or `level` is out of range.
    """
    before, after = _binary("before", before), _binary("after", after)
    _require_same_length(before, after)
    both, neither = int(np.sum(after & before)), int(np.sum(~after & ~before))
    gained, lost = int(np.sum(after & ~before)), int(np.sum(before & ~after))
    own, other = (wilson_interval(int(scores.sum()), len(scores), level=level) for scores in (after, before))
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    excess = both * neither - gained * lost
    excess = max(excess - len(before) / 2, 0) if excess > 0 else excess
    correlation = excess / math.sqrt(margins) if margins else 0.0

    def arm(one: float, another: float) -> float:
        return float(np.sqrt(max(one**2 - 2 * correlation * one * another + another**2, 0.0)))

    difference = own.mean - other.mean
    low = difference - arm(own.mean - own.low, other.high - other.mean)
    return Interval(difference, low, difference + arm(other.mean - other.low, own.high - own.mean))


def student_interval(values: Scores, *, level: float = 0.95) -> Interval:
    """Mean of `values` [N] with Student's interval, for a few numbers such as one per seed; nan for the ends of one.

    Raises:
      ValueError: no value, a value that is not finite, or `level` is out of range.
    """
    values = _scores("values", values)
    _require_level(level)
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, float("nan"), float("nan"))
    arm = float(scipy.stats.t.ppf((1 + level) / 2, count - 1) * scipy.stats.sem(values))
    return Interval(mean, mean - arm, mean + arm)


def mcnemar(before: Scores, after: Scores) -> McNemar:
    """McNemar's exact two-sided test of whether two 0/1 scores of the same items [N] differ in their mean.

    Only items on which the two disagree count: without a difference, each is a fair coin. The p-value is 1 when there
    is none.

    Raises:
      ValueError: the lengths differ, there is no item, or a score is neither 0 nor 1.
    """
    before, after = _binary("before", before), _binary("after", after)
    _require_same_length(before, after)
    gained, lost = int(np.sum(after & ~before)), int(np.sum(before & ~after))
    p_value = float(scipy.stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return McNemar(gained, lost, p_value)


def minimum_detectable_difference(items: int, discordant: float, *, level: float = 0.95, power: float = 0.8) -> float:
    """Smallest difference of two accuracies on the same items that a two-sided McNemar test finds with `power`.

    The d that solves sqrt(n)·d = z(1 - (1 - level) / 2)·sqrt(p) + z(power)·sqrt(p - d²), with n items and p the share
    of them on which the two disagree (Connor 1987, "Sample size for testing differences in proportions for the
    paired-sample design"). A difference of d needs a disagreement of at least d, so p is `discordant` or d, whichever
    is larger: a result above `discordant` could only be reached with more disagreement. 1.0 where nothing is found.

    Args:
      items: n, at least 1.
      discordant: share of the items that one side solves and the other does not, in [0, 1].
      level: 1 - the test's significance level.
      power: chance of finding the difference, at least 0.5 and below 1.

    Raises:
      ValueError: an argument is out of range.
    """
    if items < 1:
        raise ValueError(f"items is {items}: expected at least 1")
    if not 0.0 <= discordant <= 1.0:
        raise ValueError(f"discordant is {discordant}: expected a share from 0 to 1")
    if not 0.5 <= power < 1.0:
        raise ValueError(f"power is {power}: expected at least 0.5 and below 1, such as 0.8")
    _require_level(level)
    z_level, z_power = scipy.stats.norm.ppf([(1.0 + level) / 2.0, power])

    def excess(difference: float) -> float:
        """The equation divided by sqrt(p), left side minus right side: grows with the difference."""
        share = difference / np.sqrt(max(discordant, difference)) if difference else 0.0
        return np.sqrt(items) * share - z_level - z_power * np.sqrt(max(1.0 - share**2, 0.0))

    return float(scipy.optimize.brentq(excess, 0.0, 1.0)) if excess(1.0) > 0.0 else 1.0


def pass_at_k(successes: Int[np.ndarray, " N"], samples: int, k: int) -> Float[np.ndarray, " N"]:
    """Chance [N] that one of k replies is right, estimated without bias from `samples` replies per item.

    1 - C(n - c, k) / C(n, k) with n replies of which c are right (Chen et al. 2021, "Evaluating large language models
    trained on code"): k of the n are drawn without replacement.

    Raises:
      ValueError: k is not between 1 and `samples`, or a number of successes is no whole number from 0 to `samples`.
    """
    successes = np.asarray(successes)
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}: expected 1 to {samples}, the replies per item")
    if successes.ndim != 1 or not np.issubdtype(successes.dtype, np.integer):
        raise ValueError(f"successes is {successes.dtype} {successes.shape}: expected whole numbers, one per item, [N]")
    bad = np.flatnonzero((successes < 0) | (successes > samples))
    if len(bad):
        raise ValueError(f"successes[{bad[0]}] is {successes[bad[0]]}: expected 0 to {samples}, the replies per item")
    found = scipy.stats.hypergeom.sf(0, samples, successes, k)
    # Certain where it is certain: rounding leaves 1e-16 of the rest.
    return np.where(successes == 0, 0.0, np.where(samples - successes < k, 1.0, found))


def _bootstrap(
    after: Float[np.ndarray, "S2 N"],
    before: Float[np.ndarray, "S1 N"] | None = None,
    *,
    seed: int,
    samples: int,
    level: float,
) -> Interval:
    """Percentile interval of the mean of after, or of after - before; seeds and items are drawn with replacement."""
    if samples < 1:
        raise ValueError(f"samples is {samples}: expected at least 1")
    _require_level(level)
    count = after.shape[1]
    before = np.zeros((1, count)) if before is None else before
    # Seeds have a stream of their own, so that the interval does not depend on the size of a block.
    item_random, seed_random = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    block, means = max(1, _BLOCK // count), []
    for start in range(0, samples, block):
        rows = min(block, samples - start)
        values = _drawn_seeds(after, rows, seed_random) - _drawn_seeds(before, rows, seed_random)
        items = item_random.integers(count, size=(rows, count))
        means.append(np.take_along_axis(values, items, axis=1).mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    mean = (after.mean(axis=0) - before.mean(axis=0)).mean()
    return Interval(float(mean), float(low), float(high))


def _drawn_seeds(scores: Float[np.ndarray, "S N"], rows: int, random: np.random.Generator) -> Float[np.ndarray, "R N"]:
    """Per row, the item means over as many seeds as there are, drawn with replacement."""
    seeds = len(scores)
    if seeds == 1:
        return np.broadcast_to(scores, (rows, scores.shape[1]))
    return random.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=rows) / seeds @ scores


def _require_same_length(before: Scores, after: Scores) -> None:
    if len(before) != len(after):
        raise ValueError(f"before has {len(before)} scores and after has {len(after)}: expected the same items in both")


def _require_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}: expected a share between 0 and 1, such as 0.95")


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


def _binary(name: str, values: Scores) -> Bool[np.ndarray, " N"]:
    values = _scores(name, values)
    bad = np.flatnonzero((values != 0.0) & (values != 1.0))
    if len(bad):
        raise ValueError(f"{name}[{bad[0]}] is {values[bad[0]]}: McNemar's test is of scores that are 0 or 1")
    return values == 1.0


def _seed_scores(name: str, values: SeedScores) -> Float[np.ndarray, "S N"]:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"{name} has shape {values.shape}: expected at least one seed's scores per item, [S, N]")
    return np.stack([_scores(f"{name}[{number}]", row) for number, row in enumerate(values)])
