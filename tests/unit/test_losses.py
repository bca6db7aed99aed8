"""Divergence, reduction and objective against numbers computed elsewhere, by hand, or from the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from unisd_jax.losses import (
    Objective,
    TeacherScores,
    entropy,
    log_probs,
    objective,
    reduce_tokens,
    reduction_weights,
    score_tokens,
    token_divergence,
    token_log_probs,
    token_plan,
    weighted_sum,
)

B, T, V = np.ogrid[:2, :4, :5]
TEMPERATURE = 0.7
STUDENT = jnp.asarray(np.sin(1.3 * B + 0.7 * T + 1.1 * V) / TEMPERATURE, jnp.float32)
TEACHER = jnp.asarray(1.5 * np.cos(0.5 * B + 1.9 * T - 0.8 * V) / TEMPERATURE, jnp.float32)
MASK = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
IDS = jnp.array([[0, 2, 4, 1], [3, 0, 2, 4]])
HIDDEN = jnp.zeros((2, 4, 3))
ALPHAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def two_tokens(*probabilities):
    return jnp.log(jnp.array(probabilities))[None, None]


def test_direction_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2): the directions differ, and alpha = 0 is weighted by the teacher."""
    teacher, student = two_tokens(0.75, 0.25), two_tokens(0.5, 0.5)
    forward = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    reverse = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert abs(forward - reverse) > 0.01
    assert token_divergence(student, teacher, alpha=0.0).item() == pytest.approx(forward, abs=1e-6)
    assert token_divergence(student, teacher, alpha=1.0).item() == pytest.approx(reverse, abs=1e-6)


def test_the_mixture_by_hand():
    """alpha weights the teacher, in the mixture and in the sum: M = 0.8·(1/2, 1/2) + 0.2·(3/4, 1/4)."""
    p_teacher, p_student = np.array([0.75, 0.25]), np.array([0.5, 0.5])
    mixture = np.array([0.55, 0.45])
    expected = 0.2 * np.sum(p_teacher * np.log(p_teacher / mixture))
    expected += 0.8 * np.sum(p_student * np.log(p_student / mixture))
    found = token_divergence(two_tokens(*p_student), two_tokens(*p_teacher), alpha=0.2)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_the_bound_is_reached_by_disjoint_distributions():
    student, teacher = jnp.array([[[50.0, -50.0]]]), jnp.array([[[-50.0, 50.0]]])
    for alpha in (0.1, 0.5, 0.9):
        bound = -alpha * np.log(alpha) - (1 - alpha) * np.log(1 - alpha)
        assert token_divergence(student, teacher, alpha=alpha).item() == pytest.approx(bound, rel=1e-5)


