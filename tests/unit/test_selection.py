"""Which tokens count and how much: clip, entropy mask, importance weights, and the plan that joins them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisd_jax.losses import (
    Agreement,
    Objective,
    TeacherScores,
    TokenScores,
    clip_divergence,
    entropy_mask,
    importance_weights,
    largest_divergence,
    loss_mask,
    masked_mean,
    masked_quantile,
    mechanism_metrics,
    needs_scores_first,
    objective,
    quantile_ceiling,
    token_plan,
)

MASK = jnp.array([[1, 1, 1], [1, 1, 0]], bool)
NOTHING = jnp.zeros((2, 3), bool)
# The tokens of the mask hold 1, 2, 3, 4, 5.
VALUES = jnp.array([[3.0, 1.0, 5.0], [2.0, 4.0, jnp.nan]])


# Clip.


def clipped_gradient(values, mask, **options):
    return jax.grad(lambda x: jnp.where(mask, clip_divergence(x, mask, **options), 0.0).sum())(values)


def test_static_clip_by_hand():
    found = clip_divergence(VALUES, MASK, ceiling=2.5)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(found)[np.asarray(MASK)], [2.5, 1.0, 2.5, 2.0, 2.5])


def test_the_clip_passes_the_whole_gradient_up_to_the_ceiling():
    """At a tie with the ceiling the gradient is 1, not the 1/2 of a minimum."""
    np.testing.assert_array_equal(clipped_gradient(VALUES, MASK, ceiling=3.0), [[1, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(clipped_gradient(VALUES, MASK, quantile=0.5), [[1, 1, 0], [1, 0, 0]])


def test_the_quantile_clip_by_hand():
    """Of 1 … 5 the 0.6 quantile is 3.4; it is a constant for the gradient."""
    found = clip_divergence(VALUES, MASK, quantile=0.6)
    np.testing.assert_allclose(np.asarray(found)[np.asarray(MASK)], [3.0, 1.0, 3.4, 2.0, 3.4], rtol=1e-6)
    np.testing.assert_array_equal(clipped_gradient(VALUES, MASK, quantile=0.6), [[1, 1, 0], [1, 0, 0]])
    ceiling = quantile_ceiling(VALUES, MASK, 0.6)
    assert ceiling.dtype == jnp.float32 and ceiling.shape == () and float(ceiling) == pytest.approx(3.4)


def test_without_ceiling_nothing_is_clipped():
    np.testing.assert_array_equal(clip_divergence(VALUES, MASK), VALUES)
    highest = clip_divergence(VALUES, MASK, quantile=1.0)
    np.testing.assert_array_equal(np.asarray(highest)[np.asarray(MASK)], np.asarray(VALUES)[np.asarray(MASK)])


def test_the_quantile_of_nothing_clips_nothing():
    assert float(quantile_ceiling(VALUES, NOTHING, 0.5)) == math.inf
    found = clip_divergence(jnp.ones((2, 3)), NOTHING, quantile=0.5)
    np.testing.assert_array_equal(found, 1.0)


def test_the_quantile_ceiling_is_never_zero():
    assert float(quantile_ceiling(jnp.zeros((2, 3)), MASK, 0.9)) == pytest.approx(1e-6)


def test_clip_arguments_out_of_range():
    with pytest.raises(ValueError, match="ceiling is 1.0 and quantile is 0.5; expected at most one of them"):
        clip_divergence(VALUES, MASK, ceiling=1.0, quantile=0.5)
    for ceiling in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="ceiling is .*; expected a positive number of nats"):
            clip_divergence(VALUES, MASK, ceiling=ceiling)
    for quantile in (0.0, 1.01, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"quantile is .*; expected a number in \(0, 1\]"):
            clip_divergence(VALUES, MASK, quantile=quantile)
        with pytest.raises(ValueError, match=r"quantile is .*; expected a number in \(0, 1\]"):
            quantile_ceiling(VALUES, MASK, quantile)


def test_largest_divergence():
    assert largest_divergence(0.5) == pytest.approx(math.log(2))
    assert largest_divergence(0.1) == pytest.approx(largest_divergence(0.9)) == pytest.approx(0.3250830)
    assert largest_divergence(0.0) == largest_divergence(1.0) == math.inf
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"alpha is .*; expected a number in \[0, 1\]"):
            largest_divergence(alpha)


# Means and quantiles.


@pytest.mark.parametrize("quantile", [0.0, 0.05, 0.25, 0.5, 0.8, 0.95, 1.0])
def test_masked_quantile_is_that_of_numpy(quantile):
    rng = np.random.default_rng(3)
    values, mask = rng.standard_normal((4, 6)).astype(np.float32), rng.random((4, 6)) < 0.6
    found = masked_quantile(jnp.where(mask, values, jnp.nan), jnp.asarray(mask), quantile)
    assert found.dtype == jnp.float32
    assert float(found) == pytest.approx(np.quantile(values[mask], quantile), rel=1e-5, abs=1e-6)


def test_masked_quantile_of_low_precision_values_and_of_none():
    assert float(masked_quantile(VALUES.astype(jnp.bfloat16), MASK, 0.3)) == pytest.approx(2.2, rel=1e-6)
    assert np.isnan(masked_quantile(VALUES, NOTHING, 0.5))


def test_masked_mean():
    assert float(masked_mean(VALUES, MASK)) == 3.0
    assert float(masked_mean(VALUES, NOTHING)) == 0.0
    assert float(masked_mean(VALUES > 3.5, MASK)) == pytest.approx(0.4)


def test_loss_mask_skips_the_first_tokens():
    np.testing.assert_array_equal(loss_mask(MASK, 0), MASK)
    np.testing.assert_array_equal(loss_mask(MASK, 1), [[0, 1, 1], [0, 1, 0]])
    np.testing.assert_array_equal(loss_mask(MASK, 5), NOTHING)


# Entropy mask.


@pytest.mark.parametrize(
    ("top", "chosen"), [(1.0, [1, 2, 3, 4, 5]), (0.8, [2, 3, 4, 5]), (0.5, [3, 4, 5]), (0.2, [5]), (1e-6, [5])]
)
def test_entropy_mask_by_hand(top, chosen):
    found = entropy_mask(VALUES, MASK, top=top)
    assert found.dtype == bool
    assert sorted(np.asarray(VALUES)[np.asarray(found)]) == chosen


def test_entropies_that_tie_with_the_threshold_are_kept():
    ties = jnp.array([[2.0, 2.0, 1.0], [2.0, 3.0, 9.0]])
    np.testing.assert_array_equal(entropy_mask(ties, MASK, top=0.5), [[1, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(entropy_mask(jnp.zeros((2, 3)), MASK, top=0.1), MASK)


def test_the_entropy_mask_of_nothing_is_empty():
    np.testing.assert_array_equal(entropy_mask(VALUES, NOTHING, top=0.5), NOTHING)


@pytest.mark.parametrize("top", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_out_of_range(top):
    with pytest.raises(ValueError, match=r"top is .*; expected a share in \(0, 1\]"):
        entropy_mask(VALUES, MASK, top=top)


# Importance weights.

LOG_RATIO = jnp.log(jnp.array([[0.5, 1.0, 8.0], [4.0, 1.0, 1.0]]))
SAMPLER = jnp.full((2, 3), -3.0).at[1, 2].set(jnp.nan)


def test_importance_weights_of_tokens():
    found = importance_weights(SAMPLER + LOG_RATIO, SAMPLER, MASK, cap=2.0, level="token")
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [[0.5, 1.0, 2.0], [2.0, 1.0, 1.0]], rtol=1e-6)


def test_importance_weights_of_completions():
    """The arithmetic mean of the truncated ratios; the default."""
    found = importance_weights(SAMPLER + LOG_RATIO, SAMPLER, MASK)
    np.testing.assert_allclose(found, [[3.5 / 3] * 3, [1.5, 1.5, 1.0]], rtol=1e-6)


def test_equal_log_probs_have_weight_one():
    for level in ("token", "sequence"):
        np.testing.assert_allclose(importance_weights(SAMPLER, SAMPLER, MASK, level=level), 1.0, rtol=1e-6)


def test_a_large_log_ratio_does_not_overflow():
    student = jnp.array([[0.0, -1e4, 0.0], [0.0, 0.0, 0.0]])
    sampler = jnp.array([[-1e4, 0.0, 0.0], [-1e4, -1e4, jnp.inf]])
    found = importance_weights(student, sampler, MASK, cap=2.0, level="token")
    np.testing.assert_allclose(found, [[2.0, 0.0, 1.0], [2.0, 2.0, 1.0]], rtol=1e-6)
    found = importance_weights(student, sampler, MASK, cap=2.0, level="sequence")
    np.testing.assert_allclose(found, [[1.0, 1.0, 1.0], [2.0, 2.0, 1.0]], rtol=1e-6)


def test_completions_without_tokens_have_weight_one():
    for level in ("token", "sequence"):
        np.testing.assert_array_equal(importance_weights(SAMPLER, SAMPLER, NOTHING, level=level), 1.0)


def test_no_gradient_through_importance_weights():
    sampler = jnp.full((2, 3), -3.0)
    for level in ("token", "sequence"):
        loss = lambda x, level=level: importance_weights(x, sampler, MASK, level=level).sum()  # noqa: E731
        np.testing.assert_array_equal(jax.grad(loss)(sampler + LOG_RATIO), 0.0)


def test_importance_arguments_out_of_range(without_shape_hook):
    for cap in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="cap is .*; expected a positive number"):
            importance_weights(SAMPLER, SAMPLER, MASK, cap=cap)
    with pytest.raises(ValueError, match="level is 'batch'; expected token or sequence"):
        importance_weights(SAMPLER, SAMPLER, MASK, level="batch")


# The plan.

SCORES = TokenScores(VALUES, SAMPLER + LOG_RATIO, VALUES)
AGREEMENT = Agreement(gamma=1.0, quantile=1.0)
DISAGREEMENT = jnp.array([[0.0, 1.0, 2.0], [2.0, 0.0, jnp.nan]])
WEIGHTS = np.array([[1.0, 2 / 3, 1 / 2], [1 / 2, 1.0, 1.0]])


def test_the_plain_plan_is_the_mean():
    plan = token_plan(MASK, settings=Objective())
    np.testing.assert_allclose(plan.main, np.asarray(MASK) / 5)
    np.testing.assert_array_equal(plan.auxiliary, plan.main)
    assert plan.ceiling is None and plan.weights is None
    assert not needs_scores_first(Objective())


def test_only_the_agreement_weights_enter_the_denominator():
    """Outside the entropy mask a weight is 1; importance weights and the mask scale the numerator alone."""
    settings = Objective(agreement=AGREEMENT, top_entropy=0.5, importance="token", clip_quantile=0.5)
    assert needs_scores_first(settings)
    plan = token_plan(MASK, settings=settings, disagreement=DISAGREEMENT, scores=SCORES, sampler_logps=SAMPLER)
    chosen = np.array([[1, 0, 1], [0, 1, 0]])
    weights = np.where(chosen, WEIGHTS, 1.0)
    ratios = np.array([[0.5, 1.0, 2.0], [2.0, 1.0, 1.0]])
    np.testing.assert_allclose(plan.weights, weights, rtol=1e-6)
    np.testing.assert_allclose(plan.main, chosen * weights * ratios / weights[np.asarray(MASK)].sum(), rtol=1e-6)
    np.testing.assert_allclose(plan.auxiliary, np.asarray(MASK) / 5, rtol=1e-6)
    np.testing.assert_array_equal(plan.ceiling, jnp.full(MASK.shape, 3.0))


def test_the_static_ceiling_needs_no_scores():
    settings = Objective(clip_ceiling=0.25)
    plan = token_plan(MASK, settings=settings)
    assert plan.ceiling.dtype == jnp.float32 and np.all(np.asarray(plan.ceiling) == 0.25)
    assert not needs_scores_first(settings)


def test_the_plan_is_a_constant_for_the_gradient():
    settings = Objective(agreement=AGREEMENT, top_entropy=0.5, importance="sequence", clip_quantile=0.5)
    values = jnp.nan_to_num(VALUES)

    def everything(divergence, logp, entropy, disagreement):
        plan = token_plan(
            MASK, settings=settings, disagreement=disagreement, scores=TokenScores(divergence, logp, entropy),
            sampler_logps=jnp.nan_to_num(SAMPLER),
        )  # fmt: skip
        return sum(x.sum() for x in plan)

    logp = jnp.nan_to_num(SAMPLER + LOG_RATIO)
    for gradient in jax.grad(everything, argnums=(0, 1, 2, 3))(values, logp, values, jnp.nan_to_num(DISAGREEMENT)):
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize(
    ("options", "given", "missing"),
    [
        (dict(agreement=AGREEMENT), {}, "the auxiliary views' disagreement"),
        (dict(clip_quantile=0.5), {}, "the student's scores"),
        (dict(top_entropy=0.5), {}, "the student's scores"),
        (dict(importance="token"), {}, "the student's scores"),
        (dict(importance="token"), dict(scores=SCORES), "the sampler's log-probs"),
    ],
)
def test_a_mechanism_that_lacks_what_it_needs(options, given, missing):
    with pytest.raises(ValueError, match=f"the objective's settings need {missing}, which was not given"):
        token_plan(MASK, settings=Objective(**options), **given)


ALL_ON = dict(agreement=AGREEMENT, top_entropy=0.5, importance="sequence", clip_quantile=0.5)


@pytest.mark.parametrize("normalize", ["batch", "sequence", "upstream"])
def test_a_plan_for_nothing_is_zero(normalize):
    settings = Objective(normalize=normalize, **ALL_ON)
    plan = token_plan(NOTHING, settings=settings, disagreement=DISAGREEMENT, scores=SCORES, sampler_logps=SAMPLER)
    np.testing.assert_array_equal(plan.main, 0.0)
    np.testing.assert_array_equal(plan.auxiliary, 0.0)
    terms = objective(SCORES, jnp.zeros((2, 3, 1)), TeacherScores(), NOTHING, plan, settings=settings)
    assert float(terms["divergence"]) == 0.0


def test_the_divergence_term_is_the_clipped_one():
    """(3 + 1 + 3 + 2 + 3)/5, with a gradient of 1/5 up to the ceiling."""
    settings = Objective(clip_quantile=0.5)
    plan = token_plan(MASK, settings=settings, scores=SCORES)

    def term(divergence):
        scores = SCORES._replace(divergence=divergence)
        return objective(scores, jnp.zeros((2, 3, 1)), TeacherScores(), MASK, plan, settings=settings)["divergence"]

    value, gradient = jax.value_and_grad(term)(VALUES)
    assert float(value) == pytest.approx(12 / 5)
    np.testing.assert_allclose(gradient, np.array([[1, 1, 0], [1, 0, 0]]) / 5, rtol=1e-6)


# What the metrics say of it.


def metrics_of(scores=SCORES, mask=MASK, **options):
    settings = Objective(**options)
    plan = token_plan(mask, settings=settings, disagreement=DISAGREEMENT, scores=scores, sampler_logps=SAMPLER)
    found = mechanism_metrics(scores, TeacherScores(disagreement=DISAGREEMENT), mask, plan, settings)
    return {name: float(value) for name, value in found.items()}


def test_metrics_of_the_clip():
    """The token at the ceiling is not clipped."""
    assert metrics_of(clip_quantile=0.5) == pytest.approx({"clip_share": 2 / 5, "clip_ceiling": 3.0})
    assert metrics_of(clip_ceiling=3.0) == pytest.approx({"clip_share": 2 / 5, "clip_ceiling": 3.0})
    assert metrics_of(clip_ceiling=9.0)["clip_share"] == 0.0
    assert metrics_of(SCORES._replace(divergence=None), clip_ceiling=3.0) == {}


def test_metrics_of_the_importance_weights():
    found = metrics_of(importance="token", importance_cap=1.0)
    expected = importance_weights(SCORES.student_logp, SAMPLER, MASK, cap=1.0, level="token")
    assert found["importance_weight"] == pytest.approx(float(masked_mean(expected, MASK)))
    capped = np.asarray(SCORES.student_logp >= SAMPLER)[np.asarray(MASK)]
    assert found["importance_capped_share"] == pytest.approx(capped.mean())


def test_metrics_of_the_entry_ceiling():
    capped = jnp.zeros(MASK.shape, bool).at[0, 0].set(True)
    assert metrics_of(SCORES._replace(entry_capped=capped)) == pytest.approx({"entry_capped_share": 1 / 5})


def test_metrics_of_the_entropy_mask():
    assert metrics_of(top_entropy=0.5) == pytest.approx({"entropy_mask_share": 3 / 5})
    assert metrics_of() == {}


def test_metrics_see_the_weights_that_entered():
    """Those of tokens outside the entropy mask are 1."""
    found = metrics_of(agreement=AGREEMENT, top_entropy=0.5)
    assert found["agreement_weight"] == pytest.approx((1 + 1 + 0.5 + 1 + 1) / 5)
    assert found["agreement_weight_min"] == pytest.approx(0.5)
    assert found["agreement_above_99"] == pytest.approx(4 / 5)


def test_the_shares_of_a_batch_without_tokens_are_zero():
    found = metrics_of(mask=NOTHING, **ALL_ON)
    assert found["clip_share"] == found["entropy_mask_share"] == found["agreement_weight"] == 0.0
    assert not any(np.isnan(value) for value in found.values())
