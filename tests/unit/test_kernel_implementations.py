"""Every Pallas implementation through the public functions, in interpret mode, against the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from unisd_jax.kernels import Layout, fused_linear_jsd, fused_linear_jsd_loss, fused_linear_logprob
from unisd_jax.parallel.mesh import build_mesh

PALLAS = ("pallas_tpu", "pallas_triton", "pallas_gpu")
TOKENS, WIDTH, VOCAB = 11, 8, 131


@functools.cache
def operands():
    rng = np.random.default_rng(3)
    hidden, noise = (jnp.asarray(rng.normal(size=(TOKENS, WIDTH)), jnp.float32) for _ in range(2))
    head, other = (jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.float32) for _ in range(2))
    ids = jnp.asarray(rng.integers(0, VOCAB - 5, TOKENS), jnp.int32)
    return hidden, head, hidden + 0.3 * noise, head + 0.1 * other, ids


def mask():
    return jnp.arange(TOKENS) % 4 != 1


def per_token(hidden, head, others, **options):
    teacher_hidden, teacher_head, ids = others
    found = fused_linear_jsd(hidden, head, teacher_hidden, teacher_head, ids, mask=mask(), **options)
    total = jnp.sum(found.clipped_divergence) + 0.3 * jnp.sum(found.student_logp) + 0.2 * jnp.sum(found.student_entropy)
    return total, found


def weighted(hidden, head, others, **options):
    teacher_hidden, teacher_head, ids = others
    weights = jnp.linspace(0.5, 1.5, TOKENS)
    return fused_linear_jsd_loss(hidden, head, teacher_hidden, teacher_head, ids, weights, mask=mask(), **options)


@pytest.mark.parametrize(
    ("function", "alpha", "trained"), [(per_token, 0.0, True), (weighted, 0.5, False)], ids=["per token", "loss"]
)
@pytest.mark.parametrize("implementation", PALLAS)
def test_a_pallas_implementation_gives_the_plain_form_s_values_and_gradients(implementation, function, alpha, trained):
    options = {"alpha": alpha, "temperature": 0.7, "ceiling": 0.08, "vocab_size": VOCAB - 5}

    def run(**more):
        call = functools.partial(function, **options, **more)
        arguments = (0, 1) if trained else 0
        return jax.jit(jax.value_and_grad(call, arguments, has_aux=True))(*operands()[:2], operands()[2:])

    found, expected = run(implementation=implementation, interpret=True), run(implementation="reference")
    toys.assert_trees_close(found, expected, atol=2e-5)
    assert np.any(found[0][1].clipped) and all(np.any(gradient) for gradient in jax.tree.leaves(found[1]))


def test_log_probs_that_stay_on_the_chip_are_those_of_the_plain_form():
    rng = np.random.default_rng(4)
    hidden, head = (jnp.asarray(rng.normal(size=(n, 64)) / 4, jnp.bfloat16) for n in (5, 136))
    ids, mask = jnp.arange(5), jnp.array([True, True, False, True, True])
    found = fused_linear_logprob(hidden, head, ids, mask=mask, implementation="pallas_gpu", interpret=True)
    toys.assert_trees_close(found, fused_linear_logprob(hidden, head, ids, mask=mask), atol=1e-4)


@pytest.mark.parametrize("implementation", PALLAS)
def test_what_a_pallas_implementation_lacks_is_said(implementation):
    options = {"alpha": 0.5, "implementation": implementation, "interpret": True}
    with pytest.raises(ValueError, match="entry_ceiling"):
        fused_linear_jsd(*operands(), entry_ceiling=0.1, **options)
    with pytest.raises(ValueError, match="whole rows of the vocabulary"):
        fused_linear_jsd(*operands(), vocab_block=16, **options)
    layout = Layout(build_mesh(1, 1, 2), (), ("tensor",))
    with pytest.raises(ValueError, match="does not divide the vocabulary"):
        fused_linear_jsd(*operands(), layout=layout, **options)
