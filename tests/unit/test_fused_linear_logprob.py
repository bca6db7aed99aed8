import functools

import jax
import jax.numpy as jnp
import jaxtyping
import kernel_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import Case, Oracle, error_of_maximum

import unisd_jax.kernels
from unisd_jax.kernels import Layout, fused_linear_logprob
from unisd_jax.kernels.fused_linear_logprob import LogprobScores
from unisd_jax.kernels.fused_linear_logprob import api as api_module

MODES = {
    "reference": {"implementation": "reference"},
    "chunked": {"implementation": "chunked", "chunk_size": 8},
    "blocks": {"chunk_size": 8, "vocab_block": 48},
}
OPTIONS = ("temperature", "soft_cap", "vocab_size", "chunk_size", "vocab_block", "implementation")


def random_inputs(tokens, vocabulary, width, seed=0, dtype=jnp.float32, spread=2.0):
    case = oracle.random_case(tokens, width, vocabulary, seed, dtype=dtype, spread=spread)
    return case.student_hidden, case.student_head, case.targets


def float64(hidden, head, targets, **options):
    """(scores as `LogprobScores`, gradients of Σ w·logp + Σ v·entropy as a function of w and v)."""
    found = Oracle(Case(hidden, head, hidden, head, targets), alpha=0.5, **options)

    def gradients(w, v):
        return found.gradients({"student_logp": w, "student_entropy": v})

    return LogprobScores(found.scores["student_logp"], found.scores["student_entropy"]), gradients


@functools.partial(jax.jit, static_argnames=OPTIONS)
def score(hidden, head, targets, mask=None, **static):
    return fused_linear_logprob(hidden, head, targets, mask=mask, **static)


@functools.partial(jax.jit, static_argnames=("by", *OPTIONS))
def gradients(hidden, head, targets, w, v=None, mask=None, *, by=(0, 1), **static):
    def total(hidden, head):
        scores = fused_linear_logprob(hidden, head, targets, mask=mask, **static)
        return jnp.sum(w * scores.logp) + (0.0 if v is None else jnp.sum(v * scores.entropy))

    return jax.grad(total, by)(hidden, head)


def assert_scores(scores, expected, rtol=2e-6, atol=2e-6):
    for found, values, name in zip(scores, expected, LogprobScores._fields, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, values, rtol=rtol, atol=atol, err_msg=name)


COMPILED = [  # what is compiled; the numbers are drawn
    dict(tokens=9, vocabulary=13, dtype=jnp.float32, chunk_size=4, temperature=0.3),
    dict(tokens=9, vocabulary=13, dtype=jnp.bfloat16, chunk_size=4, soft_cap=4.0, vocab_size=11),
    dict(tokens=23, vocabulary=1, dtype=jnp.float32, chunk_size=5),
    dict(tokens=23, vocabulary=101, dtype=jnp.float16, chunk_size=30, vocab_block=48, temperature=2.5),
    dict(tokens=23, vocabulary=101, dtype=jnp.float32, temperature=2.5, soft_cap=4.0, implementation="reference"),
]


