"""Divergences, their gradients and the weighted loss: the right numbers, whatever the inputs and the way to run it."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import kernel_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import ALPHAS, DIFFERENTIABLE, Case, Oracle, error_of_maximum, relative_error

import unisd_jax.kernels
from unisd_jax.kernels import Layout, fused_linear_jsd, fused_linear_jsd_loss, fused_linear_jsd_value_and_grad

MODES = {
    "chunked": {"implementation": "chunked", "chunk_size": 16},
    "blocks": {"chunk_size": 16, "vocab_block": 40},
    "reference": {"implementation": "reference"},
}
FUSED = ["chunked", "blocks"]
CALLS = [(mode, alpha) for mode in MODES for alpha in ALPHAS if mode == "chunked" or alpha in (0, 0.5, 1)]
SCORES = ("divergence", "student_logp", "teacher_logp", "student_entropy", "clipped_divergence")
# Most tests change only the numbers of one call, so that each mode is compiled once for each alpha.
TOKENS, WIDTH, VOCAB, SIZE = 37, 16, 101, 90
STANDARD = {"temperature": 0.5, "vocab_size": SIZE}


@functools.cache
def standard_case():
    case = oracle.random_case(TOKENS, WIDTH, VOCAB, teacher_width=24)
    return case._replace(targets=case.targets % SIZE)


def standard_run(mode, alpha, case=None, *, weights=None, mask=None, ceiling=jnp.inf):
    """(scores, gradients to hidden and head) of the call that most tests share, and the oracle's."""
    case = standard_case() if case is None else case
    weights = oracle.random_weights(TOKENS, names=DIFFERENTIABLE) if weights is None else weights
    weights = {name: weights.get(name, jnp.zeros(TOKENS)) for name in DIFFERENTIABLE}
    mask = jnp.ones(TOKENS, bool) if mask is None else mask
    arrays = case, weights, mask, jnp.broadcast_to(jnp.asarray(ceiling, jnp.float32), TOKENS)
    found = oracle.scores_and_gradients(*arrays, alpha=alpha, **STANDARD, **MODES[mode])
    expected = Oracle(case, alpha=alpha, mask=mask, ceiling=arrays[3], **STANDARD)
    return found, (expected, expected.gradients(weights))


def assert_scores(scores, expected, rtol=2e-6, atol=2e-6):
    for name in SCORES:
        values = getattr(scores, name)
        assert values.dtype == jnp.float32
        np.testing.assert_allclose(values, expected.scores[name], rtol=rtol, atol=atol, err_msg=name)
    np.testing.assert_array_equal(scores.clipped, expected.clipped)
    if scores.entry_capped is not None:
        np.testing.assert_array_equal(scores.entry_capped, expected.entry_capped)


def assert_gradients(found, expected, bound=1e-5):
    for name, gradient, right in zip(("hidden", "head"), found, expected, strict=True):
        assert np.isfinite(gradient).all(), name
        assert error_of_maximum(gradient, right) <= bound, name


def test_the_oracle_s_gradients_are_those_of_its_scores():
    case = oracle.random_case(5, 4, 7, teacher_width=3)
    case = Case(*(np.asarray(x, np.float64) for x in case[:4]), np.asarray(case.targets) % 6)
    weights = oracle.random_weights(5, names=DIFFERENTIABLE)
    steps = [np.random.default_rng(9).normal(size=x.shape) * 1e-5 for x in case[:2]]
    for alpha in ALPHAS:
        for entry_ceiling in (None, 0.05):
            make = functools.partial(
                Oracle, alpha=alpha, temperature=0.7, soft_cap=3.0, vocab_size=6, entry_ceiling=entry_ceiling,
                ceiling=0.2,
            )  # fmt: skip

            def total(case, make=make):
                scores = make(case).scores
                return sum(np.sum(np.asarray(weight, np.float64) * scores[name]) for name, weight in weights.items())

            for field, step, gradient in zip(Case._fields, steps, make(case).gradients(weights), strict=False):
                up, down = (case._replace(**{field: getattr(case, field) + sign * step}) for sign in (1, -1))
                assert np.sum(gradient * step) == pytest.approx((total(up) - total(down)) / 2, rel=1e-6)


# Values and gradients


@pytest.mark.parametrize(("mode", "alpha"), CALLS)
def test_scores_and_gradients_agree_with_float64(mode, alpha):
    ceiling = jnp.asarray(np.random.default_rng(5).uniform(0.3, 1.2, TOKENS), jnp.float32)
    ceiling *= Oracle(standard_case(), alpha=alpha, **STANDARD).scores["divergence"].mean()
    (scores, gradients), (expected, right) = standard_run(
        mode, alpha, mask=oracle.random_mask(TOKENS, 25), ceiling=ceiling
    )
    assert 3 < expected.clipped.sum() < 22
    assert_scores(scores, expected)
    assert relative_error(scores.divergence, expected.scores["divergence"]) <= 1e-5
    assert_gradients(gradients, right)


