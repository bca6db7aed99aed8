"""Adapters: nothing at first, the same as merged weights afterwards, and the only thing that gets a gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from unisd_jax.errors import UserError
from unisd_jax.models import Lora, LoraFactors, init_lora, merge
from unisd_jax.models.lora import TARGETS, low_rank_product

ALL = tuple(TARGETS)


@pytest.fixture(scope="module")
def toy():
    """(model, params, hidden(params, lora)) on one ragged batch."""
    model, params = toys.random_model()
    prompts = jax.tree.map(jnp.asarray, toys.left_padded(np.random.default_rng(0), 3, 7))
    hidden = jax.jit(lambda params, lora: model.hidden(params, prompts.ids, prompts.mask, lora=lora))
    return model, params, lambda params, lora=None: np.asarray(hidden(params, lora))[prompts.mask]


def test_a_new_adapter_changes_nothing(toy):
    _, params, hidden = toy
    lora = init_lora(jax.random.key(0), params, rank=3, alpha=6.0, targets=ALL)
    np.testing.assert_array_equal(hidden(params, lora), hidden(params))
    toys.assert_trees_close(merge(params, lora), params)


def test_a_new_adapter_has_the_right_shapes_and_spread(toy):
    _, params, _ = toy
    lora = init_lora(jax.random.key(0), params, rank=3, alpha=6.0, targets=("down", "q"))
    assert lora.scale == 2.0
    assert set(lora.factors) == {"attention/q", "mlp/down"}
    a, b = lora.factors["mlp/down"]
    assert (a.shape, b.shape) == ((2, 24, 3), (2, 3, 16)) and a.dtype == b.dtype == jnp.float32
    assert not b.any()
    bound = 24**-0.5
    assert 0.9 * bound < np.max(np.abs(a)) <= bound and abs(np.mean(a)) < 0.2 * bound
    assert not np.array_equal(a[0], a[1])


def test_the_start_depends_on_the_key_but_not_on_the_other_targets(toy):
    _, params, _ = toy
    some = init_lora(jax.random.key(0), params, rank=2, alpha=1.0, targets=("k",))
    every = init_lora(jax.random.key(0), params, rank=2, alpha=1.0, targets=ALL)
    other = init_lora(jax.random.key(1), params, rank=2, alpha=1.0, targets=("k",))
    np.testing.assert_array_equal(some.factors["attention/k"].a, every.factors["attention/k"].a)
    assert not np.array_equal(some.factors["attention/k"].a, other.factors["attention/k"].a)
    assert not np.array_equal(every.factors["attention/k"].a, every.factors["attention/v"].a)


def test_an_unknown_target_is_named(toy):
    with pytest.raises(UserError, match=r"model\.lora\.targets: unknown 'gates'; known: q, k, v, o, gate, up, down"):
        init_lora(jax.random.key(0), toy[1], rank=2, alpha=1.0, targets=("q", "gates"))


def test_a_rank_that_no_matrix_can_hold(toy):
    """The key projection is 16 x 8."""
    init_lora(jax.random.key(0), toy[1], rank=8, alpha=1.0, targets=("k",))
    with pytest.raises(UserError, match=r"model\.lora\.rank is 9, more than the 16 x 8 matrix 'k' can hold"):
        init_lora(jax.random.key(0), toy[1], rank=9, alpha=1.0, targets=("q", "k"))


@pytest.mark.parametrize("targets", [ALL, ("down",)], ids=["all", "down"])
def test_applied_equals_merged(toy, targets):
    _, params, hidden = toy
    lora = toys.random_lora(params, targets=targets)
    applied = hidden(params, lora)
    np.testing.assert_allclose(applied, hidden(merge(params, lora)), atol=1e-5)
    assert np.max(np.abs(applied - hidden(params))) > 0.1, "the adapter does something"


@pytest.mark.parametrize("target", ALL)
def test_every_target_reaches_its_matrix(toy, target):
    _, params, _ = toy
    lora = toys.random_lora(params, targets=(target,), scale=1.5)
    group, name = TARGETS[target].split("/")
    merged, product = merge(params, lora), toys.products(lora)[TARGETS[target]]
    expected = np.asarray(params["layers"][group][name]["kernel"]) + product
    np.testing.assert_allclose(merged["layers"][group][name]["kernel"], expected, atol=1e-5)
    before = jax.tree_util.tree_leaves_with_path(params)
    changed = [
        path for (path, old), new in zip(before, jax.tree.leaves(merged), strict=True) if not np.array_equal(old, new)
    ]
    assert [jax.tree_util.keystr(path, simple=True, separator="/") for path in changed] == [
        f"layers/{TARGETS[target]}/kernel"
    ]


def test_merging_leaves_the_weights_alone(toy):
    _, params, _ = toy
    before = jax.tree.map(np.array, params)
    merged = merge(params, toys.random_lora(params, targets=ALL))
    assert merged is not params
    toys.assert_trees_close(params, before)
    assert merge(params, None) is params


def test_merging_is_computed_in_float32(toy):
    """Rounded once, at the end: a product rounded to bfloat16 before the sum would give other weights."""
    _, params, _ = toy
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    lora = toys.random_lora(params, targets=("up",), rank=8)
    kernel = np.asarray(half["layers"]["mlp"]["up"]["kernel"], np.float32)
    expected = (kernel + toys.products(lora)["mlp/up"]).astype(np.float32).astype(jnp.bfloat16)
    merged = merge(half, lora)["layers"]["mlp"]["up"]["kernel"]
    assert merged.dtype == jnp.bfloat16
    assert np.mean(np.asarray(merged) != expected) < 0.01, "only ties in float32 itself may differ"


def test_the_gradient_reaches_adapters_only(toy):
    model, params, _ = toy
    lora = toys.random_lora(params, targets=("q", "down"))
    ids, mask = jnp.arange(6)[None], jnp.ones((1, 6), bool)

    @functools.partial(jax.jit, static_argnames="wrt")
    def gradient(params, lora, wrt):
        return jax.grad(lambda *args: jnp.sum(model.hidden(args[0], ids, mask, lora=args[1]) ** 2), argnums=wrt)(
            params, lora
        )

    gradients = gradient(params, lora, 1)
    assert isinstance(gradients, Lora) and jax.tree.structure(gradients) == jax.tree.structure(lora)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradients))
    # The chain rule: dL/dA = scale · dL/dW Bᵀ, dL/dB = scale · Aᵀ dL/dW, with W the merged matrix.
    dense = gradient(merge(params, lora), None, 0)["layers"]["mlp"]["down"]["kernel"]
    a, b = lora.factors["mlp/down"]
    found = gradients.factors["mlp/down"]
    np.testing.assert_allclose(found.a, lora.scale * dense @ b.swapaxes(1, 2), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.b, lora.scale * a.swapaxes(1, 2) @ dense, rtol=1e-3, atol=1e-3)


def test_the_hand_written_backward_pass_is_the_derived_one():
    rng = np.random.default_rng(3)
    x, a, b, weight = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 5, 6), (6, 3), (3, 4), (2, 5, 4))
    )

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(product, *factors):
        return jax.value_and_grad(lambda *args: jnp.sum(weight * product(*args)), argnums=(0, 1, 2))(*factors)

    found, expected = gradients(low_rank_product, x, a, b), gradients(lambda x, a, b: (x @ a) @ b, x, a, b)
    toys.assert_trees_close(found, expected, atol=1e-6)
    half = gradients(low_rank_product, *(value.astype(jnp.bfloat16) for value in (x, a, b)))[1]
    assert all(value.dtype == jnp.bfloat16 for value in half)


def test_at_the_start_only_b_moves(toy):
    model, params, _ = toy
    lora = init_lora(jax.random.key(0), params, rank=2, alpha=2.0, targets=("q",))
    ids, mask = jnp.arange(6)[None], jnp.ones((1, 6), bool)
    gradients = jax.jit(jax.grad(lambda lora: jnp.sum(model.hidden(params, ids, mask, lora=lora) ** 2)))(lora)
    a, b = gradients.factors["attention/q"]
    assert not np.any(a) and np.any(b)


def test_an_adapter_is_a_pytree():
    factors = LoraFactors(jnp.ones((1, 4, 2)), jnp.ones((1, 2, 4)))
    lora = Lora({"attention/q": factors}, 0.5)
    doubled = jax.tree.map(lambda x: 2 * x, lora)
    assert isinstance(doubled, Lora) and doubled.scale == 0.5
    assert doubled.factors["attention/q"].a[0, 0, 0] == 2
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(lora)
    ]
    assert paths == ["factors/attention/q/a", "factors/attention/q/b"]
