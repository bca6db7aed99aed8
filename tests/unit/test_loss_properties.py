"""What holds for all inputs: exact invariants of the terms, their limits and bounds, and what may not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from unisd_jax.losses import (
    Agreement,
    Objective,
    TeacherScores,
    TokenScores,
    clip_divergence,
    contrastive_hinge,
    feature_distance,
    largest_divergence,
    objective,
    reduce_tokens,
    score_tokens,
    sequence_agreement,
    sequence_weights,
    token_agreement,
    token_divergence,
    token_log_probs,
    token_plan,
    token_weights,
)

quickly = settings(max_examples=20, deadline=None)

# One shape for all, so that hardly anything is compiled twice: batch, tokens, vocabulary, hidden size, views.
B, T, V, H, K = 4, 3, 5, 2, 3
NORMALIZATIONS = ("batch", "sequence", "upstream")
STATISTICS = ("var", "range")
LEVELS = ("token", "sequence")

normalizations = st.sampled_from(NORMALIZATIONS)
statistics = st.sampled_from(STATISTICS)
levels = st.sampled_from(LEVELS)
alphas = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
inner_alphas = st.sampled_from([0.01, 0.1, 0.5, 0.9, 0.99])


def floats(low, high):
    """Numbers in [low, high], 1025 of them: two that differ do so by more than rounding."""
    return st.integers(0, 1024).map(lambda step: np.float32(low + (high - low) * step / 1024))


def batch(low, high, *shape):
    return arrays.arrays(np.float32, (B, T, *shape), elements=floats(low, high))


masks = arrays.arrays(bool, (B, T))
divergences = batch(0, 4)
log_probs = batch(-8, 0)
views = arrays.arrays(np.float32, (K, B, T), elements=floats(-8, 0))
hidden_states = batch(-3, 3, H)
logits = batch(-3, 3, V)
token_ids = arrays.arrays(np.int32, (B, T), elements=st.integers(0, V - 1))


def agreement(level, context_logps, mask, **options):
    function = token_agreement if level == "token" else sequence_agreement
    return function(jnp.asarray(context_logps), jnp.asarray(mask), **options)


def as_jax(*values):
    return tuple(map(jnp.asarray, values))


# A whole batch as the objective sees it: scores, hidden states, what the teacher says, mask, the sampler's log-probs.


@st.composite
def batches(draw, level="token"):
    scores = TokenScores(*as_jax(draw(divergences), draw(log_probs), draw(divergences)))
    disagreement = draw(divergences)
    if level == "sequence":
        disagreement = disagreement[:, 0]
    teacher = TeacherScores(*as_jax(draw(hidden_states), draw(log_probs), draw(log_probs), disagreement))
    return scores, jnp.asarray(draw(hidden_states)), teacher, *as_jax(draw(masks), draw(log_probs))


def everything(level="token", normalize="batch", **changes):
    """All mechanisms at once."""
    options = dict(
        normalize=normalize, clip_quantile=0.7, top_entropy=0.6, agreement=Agreement(level=level),
        contrast_weight=0.3, contrast_margin=0.5, matching_weight=0.2, importance="sequence",
    )  # fmt: skip
    return Objective(**(options | changes))


def plan_of(whole, options):
    scores, _, teacher, mask, sampler = whole
    return token_plan(mask, settings=options, disagreement=teacher.disagreement, scores=scores, sampler_logps=sampler)


def rows_of(tree, rows):
    """Some rows of every array that has any; a ceiling is of the whole batch."""
    return jax.tree.map(lambda x: x if x.ndim == 0 else x[rows], tree)


def terms_of(whole, options, plan=None):
    scores, hidden, teacher, mask, _ = whole
    plan = plan_of(whole, options) if plan is None else plan
    return {name: float(x) for name, x in objective(scores, hidden, teacher, mask, plan, settings=options).items()}


# Agreement.


@quickly
@given(whole=batches(), level=levels, normalize=normalizations)
def test_gamma_zero_is_the_unweighted_loss(whole, level, normalize):
    if level == "sequence":
        whole = (*whole[:2], whole[2]._replace(disagreement=whole[2].disagreement[:, 0]), *whole[3:])
    weighted = everything(level, normalize, agreement=Agreement(level=level, gamma=0.0))
    plain = everything(normalize=normalize, agreement=None)
    plan = plan_of(whole, weighted)
    np.testing.assert_array_equal(plan.weights, 1.0)
    np.testing.assert_array_equal(plan.main, plan_of(whole, plain).main)
    assert terms_of(whole, weighted) == terms_of(whole, plain)


@quickly
@given(
    one=arrays.arrays(np.float32, (B, T), elements=st.floats(-1e4, 0, width=32) | st.just(-np.inf)),
    mask=masks,
    number=st.sampled_from([2, 3, 7]),
    level=levels,
    statistic=statistics,
    gamma=st.sampled_from([0.5, 1e4]),
)
@example(np.full((B, T), -np.inf, np.float32), np.ones((B, T), bool), 7, "token", "var", 1e4)
@example(np.full((B, T), -1.7, np.float32), np.ones((B, T), bool), 3, "sequence", "var", 1e4)
def test_identical_views_never_disagree(one, mask, number, level, statistic, gamma):
    """Exactly: what rounding left of the variance would be scaled up by its own quantile."""
    same = np.broadcast_to(one, (number, B, T))
    weights, disagreement = agreement(level, same, mask, gamma=gamma, statistic=statistic)
    np.testing.assert_array_equal(disagreement, 0.0)
    np.testing.assert_array_equal(weights, 1.0)


@quickly
@given(logps=views, mask=masks, order=st.permutations(range(K)), level=levels, statistic=statistics)
def test_the_order_of_the_views_does_not_matter(logps, mask, order, level, statistic):
    expected = agreement(level, logps, mask, gamma=1.0, statistic=statistic)
    found = agreement(level, logps[np.array(order)], mask, gamma=1.0, statistic=statistic)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-6)
    # A spread near the smallest scale could turn rounding into a difference; these inputs have steps of 1/128 nat.
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-3)


@quickly
@given(
    disagreement=arrays.arrays(np.float32, (B, T), elements=st.floats(0, 1e9, width=32)),
    mask=masks,
    gamma=st.floats(0, 1e6),
)
def test_weights_are_positive_and_at_most_one(disagreement, mask, gamma):
    weights = np.asarray(token_weights(*as_jax(disagreement, mask), gamma=gamma))
    assert np.all(weights >= np.float32(0.01)) and np.all(weights <= 1)
    weights = np.asarray(sequence_weights(jnp.asarray(disagreement[:, 0]), gamma=gamma))
    assert np.all(weights >= np.float32(1e-6)) and np.all(weights <= 1)


@quickly
@given(logps=views, mask=masks, level=levels, statistic=statistics)
def test_more_disagreement_never_raises_a_weight(logps, mask, level, statistic):
    weights, disagreement = map(np.asarray, agreement(level, logps, mask, gamma=1.0, statistic=statistic))
    counted = mask if level == "token" else np.ones(B, bool)
    ordered = weights[counted][np.argsort(disagreement[counted], kind="stable")]
    assert np.all(np.diff(ordered) <= 1e-6)


# What may not matter: order, padding, how the batch is split.


@quickly
@given(whole=batches(), normalize=normalizations, order=st.permutations(range(B)))
def test_the_order_of_the_batch_does_not_matter(whole, normalize, order):
    options = everything(normalize=normalize)
    moved = rows_of(whole, np.array(order))
    plan = plan_of(whole, options)
    for found, expected in zip(plan_of(moved, options), rows_of(plan, np.array(order)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert terms_of(moved, options) == pytest.approx(terms_of(whole, options), rel=1e-5, abs=1e-6)


@quickly
@given(whole=batches(), normalize=normalizations)
def test_more_padding_does_not_matter(whole, normalize):
    """Two more columns of masked tokens, without a number in them."""

    def pad(x):
        fill = False if x.dtype == bool else jnp.nan
        return jnp.pad(x, ((0, 0), (0, 2)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)

    options = everything(normalize=normalize)
    padded = jax.tree.map(pad, whole)
    plan, wide = plan_of(whole, options), plan_of(padded, options)
    for name in ("main", "auxiliary", "weights"):
        np.testing.assert_allclose(getattr(wide, name)[:, :T], getattr(plan, name), rtol=1e-6, err_msg=name)
    np.testing.assert_array_equal(wide.main[:, T:], 0.0)
    assert terms_of(padded, options) == pytest.approx(terms_of(whole, options), rel=1e-6, abs=1e-7)


@quickly
@given(whole=batches(), normalize=normalizations)
def test_rows_of_padding_matter_only_upstream(whole, normalize):
    """As many rows again without a token: the release divides by their number too."""
    assume(np.asarray(whole[3]).any())
    options = everything(normalize=normalize, top_entropy=1.0)
    doubled = jax.tree.map(lambda x: jnp.concatenate([x, x]), whole)
    doubled = (*doubled[:3], doubled[3].at[B:].set(False), doubled[4])
    share = 0.5 if normalize == "upstream" else 1.0
    expected = {name: share * value for name, value in terms_of(whole, options).items()}
    assert terms_of(doubled, options) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@quickly
@given(
    whole=st.one_of(batches("token"), batches("sequence")),
    normalize=normalizations,
    order=st.permutations(range(B)),
)
def test_the_parts_of_a_batch_add_up_to_the_whole(whole, normalize, order):
    """With the plan of the whole batch, whatever rows make up a part."""
    level = "token" if whole[2].disagreement.ndim == 2 else "sequence"
    options = everything(level, normalize)
    plan, order = plan_of(whole, options), np.array(order)
    found = [terms_of(rows_of(whole, rows), options, rows_of(plan, rows)) for rows in (order[:2], order[2:])]
    summed = {name: found[0][name] + found[1][name] for name in options.terms}
    assert summed == pytest.approx(terms_of(whole, options), rel=1e-5, abs=1e-6)


@settings(quickly, max_examples=8)
@given(whole=batches(), normalize=normalizations)
def test_gradients_of_the_parts_add_up_to_the_whole(whole, normalize):
    options = everything(normalize=normalize)
    scores, hidden, teacher, mask, _ = whole
    plan = plan_of(whole, options)

    def gradients(scores, hidden, teacher, mask, plan):
        def loss(divergence, logp, hidden):
            changed = scores._replace(divergence=divergence, student_logp=logp)
            return sum(objective(changed, hidden, teacher, mask, plan, settings=options).values())

        return jax.grad(loss, argnums=(0, 1, 2))(scores.divergence, scores.student_logp, hidden)

    full = gradients(scores, hidden, teacher, mask, plan)
    halves = [gradients(*rows_of((scores, hidden, teacher, mask, plan), rows)) for rows in (slice(2), slice(2, B))]
    for found, one, other in zip(full, *halves, strict=True):
        np.testing.assert_allclose(found, np.concatenate([one, other]), rtol=1e-5, atol=1e-7)


# Normalization.


@quickly
@given(
    values=divergences,
    lengths=arrays.arrays(np.int32, B, elements=st.integers(1, T)),
    weights=arrays.arrays(np.float32, B, elements=floats(0.05, 1)),
)
def test_a_completion_weight_cancels_upstream_as_long_as_a_row_adds_up_to_one(values, lengths, weights):
    mask = np.arange(T) < lengths[:, None]
    weights = np.maximum(weights, 1 / lengths)
    values, mask, weights = as_jax(values, mask, np.float32(np.broadcast_to(weights[:, None], (B, T))))
    found = float(reduce_tokens(values, mask, weights, normalize="upstream"))
    assert found == pytest.approx(float(reduce_tokens(values, mask, normalize="upstream")), rel=1e-5, abs=1e-6)


@quickly
@given(
    disagreement=arrays.arrays(np.float32, B, elements=floats(0, 1)),
    lengths=arrays.arrays(np.int32, B, elements=st.integers(2, T)),
    normalize=normalizations,
)
def test_sequence_agreement_acts_except_upstream(disagreement, lengths, normalize):
    """Unlike in the release, a completion with a larger disagreement counts less: by exp(−γ·D), here at least 1/2."""
    gamma = np.log(2.0).item()
    mask = jnp.asarray(np.arange(T) < lengths[:, None])
    options = Objective(normalize=normalize, agreement=Agreement(level="sequence", gamma=gamma))
    weighted = np.asarray(token_plan(mask, settings=options, disagreement=jnp.asarray(disagreement)).main)[:, 0]
    plain = np.asarray(token_plan(mask, settings=Objective(normalize=normalize)).main)[:, 0]
    expected = np.ones(B) if normalize == "upstream" else np.exp(-gamma * disagreement)
    if normalize == "batch":
        expected *= lengths.sum() / np.sum(lengths * expected)
    np.testing.assert_allclose(weighted / plain, expected, rtol=1e-5)


# Divergence and clip.


@quickly
@given(pair=st.tuples(*2 * [batch(-30, 30, V)]), alpha=inner_alphas)
def test_jsd_lies_between_zero_and_its_bound(pair, alpha):
    found = np.asarray(token_divergence(*as_jax(*pair), alpha=alpha))
    assert np.all(found >= -1e-6) and np.all(found <= largest_divergence(alpha) + 1e-6)


@quickly
@given(pair=st.tuples(*2 * [batch(-30, 30, V)]), alpha=st.sampled_from([0.0, 1.0]))
def test_kl_is_not_negative(pair, alpha):
    assert np.all(np.asarray(token_divergence(*as_jax(*pair), alpha=alpha)) >= -1e-5)


@quickly
@given(pair=st.tuples(*2 * [batch(-1, 1, V)]), alpha=st.sampled_from([0.01, 0.003]))
def test_the_limits_of_jsd_are_the_two_kl(pair, alpha):
    """|D/α − KL(T ‖ S)| ≤ α·χ²(T ‖ S), and the same with the roles and α exchanged."""
    student, teacher = as_jax(*pair)
    p, q = (np.asarray(jax.nn.softmax(x), np.float64) for x in pair)
    rounding = 2e-6 / alpha
    forward = np.asarray(token_divergence(student, teacher, alpha=0.0))
    gap = np.abs(np.asarray(token_divergence(student, teacher, alpha=alpha)) / alpha - forward)
    assert np.all(gap <= alpha * (np.sum(q * q / p, axis=-1) - 1) + rounding)
    reverse = np.asarray(token_divergence(student, teacher, alpha=1.0))
    gap = np.abs(np.asarray(token_divergence(student, teacher, alpha=1 - alpha)) / alpha - reverse)
    assert np.all(gap <= alpha * (np.sum(p * p / q, axis=-1) - 1) + rounding)


@quickly
@given(pair=st.tuples(*2 * [batch(-30, 30, V)]), mask=masks, alpha=inner_alphas, above=st.sampled_from([1.0, 1.5]))
def test_a_ceiling_at_the_bound_or_above_never_acts(pair, mask, alpha, above):
    divergence = token_divergence(*as_jax(*pair), alpha=alpha)
    found = clip_divergence(divergence, jnp.asarray(mask), ceiling=above * largest_divergence(alpha))
    np.testing.assert_allclose(found, divergence, rtol=1e-6)


@quickly
@given(whole=batches(), normalize=normalizations)
def test_no_ceiling_and_an_unreachable_one_are_the_same(whole, normalize):
    open_, high = (everything(normalize=normalize, clip_quantile=None, clip_ceiling=c) for c in (None, 5.0))
    assert plan_of(whole, open_).ceiling is None
    assert terms_of(whole, open_) == terms_of(whole, high)


@quickly
@given(whole=batches(), normalize=normalizations, ceiling=floats(0.01, 3))
def test_the_clip_bounds_the_loss(whole, normalize, ceiling):
    """A weighted mean of numbers up to the ceiling; it is also never above the loss without clip."""
    options = Objective(normalize=normalize, agreement=Agreement(), clip_ceiling=float(ceiling))
    found = terms_of(whole, options)["divergence"]
    assert 0 <= found <= ceiling * (1 + 1e-5)
    unclipped = Objective(normalize=normalize, agreement=Agreement())
    assert found <= terms_of(whole, unclipped)["divergence"] * (1 + 1e-5) + 1e-7


@quickly
@given(both=logits, hidden=hidden_states, alpha=alphas, shift=floats(-5, 5))
def test_a_student_like_its_teacher_is_at_zero_and_stays_there(both, hidden, alpha, shift):
    """A constant added to all logits of a token is no difference."""
    teacher = jnp.asarray(both + shift)
    divergence = lambda x: token_divergence(x, teacher, alpha=alpha)  # noqa: E731
    np.testing.assert_allclose(divergence(jnp.asarray(both)), 0.0, atol=5e-6)
    np.testing.assert_allclose(jax.grad(lambda x: divergence(x).sum())(jnp.asarray(both)), 0.0, atol=5e-6)
    hidden = jnp.asarray(hidden)
    np.testing.assert_array_equal(feature_distance(hidden, hidden), 0.0)
    np.testing.assert_array_equal(jax.grad(lambda x: feature_distance(x, hidden).sum())(hidden), 0.0)


# Contrast.


@quickly
@given(student=log_probs, both=log_probs)
def test_equal_views_without_margin_have_no_hinge(student, both):
    student, both = as_jax(student, both)
    np.testing.assert_array_equal(contrastive_hinge(student, both, both, margin=0.0), 0.0)
    gradient = jax.grad(lambda x: contrastive_hinge(x, both, both, margin=0.0).sum())(student)
    np.testing.assert_array_equal(gradient, 0.0)


@quickly
@given(student=log_probs, positive=log_probs, negative=log_probs, margin=floats(0, 2))
def test_the_hinge_is_bounded(student, positive, negative, margin):
    found = np.asarray(contrastive_hinge(*as_jax(student, positive, negative), margin=float(margin)))
    assert np.all(found >= 0) and np.all(found <= margin + np.abs(positive - negative) + 1e-5)


# Precision and extremes.

HALF_STEP = 2.0**-8  # the most by which rounding to bfloat16 moves a number, as a share of it


@quickly
@given(pair=st.tuples(*2 * [batch(-2, 2, V)]), alpha=alphas)
def test_bfloat16_logits_cost_what_their_rounding_costs(pair, alpha):
    """Logits within δ move each log-prob by up to 2δ, hence the divergence by 4δ + (e^{2δ} − 1)·(largest log ratio)."""
    exact = as_jax(*pair)
    found = token_divergence(*(x.astype(jnp.bfloat16) for x in exact), alpha=alpha)
    assert found.dtype == jnp.float32
    step, largest_ratio = 2 * HALF_STEP, 2 * 4.0
    bound = 4 * step + (np.exp(2 * step) - 1) * largest_ratio
    np.testing.assert_allclose(found, token_divergence(*exact, alpha=alpha), rtol=0, atol=bound)


@quickly
@given(student=hidden_states, teacher=hidden_states)
def test_bfloat16_hidden_states_cost_what_their_rounding_costs(student, teacher):
    """States within δ of their own: the square of a difference d moves by up to 4δ|d| + 4δ²."""
    exact = as_jax(student, teacher)
    found = feature_distance(*(x.astype(jnp.bfloat16) for x in exact))
    assert found.dtype == jnp.float32
    step = 3 * HALF_STEP
    bound = np.mean(4 * step * np.abs(student - teacher) + 4 * step**2, axis=-1) + 1e-5
    assert np.all(np.abs(np.asarray(found) - np.asarray(feature_distance(*exact))) <= bound)


extremes = arrays.arrays(np.float32, (B, T, V), elements=st.sampled_from([-1e4, -30.0, 0.0, 30.0, 1e4, -np.inf]))


@quickly
@given(
    three=st.tuples(extremes, extremes, extremes),
    sampled=arrays.arrays(np.float32, (3, B, T), elements=st.sampled_from([-1e4, 0.0, 1e4])),
    ids=token_ids,
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    mask=masks,
)
def test_extreme_logits_have_finite_terms_and_gradients(three, sampled, ids, alpha, mask):
    """Entries that are ruled out, but never the sampled token; with all terms and weights on."""
    three = tuple(x.copy() for x in three)
    for x, chosen in zip(three, sampled, strict=True):
        np.put_along_axis(x, ids[..., None], chosen[..., None], axis=-1)
    student, teacher, negative, ids, mask = as_jax(*three, ids, mask)
    options = everything(alpha=alpha, temperature=0.7)
    logps = [token_log_probs(x / 0.7, ids) for x in (teacher, negative)]
    _, disagreement = agreement("token", jnp.stack(logps), mask, gamma=1.0)
    hidden = jnp.zeros((B, T, H))
    taught = TeacherScores(hidden, *logps, disagreement)

    def loss(student):
        scores = score_tokens(student, teacher, ids, settings=options)
        plan = plan_of((scores, hidden, taught, mask, logps[0]), options)
        return sum(objective(scores, hidden, taught, mask, plan, settings=options).values()), plan

    (value, plan), gradient = jax.value_and_grad(loss, has_aux=True)(student)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert all(np.isfinite(x).all() for x in (plan.main, plan.auxiliary, plan.weights))
