"""Intervals and tests: their properties on any input, their error rates on data that are known, and bad input."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisd_jax.eval.statistics import (
    Interval,
    McNemar,
    mcnemar,
    mean_interval,
    minimum_detectable_difference,
    newcombe_interval,
    paired_bootstrap,
    paired_seeds_interval,
    pass_at_k,
    ratio_interval,
    seeds_interval,
    student_interval,
    wilson_interval,
)

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


# --- several seeds ---

tables = st.integers(1, 4).flatmap(
    lambda seeds: st.lists(st.lists(scores, min_size=seeds, max_size=seeds), min_size=1, max_size=20)
).map(lambda rows: np.array(rows).T)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(tables, st.integers(0, 3))
def test_seeds_interval_lies_between_the_extreme_scores_and_is_mean_interval_with_one_seed(table, seed):
    interval = seeds_interval(table, samples=200, seed=seed)
    assert interval.mean == pytest.approx(table.mean(), abs=1e-9)
    assert table.min() - 1e-9 <= interval.low <= interval.high <= table.max() + 1e-9
    assert seeds_interval(table[:1], samples=200, seed=seed) == mean_interval(table[0], samples=200, seed=seed)


@settings(max_examples=40, deadline=None)
@given(tables, scores)
def test_paired_seeds_interval_is_the_paired_bootstrap_with_one_seed_and_shifts(table, shift):
    before, after = table[:1], table[-1:]
    expected = paired_bootstrap(before[0], after[0], samples=200)
    assert paired_seeds_interval(before, after, samples=200) == expected
    plain = paired_seeds_interval(table, table[:1], samples=200)
    shifted = paired_seeds_interval(table, table[:1] + shift, samples=200)
    assert np.allclose(shifted, np.add(plain, shift), atol=1e-9)


def seed_table(random, *, seeds=5, items=100, between_seeds=0.0, between_items=1.0) -> np.ndarray:
    """Scores [S, N] of mean 0: an effect of the seed, one of the item, and none of the two together."""
    return between_seeds * random.normal(size=(seeds, 1)) + between_items * random.normal(size=(1, items))


def width(interval: Interval) -> float:
    return interval.high - interval.low


def test_seeds_that_differ_widen_the_interval_and_seeds_that_agree_do_not():
    random = np.random.default_rng(0)
    agree, differ = (seed_table(random, between_seeds=sigma) for sigma in (0.0, 1.0))
    assert width(seeds_interval(agree)) == pytest.approx(width(mean_interval(agree[0])), rel=0.05)
    assert width(seeds_interval(differ)) > 2 * width(mean_interval(differ.mean(axis=0)))


def test_items_are_shared_by_all_seeds_and_both_sides():
    table = seed_table(np.random.default_rng(1), between_items=50.0)
    # What makes an item easy is in every seed: more seeds do not make it smaller, as more items would.
    assert width(seeds_interval(table)) == pytest.approx(width(mean_interval(table[0])), rel=0.05)
    assert paired_seeds_interval(table[:2], table + 1) == pytest.approx(Interval(1.0, 1.0, 1.0))


def test_seeds_are_drawn_on_each_side_by_itself():
    # Seeds with the same number share nothing: if they were drawn in pairs, the difference would be exactly 1.
    table = seed_table(np.random.default_rng(2), between_seeds=3.0, between_items=0.0)
    both = paired_seeds_interval(table, table + 1)
    assert both.mean == pytest.approx(1.0)
    assert width(both) == pytest.approx(math.sqrt(2) * width(seeds_interval(table)), rel=0.1)


def test_coverage_over_seeds_and_items():
    random, hits = np.random.default_rng(3), 0
    for trial in range(300):
        table = seed_table(random, seeds=12, items=60, between_seeds=0.3)
        _, low, high = seeds_interval(table, samples=400, seed=trial)
        hits += low <= 0.0 <= high
    assert 0.89 <= hits / 300 <= 0.98


def test_blocks_do_not_change_the_interval_over_seeds(monkeypatch):
    table = seed_table(np.random.default_rng(4), seeds=3, items=7, between_seeds=1.0)
    whole = seeds_interval(table, samples=50)
    monkeypatch.setattr("unisd_jax.eval.statistics._BLOCK", 70)
    assert seeds_interval(table, samples=50) == whole


# --- Wilson ---


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_s_ends_solve_its_equation(counts):
    successes, total = counts
    mean, low, high = wilson_interval(successes, total)
    assert mean == successes / total
    assert 0.0 <= low <= mean <= high <= 1.0
    for end in (low, high):  # |share - end| = z · sqrt(end (1 - end) / n)
        assert abs(mean - end) == pytest.approx(1.959964 * math.sqrt(max(end * (1 - end), 0.0) / total), abs=1e-6)


@pytest.mark.parametrize("share", [0.03, 0.2, 0.5, 0.9])
def test_wilson_covers_a_known_share(share):
    total = 80
    chances = [math.comb(total, n) * share**n * (1 - share) ** (total - n) for n in range(total + 1)]
    intervals = [wilson_interval(n, total) for n in range(total + 1)]
    covered = sum(chance for chance, (_, low, high) in zip(chances, intervals, strict=True) if low <= share <= high)
    assert 0.92 <= covered <= 0.985


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "total is 0"),
        ((3, 2), "successes is 3: expected 0 to 2"),
        ((-1, 2), "successes is -1"),
        ((1, 2, 95), "level is 95"),
    ],
)
def test_bad_counts_are_refused(arguments, message):
    successes, total, *level = arguments
    with pytest.raises(ValueError, match=message):
        wilson_interval(successes, total, **({"level": level[0]} if level else {}))


# --- McNemar ---


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_the_two_sided_sign_test_of_the_discordant_pairs(rows):
    before, after = np.array(rows).T
    gained = sum(not old and new for old, new in rows)
    lost = sum(old and not new for old, new in rows)
    discordant = gained + lost
    tail = sum(math.comb(discordant, n) for n in range(min(gained, lost) + 1)) / 2**discordant
    assert mcnemar(before, after) == pytest.approx(McNemar(gained, lost, min(1.0, 2 * tail)))
    assert mcnemar(after, before) == pytest.approx(McNemar(lost, gained, min(1.0, 2 * tail)))


def test_mcnemar_by_hand_and_without_discordant_pairs():
    # Six gained and none lost: both tails of six fair coins, 2 / 64.
    assert mcnemar(np.zeros(9), np.array([1] * 6 + [0] * 3)) == McNemar(6, 0, pytest.approx(0.03125))
    assert mcnemar(np.array([0.0, 1.0]), np.array([0, 1])) == McNemar(0, 0, 1.0)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([0.0, 0.5], [0.0, 1.0], r"before\[1\] is 0.5: McNemar's test is of scores that are 0 or 1"),
        ([0, 1], [2, 1], r"after\[0\] is 2.0: McNemar"),
        ([0, 1], [1], "before has 2 scores and after has 1"),
        ([], [], "before is empty"),
    ],
)
def test_mcnemar_refuses_other_scores(before, after, message):
    with pytest.raises(ValueError, match=message):
        mcnemar(np.array(before), np.array(after))


# --- minimum detectable difference ---


@settings(max_examples=80, deadline=None)
@given(st.integers(10, 5000), st.floats(0.0, 1.0))
def test_detectable_difference_solves_the_equation(items, discordant):
    difference = minimum_detectable_difference(items, discordant)
    assert 0.0 < difference <= 1.0
    share = max(discordant, difference)
    noise = 1.959964 * math.sqrt(share) + 0.841621 * math.sqrt(max(share - difference**2, 0.0))
    assert math.sqrt(items) * difference == pytest.approx(noise, rel=1e-5)
    assert minimum_detectable_difference(4 * items, discordant) < difference
    assert minimum_detectable_difference(items, discordant, power=0.9) > difference
    assert minimum_detectable_difference(items, discordant, level=0.99) > difference


@pytest.mark.parametrize(("items", "discordant"), [(400, 0.3), (1000, 0.2), (2000, 0.05)])
def test_the_detectable_difference_is_found_with_about_the_power_asked_for(items, discordant):
    difference = minimum_detectable_difference(items, discordant)
    chances = [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
    counts = np.random.default_rng(0).multinomial(items, chances, size=1000)
    found = 0
    for gained, lost, _ in counts:
        before = np.repeat([0, 1, 0], [gained, lost, items - gained - lost])
        after = np.repeat([1, 0, 0], [gained, lost, items - gained - lost])
        found += mcnemar(before, after).p_value < 0.05
    assert 0.73 <= found / 1000 <= 0.84  # the exact test is a little weaker than the formula's normal one


def test_without_disagreement_the_smallest_difference_that_could_be_found_is_told():
    # Seven or eight of a hundred items, all gained; six are what the exact test needs at least.
    assert minimum_detectable_difference(100, 0.0) == pytest.approx(0.0767, abs=1e-3)
    assert minimum_detectable_difference(100, 0.01) == minimum_detectable_difference(100, 0.0)
    assert minimum_detectable_difference(3, 0.5) == 1.0  # three items never reach p < 0.05


@pytest.mark.parametrize(
    ("items", "discordant", "options", "message"),
    [
        (0, 0.1, {}, "items is 0"),
        (10, -0.1, {}, "discordant is -0.1"),
        (10, 1.1, {}, "discordant is 1.1"),
        (10, float("nan"), {}, "discordant is nan"),
        (10, 0.1, {"power": 1.0}, "power is 1.0"),
        (10, 0.1, {"power": 0.3}, "power is 0.3"),
        (10, 0.1, {"level": 0.0}, "level is 0.0"),
    ],
)
def test_bad_arguments_of_the_detectable_difference_are_refused(items, discordant, options, message):
    with pytest.raises(ValueError, match=message):
        minimum_detectable_difference(items, discordant, **options)


# --- pass@k ---


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_success(data):
    samples = data.draw(st.integers(1, 8))
    k = data.draw(st.integers(1, samples))
    successes = data.draw(st.lists(st.integers(0, samples), min_size=1, max_size=5))
    expected = []
    for right in successes:
        subsets = list(itertools.combinations([True] * right + [False] * (samples - right), k))
        expected.append(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(np.array(successes), samples, k) == pytest.approx(np.array(expected))


def test_pass_at_k_of_many_samples_is_exact():
    got = pass_at_k(np.array([0, 1, 3, 1000, 2000]), 2000, 100)
    expected = [1 - math.comb(2000 - right, 100) / math.comb(2000, 100) for right in (0, 1, 3, 1000, 2000)]
    assert got == pytest.approx(np.array(expected), rel=1e-9)
    assert got[0] == 0.0 and got[-1] == 1.0


@pytest.mark.parametrize(
    ("successes", "samples", "k", "message"),
    [
        ([1], 4, 5, "k is 5: expected 1 to 4"),
        ([1], 4, 0, "k is 0"),
        ([1, 5], 4, 2, r"successes\[1\] is 5"),
        ([-1], 4, 2, r"successes\[0\] is -1"),
        ([0.5], 4, 2, "expected whole numbers"),
        ([[1]], 4, 2, "expected whole numbers"),
    ],
)
def test_pass_at_k_refuses_impossible_counts(successes, samples, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(np.array(successes), samples, k)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([1.0], [[1.0]], r"before has shape \(1,\)"),
        (np.ones((0, 3)), [[1.0]], r"before has shape \(0, 3\)"),
        ([[1.0]], np.ones((2, 0)), r"after\[0\] is empty"),
        ([[1.0, 1.0]], [[1.0, 1.0], [1.0, np.nan]], r"after\[1\]\[1\] is nan"),
        ([[1.0, 1.0]], [[1.0]], "before has 2 scores per seed and after has 1"),
    ],
)
def test_bad_tables_of_seeds_are_named(before, after, message):
    with pytest.raises(ValueError, match=message):
        paired_seeds_interval(np.array(before), np.array(after))


# --- ratios ---

counted = st.lists(st.tuples(scores, st.integers(0, 30)), min_size=1, max_size=30).filter(
    lambda rows: any(count for _, count in rows)
)


@settings(max_examples=40, deadline=None)
@given(counted, st.floats(0.1, 10.0))
def test_ratio_interval_is_pooled_and_scales_with_the_numerators(rows, factor):
    tops, counts = np.array(rows).T
    ratio = ratio_interval(tops, counts, samples=200)
    assert ratio.mean == pytest.approx(tops.sum() / counts.sum(), abs=1e-9)
    assert ratio.low <= ratio.high
    assert np.allclose(ratio_interval(factor * tops, counts, samples=200), np.multiply(factor, ratio), atol=1e-6)


def test_ratio_interval_with_equal_counts_is_the_mean_interval():
    values = np.random.default_rng(5).normal(size=40)
    assert ratio_interval(3.0 * values, np.full(40, 3)) == pytest.approx(mean_interval(values))


@pytest.mark.parametrize(
    ("tops", "counts", "options", "message"),
    [
        ([1.0, 2.0], [1], {}, "2 numerators and 1 denominators"),
        ([1.0], [0], {}, "negative or all 0"),
        ([1.0, 1.0], [3, -1], {}, "negative or all 0"),
        ([np.nan], [1], {}, r"numerators\[0\] is nan"),
        ([1.0], [1], {"samples": 0}, "samples is 0"),
        ([1.0], [1], {"level": 1.0}, "level is 1.0"),
    ],
)
def test_bad_ratios_are_refused(tops, counts, options, message):
    with pytest.raises(ValueError, match=message):
        ratio_interval(np.array(tops), np.array(counts), **options)


# --- Newcombe's interval of paired proportions ---


def scores_of(both, lost, gained, neither):
    """(before, after) with so many items of each kind."""
    kinds = [(1, 1)] * both + [(1, 0)] * lost + [(0, 1)] * gained + [(0, 0)] * neither
    return np.array(kinds).T


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        # Newcombe 1998, table II, method 10, for the difference of the first less the second.
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((20, 12, 2, 16), 0.0562, 0.3292),
        ((0, 12, 2, 36), 0.0569, 0.3404),
    ],
)
def test_newcombe_s_interval_is_that_of_his_table(table, low, high):
    before, after = scores_of(*table)
    found = newcombe_interval(before, after)
    assert (-found.high, -found.low) == pytest.approx((low, high), abs=6e-4)
    assert found.mean == pytest.approx((table[2] - table[1]) / sum(table))


def test_newcombe_s_interval_of_very_many_items():
    exact = np.arange(300_000) % 2
    assert newcombe_interval(exact, exact).high < 0.01


def test_newcombe_s_interval_covers_a_known_difference():
    random, hits = np.random.default_rng(0), 0
    for _ in range(400):
        kinds = random.choice(4, size=80, p=[0.5, 0.1, 0.2, 0.2])
        found = newcombe_interval(np.isin(kinds, (0, 1)), np.isin(kinds, (0, 2)))
        hits += found.low <= 0.1 <= found.high
    assert 0.92 <= hits / 400 <= 0.99


def test_student_s_interval_of_a_few_numbers():
    found = student_interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high - found.mean == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4)
    assert found.high - found.mean == pytest.approx(found.mean - found.low)
    assert np.isnan(student_interval([1.0]).low) and student_interval([1.0]).mean == 1.0
    assert student_interval([4.0, 4.0]) == Interval(4.0, 4.0, 4.0)
    with pytest.raises(ValueError, match="expected finite"):
        student_interval([1.0, math.inf])