@pytest.mark.parametrize(
    ("mode", "alpha", "entry_ceiling"),
    [
        ("chunked", 0.0, 0.03),
        ("chunked", 0.5, 0.015),
        ("chunked", 1.0, 0.03),
        ("blocks", 0.5, 0.015),
        ("reference", 0.5, 0.015),
    ],
)
def test_soft_cap_and_entry_ceiling_agree_with_float64(mode, alpha, entry_ceiling):
    case, weights = standard_case(), oracle.random_weights(TOKENS, names=DIFFERENTIABLE)
    options = {"alpha": alpha, "temperature": 0.6, "soft_cap": 2.5, "entry_ceiling": entry_ceiling, "ceiling": 0.3}
    scores, gradients = oracle.scores_and_gradients(case, weights, **options, **MODES[mode])
    expected = Oracle(case, **options)
    assert 3 < expected.entry_capped.sum() and 3 < expected.clipped.sum()
    assert_scores(scores, expected)
    assert_gradients(gradients, expected.gradients(weights))


@pytest.mark.parametrize("mode", ["chunked", "reference"])
def test_without_options_the_teacher_uses_the_student_s_head(mode):
    case, weights = oracle.random_case(21, 8, 50, noise=0.5), oracle.random_weights(21, names=DIFFERENTIABLE)
    scores, gradients = oracle.scores_and_gradients(case, weights, alpha=0.5, **MODES[mode])
    expected = Oracle(case, alpha=0.5)
    assert scores.entry_capped is None and not scores.clipped.any()
    np.testing.assert_array_equal(scores.clipped_divergence, scores.divergence)
    assert_scores(scores, expected)
    assert_gradients(gradients, expected.gradients(weights))


@pytest.mark.parametrize("masked", [False, True])
def test_chunks_of_the_default_size_agree_with_float64(masked):
    """300 tokens are two chunks of 128 and three of 16; half of them one and two."""
    case, weights = oracle.random_case(300, 8, 60), oracle.random_weights(300, names=DIFFERENTIABLE)
    mask = oracle.random_mask(300, 150) if masked else None
    scores, gradients = oracle.scores_and_gradients(case, weights, mask, alpha=0.5)
    expected = Oracle(case, alpha=0.5, mask=mask)
    assert_scores(scores, expected)
    assert_gradients(gradients, expected.gradients(weights))


@pytest.mark.parametrize(("mode", "alpha"), CALLS)
def test_a_small_divergence_keeps_its_digits(mode, alpha):
    """The logits are exact here, so that what is measured is the sum over the vocabulary."""
    rng = np.random.default_rng(0)
    for noise, bound in ((0.1, 2e-5), (0.01, 5e-4)):
        head = rng.normal(size=(VOCAB, WIDTH))
        teacher_head = np.zeros((VOCAB, 24))
        teacher_head[:, :WIDTH] = head + noise * rng.normal(size=head.shape)
        case = standard_case()._replace(
            student_hidden=jnp.eye(TOKENS, WIDTH), student_head=jnp.asarray(head, jnp.float32),
            teacher_hidden=jnp.eye(TOKENS, 24), teacher_head=jnp.asarray(teacher_head, jnp.float32),
        )  # fmt: skip
        (scores, _), (expected, _) = standard_run(mode, alpha, case, mask=jnp.arange(TOKENS) < WIDTH)
        found, right = (x[:WIDTH] for x in (scores.divergence, expected.scores["divergence"]))
        assert right.max() < 5 * noise**2
        # The plain formulas subtract numbers of nearly the same size.
        assert relative_error(found, right) <= (bound if mode != "reference" else 20 * bound), noise


@pytest.mark.parametrize(
    ("dtype", "mode"), [(jnp.bfloat16, "chunked"), (jnp.bfloat16, "blocks"), (jnp.float16, "chunked")]
)
def test_half_precision_inputs_are_summed_in_float32(dtype, mode):
    case = oracle.random_case(24, 256, 90, dtype=dtype)
    weights = oracle.random_weights(24, names=DIFFERENTIABLE)
    scores, gradients = oracle.scores_and_gradients(case, weights, alpha=0.5, **MODES[mode])
    expected = Oracle(case, alpha=0.5)
    assert_scores(scores, expected)
    assert {gradient.dtype for gradient in gradients} == {jnp.dtype(dtype)}
    # A float16 gradient is rounded once, at the end; bfloat16 factors enter the products rounded.
    assert_gradients(gradients, expected.gradients(weights), 2e-2 if dtype == jnp.bfloat16 else 1e-3)


