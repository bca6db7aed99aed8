"""Divergence, reduction and objective against numbers computed elsewhere, by hand, or from the definition."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from unisd_jax.losses import (
    Objective,
    entropy,
    log_probs,
    objective,
    reduce_tokens,
    reduction_weights,
    token_divergence,
    token_log_probs,
    weighted_sum,
)

# The test vectors: closed-form logits, numbers computed in float64 by another implementation, printed to six digits.
B, T, V = np.ogrid[:2, :4, :5]
TEMPERATURE = 0.7
STUDENT = jnp.asarray(np.sin(1.3 * B + 0.7 * T + 1.1 * V) / TEMPERATURE, jnp.float32)
TEACHER = jnp.asarray(1.5 * np.cos(0.5 * B + 1.9 * T - 0.8 * V) / TEMPERATURE, jnp.float32)
MASK = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
IDS = jnp.array([[0, 2, 4, 1], [3, 0, 2, 4]])
# alpha: (divergence, reduced loss).
VECTORS = {
    0.0: ([[0.764301, 0.962139, 1.973555, 0.199105], [0.095110, 1.415685, 0.138886, 1.736425]], 0.865086),
    1.0: ([[0.733004, 1.024382, 2.394236, 0.358226], [0.119776, 2.174723, 0.170078, 2.824329]], 1.137356),
    0.1: ([[0.065545, 0.082228, 0.163711, 0.018466], [0.008610, 0.120124, 0.012656, 0.149022]], 0.073427),
    0.5: ([[0.168069, 0.215956, 0.421274, 0.059906], [0.025102, 0.323729, 0.037463, 0.408693]], 0.195358),
    0.9: ([[0.063397, 0.085817, 0.182648, 0.028421], [0.010177, 0.150034, 0.014832, 0.192395]], 0.085088),
}
ENTROPY = [[1.301724, 1.247952, 1.171312, 1.232283], [1.180630, 1.210257]]
ALPHAS = (0.0, 0.1, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("alpha", VECTORS)
def test_the_vectors(alpha):
    divergence, loss = VECTORS[alpha]
    found = token_divergence(STUDENT, TEACHER, alpha=alpha)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, divergence, atol=2e-6)
    assert float(reduce_tokens(found, MASK, normalize="upstream")) == pytest.approx(loss, abs=2e-6)
    through_objective, scores = objective(
        STUDENT * TEMPERATURE, TEACHER * TEMPERATURE, IDS, MASK, reduction_weights(MASK, normalize="upstream"),
        settings=Objective(alpha=alpha, normalize="upstream", temperature=TEMPERATURE),
    )  # fmt: skip
    assert float(through_objective) == pytest.approx(loss, abs=2e-6)
    np.testing.assert_allclose(scores.divergence, divergence, atol=2e-6)


def test_the_entropy_vector():
    found = entropy(STUDENT)
    np.testing.assert_allclose(found[0], ENTROPY[0], atol=2e-6)
    np.testing.assert_allclose(found[1, :2], ENTROPY[1], atol=2e-6)


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


logits = arrays.arrays(np.float32, (2, 1, 2, 6), elements=st.floats(-30, 30, width=32))


@settings(max_examples=50, deadline=None)
@given(logits, st.sampled_from([0.01, 0.1, 0.5, 0.9, 0.99]))
def test_jsd_is_bounded(pair, alpha):
    bound = -alpha * np.log(alpha) - (1 - alpha) * np.log(1 - alpha)
    found = np.asarray(token_divergence(*map(jnp.asarray, pair), alpha=alpha))
    assert np.all(found >= -1e-6) and np.all(found <= bound + 1e-6)


def test_the_bound_is_reached_by_disjoint_distributions():
    student, teacher = jnp.array([[[50.0, -50.0]]]), jnp.array([[[-50.0, 50.0]]])
    for alpha in (0.1, 0.5, 0.9):
        bound = -alpha * np.log(alpha) - (1 - alpha) * np.log(1 - alpha)
        assert token_divergence(student, teacher, alpha=alpha).item() == pytest.approx(bound, rel=1e-5)


def test_the_limits_of_jsd():
    """D/alpha → KL(teacher ‖ student) as alpha → 0, D/(1−alpha) → KL(student ‖ teacher) as alpha → 1."""
    small = 1e-3
    forward, reverse = (token_divergence(STUDENT, TEACHER, alpha=alpha) for alpha in (0.0, 1.0))
    np.testing.assert_allclose(token_divergence(STUDENT, TEACHER, alpha=small) / small, forward, rtol=0.02)
    np.testing.assert_allclose(token_divergence(STUDENT, TEACHER, alpha=1 - small) / small, reverse, rtol=0.02)


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


@pytest.fixture
def without_shape_hook():
    """What a user sees: in production nothing checks the annotations before the function's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


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
    coefficients = reduction_weights(MASK, normalize="batch")

    def loss(logits):
        return objective(logits, None, IDS, MASK, coefficients, settings=options)

    (value, scores), gradient = jax.value_and_grad(loss, has_aux=True)(STUDENT)
    logp = np.asarray(jax.nn.log_softmax(STUDENT))
    chosen = np.take_along_axis(logp, np.asarray(IDS)[..., None], -1)[..., 0]
    assert float(value) == pytest.approx(-chosen[np.asarray(MASK)].mean(), abs=1e-6)
    np.testing.assert_allclose(scores.student_logp, chosen, atol=1e-6)
    np.testing.assert_array_equal(scores.divergence, 0.0)
    expected = (np.exp(logp) - np.eye(5)[np.asarray(IDS)]) / 6 * np.asarray(MASK)[..., None]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_scores_are_those_of_the_scaled_logits():
    """The sampler draws from logits / temperature, so the trainer's log-probs are read there too."""
    options = Objective(alpha=0.5, temperature=TEMPERATURE)
    coefficients = reduction_weights(MASK, normalize="batch")
    raw = STUDENT * TEMPERATURE, TEACHER * TEMPERATURE
    _, scores = objective(*raw, IDS, MASK, coefficients, settings=options)
    np.testing.assert_allclose(scores.student_logp, token_log_probs(STUDENT, IDS), atol=1e-6)
    np.testing.assert_allclose(scores.entropy, entropy(STUDENT), atol=1e-6)

    def leak(logits):
        return sum(x.sum() for x in objective(logits, raw[1], IDS, MASK, coefficients, settings=options)[1])

    assert not np.any(jax.grad(leak)(raw[0])), "the scores are for the metrics and carry no gradient"
