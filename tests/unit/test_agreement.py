"""Agreement of the auxiliary views: spread, weights, and views that come one after the other."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisd_jax.losses import (
    Agreement,
    Objective,
    TeacherScores,
    TokenScores,
    add_views,
    agreement_weights,
    effective_share,
    mechanism_metrics,
    no_views,
    reduction_weights,
    sequence_agreement,
    sequence_weights,
    spread_disagreement,
    token_agreement,
    token_plan,
    token_weights,
    view_values,
)

STATISTICS = ("var", "range")
LEVELS = ("token", "sequence")
# Two views, completions of 3, 1 and 0 tokens; what stands at masked tokens is never to be seen.
MASK = jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
BAD = [jnp.nan, jnp.inf, -jnp.inf]
VIEWS = jnp.array(
    [
        [[-1.0, -2.0, -3.0], [-4.0, BAD[0], BAD[1]], BAD],
        [[-1.0, -4.0, -7.0], [-4.5, BAD[2], BAD[0]], BAD],
    ]
)
DISAGREEMENT = {
    # Unbiased variance of two numbers a and b: (a − b)²/2.
    ("token", "var"): [[0.0, 2.0, 8.0], [0.125, 0.0, 0.0], [0.0, 0.0, 0.0]],
    ("token", "range"): [[0.0, 2.0, 4.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]],
    # Biased variance of the means (−2, −4) and (−4, −4.5): (a − b)²/4.
    ("sequence", "var"): [1.0, 0.0625, 0.0],
    ("sequence", "range"): [2.0, 0.5, 0.0],
}


def agreement(level, views=VIEWS, mask=MASK, gamma=1.0, **options):
    return (token_agreement if level == "token" else sequence_agreement)(views, mask, gamma=gamma, **options)


def numpy_disagreement(views, mask, statistic, level):
    """The definition in float64."""
    views, mask = np.asarray(views, np.float64), np.asarray(mask)
    if level == "sequence":
        views = np.where(mask, views, 0.0).sum(-1) / np.maximum(mask.sum(-1), 1)
    spread = np.ptp(views, axis=0) if statistic == "range" else np.var(views, axis=0, ddof=int(level == "token"))
    return np.where(mask, spread, 0.0) if level == "token" else spread


@pytest.mark.parametrize(("level", "statistic"), DISAGREEMENT)
def test_disagreement_by_hand(level, statistic):
    _, found = agreement(level, statistic=statistic)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, DISAGREEMENT[level, statistic], atol=1e-6)


def test_token_weights_by_hand():
    """The scale is the median of 0, 2, 8 and 1/8 (1.0625), so 8 becomes 7.53, which the cap brings to 3."""
    weights, _ = token_agreement(VIEWS, MASK, gamma=0.5, statistic="var", quantile=0.5, cap=3.0)
    scaled = np.array([0.0, 2.0 / 1.0625, 3.0, 0.125 / 1.0625])
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(weights)[np.asarray(MASK)], 1 / (1 + 0.5 * scaled), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(weights)[~np.asarray(MASK)], 1.0)


def test_sequence_weights_by_hand():
    weights, _ = sequence_agreement(VIEWS, MASK, gamma=2.0, statistic="range")
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, np.exp([-4.0, -1.0, 0.0]), rtol=1e-6)


def test_weights_have_floors():
    mask = jnp.ones((1, 2), bool)
    weights = token_weights(jnp.array([[0.0, 5.0]]), mask, gamma=1e6, quantile=0.5)
    np.testing.assert_allclose(weights, [[1.0, 0.01]], rtol=1e-6)
    np.testing.assert_allclose(sequence_weights(jnp.array([0.0, 1e6]), gamma=1.0), [1.0, 1e-6], rtol=1e-6)


def test_a_scale_of_zero_does_not_divide():
    """Most tokens without any disagreement: the scale is 1e-6, not 0."""
    disagreement = jnp.array([[0.0, 0.0, 0.0, 2e-6]])
    weights = token_weights(disagreement, jnp.ones((1, 4), bool), gamma=1.0, quantile=0.5)
    np.testing.assert_allclose(weights, [[1.0, 1.0, 1.0, 1 / 3]], rtol=1e-6)


def test_gamma_and_cap_of_zero_weight_everything_by_one():
    np.testing.assert_array_equal(token_weights(jnp.array([[0.0, 3.0]]), MASK[:1, :2], gamma=0.0), 1.0)
    np.testing.assert_array_equal(token_weights(jnp.array([[0.0, 3.0]]), MASK[:1, :2], gamma=5.0, cap=0.0), 1.0)
    np.testing.assert_array_equal(sequence_weights(jnp.array([0.0, 3.0]), gamma=0.0), 1.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_nothing_flows_to_the_views(level, statistic):
    def everything(views):
        weights, disagreement = agreement(level, views, statistic=statistic)
        return weights.sum() + disagreement.sum()

    np.testing.assert_array_equal(jax.grad(everything)(jnp.where(MASK, VIEWS, 0.0)), 0.0)


def test_nothing_flows_through_the_weights():
    disagreement = jnp.array([[0.0, 2.0, 8.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert not np.any(jax.grad(lambda x: token_weights(x, MASK, gamma=1.0).sum())(disagreement))
    assert not np.any(jax.grad(lambda x: sequence_weights(x, gamma=1.0).sum())(disagreement[:, 0]))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_one_view_agrees_with_itself_and_says_so(level, statistic):
    with pytest.warns(UserWarning, match="agreement of a single view is always perfect: all weights are 1"):
        weights, disagreement = agreement(level, VIEWS[:1], statistic=statistic)
    np.testing.assert_array_equal(weights, 1.0)
    np.testing.assert_array_equal(disagreement, 0.0)


@pytest.mark.parametrize("level", LEVELS)
def test_two_views_do_not_warn(level):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agreement(level)


@pytest.mark.parametrize("level", LEVELS)
def test_no_view_at_all(level):
    with pytest.raises(ValueError, match="context_logps holds no view; agreement needs at least two"):
        agreement(level, VIEWS[:0])


def test_arguments_out_of_range():
    zeros = jnp.zeros((3, 3))
    with pytest.raises(ValueError, match="gamma is -1.0; expected a finite number, 0 or more"):
        token_agreement(VIEWS, MASK, gamma=-1.0)
    with pytest.raises(ValueError, match="gamma is -1.0; expected a finite number, 0 or more"):
        sequence_agreement(VIEWS, MASK, gamma=-1.0)
    with pytest.raises(ValueError, match="gamma is inf; expected a finite number"):
        agreement("token", gamma=math.inf)
    with pytest.raises(ValueError, match="gamma is -0.1; expected a finite number, 0 or more"):
        sequence_weights(zeros[0], gamma=-0.1)
    with pytest.raises(ValueError, match="cap is -2.0; expected a finite number, 0 or more"):
        token_weights(zeros, MASK, gamma=1.0, cap=-2.0)
    for quantile in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"quantile is .*; expected a number in \[0, 1\]"):
            token_weights(zeros, MASK, gamma=1.0, quantile=quantile)


@pytest.mark.parametrize("level", LEVELS)
def test_an_unknown_statistic(level, without_shape_hook):
    with pytest.raises(ValueError, match="statistic is 'std'; expected var or range"):
        agreement(level, statistic="std")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_batch_without_tokens_has_weight_one(level, statistic):
    nothing = jnp.zeros((3, 3), bool)
    weights, disagreement = agreement(level, VIEWS, nothing, statistic=statistic)
    np.testing.assert_array_equal(weights, 1.0)
    np.testing.assert_array_equal(disagreement, 0.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_token_that_a_view_rules_out_gives_finite_weights(level, statistic):
    views = jnp.where(MASK, VIEWS, 0.0).at[0, 0, 0].set(-jnp.inf)
    weights, disagreement = agreement(level, views, statistic=statistic)
    assert np.isfinite(weights).all() and np.isfinite(disagreement).all()
    assert 0 < np.min(weights) < 0.5


def test_low_precision_views_are_compared_in_float32():
    for level in LEVELS:
        half = VIEWS.astype(jnp.bfloat16)
        found, expected = agreement(level, half), agreement(level, half.astype(jnp.float32))
        assert all(array.dtype == jnp.float32 for array in found)
        np.testing.assert_array_equal(found[0], expected[0])


# Streaming.

RNG = np.random.default_rng(0)
MANY_MASK = jnp.asarray(RNG.random((4, 6)) < 0.7).at[0].set(True).at[1].set(False)
MANY = jnp.where(MANY_MASK, jnp.asarray(-RNG.exponential(2.0, (6, 4, 6)), jnp.float32), jnp.nan)


def streamed(groups, level, views=MANY, mask=MANY_MASK):
    values = view_values(views, mask, level=level)
    spread = no_views(values.shape[1:])
    for group in groups:
        spread = add_views(spread, values[jnp.array(group)])
    return spread


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize(
    "groups",
    [
        [[0, 1, 2, 3, 4, 5]],
        [[0], [1], [2], [3], [4], [5]],
        [[0, 1], [2, 3, 4], [5]],
        [[5], [3, 0, 1], [4, 2]],
    ],
    ids=["at once", "one by one", "in groups", "in another order"],
)
def test_views_may_come_in_any_grouping_and_order(groups, level, statistic):
    spread = streamed(groups, level)
    assert float(spread.count) == 6 and spread.mean.shape == ((4, 6) if level == "token" else (4,))
    found = spread_disagreement(spread, MANY_MASK, statistic=statistic, level=level)
    assert found.dtype == jnp.float32 and np.isfinite(found).all()
    expected = numpy_disagreement(MANY, MANY_MASK, statistic, level)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)
    _, batched = agreement(level, MANY, MANY_MASK, statistic=statistic)
    np.testing.assert_allclose(found, batched, rtol=2e-6, atol=1e-7)


def test_a_small_spread_far_from_zero_survives():
    """The difference of two large sums of squares would have lost it."""
    views = jnp.asarray(-100 + 0.01 * np.random.default_rng(1).standard_normal((6, 1, 8)), jnp.float32)
    mask = jnp.ones((1, 8), bool)
    spread = streamed([[k] for k in range(6)], "token", views, mask)
    found = spread_disagreement(spread, mask, statistic="var", level="token")
    np.testing.assert_allclose(found, numpy_disagreement(views, mask, "var", "token"), rtol=0.02)


@pytest.mark.parametrize("level", LEVELS)
def test_one_streamed_view_has_no_disagreement(level):
    spread = streamed([[2]], level)
    for statistic in STATISTICS:
        np.testing.assert_array_equal(spread_disagreement(spread, MANY_MASK, statistic=statistic, level=level), 0.0)


def test_values_of_a_view():
    tokens = view_values(VIEWS, MASK, level="token")
    np.testing.assert_array_equal(tokens[1], [[-1.0, -4.0, -7.0], [-4.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    means = view_values(VIEWS, MASK, level="sequence")
    np.testing.assert_allclose(means, [[-2.0, -4.0, 0.0], [-4.0, -4.5, 0.0]])
    assert tokens.dtype == means.dtype == jnp.float32


# In the plan, and what the metrics say.


def test_the_weights_of_the_settings():
    disagreement = jnp.array([[0.0, 2.0, 8.0], [0.125, 0.0, 0.0], [0.0, 0.0, 0.0]])
    settings = Agreement(gamma=0.5, quantile=0.5, cap=3.0)
    found = agreement_weights(disagreement, MASK, settings=settings)
    np.testing.assert_array_equal(found, token_weights(disagreement, MASK, gamma=0.5, quantile=0.5, cap=3.0))
    rows = agreement_weights(jnp.array([1.0, 0.0, 2.0]), MASK, settings=Agreement(level="sequence", gamma=0.5))
    np.testing.assert_allclose(rows, np.exp([[-0.5], [0.0], [-1.0]]) * np.ones(3), rtol=1e-6)


def test_the_plan_reduces_under_the_weights():
    settings = Objective(agreement=Agreement(gamma=0.5, quantile=0.5, cap=3.0))
    disagreement = jnp.array(DISAGREEMENT["token", "var"])
    plan = token_plan(MASK, settings=settings, disagreement=disagreement)
    weights = token_weights(disagreement, MASK, gamma=0.5, quantile=0.5, cap=3.0)
    np.testing.assert_array_equal(plan.weights, weights)
    np.testing.assert_allclose(plan.main, reduction_weights(MASK, weights, normalize="batch"), rtol=1e-6)
    np.testing.assert_allclose(plan.auxiliary, np.asarray(MASK) / 4, rtol=1e-6, err_msg="contrast and matching: none")


def test_effective_share():
    mask = jnp.array([[1, 1, 0], [1, 1, 0]], bool)
    assert float(effective_share(jnp.full((2, 3), 0.3), mask)) == pytest.approx(1.0)
    assert float(effective_share(jnp.array([[1.0, 0.0, 9.0], [0.0, 0.0, 9.0]]), mask)) == pytest.approx(1 / 4)
    assert float(effective_share(jnp.array([[1.0, 0.5, jnp.nan], [0.5, 1.0, 9.0]]), mask)) == pytest.approx(9 / 10)
    assert float(effective_share(jnp.ones((2, 3)), jnp.zeros((2, 3), bool))) == 0.0


def metrics_of(disagreement, settings, mask=MASK):
    plan = token_plan(mask, settings=settings, disagreement=disagreement)
    scores = TokenScores(None, jnp.zeros(mask.shape), jnp.zeros(mask.shape))
    found = mechanism_metrics(scores, TeacherScores(disagreement=disagreement), mask, plan, settings)
    return {name: float(value) for name, value in found.items()}


def test_metrics_of_token_agreement():
    settings = Objective(agreement=Agreement(gamma=0.5, quantile=0.5, cap=3.0))
    weights = 1 / (1 + 0.5 * np.array([0.0, 2.0 / 1.0625, 3.0, 0.125 / 1.0625]))
    assert metrics_of(jnp.array(DISAGREEMENT["token", "var"]), settings) == pytest.approx(
        {
            "agreement_weight": weights.mean(),
            "agreement_weight_min": 0.4,
            "agreement_effective_share": weights.sum() ** 2 / (4 * np.sum(weights**2)),
            "agreement_above_99": 1 / 4,
            "agreement_disagreement": 10.125 / 4,
        },
        rel=1e-5,
    )


def test_metrics_of_sequence_agreement():
    """The weights are means over tokens, the disagreement over completions that have any."""
    settings = Objective(agreement=Agreement(level="sequence", gamma=1.0))
    found = metrics_of(jnp.array([np.log(2.0), 0.0, 0.5], jnp.float32), settings)
    assert found["agreement_weight"] == pytest.approx((3 * 0.5 + 1) / 4, rel=1e-5)
    assert found["agreement_weight_min"] == pytest.approx(0.5, rel=1e-5)
    assert found["agreement_above_99"] == pytest.approx(1 / 4)
    assert found["agreement_effective_share"] == pytest.approx(2.5**2 / (4 * 1.75), rel=1e-5)
    assert found["agreement_disagreement"] == pytest.approx(np.log(2.0) / 2, rel=1e-5)


def test_weights_above_99_hundredths_are_counted():
    """0.995 is, 0.985 is not; the third completion has no tokens."""
    settings = Objective(agreement=Agreement(level="sequence", gamma=1.0))
    found = metrics_of(jnp.asarray(-np.log([0.985, 0.995, 1.0]), jnp.float32), settings)
    assert found["agreement_above_99"] == pytest.approx(1 / 4)


def test_no_agreement_no_metrics():
    assert metrics_of(None, Objective()) == {}