@pytest.mark.parametrize(
    ("mode", "by", "names"),
    [
        ("chunked", "student_hidden", DIFFERENTIABLE),
        ("chunked", "student_hidden", ("student_logp",)),
        ("chunked", "student_head", DIFFERENTIABLE),
        ("blocks", "student_head", ("student_logp",)),
    ],
)
def test_one_score_s_gradient_to_one_array_is_right(mode, by, names):
    case, mask, weights = standard_case(), oracle.random_mask(TOKENS, 25), oracle.random_weights(TOKENS, names=names)
    foul = {name: jnp.where(mask, weight, jnp.nan) for name, weight in weights.items()}
    _, (gradient,) = oracle.scores_and_gradients(case, foul, mask, by=(by,), alpha=0.9, **MODES[mode])
    right = Oracle(case, alpha=0.9, mask=mask).gradients(weights)
    assert error_of_maximum(gradient, right[by == "student_head"]) <= 1e-5


@pytest.mark.parametrize("mode", ["chunked", "reference"])
def test_nothing_flows_to_the_teacher(mode):
    case, weights = standard_case(), jnp.ones(TOKENS)

    def total(taught, head):
        arrays, options = (*case[:2], taught, head, case.targets), {"alpha": 0.5, "quantile": 0.8} | MODES[mode]
        scores = fused_linear_jsd(*arrays, **options)
        floats = [x for x in scores if x is not None and x.dtype == jnp.float32]
        return sum(map(jnp.sum, floats)) + fused_linear_jsd_loss(*arrays, weights, **options)[0]

    gradients = jax.jit(jax.grad(total, (0, 1)))(case.teacher_hidden, case.teacher_head)
    assert not any(np.any(gradient) for gradient in gradients)


# The weighted loss


CLIPS = {
    "no clip": {},
    "a ceiling": {"ceiling": jnp.linspace(0.15, 0.5, TOKENS)},
    "a quantile": {"quantile": 0.8},
}


def standard_loss(mode, clip, *, case=None, weights=None, mask=None, **changes):
    """What `oracle.loss_and_gradients` gives for hidden states, head and weights, and the oracle."""
    case = standard_case() if case is None else case
    mask = oracle.random_mask(TOKENS, 26) if mask is None else mask
    options = {"alpha": 0.5, "temperature": 1.5, "vocab_size": SIZE} | CLIPS[clip] | changes
    by = ("student_hidden", "student_head", "weights")
    found = oracle.loss_and_gradients(case, weights, mask=mask, by=by, **options, **MODES[mode])
    return found, Oracle(case, mask=mask, **options)


@pytest.mark.parametrize(
    ("mode", "clip"), [(mode, clip) for mode in MODES for clip in CLIPS if mode == "chunked" or clip != "no clip"]
)
def test_the_loss_is_the_weighted_sum_and_so_are_its_gradients(mode, clip):
    (weights,) = oracle.random_weights(TOKENS).values()
    ((loss, scores), found), expected = standard_loss(mode, clip, weights=weights)
    assert (expected.clipped.sum() > 3) == (clip != "no clip")
    assert loss == pytest.approx(expected.loss(weights), rel=1e-5, abs=1e-6)
    assert_scores(scores, expected)
    assert_gradients(found[:2], expected.gradients({"clipped_divergence": weights}))
    np.testing.assert_allclose(found[2], expected.scores["clipped_divergence"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "clip"), [("chunked", "a ceiling"), ("chunked", "a quantile"), ("blocks", "a quantile")]
)
def test_the_trainer_s_function_gives_the_same(mode, clip):
    case, (weights,), mask = standard_case(), oracle.random_weights(TOKENS).values(), oracle.random_mask(TOKENS, 26)
    options = {"alpha": 0.5, "temperature": 1.5, "mask": mask} | CLIPS[clip]
    (loss, scores), found = oracle.value_and_grad(case, weights, **options, **MODES[mode])
    expected = Oracle(case, **options)
    assert loss == pytest.approx(expected.loss(weights), rel=1e-5, abs=1e-6)
    assert_scores(scores, expected)
    assert_gradients(found, expected.gradients({"clipped_divergence": weights}))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_quantile_s_loss_is_right_for_the_divergences_without_a_bound(alpha):
    """What the clipped tokens, the largest of all, put into the head's gradient is taken out of a float32 sum again."""
    case, (weights,) = oracle.random_case(128, 16, VOCAB, spread=4.0), oracle.random_weights(128).values()
    expected = Oracle(case, alpha=alpha, quantile=0.9)
    (loss, _), found = oracle.loss_and_gradients(case, weights, alpha=alpha, quantile=0.9)
    assert loss == pytest.approx(expected.loss(weights), rel=1e-5)
    assert_gradients(found, expected.gradients({"clipped_divergence": weights}))