@settings(deadline=None, max_examples=25)
@given(
    call=st.sampled_from(COMPILED),
    seed=st.integers(0, 2**16),
    spread=st.sampled_from([0.1, 2.0, 10.0]),
    share=st.floats(0, 1),
)
def test_all_forms_agree_with_float64(call, seed, spread, share):
    call = dict(call)
    tokens, vocabulary, dtype = call.pop("tokens"), call.pop("vocabulary"), call.pop("dtype")
    hidden, head, targets = random_inputs(tokens, vocabulary, 5, seed, dtype, spread)
    targets = targets % call.get("vocab_size", vocabulary)
    call["mask"] = oracle.random_mask(tokens, round(share * tokens), seed)
    expected, _ = float64(hidden, head, targets, **call)
    assert_scores(score(hidden, head, targets, **call), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_agree_with_float64(mode):
    inputs, mask = random_inputs(37, 101, 16), oracle.random_mask(37, 25)
    w, v = oracle.random_weights(37, names=("w", "v")).values()
    options = {"temperature": 0.7, "soft_cap": 3.0, "vocab_size": 90}
    inputs = (*inputs[:2], inputs[2] % 90)
    right = float64(*inputs, mask=mask, **options)[1](w, v)
    for gradient, value in zip(gradients(*inputs, w, v, mask, **options, **MODES[mode]), right, strict=True):
        assert error_of_maximum(gradient, value) <= 1e-5


@pytest.mark.parametrize("by", [0, 1])
def test_the_cross_entropy_s_gradient_to_one_array_is_right(by):
    inputs, w = random_inputs(37, 101, 16), jnp.full(37, -1 / 37)
    right = float64(*inputs)[1](w, jnp.zeros(37))[by]
    for mode in ({"chunk_size": 8}, {"implementation": "reference"}):
        assert error_of_maximum(gradients(*inputs, w, by=by, **mode), right) <= 1e-5


@pytest.mark.parametrize("mode", ["chunked", "blocks"])
def test_half_precision_inputs_are_summed_in_float32(mode):
    inputs, w = random_inputs(24, 90, 512, dtype=jnp.bfloat16, spread=8.0), jnp.ones(24) / 24
    expected, right = float64(*inputs)
    # The logits are of order 20: sums kept in bfloat16 would be off by about 0.1.
    assert_scores(score(*inputs, **MODES[mode]), expected, rtol=1e-5, atol=1e-5)
    for gradient, value in zip(gradients(*inputs, w, **MODES[mode]), right(w, jnp.zeros(24)), strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert error_of_maximum(gradient, value) <= 2e-2


def test_a_uniform_distribution_has_the_largest_entropy():
    hidden, head, targets = jnp.zeros((3, 4)), jnp.ones((10, 4)), jnp.array([0, 5, 9])
    scores = fused_linear_logprob(hidden, head, targets)
    np.testing.assert_allclose(scores.logp, -np.log(10), rtol=1e-6)
    np.testing.assert_allclose(scores.entropy, np.log(10), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_extreme_logits_stay_finite(mode):
    # Logits of token 0: 1e4, -1e4, 0. Of token 1: -1e4, 1e4, 0.
    hidden, head, targets = jnp.array([[1e4], [-1e4]]), jnp.array([[1.0], [-1.0], [0.0]]), jnp.array([0, 0])
    scores = score(hidden, head, targets, **MODES[mode])
    np.testing.assert_allclose(scores.logp, [0.0, -2e4])
    np.testing.assert_allclose(scores.entropy, [0.0, 0.0])
    by_hidden, by_head = gradients(hidden, head, targets, jnp.ones(2), jnp.ones(2), **MODES[mode])
    np.testing.assert_allclose(by_hidden, [[0.0], [2.0]])
    np.testing.assert_allclose(by_head, [[-1e4], [1e4], [0.0]])


@pytest.mark.parametrize("mode", MODES)
def test_a_logit_of_minus_infinity_is_a_token_of_probability_zero(mode):
    hidden, head = jnp.ones((2, 1)), jnp.array([[0.0], [-jnp.inf], [0.0]])
    scores = score(hidden, head, jnp.array([2, 1]), **MODES[mode])
    np.testing.assert_allclose(scores.logp, [-np.log(2), -np.inf], rtol=1e-6)
    np.testing.assert_allclose(scores.entropy, [np.log(2), np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_target_outside_the_vocabulary_is_nan_and_harms_no_other(mode):
    hidden, head, _ = random_inputs(3, 5, 4)
    targets = jnp.array([-1, 4, 5])
    scores = score(hidden, head, targets, **MODES[mode])
    assert np.isnan(scores.logp).tolist() == [True, False, True]
    assert np.isfinite(scores.entropy).all()
    found = gradients(hidden, head, targets, jnp.array([0.0, 1.0, 0.0]), jnp.ones(3), **MODES[mode])
    right = float64(hidden, head, targets)[1](jnp.array([0.0, 1.0, 0.0]), jnp.ones(3))
    for gradient, value in zip(found, right, strict=True):
        assert error_of_maximum(gradient, value) <= 1e-5


@pytest.mark.parametrize("mode", ["chunked", "blocks"])
def test_nothing_at_masked_tokens_reaches_anything(mode):
    (hidden, head, targets), mask = random_inputs(19, 50, 4), oracle.random_mask(19, 11)
    w, v = oracle.random_weights(19, names=("w", "v")).values()
    dirty = jnp.where(mask[:, None], hidden, jnp.nan), head, jnp.where(mask, targets, 10**6)
    expected, right = float64(hidden, head, targets, mask=mask)
    assert_scores(score(*dirty, mask, **MODES[mode]), expected)
    found = gradients(*dirty, *(jnp.where(mask, x, jnp.nan) for x in (w, v)), mask, **MODES[mode])
    for gradient, value in zip(found, right(w, v), strict=True):
        assert error_of_maximum(gradient, value) <= 1e-5


def test_no_token_gives_no_score():
    hidden, head, targets = random_inputs(0, 5, 4)
    for mode in MODES.values():
        assert [x.shape for x in score(hidden, head, targets, **mode)] == [(0,), (0,)]
    assert not gradients(hidden, head, targets, jnp.zeros(0), **MODES["chunked"])[1].any()


def bad_call(**changes):
    hidden, head, targets = random_inputs(4, 6, 3)
    return {"hidden": hidden, "head": head, "targets": targets} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": jnp.zeros((4, 2))}, r"hidden \(4, 2\), head \(6, 3\).*last axes"),
        ({"targets": jnp.zeros(5, jnp.int32)}, r"targets \(5,\).*first axes"),
        ({"hidden": jnp.zeros((2, 4, 3))}, r"hidden \(2, 4, 3\).*expected hidden states \[N, H\]"),
        ({"targets": jnp.zeros((4, 1), jnp.int32)}, r"targets \(4, 1\).*targets \[N\]"),
        ({"head": jnp.zeros((0, 3))}, "at least one row"),
        ({"head": jnp.zeros((6, 3), jnp.int32)}, "head has dtype int32"),
        ({"targets": jnp.zeros(4)}, "targets have dtype float32"),
        ({"mask": jnp.ones(4)}, r"mask is float32 \(4,\)"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"soft_cap": 0.0}, "soft_cap is 0.0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"vocab_block": 0}, "vocab_block is 0"),
        ({"vocab_size": 7}, "vocab_size is 7; expected 1 to 6"),
        ({"implementation": "pallas"}, "'pallas'; expected one of auto, chunked"),
        ({"layout": Layout(jax.make_mesh((1,), ("data",)), ("fsdp",))}, r"\['fsdp'\].*\['data'\]"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments_are_named(without_shape_hook, changes, message):
    with pytest.raises(ValueError, match=message):
        fused_linear_logprob(**bad_call(**changes))


def test_the_shape_hook_is_on_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        fused_linear_logprob(**bad_call(temperature="warm"))


def test_the_public_name_is_the_function():
    assert unisd_jax.kernels.fused_linear_logprob is api_module.fused_linear_logprob
    assert unisd_jax.kernels.LogprobScores is LogprobScores