def test_swapping_the_roles_swaps_alpha():
    for alpha in ALPHAS:
        np.testing.assert_allclose(
            token_divergence(STUDENT, TEACHER, alpha=alpha), token_divergence(TEACHER, STUDENT, alpha=1 - alpha),
            atol=1e-6,
        )  # fmt: skip


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_distributions_are_at_zero_and_stay_there(alpha):
    shifted = STUDENT + 3.0
    found, gradient = jax.value_and_grad(lambda x: token_divergence(x, shifted, alpha=alpha).sum())(STUDENT)
    assert abs(float(found)) < 1e-5
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gradient_is_that_of_the_definition(alpha):
    """Against float64 central differences of the definition."""

    def definition(student):
        p, q = (np.exp(x - np.log(np.exp(x).sum(-1, keepdims=True))) for x in (student, np.float64(TEACHER)))
        if alpha in (0.0, 1.0):
            p, q = (q, p) if alpha == 0.0 else (p, q)
            return np.sum(p * np.log(p / q))
        mixture = (1 - alpha) * p + alpha * q
        return alpha * np.sum(q * np.log(q / mixture)) + (1 - alpha) * np.sum(p * np.log(p / mixture))

    found = jax.grad(lambda x: token_divergence(x, TEACHER, alpha=alpha).sum())(STUDENT)
    start, step = np.float64(STUDENT), 1e-5
    for index in [(0, 0, 0), (0, 2, 3), (1, 3, 4)]:
        up, down = start.copy(), start.copy()
        up[index] += step
        down[index] -= step
        assert float(found[index]) == pytest.approx((definition(up) - definition(down)) / (2 * step), abs=2e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_nothing_flows_to_the_teacher(alpha):
    gradient = jax.grad(lambda x: token_divergence(STUDENT, x, alpha=alpha).sum())(TEACHER)
    assert not np.any(gradient)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_extreme_logits_have_finite_gradients(alpha):
    student = jnp.array([[[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4]]])
    teacher = jnp.array([[[-1e4, 1e4, 0.0], [-1e4, 1e4, 1e4], [-1e4, -1e4, 1e4]]])
    found, gradient = jax.value_and_grad(lambda x: token_divergence(x, teacher, alpha=alpha).sum())(student)
    assert np.isfinite(found) and np.isfinite(gradient).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_impossible_tokens(alpha):
    """−inf in both: as if the entry were not in the vocabulary. In one of them: still no NaN."""
    gone = jnp.full((2, 4, 1), -jnp.inf)
    student, teacher = (jnp.concatenate([x, gone], axis=-1) for x in (STUDENT, TEACHER))

    def divergence(x, y):
        return token_divergence(x, y, alpha=alpha).sum()

    found, gradient = jax.value_and_grad(divergence)(student, teacher)
    expected, smaller = jax.value_and_grad(divergence)(STUDENT, TEACHER)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(gradient[..., :5], smaller, atol=1e-6)
    np.testing.assert_array_equal(gradient[..., 5], 0.0)
    for one, other in ((student, teacher.at[..., 5].set(0.0)), (student.at[..., 5].set(0.0), teacher)):
        found, gradient = jax.value_and_grad(divergence)(one, other)
        assert np.isfinite(found) and np.isfinite(gradient).all()


def test_low_precision_logits_are_computed_in_float32():
    half = STUDENT.astype(jnp.bfloat16), TEACHER.astype(jnp.bfloat16)
    found = token_divergence(*half, alpha=0.5)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, token_divergence(*(x.astype(jnp.float32) for x in half), alpha=0.5))


@pytest.mark.parametrize("alpha", [-0.1, 1.0001, float("nan"), float("inf")])
def test_alpha_outside_its_range(alpha):
    with pytest.raises(ValueError, match=r"alpha is .*; expected a number in \[0, 1\]"):
        token_divergence(STUDENT, TEACHER, alpha=alpha)


def test_shapes_that_differ(without_shape_hook):
    with pytest.raises(ValueError, match=r"student logits \(2, 4, 5\) and teacher logits \(2, 1, 5\) differ"):
        token_divergence(STUDENT, TEACHER[:, :1], alpha=0.5)


def test_log_probs():
    found = log_probs(jnp.array([[0.0, -jnp.inf, jnp.log(3.0)]]))
    np.testing.assert_allclose(np.exp(found), [[0.25, 0.0, 0.75]], atol=1e-6)
    assert np.isfinite(found).all()
    chosen = token_log_probs(STUDENT, IDS)
    assert float(chosen[1, 3]) == pytest.approx(float(jax.nn.log_softmax(STUDENT[1, 3])[4]), abs=1e-6)


def test_entropy_by_hand():
    assert float(entropy(jnp.zeros((1, 8)))[0]) == pytest.approx(np.log(8), abs=1e-6)
    assert float(entropy(jnp.array([[0.0, -jnp.inf]]))[0]) == 0.0