def test_a_frozen_head_changes_no_gradient_of_the_hidden_states():
    case, (weights,) = standard_case(), oracle.random_weights(TOKENS).values()
    options = {"alpha": 0.1, "quantile": 0.8, "chunk_size": 16}
    right = Oracle(case, **options).gradients({"clipped_divergence": weights})[0]

    def stopped(hidden, head):
        head = jax.lax.stop_gradient(head)
        return fused_linear_jsd_loss(hidden, head, *case[2:], weights, **options)[0]

    hidden, head = jax.jit(jax.grad(stopped, (0, 1)))(*case[:2])
    assert error_of_maximum(hidden, right) <= 1e-5 and not head.any()
    for mode in ({}, {"vocab_block": 40}):
        _, (hidden, head) = oracle.value_and_grad(case, weights, head_gradient=False, **options, **mode)
        assert error_of_maximum(hidden, right) <= 1e-5 and head is None


@pytest.mark.parametrize("mode", FUSED)
def test_the_trainer_s_gradients_are_float32_whatever_the_inputs(mode):
    case, (weights,) = oracle.random_case(16, 32, 90, dtype=jnp.bfloat16), oracle.random_weights(16).values()
    (loss, _), found = oracle.value_and_grad(case, weights, alpha=0.5, **MODES[mode])
    assert_gradients(found, Oracle(case, alpha=0.5).gradients({"divergence": weights}), 2e-2)
    assert [x.dtype for x in (loss, *found)] == [jnp.float32] * 3


def test_a_scaled_loss_keeps_float16_gradients_from_vanishing():
    case, weights = oracle.random_case(16, 16, 90, dtype=jnp.float16), jnp.full(16, 1e-6)

    def scaled(hidden):
        return 2.0**15 * fused_linear_jsd_loss(hidden, *case[1:], weights, alpha=0.5, chunk_size=16)[0]

    right = Oracle(case, alpha=0.5).gradients({"divergence": 2.0**15 * weights})[0]
    assert error_of_maximum(jax.jit(jax.grad(scaled))(case.student_hidden), right) <= 2e-3


# Ties


@pytest.mark.parametrize("mode", MODES)
def test_a_token_at_its_ceiling_keeps_its_gradient_and_one_above_has_none(mode):
    weights = {"clipped_divergence": jnp.ones(TOKENS)}
    (free, gradients), _ = standard_run(mode, 0.5, weights=weights)
    (tied, same), _ = standard_run(mode, 0.5, weights=weights, ceiling=free.divergence)
    assert not tied.clipped.any()
    np.testing.assert_array_equal(tied.clipped_divergence, free.divergence)
    for found, expected in zip(same, gradients, strict=True):
        np.testing.assert_array_equal(found, expected)
    below = jnp.nextafter(free.divergence, jnp.zeros(TOKENS))
    (capped, none), _ = standard_run(mode, 0.5, weights=weights, ceiling=below)
    assert capped.clipped.all() and not any(np.any(gradient) for gradient in none)
    np.testing.assert_array_equal(capped.clipped_divergence, below)


@pytest.mark.parametrize(("mode", "quantile"), [("chunked", 0.5), ("chunked", 1.0), ("reference", 0.5)])
def test_a_quantile_that_is_a_token_s_divergence_leaves_that_token_its_gradient(mode, quantile):
    case, weights = oracle.random_case(21, 8, 50), jnp.ones(21) / 21
    (_, scores), found = oracle.loss_and_gradients(case, weights, alpha=0.5, quantile=quantile, **MODES[mode])
    assert scores.clipped.sum() == (10 if quantile == 0.5 else 0)
    at = int(np.argsort(scores.divergence)[10 if quantile == 0.5 else 20])
    assert scores.clipped_divergence[at] == scores.divergence[at] and found[0][at].any()
    expected = Oracle(case, alpha=0.5, ceiling=float(scores.divergence[at]) * (1 + 1e-5))
    assert_gradients(found, expected.gradients({"clipped_divergence": weights}))


def test_a_quantile_between_equal_divergences_is_that_divergence():
    """A hundred times ten tokens, all ten the same: rounding of the interpolation may clip none of them."""
    case = oracle.random_case(100, 8, 50)

    def clipped(hidden, taught):
        rows = [jnp.broadcast_to(x, (10, *x.shape)) for x in (hidden, taught)]
        arrays = rows[0], case.student_head, rows[1], case.teacher_head, jnp.zeros(10, jnp.int32)
        return fused_linear_jsd(*arrays, alpha=0.5, quantile=0.95, implementation="reference").clipped.any()

    found = jax.jit(jax.vmap(clipped))(case.student_hidden, case.teacher_hidden)
    assert found.sum() == 0


