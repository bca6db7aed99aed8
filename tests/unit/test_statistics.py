"""The bootstrap: its properties on any input, its coverage on data whose mean is known, and bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisd_jax.eval.statistics import Interval, mean_interval, paired_bootstrap

scores = st.floats(-100, 100).map(lambda value: round(value, 3))
pairs = st.lists(st.tuples(scores, scores), min_size=1, max_size=40).map(lambda rows: np.array(rows).T)


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_interval_lies_between_the_extreme_differences_and_orders(both):
    before, after = both
    interval = paired_bootstrap(before, after, samples=200)
    difference = after - before
    assert interval.mean == pytest.approx(difference.mean(), abs=1e-9)
    assert difference.min() - 1e-9 <= interval.low <= interval.high <= difference.max() + 1e-9


@settings(max_examples=40, deadline=None)
@given(pairs, scores)
def test_shifting_after_shifts_the_interval_and_swapping_mirrors_it(both, shift):
    before, after = both
    plain = paired_bootstrap(before, after, samples=200)
    shifted = paired_bootstrap(before, after + shift, samples=200)
    assert np.allclose(shifted, np.add(plain, shift), atol=1e-9)
    swapped = paired_bootstrap(after, before, samples=200)
    assert np.allclose(swapped, (-plain.mean, -plain.high, -plain.low), atol=1e-9)


def test_same_seed_same_interval_other_seed_another():
    values = np.random.default_rng(1).normal(size=50)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_pairing_removes_what_both_share():
    # Items differ wildly but each gains exactly 1: an unpaired bootstrap would give a wide interval.
    before = np.linspace(-50, 50, 30)
    assert paired_bootstrap(before, before + 1) == pytest.approx(Interval(1.0, 1.0, 1.0))


def test_booleans_and_integers_count_as_scores():
    interval = paired_bootstrap(np.array([False, False, True, False]), np.array([1, 1, 1, 0]))
    assert interval.mean == 0.5
    assert 0.0 <= interval.low < interval.mean < interval.high <= 1.0


def test_coverage_of_a_known_mean():
    random = np.random.default_rng(0)
    hits = sum(
        low <= 0.4 <= high
        for _, low, high in (mean_interval(random.binomial(1, 0.4, size=120), samples=500, seed=i) for i in range(300))
    )
    assert 0.91 <= hits / 300 <= 0.98


def test_higher_level_is_wider_and_more_items_narrower():
    values = np.random.default_rng(2).normal(size=400)
    width = {level: np.ptp(mean_interval(values, level=level)[1:]) for level in (0.5, 0.95, 0.99)}
    assert width[0.5] < width[0.95] < width[0.99]
    assert width[0.95] < np.ptp(mean_interval(values[:40])[1:])
    assert width[0.95] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


def test_blocks_of_resampled_indices_add_up_to_the_samples_asked_for(monkeypatch):
    values = np.arange(7.0)
    whole = mean_interval(values, samples=50)
    monkeypatch.setattr("unisd_jax.eval.statistics._BLOCK", 70)  # ten samples a block, the last one full as well
    in_blocks = mean_interval(values, samples=50)
    assert in_blocks == whole
    monkeypatch.setattr("unisd_jax.eval.statistics._BLOCK", 1)  # fewer indices than items: still one sample a block
    assert mean_interval(values, samples=50).mean == whole.mean


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([1.0, 2.0], [1.0], "before has 2 scores and after has 1"),
        ([], [], "before is empty"),
        ([1.0, np.nan], [1.0, 1.0], r"before\[1\] is nan"),
        ([1.0, 1.0], [np.inf, 1.0], r"after\[0\] is inf"),
        ([[1.0]], [[1.0]], r"before has shape \(1, 1\)"),
    ],
)
def test_bad_scores_are_named(before, after, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(np.array(before), np.array(after))


@pytest.mark.parametrize("options", [{"samples": 0}, {"level": 0.0}, {"level": 1.0}, {"level": 95}])
def test_bad_options_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is"):
        mean_interval(np.ones(3), **options)