# Rows of 4, 2 and 0 tokens.
VALUES = jnp.array([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 7.0, 7.0], [5.0, 5.0, 5.0, 5.0]])
ROWS = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
WEIGHTS = jnp.array([[1.0, 0.5, 0.5, 0.0], [2.0, 1.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    ("normalize", "weights", "expected"),
    [
        ("batch", None, (10 + 30) / 6),
        ("sequence", None, (10 / 4 + 30 / 2) / 2),
        ("upstream", None, (10 / 4 + 30 / 2) / 3),
        ("batch", WEIGHTS, (1 + 1 + 1.5 + 20 + 20) / 5),
        ("sequence", WEIGHTS, (3.5 / 4 + 40 / 2) / 2),
        ("upstream", WEIGHTS, (3.5 / 2 + 40 / 3) / 3),
    ],
)
def test_reductions_by_hand(normalize, weights, expected):
    assert float(reduce_tokens(VALUES, ROWS, weights, normalize=normalize)) == pytest.approx(expected, rel=1e-6)


def test_upstream_never_divides_by_less_than_one():
    """A row whose weights add up to 0.2 is divided by 1."""
    mask, weights = jnp.ones((1, 2), bool), jnp.array([[0.1, 0.1]])
    assert float(reduce_tokens(jnp.array([[1.0, 3.0]]), mask, weights, normalize="upstream")) == pytest.approx(0.4)


def test_a_row_weight_cancels_only_upstream():
    """Why sequence agreement did nothing in the released code, and does something here."""
    mask, doubled = ROWS[:2], jnp.array([[2.0], [1.0]]) * jnp.ones((2, 4))

    def reduced(normalize, weights):
        return float(reduce_tokens(VALUES[:2], mask, weights, normalize=normalize))

    assert reduced("upstream", doubled) == pytest.approx(reduced("upstream", None))
    assert reduced("sequence", doubled) == pytest.approx((2 * 2.5 + 15) / 2)
    assert reduced("batch", doubled) == pytest.approx((20 + 30) / 10)


@pytest.mark.parametrize("normalize", ["batch", "sequence", "upstream"])
def test_masked_values_are_never_looked_at(normalize):
    poisoned = jnp.where(ROWS, VALUES, jnp.nan)
    assert reduce_tokens(poisoned, ROWS, normalize=normalize) == reduce_tokens(VALUES, ROWS, normalize=normalize)
    gradient = jax.grad(lambda x: reduce_tokens(x, ROWS, normalize=normalize))(poisoned)
    np.testing.assert_array_equal(gradient, reduction_weights(ROWS, normalize=normalize))


@pytest.mark.parametrize("normalize", ["batch", "sequence", "upstream"])
def test_a_batch_without_tokens_is_zero(normalize):
    nothing = jnp.zeros((2, 3), bool)
    poisoned = jnp.full((2, 3), jnp.nan)
    assert float(reduce_tokens(poisoned, nothing, normalize=normalize)) == 0.0
    assert float(reduce_tokens(jnp.ones((2, 3)), ~nothing, jnp.zeros((2, 3)), normalize=normalize)) == 0.0


@settings(max_examples=40, deadline=None)
@given(
    mask=arrays.arrays(bool, (6, 4)),
    values=arrays.arrays(np.float32, (6, 4), elements=st.floats(-10, 10, width=32)),
    normalize=st.sampled_from(["batch", "sequence", "upstream"]),
    order=st.permutations(range(6)),
    cut=st.integers(1, 5),
)
def test_any_split_has_the_same_sum(mask, values, normalize, order, cut):
    mask, values, order = jnp.asarray(mask), jnp.asarray(values), np.array(order)
    coefficients = reduction_weights(mask, normalize=normalize)
    whole = float(reduce_tokens(values, mask, normalize=normalize))
    parts = (order[:cut], order[cut:])
    split = sum(float(weighted_sum(values[part], mask[part], coefficients[part])) for part in parts)
    assert split == pytest.approx(whole, abs=1e-5)


def test_the_weights_carry_no_gradient():
    gradient = jax.grad(lambda w: reduce_tokens(VALUES, ROWS, w, normalize="batch"))(WEIGHTS)
    assert not np.any(gradient)


def test_an_unknown_reduction(without_shape_hook):
    with pytest.raises(ValueError, match="normalize is 'token'; expected batch, sequence or upstream"):
        reduce_tokens(VALUES, ROWS, normalize="token")


def test_nll_is_the_mean_cross_entropy_of_the_gold_tokens():
    """At temperature 1 whatever the sampling temperature, with a gradient of (p − onehot)/tokens."""
    options = Objective(loss="nll", temperature=TEMPERATURE)
    plan = token_plan(MASK, settings=options)

    def loss(logits):
        scores = score_tokens(logits, None, IDS, settings=options)
        terms = objective(scores, HIDDEN, TeacherScores(), MASK, plan, settings=options)
        assert tuple(terms) == options.terms == ("nll",)
        return terms["nll"], scores

    (value, scores), gradient = jax.value_and_grad(loss, has_aux=True)(STUDENT)
    logp = np.asarray(jax.nn.log_softmax(STUDENT))
    chosen = np.take_along_axis(logp, np.asarray(IDS)[..., None], -1)[..., 0]
    assert float(value) == pytest.approx(-chosen[np.asarray(MASK)].mean(), abs=1e-6)
    np.testing.assert_allclose(scores.student_logp, chosen, atol=1e-6)
    assert scores.divergence is None
    expected = (np.exp(logp) - np.eye(5)[np.asarray(IDS)]) / 6 * np.asarray(MASK)[..., None]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_the_divergence_term_has_the_gradient_of_the_reduced_divergence():
    """Through the three steps of the objective, at the temperature of the loss."""
    options = Objective(alpha=0.5, temperature=TEMPERATURE)
    plan = token_plan(MASK, settings=options)

    def through_objective(logits):
        scores = score_tokens(logits, TEACHER * TEMPERATURE, IDS, settings=options)
        return objective(scores, HIDDEN, TeacherScores(), MASK, plan, settings=options)["divergence"]

    def direct(logits):
        return reduce_tokens(token_divergence(logits / TEMPERATURE, TEACHER, alpha=0.5), MASK)

    found, expected = (jax.value_and_grad(loss)(STUDENT * TEMPERATURE) for loss in (through_objective, direct))
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
    assert np.any(found[1][0]) and not np.any(found[1][1, 2:]), "masked tokens have no gradient"


def test_scores_are_those_of_the_scaled_logits():
    """The sampler draws from logits / temperature, so the trainer's log-probs are read there too."""
    options = Objective(alpha=0.5, temperature=TEMPERATURE)
    scores = score_tokens(STUDENT * TEMPERATURE, TEACHER * TEMPERATURE, IDS, settings=options)
    np.testing.assert_allclose(scores.student_logp, token_log_probs(STUDENT, IDS), atol=1e-6)
    np.testing.assert_allclose(scores.entropy, entropy(STUDENT), atol=1e-6)
    np.testing.assert_allclose(scores.divergence, token_divergence(STUDENT, TEACHER, alpha=0.5), atol=1e-6)
    assert all(score.dtype == jnp.float32 for score in scores[:3]) and scores.entry_capped is None
    capped = score_tokens(STUDENT, TEACHER, IDS, settings=Objective(entry_ceiling=0.01)).entry_capped
    uncapped = score_tokens(STUDENT, TEACHER, IDS, settings=Objective(entry_ceiling=1e3)).entry_capped
    assert capped.any() and not uncapped.any()


def test_the_entropy_of_the_scores_carries_no_gradient():
    options = Objective(temperature=TEMPERATURE)
    assert not np.any(jax.grad(lambda x: score_tokens(x, None, IDS, settings=options).entropy.sum())(STUDENT))


def test_the_entry_ceiling_reaches_the_scores():
    options = Objective(temperature=TEMPERATURE, entry_ceiling=0.05)
    found = score_tokens(STUDENT * TEMPERATURE, TEACHER * TEMPERATURE, IDS, settings=options).divergence
    np.testing.assert_allclose(found, token_divergence(STUDENT, TEACHER, alpha=0.0, entry_ceiling=0.05), atol=1e-6)
    assert np.all(found < token_divergence(STUDENT, TEACHER, alpha=0.0))


def test_the_entry_ceiling_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2): the entries 0.304 and −0.173, of which the first is cut to 0.2."""
    student, teacher = two_tokens(0.5, 0.5), two_tokens(0.75, 0.25)

    def divergence(x):
        return token_divergence(x, teacher, alpha=0.0, entry_ceiling=0.2).sum()

    found, gradient = jax.value_and_grad(divergence)(student)
    assert float(found) == pytest.approx(0.2 + 0.25 * np.log(0.25 / 0.5), abs=1e-6)
    # Only the second entry, −0.25·log p_S(2), still has a gradient: −0.25·(onehot − p_S).
    np.testing.assert_allclose(gradient, [[[0.125, -0.125]]], atol=1e-6)


@pytest.mark.parametrize("entry_ceiling", [0.0, -1.0, float("nan")])
def test_an_entry_ceiling_that_is_not_positive(entry_ceiling):
    with pytest.raises(ValueError, match="entry_ceiling is .*; expected a positive number of nats or None"):
        token_divergence(STUDENT, TEACHER, alpha=0.5, entry_ceiling=entry_ceiling)