# Inputs at the edge


def extreme_cases():
    """Student and teacher logits of ±1e4, agreeing, contrary, disjoint and with a single likely token."""
    case = standard_case()
    signs = np.sign(np.random.default_rng(2).normal(size=(VOCAB,)))
    head, hidden = np.zeros((VOCAB, WIDTH)), np.zeros((TOKENS, WIDTH))
    head[:, 0], head[:, 1] = signs, np.where(np.arange(VOCAB) % 2, 1.0, -1.0)
    head[7, 2] = 1.0
    hidden[:, :3] = 1e4 * np.random.default_rng(3).permutation(np.eye(3)[np.arange(TOKENS) % 3])
    hidden[::5] *= 1e-4
    for change in (1.0, -1.0):
        taught = np.concatenate([change * hidden, np.zeros((TOKENS, 8))], axis=1)
        teacher_head = np.concatenate([head, np.zeros((VOCAB, 8))], axis=1)
        yield case._replace(
            **{
                name: jnp.asarray(x, jnp.float32)
                for name, x in zip(Case._fields, (hidden, head, taught, teacher_head), strict=False)
            }
        )


@pytest.mark.parametrize(("mode", "alpha"), CALLS)
def test_extreme_logits_and_disjoint_supports_stay_finite_and_right(mode, alpha):
    for case in extreme_cases():
        (scores, gradients), (expected, right) = standard_run(mode, alpha, case)
        # float32 holds a log-prob of -4e4 to 2e-3.
        assert_scores(scores, expected, rtol=1e-3, atol=4e-3)
        # For the reverse KL, log-ratios of 4e4 are subtracted from each other.
        assert_gradients(gradients, right, 5e-3 if alpha < 1 else np.inf)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nothing_at_masked_tokens_reaches_anything(mode, poison):
    case, mask = standard_case(), oracle.random_mask(TOKENS, 20)
    dirty = case._replace(
        student_hidden=jnp.where(mask[:, None], case.student_hidden, poison),
        teacher_hidden=jnp.where(mask[:, None], case.teacher_hidden, poison),
        targets=jnp.where(mask, case.targets, jnp.where(jnp.arange(TOKENS) % 2, 10**6, -5)),
    )
    weights = oracle.random_weights(TOKENS, names=DIFFERENTIABLE)
    foul = {name: jnp.where(mask, weight, poison) for name, weight in weights.items()}
    # JAX differentiates the reference, and there 0 · NaN is NaN.
    (scores, gradients), (expected, _) = standard_run(
        mode, 0.5, dirty, weights=weights if mode == "reference" else foul, mask=mask
    )
    assert_scores(scores, expected)
    assert not any(np.any(np.asarray(values)[~mask]) for values in scores if values is not None)
    assert_gradients(gradients, expected.gradients(weights))
    for clip in ("a ceiling", "a quantile"):
        ((loss, _), found), expected = standard_loss(mode, clip, case=dirty, weights=foul["divergence"], mask=mask)
        assert loss == pytest.approx(expected.loss(weights["divergence"]), rel=1e-5)
        assert_gradients(found[:2], expected.gradients({"clipped_divergence": weights["divergence"]}))
        assert not np.any(found[2][~mask])


