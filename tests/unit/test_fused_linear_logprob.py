import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import unisd_jax.kernels
from unisd_jax.kernels import fused_linear_logprob
from unisd_jax.kernels.fused_linear_logprob import LogprobScores
from unisd_jax.kernels.fused_linear_logprob import api as api_module

IMPLEMENTATIONS = ["auto", "reference", "chunked"]


def numpy_scores(hidden, head, targets, temperature):
    """The definition in float64, written without any shared code."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / temperature
    logits -= logits.max(axis=1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    probs = np.exp(log_probs)
    entropy = -np.where(probs > 0, probs * np.where(probs > 0, log_probs, 0), 0).sum(axis=1)
    return log_probs[np.arange(len(targets)), targets], entropy


def random_inputs(tokens, vocabulary, width, seed=0, scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(tokens, width)) * scale, dtype)
    head = jnp.asarray(rng.normal(size=(vocabulary, width)), dtype)
    return hidden, head, jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32)


def intermediate_sizes(jaxpr):
    """Element counts of everything a jaxpr computes, loop bodies included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.size
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from intermediate_sizes(inner)


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(0, 9),
    vocabulary=st.integers(1, 13),
    width=st.integers(1, 5),
    chunk_size=st.integers(1, 12),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    seed=st.integers(0, 3),
)
def test_all_forms_agree_with_float64(tokens, vocabulary, width, chunk_size, temperature, seed):
    hidden, head, targets = random_inputs(tokens, vocabulary, width, seed)
    logp, entropy = numpy_scores(hidden, head, targets, temperature)
    for implementation in IMPLEMENTATIONS:
        scores = fused_linear_logprob(
            hidden,
            head,
            targets,
            temperature=temperature,
            chunk_size=chunk_size,
            implementation=implementation,
        )
        assert scores.logp.dtype == scores.entropy.dtype == jnp.float32
        np.testing.assert_allclose(scores.logp, logp, rtol=1e-5, atol=2e-5, err_msg=implementation)
        np.testing.assert_allclose(scores.entropy, entropy, rtol=1e-5, atol=2e-5, err_msg=implementation)


