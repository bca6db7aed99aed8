"""From grades to numbers: which interval, which denominator, what is counted and what is averaged."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisd_jax.data.tasks.base import Item, Task
from unisd_jax.errors import UserError
from unisd_jax.eval import retention, summary
from unisd_jax.eval.grading import counts, grade_all, means
from unisd_jax.eval.statistics import Interval, wilson_interval


def grades(*exact, **more):
    rows = enumerate(exact)
    return [{"exact": float(value)} | {name: values[at] for name, values in more.items()} for at, value in rows]


def test_right_or_wrong_has_wilson_s_interval_and_fractions_the_bootstrap_s():
    found = summary.estimate(np.array([1, 0, 0, 1, 1.0]))
    assert found == wilson_interval(3, 5)._asdict() | {"interval": "wilson"}
    found = summary.estimate(np.array([0.5, 0, 1, 0.25]))
    assert found["interval"] == "bootstrap" and found["low"] < found["mean"] == 0.4375 < found["high"]


def test_strings_are_counted_and_numbers_averaged():
    some = grades(1, 0, 0, outcome=["pass", "timeout", "timeout"])
    assert means(some) == {"exact": pytest.approx(1 / 3)}
    assert counts(some) == {"outcome": {"timeout": 2, "pass": 1}}
    found = summary.graded(some, 1)
    assert set(found["metrics"]) == {"exact"} and found["counts"] == {"outcome": {"timeout": 2, "pass": 1}}
    assert "pass_at_k" not in found


def test_samples_are_averaged_per_item_before_anything_else():
    scores = summary.item_scores(grades(1, 0, 1, 1, 0, 0), 2)
    assert scores["exact"].tolist() == [0.5, 1.0, 0.0]
    found = summary.graded(grades(1, 0, 1, 1, 0, 0), 2)
    assert {k: value["mean"] for k, value in found["pass_at_k"].items()} == {"1": 0.5, "2": pytest.approx(2 / 3)}
    assert found["metrics"]["exact"]["mean"] == found["pass_at_k"]["1"]["mean"] == 0.5


def test_retries_replace_only_what_was_sampled_again():
    first = grades(1, 0, 0, form=[1.0, 0.0, 0.0])
    again = {1: {"exact": 1.0, "form": 1.0}, 2: {"exact": 0.0, "form": 0.0}}
    assert summary.with_retries(first, again, 1)["exact"]["mean"] == pytest.approx(2 / 3)
    assert summary.with_retries(first, {}, 1) == summary.graded(first, 1)["metrics"]


def test_subjects_are_the_items_own_and_absent_where_the_data_name_none():
    items = [Item(str(n), "p", "c", "a", details={"subject": name}) for n, name in enumerate(("b", "a", "b", ""))]
    found = summary.subjects(items, np.array([1, 0, 0, 1.0]))
    assert list(found) == ["a", "b"] and found["b"]["items"] == 2 and found["b"]["exact"]["mean"] == 0.5
    assert summary.subjects([Item("1", "p", "c", "a")], np.array([1.0])) == {}


def test_the_likeliest_option_and_the_probability_of_all_right_ones():
    def options(item):
        return ["A", "B", "C"]

    task = Task("t", None, lambda text, item: {"exact": float(text in item.answer)}, options=options)
    items = [Item("1", "p", "c", "A"), Item("2", "p", "c", "BC")]  # the second has two options with the right text
    logps = [[math.log(0.2), math.log(0.1), math.log(0.1)], [-800.0, -801.0, -800.0 + math.log(0.5)]]
    found = summary.option_scores(task, items, logps)
    assert found["exact"].tolist() == [1, 0]
    expected = [0.5, (math.exp(-1) + 0.5) / (1.5 + math.exp(-1))]
    assert found["probability_of_right"] == pytest.approx(expected)


def test_a_gain_has_an_interval_a_test_and_what_could_have_been_found():
    before, after = np.array([0, 0, 1, 0, 1.0]), np.array([1, 1, 1, 0, 0.0])
    found = summary.gain(before, after)
    assert found["mean"] == pytest.approx(0.2) and found["low"] <= 0.2 <= found["high"]
    assert (found["mcnemar"]["gained"], found["mcnemar"]["lost"], found["mcnemar"]["p_value"]) == (2, 1, 1.0)
    assert 0 < found["minimum_detectable"] <= 1
    assert set(summary.gain(before / 2, after / 2)) == {"mean", "low", "high", "interval"}, "a test of right and wrong"


def test_no_change_is_no_certainty():
    """Resampling items of which none changed would give an interval without width."""
    for exact in (np.zeros(6), np.ones(6), np.array([1, 0, 0, 1.0])):
        found = summary.gain(exact, exact)
        assert found["low"] < found["mean"] == 0 < found["high"] and found["interval"] == "newcombe"
    for before, after in ((np.zeros(6), np.ones(6)), (np.ones(6), np.zeros(6))):
        found = summary.gain(before, after)
        assert abs(found["mean"]) == 1 and found["high"] - found["low"] > 0.2, "all changed alike"
    assert summary.graded(grades(0, 0, 0, 0), 2)["pass_at_k"]["2"]["high"] > 0.3


def test_what_cannot_be_detected_is_none():
    assert summary.detectable_alone(np.array([1.0, 0.0])) is None
    assert summary.detectable_alone(np.array([0.5] * 100)) is None, "McNemar's test is of right and wrong"
    assert summary.detectable_alone(np.array([1.0, 0.0] * 50)) == pytest.approx(0.195, abs=0.02)


def test_completions_of_one_item_are_drawn_together():
    rows = [{"tokens": 2, "jsd": 1.0}, {"tokens": 1, "jsd": 0.5}, {"tokens": 4, "jsd": 0.0}, {"tokens": 0, "jsd": 0.0}]
    assert summary.by_item(rows, 2) == [{"tokens": 3, "jsd": 1.5}, {"tokens": 4, "jsd": 0.0}]
    rng = np.random.default_rng(0)
    values = rng.normal(size=100)
    rows = [{"tokens": 10, "jsd": 10 * values[item] + rng.normal() / 100} for item in range(100) for _ in range(10)]
    width = {n: np.ptp(retention._pooled(summary.by_item(rows, n), "jsd", 0)[1:]) for n in (1, 10)}
    assert width[10] > 2.5 * width[1], "as wide as that of the items, not of ten times as many"


@pytest.mark.parametrize("exact", [[0.0], [1.0], [1.0] * 7, [0.0] * 7])
def test_all_right_all_wrong_and_one_item_are_numbers_too(exact):
    exact = np.array(exact)
    assert 0 <= summary.estimate(exact)["low"] <= summary.estimate(exact)["high"] <= 1
    assert summary.gain(exact, exact)["mean"] == 0 and 0 < (summary.detectable_alone(exact) or 1) <= 1


values = st.recursive(
    st.floats() | st.integers() | st.text() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(values)
def test_whatever_is_written_is_json(value):
    json.dumps(summary.plain(value), allow_nan=False)


def test_what_is_not_finite_is_null():
    found = summary.plain({"a": Interval(1.0, float("nan"), np.float64("inf")), "b": (np.float32(2), "x")})
    assert found == {"a": {"mean": 1.0, "low": None, "high": None}, "b": [2.0, "x"]}


def test_grading_in_parallel_keeps_the_order():
    items = [Item(str(number), "p", "c", str(number)) for number in range(50)]
    texts = [str(number) if number % 3 else "no" for number in range(50)]

    def grade(text, item):
        return {"exact": float(text == item.answer)}

    (found,) = grade_all([grade], texts, items)
    assert grade_all([grade, grade], texts, items, parallel=True) == [found, found]
    assert [grade["exact"] for grade in found] == [float(n % 3 > 0) for n in range(50)]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"exact": math.nan}, "exact=nan: expected a number or a string"),
        ({"exact": None}, "exact=None: expected a number"),
        ({"exact": [1]}, r"exact=\[1\]"),
        ({"exact": "yes"}, "expected the number 'exact'"),
        ({"form": 1.0}, r"has \['form'\]: expected the number 'exact'"),
        ({"exact": 1.0, "form": 1.0}, "the same names and kinds"),
    ],
)
def test_a_grade_that_is_none_is_told_with_its_item(second, said):
    grades = iter([{"exact": 1.0}, second])
    with pytest.raises(UserError, match=f"of a reply to two has {said}" if "exact=" in said else said):
        grade_all(
            [lambda text, item: next(grades)], ["a", "b"], [Item("one", "p", "c", "a"), Item("two", "p", "c", "a")]
        )


def test_numbers_of_numpy_are_numbers():
    found = grade_all(
        [lambda text, item: {"exact": np.bool_(True), "n": np.int64(2)}], ["a"], [Item("1", "p", "c", "a")]
    )
    assert json.dumps(found) == '[[{"exact": 1.0, "n": 2.0}]]'


# --- Perplexities and distances from sums ---


def sums(tokens, **scores):
    return {"tokens": tokens} | scores


def test_perplexities_are_pooled_over_tokens():
    rows = [sums(1, logp=-2.0), sums(9, logp=-9.0), sums(0, logp=0.0)]
    found = retention.perplexity(rows)
    assert found.mean == pytest.approx(math.exp(11 / 10)) and found.low <= found.mean <= found.high
    assert retention.perplexity([sums(0, logp=0.0)]) is None


def test_the_release_counts_every_completion_alike():
    rows = [
        sums(1, logp_base=-2.0, jsd=0.2), sums(9, logp_base=-9.0, jsd=0.9), sums(0, logp_base=0.0, jsd=0.0),
    ]  # fmt: skip
    found = retention.released(rows, "logp_base")
    assert found["ppl_mean_avg"] == pytest.approx((math.exp(2) + math.exp(1)) / 2)
    assert found["logp_mean_avg"] == pytest.approx(-1.5) and found["logp_mean_std"] == pytest.approx(0.5)
    assert found["jsd_mean_avg"] == pytest.approx(0.15) and found["ppl_mean_median"] == found["ppl_mean_avg"]
    assert (found["num_examples"], found["num_empty_completions"], found["total_tokens"]) == (2, 1, 10)
    assert retention.released([rows[2]], "logp_base")["ppl_mean_avg"] is None


def test_pairs_leave_out_items_of_which_one_reply_is_empty():
    adapted = [
        sums(2, logp_base=-2.0, jsd=0.4, entropy_adapted=2.0),
        sums(1, logp_base=-3.0, jsd=0.1, entropy_adapted=3.0),
        sums(0, logp_base=0, jsd=0, entropy_adapted=0),
    ]
    base = [
        sums(1, logp_adapted=-3.0, jsd=0.1, entropy_base=0.5),
        sums(2, logp_adapted=-2.0, jsd=0.2, entropy_base=1.0),
        sums(1, logp_adapted=-1.0, jsd=0, entropy_base=9.0),
    ]
    found = retention.paired(adapted, base)
    assert found["pairs"] == 2 and found["logp_delta"].mean == pytest.approx(((-1 + 3) + (-3 + 1)) / 2)
    assert found["logp_delta_above_0"] == 0.5 and found["jsd_delta"].mean == pytest.approx((0.1 + 0.0) / 2)
    assert found["entropy_change"].mean == pytest.approx(((1 - 0.5) + (3 - 0.5)) / 2)
    assert retention.paired([adapted[2]], [base[2]]) == {"pairs": 0}


def test_only_the_token_that_ends_a_reply_is_left_out():
    assert retention.without_stop([[5, 2], [2, 5], [2], []], stop_ids=(2,)) == [[5], [2, 5], [], []]