@pytest.mark.parametrize("mode", MODES)
def test_a_ceiling_at_a_masked_token_does_not_matter(mode):
    mask, weights = oracle.random_mask(TOKENS, 20), jnp.ones(TOKENS)
    ceiling = jnp.where(mask, CLIPS["a ceiling"]["ceiling"], jnp.nan)
    ((loss, scores), found), expected = standard_loss(mode, "a ceiling", weights=weights, mask=mask, ceiling=ceiling)
    assert_scores(scores, expected)
    assert_gradients(found[:2], expected.gradients({"clipped_divergence": weights}))
    np.testing.assert_allclose(found[2], expected.scores["clipped_divergence"], rtol=1e-5, atol=1e-6)
    assert loss == pytest.approx(expected.loss(weights), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_target_outside_the_vocabulary_is_nan_there_and_nowhere_else(mode):
    case = standard_case()
    wrong = jnp.arange(TOKENS) % 4 == 0
    ids = jnp.asarray([-1, SIZE, VOCAB, 2**31 - 1, -(2**31)], jnp.int32)
    case = case._replace(targets=jnp.where(wrong, ids[jnp.arange(TOKENS) % 5], case.targets))
    weights = oracle.random_weights(TOKENS, names=DIFFERENTIABLE)
    weights["student_logp"] = jnp.where(wrong, 0.0, weights["student_logp"])
    (scores, gradients), (expected, right) = standard_run(mode, 0.5, case, weights=weights)
    np.testing.assert_array_equal(np.isnan(scores.student_logp), wrong)
    np.testing.assert_array_equal(np.isnan(scores.teacher_logp), wrong)
    assert_scores(scores, expected)
    assert_gradients(gradients, right)


@pytest.mark.parametrize("mode", MODES)
def test_no_token_that_counts_gives_zeros(mode):
    (scores, gradients), _ = standard_run(mode, 0.5, mask=jnp.zeros(TOKENS, bool))
    assert not any(np.any(x) for x in (*jax.tree.leaves(scores), *gradients))


@pytest.mark.parametrize("clip", ["a ceiling", "a quantile"])
@pytest.mark.parametrize("mode", MODES)
def test_the_loss_of_no_token_is_zero(mode, clip):
    ((loss, scores), found), _ = standard_loss(mode, clip, weights=jnp.ones(TOKENS), mask=jnp.zeros(TOKENS, bool))
    assert not any(np.any(x) for x in (*jax.tree.leaves(scores), *found)) and loss == 0


@pytest.mark.parametrize(
    ("tokens", "vocab", "mode", "quantile"),
    [
        (0, 13, "chunked", None),
        (0, 13, "chunked", 0.8),
        (0, 13, "blocks", None),
        (1, 13, "chunked", 0.8),
        (1, 13, "blocks", None),
        (5, 1, "chunked", 0.8),
        (5, 1, "blocks", None),
    ],
)
def test_one_token_or_none_and_a_vocabulary_of_one(tokens, vocab, mode, quantile):
    case, weights = oracle.random_case(tokens, 4, vocab), jnp.ones(tokens)
    options = {"alpha": 0.5, "quantile": quantile} | MODES[mode]
    (loss, scores), gradients = oracle.loss_and_gradients(case, weights, **options)
    expected = Oracle(case, **options)
    assert loss == pytest.approx(expected.loss(weights), rel=1e-5, abs=1e-7)
    assert_scores(scores, expected)
    for gradient, right in zip(gradients, expected.gradients({"clipped_divergence": weights}), strict=True):
        assert gradient.shape == right.shape
        np.testing.assert_allclose(gradient, right, rtol=1e-4, atol=1e-6)


# Any call


COMPILED = [  # what is compiled; the numbers are drawn
    dict(tokens=29, vocab=67, alpha=0.5, dtype=jnp.float32, chunk_size=8, temperature=0.5),
    dict(tokens=29, vocab=67, alpha=0.0, dtype=jnp.float16, chunk_size=None, vocab_block=16, temperature=2.0),
    dict(tokens=13, vocab=131, alpha=0.2, dtype=jnp.bfloat16, chunk_size=100, soft_cap=5.0, quantile=0.6),
]


@settings(deadline=None, max_examples=25)
@given(
    call=st.sampled_from(COMPILED),
    seed=st.integers(0, 2**16),
    spread=st.sampled_from([0.1, 2.0, 10.0]),
    noise=st.sampled_from([None, 0.3]),
    share=st.floats(0, 1),
    ceiling=st.floats(0.05, 3),
)
def test_any_call_gives_the_oracle_s_numbers_and_the_same_by_either_function(call, seed, spread, noise, share, ceiling):
    call = dict(call)
    tokens, vocab, dtype = call.pop("tokens"), call.pop("vocab"), call.pop("dtype")
    case = oracle.random_case(tokens, 6, vocab, seed, dtype=dtype, spread=spread, noise=noise)
    case = case._replace(teacher_head=case.student_head if noise else case.teacher_head)
    case = case._replace(targets=case.targets % call.get("vocab_size", vocab))
    call["mask"] = oracle.random_mask(tokens, round(share * tokens), seed)
    if "quantile" not in call:
        call["ceiling"] = jnp.float32(ceiling)
    weights = oracle.random_weights(tokens, seed)["divergence"]
    expected = Oracle(case, **call)
    apart = np.abs(expected.scores["divergence"] - expected.ceiling) > 1e-5
    if "quantile" in call and not call["mask"].any():
        return  # a test of its own
    scores, gradients = oracle.scores_and_gradients(case, {"clipped_divergence": weights}, **call)
    (loss, _), same = oracle.loss_and_gradients(case, weights, **call)
    assert loss == pytest.approx(expected.loss(weights), rel=1e-4, abs=1e-5)
    assert loss == pytest.approx(float(jnp.sum(weights * scores.clipped_divergence)), rel=1e-5, abs=1e-6)
    for name in SCORES:
        np.testing.assert_allclose(getattr(scores, name), expected.scores[name], rtol=2e-5, atol=2e-5, err_msg=name)
    np.testing.assert_array_equal(scores.clipped[apart], expected.clipped[apart])
    if apart.all():
        bound = 2e-2 if dtype == jnp.bfloat16 else 2e-3
        right = expected.gradients({"clipped_divergence": weights})
        for found in (gradients, same):
            for gradient, value in zip(found, right, strict=True):
                largest = max(np.abs(value).max(), 1e-4)  # float16 has steps of 6e-8
                np.testing.assert_allclose(gradient.astype(jnp.float32), value, rtol=0, atol=bound * largest)


# Inside other transformations


def loss_of(case, weights, mask, **options):
    options = {"alpha": 0.5, "quantile": 0.8, "chunk_size": 8} | options
    return fused_linear_jsd_loss(*case, weights, mask=mask, **options)[0]


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_over_micro_batches_is_differentiated(remat):
    case, mask, (weights,) = standard_case(), oracle.random_mask(36, 25), oracle.random_weights(36).values()
    rows = jax.tree.map(
        lambda x: x[:36].reshape(3, 12, *x.shape[1:]), (case.student_hidden, case.teacher_hidden, case.targets)
    )
    rows = (*rows, weights.reshape(3, 12), mask.reshape(3, 12))

    def part(head, hidden, taught, targets, weights, mask):
        return loss_of((hidden, head, taught, case.teacher_head, targets), weights, mask)

    step = jax.checkpoint(part) if remat else part

    @jax.jit
    def gradients(hidden, head):
        def total(hidden, head):
            return jax.lax.scan(lambda sum_, row: (sum_ + step(head, *row), None), 0.0, (hidden, *rows[1:]))[0]

        return jax.grad(total, (0, 1))(hidden, head)

    hidden, head = gradients(rows[0], case.student_head)
    right = [
        Oracle(
            Case(rows[0][i], case.student_head, rows[1][i], case.teacher_head, rows[2][i]),
            alpha=0.5, quantile=0.8, mask=rows[4][i],
        ).gradients({"clipped_divergence": rows[3][i]})
        for i in range(3)
    ]  # fmt: skip
    assert error_of_maximum(hidden, np.stack([x[0] for x in right])) <= 1e-5
    assert error_of_maximum(head, sum(x[1] for x in right)) <= 1e-5


def test_a_batch_of_calls_is_each_call():
    case, (weights,) = standard_case(), oracle.random_weights(36).values()
    batch = Case(*(x[:36].reshape(2, 18, *x.shape[1:]) if i in (0, 2, 4) else x for i, x in enumerate(case)))
    masks = jnp.stack([oracle.random_mask(18, 3), oracle.random_mask(18, 17)])
    axes = Case(0, None, 0, None, 0)

    def grads(case, weights, mask):
        arrays = case.student_hidden, case.student_head
        return jax.grad(lambda hidden, head: loss_of((hidden, head, *case[2:]), weights, mask), (0, 1))(*arrays)

    found = jax.jit(jax.vmap(grads, (axes, 0, 0)))(batch, weights.reshape(2, 18), masks)
    for i in range(2):
        one = Case(*(x[i] if axis == 0 else x for x, axis in zip(batch, axes, strict=True)))
        right = Oracle(one, alpha=0.5, quantile=0.8, mask=masks[i])
        right = right.gradients({"clipped_divergence": weights.reshape(2, 18)[i]})
        assert_gradients([x[i] for x in found], right)


def test_a_call_without_jit_gives_the_same():
    case, (weights,) = oracle.random_case(5, 4, 11), oracle.random_weights(5).values()
    loss, scores = fused_linear_jsd_loss(*case, weights, alpha=0.5)
    expected = Oracle(case, alpha=0.5)
    assert loss == pytest.approx(expected.loss(weights), rel=1e-5)
    assert_scores(scores, expected)


@pytest.mark.parametrize("mode", ["chunked", "reference"])
def test_no_gradient_flows_through_the_scores_of_the_loss(mode):
    case, (weights,) = standard_case(), oracle.random_weights(TOKENS).values()

    def scores(hidden, head):
        scores = fused_linear_jsd_loss(hidden, head, *case[2:], weights, alpha=0.5, **MODES[mode])[1]
        return scores.divergence.sum() + scores.student_logp.sum() + scores.student_entropy.sum()

    assert not any(np.any(x) for x in jax.jit(jax.grad(scores, (0, 1)))(*case[:2]))


# What is refused


def bad_call(**changes):
    case = oracle.random_case(4, 3, 6)
    return case._asdict() | {"alpha": 0.5} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_hidden": jnp.zeros((4, 2))}, r"student_hidden \(4, 2\).*last axes of student_hidden and stud"),
        ({"teacher_hidden": jnp.zeros((4, 2))}, r"teacher_hidden \(4, 2\).*last axes of teacher_hidden and teac"),
        ({"teacher_hidden": jnp.zeros((5, 3))}, r"teacher_hidden \(5, 3\).*first axes"),
        ({"teacher_head": jnp.zeros((7, 3))}, r"teacher_head \(7, 3\).*same vocabulary"),
        ({"targets": jnp.zeros(5, jnp.int32)}, r"targets \(5,\).*first axes"),
        ({"student_hidden": jnp.zeros((2, 4, 3))}, r"student_hidden \(2, 4, 3\).*expected hidden states \[N, H\]"),
        ({"targets": jnp.zeros((4, 1), jnp.int32)}, r"targets \(4, 1\).*targets \[N\]"),
        ({"student_head": jnp.zeros((0, 3)), "teacher_head": jnp.zeros((0, 3))}, "at least one row"),
        ({"student_hidden": jnp.zeros((4, 3), jnp.int32)}, "student_hidden has dtype int32"),
        ({"teacher_head": jnp.zeros((6, 3), jnp.int8)}, "teacher_head has dtype int8"),
        ({"targets": jnp.zeros(4)}, "targets have dtype float32"),
        ({"mask": jnp.ones(4)}, r"mask is float32 \(4,\); expected bool \(4,\)"),
        ({"mask": jnp.ones(3, bool)}, r"mask is bool \(3,\)"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"soft_cap": -3.0}, "soft_cap is -3.0"),
        ({"ceiling": 0.3, "quantile": 0.9}, "ceiling is 0.3 and quantile is 0.9"),
        ({"ceiling": 0.0}, "ceiling is 0.0"),
        ({"ceiling": float("nan")}, "ceiling is nan"),
        ({"ceiling": jnp.ones(3)}, r"ceiling.*\(3,\)"),
        ({"entry_ceiling": -1.0}, "entry_ceiling is -1.0"),
        ({"quantile": 0.0}, "quantile is 0.0"),
        ({"quantile": 1.5}, "quantile is 1.5"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"vocab_block": -4}, "vocab_block is -4"),
        ({"vocab_size": 7}, "vocab_size is 7; expected 1 to 6"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"implementation": "torch"}, "implementation is 'torch'; expected one of auto, chunked"),
        ({"layout": Layout(jax.make_mesh((1,), ("data",)), ("data",), ("model",))}, r"\['model'\].*\['data'\]"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments_are_named(without_shape_hook, changes, message):
    with pytest.raises(ValueError, match=message):
        fused_linear_jsd(**bad_call(**changes))
    for function in (fused_linear_jsd_loss, fused_linear_jsd_value_and_grad):
        with pytest.raises(ValueError, match=message):
            function(**bad_call(weights=jnp.ones(4), **changes))


def test_bad_weights_and_a_reference_without_gradients_of_its_own_are_named(without_shape_hook):
    for function in (fused_linear_jsd_loss, fused_linear_jsd_value_and_grad):
        with pytest.raises(ValueError, match=r"weights have shape \(3,\), targets \(4,\)"):
            function(**bad_call(weights=jnp.ones(3)))
    with pytest.raises(ValueError, match="implementation is 'reference'"):
        fused_linear_jsd_value_and_grad(**bad_call(weights=jnp.ones(4), implementation="reference"))


def test_the_shape_hook_is_on_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        fused_linear_jsd(**bad_call(alpha="half"))


def test_the_public_names_are_those_of_the_module():
    from unisd_jax.kernels import fused_linear_jsd as function
    from unisd_jax.kernels.fused_linear_jsd import api

    assert function is api.fused_linear_jsd
    assert unisd_jax.kernels.fused_linear_jsd_loss is api.fused_linear_jsd_loss
    assert set(unisd_jax.kernels.__all__) <= set(dir(unisd_jax.kernels))


JAX_ALONE = """
import sys

ALLOWED = {"jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "unisd_jax", *sys.stdlib_module_names}

class Filtered:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ALLOWED or name.startswith("_"):
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Filtered, sys.meta_path)
import jax, jax.numpy as jnp
from unisd_jax.kernels import fused_linear_jsd, fused_linear_logprob
hidden, head, ids = jnp.ones((3, 4)), jnp.ones((5, 4)), jnp.zeros(3, int)
print(fused_linear_jsd(hidden, head, hidden, None, ids, alpha=0.5).student_logp.shape, end=" ")
print(jax.grad(lambda x: fused_linear_logprob(x, head, ids).logp.sum())(hidden).shape)
import flax
"""


def test_the_kernels_need_nothing_but_jax():
    run = subprocess.run([sys.executable, "-c", JAX_ALONE], capture_output=True, text=True, timeout=120)
    assert run.stdout == "(3,) (3, 4)\n", run.stderr
    assert run.stderr.endswith("No module named 'flax'\n"), "nothing else could be imported"