def test_chunked_equals_reference_under_jit_for_a_ragged_number_of_tokens():
    hidden, head, targets = random_inputs(101, 257, 16)

    def score(implementation):
        return jax.jit(lambda *arrays: fused_linear_logprob(*arrays, chunk_size=32, implementation=implementation))(
            hidden, head, targets
        )

    reference, chunked = score("reference"), score("chunked")
    np.testing.assert_allclose(chunked.logp, reference.logp, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(chunked.entropy, reference.entropy, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_inputs_are_summed_in_float32(dtype, implementation):
    hidden, head, targets = random_inputs(40, 300, 512, dtype=dtype)
    logp, entropy = numpy_scores(hidden, head, targets, 1.0)
    scores = fused_linear_logprob(hidden, head, targets, chunk_size=16, implementation=implementation)
    # The logits are of order 20: sums kept in bfloat16 would be off by about 0.1.
    np.testing.assert_allclose(scores.logp, logp, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(scores.entropy, entropy, rtol=1e-4, atol=1e-4)


def test_a_uniform_distribution_has_the_largest_entropy():
    hidden, head, targets = jnp.zeros((3, 4)), jnp.ones((10, 4)), jnp.array([0, 5, 9])
    scores = fused_linear_logprob(hidden, head, targets)
    np.testing.assert_allclose(scores.logp, -np.log(10), rtol=1e-6)
    np.testing.assert_allclose(scores.entropy, np.log(10), rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_logits_stay_finite(implementation):
    # Logits of token 0: 1e4, -1e4, 0. Of token 1: -1e4, 1e4, 0.
    hidden, head = jnp.array([[1e4], [-1e4]]), jnp.array([[1.0], [-1.0], [0.0]])
    scores = fused_linear_logprob(hidden, head, jnp.array([0, 0]), implementation=implementation, chunk_size=1)
    np.testing.assert_allclose(scores.logp, [0.0, -2e4])
    np.testing.assert_allclose(scores.entropy, [0.0, 0.0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_logit_of_minus_infinity_is_a_token_of_probability_zero(implementation):
    hidden, head = jnp.ones((2, 1)), jnp.array([[0.0], [-jnp.inf], [0.0]])
    scores = fused_linear_logprob(hidden, head, jnp.array([2, 1]), implementation=implementation, chunk_size=1)
    np.testing.assert_allclose(scores.logp, [-np.log(2), -np.inf], rtol=1e-6)
    np.testing.assert_allclose(scores.entropy, [np.log(2), np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_target_outside_the_vocabulary_is_nan_and_harms_no_other(implementation):
    hidden, head, _ = random_inputs(3, 5, 4)
    scores = fused_linear_logprob(hidden, head, jnp.array([-1, 4, 5]), implementation=implementation, chunk_size=2)
    assert np.isnan(scores.logp).tolist() == [True, False, True]
    assert np.isfinite(scores.entropy).all()


def test_no_array_of_tokens_by_vocabulary_is_held():
    tokens, vocabulary, chunk = 1024, 512, 64
    arrays = random_inputs(tokens, vocabulary, 8)

    def traced(implementation):
        return jax.jit(lambda *a: fused_linear_logprob(*a, chunk_size=chunk, implementation=implementation)).trace(
            *arrays
        )

    sizes = {name: max(intermediate_sizes(traced(name).jaxpr.jaxpr)) for name in IMPLEMENTATIONS}
    assert sizes == {
        "reference": tokens * vocabulary,
        "chunked": chunk * vocabulary,
        "auto": chunk * vocabulary,
    }
    memory = {name: traced(name).lower().compile().memory_analysis() for name in ("reference", "chunked")}
    assert memory["chunked"].temp_size_in_bytes < tokens * vocabulary * 4 / 2
    assert memory["chunked"].temp_size_in_bytes < memory["reference"].temp_size_in_bytes


def test_gradients_are_zero():
    hidden, head, targets = random_inputs(5, 7, 3)
    for implementation in IMPLEMENTATIONS:
        grads = jax.grad(
            lambda h, w, implementation=implementation: fused_linear_logprob(
                h, w, targets, chunk_size=2, implementation=implementation
            ).logp.sum(),
            argnums=(0, 1),
        )(hidden, head)
        assert not any(np.any(grad) for grad in grads)


@pytest.fixture
def without_shape_hook():
    """What a user sees: in production nothing checks the annotations before the function's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def bad_call(**changes):
    hidden, head, targets = random_inputs(4, 6, 3)
    return {"hidden": hidden, "head": head, "targets": targets} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": jnp.zeros((4, 2))}, r"hidden \(4, 2\), head \(6, 3\).*last axes"),
        ({"targets": jnp.zeros(5, jnp.int32)}, r"targets \(5,\).*first axes"),
        ({"hidden": jnp.zeros((2, 4, 3))}, r"expected hidden \[N, H\]"),
        ({"targets": jnp.zeros((4, 1), jnp.int32)}, r"expected hidden \[N, H\]"),
        ({"head": jnp.zeros((0, 3))}, "at least one row"),
        ({"targets": jnp.zeros(4)}, "targets have dtype float32"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"implementation": "pallas"}, "'pallas'; expected 'auto', 'reference' or 'chunked'"),
    ],
)
def test_bad_arguments_are_named(without_shape_hook, changes, message):
    with pytest.raises(ValueError, match=message):
        fused_linear_logprob(**bad_call(**changes))


def test_the_shape_hook_is_on_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        fused_linear_logprob(**bad_call(hidden=jnp.zeros((4, 2))))


def test_the_public_name_is_the_function():
    assert unisd_jax.kernels.fused_linear_logprob is api_module.fused_linear_logprob
    assert unisd_jax.kernels.LogprobScores is LogprobScores
