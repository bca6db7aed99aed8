"""Means over seeds with their intervals, each with how many seeds and items it is of and what was resampled."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy

from unisd_jax.eval.statistics import (
    Interval,
    paired_seeds_interval,
    seeds_interval,
    student_interval,
    wilson_interval,
)
from unisd_jax.eval.summary import estimate, gain
from unisd_jax.overview.measurements import Ends, Measurement

# What an interval allows to be otherwise: other seeds and other items, other items only, other seeds only.
BOTH, ITEMS, SEEDS, NOTHING = "s+i", "i", "s", "none"
_GRADE = {"exact": "exact", "released": "released_exact", "gain": "exact", "released_gain": "released_exact"}
_DRAWN = 2_000_000  # item draws of one bootstrap: 10,000 resampled sets of 200 items, fewer of more


class Estimate(NamedTuple):
    """A mean over seeds; the ends are None where an interval could not be computed, items 0 where not known."""

    mean: float
    low: float | None
    high: float | None
    seeds: int
    items: int
    over: str


def over_seeds(found: Sequence[Measurement], name: str) -> Estimate | None:
    """The mean of a value over the seeds that have it, None where none has.

    With grades of the same items, seeds and items are resampled together. Without, several seeds have Student's
    interval, which knows the seeds but not the items, and one seed the interval that was stored with it.
    """
    there = [measurement for measurement in found if name in measurement.values or _graded(measurement, name)]
    if not there:
        return None
    column = there[0].column
    # The drift at the end of training is on prompts whose number is not stored.
    size = len(there), 0 if name == "drift" and column.source == "training" else column.items
    stored = len(there) == 1 and name in there[0].values and there[0].values[name].low is not None
    if not stored and all(_graded(measurement, name) for measurement in there) and _same_items(there):
        interval, over = _resampled(there, name)
        # Where nothing varies there is nothing to resample: a width of 0 would be certainty.
        found, over = (Ends(interval.mean), NOTHING) if interval.low == interval.high else (interval, over)
        return Estimate(*found, *size, over)
    there = [measurement for measurement in there if name in measurement.values]
    values = [measurement.values[name] for measurement in there]
    size = len(there), size[1]
    if len(values) == 1:
        one = _wilson(values[0], size[1]) if name in ("exact", "released") else values[0]
        return Estimate(*one, *size, NOTHING if one.low is None else ITEMS)
    if not values:
        return None
    found = _student([value.mean for value in values])
    return Estimate(*found, *size, NOTHING if found.low is None else SEEDS)


def difference(found: Sequence[Measurement], other: Sequence[Measurement], name: str) -> Ends | None:
    """How much more `found` has than `other`, None where no interval can be had."""
    both = [*found, *other]
    if not both or not found or not other:
        return None
    if all(_graded(measurement, name) for measurement in both) and _same_items(both):
        before, after = _grades(other, name), _grades(found, name)
        return Ends(*paired_seeds_interval(before, after, samples=_samples(before)))
    sides = [[one.values[name].mean for one in side if name in one.values] for side in (found, other)]
    if min(map(len, sides)) < 2:
        return None
    mean = float(np.mean(sides[0]) - np.mean(sides[1]))
    if np.ptp(sides[0]) == np.ptp(sides[1]) == 0:
        return None
    interval = scipy.stats.ttest_ind(*sides, equal_var=False).confidence_interval(0.95)
    return Ends(mean, float(interval.low), float(interval.high))


def _resampled(found: Sequence[Measurement], name: str) -> tuple[Interval, str]:
    own = _grades(found, name)
    if "gain" in name:
        base = np.unique([measurement.base[_GRADE[name]] for measurement in found], axis=0)
        if len(own) == len(base) == 1:
            return _ends(gain(base[0], own[0])), ITEMS
        return paired_seeds_interval(base, own, samples=_samples(own)), BOTH
    if len(own) == 1:
        return _ends(estimate(own[0])), ITEMS
    return seeds_interval(own, samples=_samples(own)), BOTH


def _ends(found: dict) -> Interval:
    return Interval(*(found[end] for end in Interval._fields))


def _grades(found: Sequence[Measurement], name: str) -> np.ndarray:
    return np.stack([measurement.own[_GRADE[name]] for measurement in found])


def _graded(measurement: Measurement, name: str) -> bool:
    grade = _GRADE.get(name)
    return grade in measurement.own and ("gain" not in name or grade in measurement.base)


def _same_items(found: Sequence[Measurement]) -> bool:
    return all(measurement.items == found[0].items for measurement in found)


def _samples(grades: np.ndarray) -> int:
    return int(np.clip(_DRAWN // grades.shape[1], 1000, 10_000))


def _student(values: Sequence[float]) -> Ends:
    """Student's interval; none where all seeds came to the same, which says nothing about how far others may differ."""
    found = student_interval(values)
    return Ends(found.mean) if np.ptp(values) == 0 else Ends(*found)


def _wilson(share: Ends, items: int) -> Ends:
    """The stored interval of a share; Wilson's where none is stored and the share is one of items right or wrong."""
    right = share.mean * items
    if share.low is None and items and 0 <= right <= items and abs(right - round(right)) < 1e-6:
        return Ends(*wilson_interval(round(right), items))
    return share
