"""What is said of the runs: a finding is a number with its interval and a predicted side, a claim a list of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from unisd_jax.claims.runs import Finished
from unisd_jax.eval.statistics import Interval, seeds_interval, student_interval

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
Values = Sequence[float] | Float[np.ndarray, " S"]
# [variant][method] -> the finished seeds
Runs = Mapping[str, Mapping[str, Sequence[Finished]]]


class Finding(NamedTuple):
    """Something measured. `predicted` is the side of `null` on which the claim puts it, + or -; "" is told only."""

    what: str
    interval: Interval
    unit: str
    predicted: str = ""
    null: float = 0.0

    @property
    def verdict(self) -> str:
        """Which side the interval is on, if it is on one."""
        if not self.predicted:
            return ""
        mean, low, high = self.interval
        if not np.isfinite([mean, low, high]).all():
            return UNDECIDED
        above, below = low > self.null, high < self.null
        if not above and not below:
            return UNDECIDED
        return HOLDS if above == (self.predicted == "+") else FAILS


class Claim(NamedTuple):
    """A claim of the paper, by its number in our list, and what was found."""

    number: str
    text: str
    findings: list[Finding]
    note: str = ""

    @property
    def verdict(self) -> str:
        """It holds if all that it predicts does, and does not if any part does not."""
        found = {finding.verdict for finding in self.findings} - {""}
        if not found or FAILS in found:
            return FAILS if found else UNDECIDED
        return HOLDS if found == {HOLDS} else UNDECIDED


def resampled(
    statistic: Callable[[Any], float], groups: Sequence[int], *, samples: int = 1000, seed: int = 0
) -> Interval:
    """`statistic(places)` of all places, with its percentile bootstrap interval, drawing whole groups of places.

    `groups` says to which group (an item, with all its tokens) each place belongs. Draws without a value are left out.
    """
    groups = np.asarray(groups)
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.unique(groups[order], return_index=True)[1][1:])
    random = np.random.default_rng(seed)
    drawn = [
        statistic(np.concatenate([members[place] for place in random.integers(len(members), size=len(members))]))
        for _ in range(samples)
    ]
    drawn = [value for value in drawn if np.isfinite(value)]
    ends = np.percentile(drawn, [2.5, 97.5]) if drawn else (float("nan"), float("nan"))
    return Interval(float(statistic(np.arange(len(groups)))), float(ends[0]), float(ends[1]))


def grade_difference(first: Sequence[Finished], second: Sequence[Finished], grade: str = "exact") -> Interval:
    """first - second of a grade after training, in points.

    Seed by seed, which share data order and sampling keys; items and seeds are resampled.
    """
    return _points([one.grade(grade) - other.grade(grade) for one, other in zip(first, second, strict=True)])


def gain(runs: Sequence[Finished], grade: str = "exact") -> Interval:
    """after - before of a grade, in points; items and seeds resampled."""
    return _points([run.grade(grade) - run.grade(grade, at="before") for run in runs])


def difference_of_differences(here: Sequence[Sequence[Finished]], there: Sequence[Sequence[Finished]]) -> Interval:
    """(here[0] - here[1]) - (there[0] - there[1]) of exact match after training, in points, as `grade_difference`."""
    sides = zip(*here, *there, strict=True)
    return _points(
        [(a.grade("exact") - b.grade("exact")) - (c.grade("exact") - d.grade("exact")) for a, b, c, d in sides]
    )


def _points(scores: Sequence[Float[np.ndarray, " N"]]) -> Interval:
    return Interval(*(100 * end for end in seeds_interval(np.stack(scores))))


def fit(run: Finished) -> float:
    """log PPL_fit: minus the mean log-prob per token of the gold replies, after training."""
    return -run.after["means"]["gold_logprob"]


def fit_before(run: Finished) -> float:
    """log PPL_fit before training."""
    return -run.before["means"]["gold_logprob"]


def drift(run: Finished) -> float:
    """Mean token JSD from the base on unrelated prompts, nats."""
    return run.result.details["drift"]


def seed_difference(
    first: Sequence[Finished], second: Sequence[Finished], value: Callable[[Finished], float]
) -> Interval:
    """first - second, seed by seed (they share data order and sampling keys), with Student's interval."""
    return student_interval([value(one) - value(other) for one, other in zip(first, second, strict=True)])


def time_ratio(first: Values, second: Values) -> Interval:
    """Seconds of an update, first / second: of the logarithms, round by round, with Student's interval."""
    return Interval(*np.exp(student_interval(np.log(first) - np.log(second))).tolist())


def run_means(runs: Sequence[Finished], metric: str) -> Interval:
    """A metric's mean over the steps, with Student's interval over the seeds."""
    return student_interval([float(np.mean(run.metric(metric))) for run in runs])
