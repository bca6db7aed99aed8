"""The decoder: padding, neighbours, the cache and every option change nothing; rotary positions by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from unisd_jax.models import KVCache, Model, completion_hidden, completion_scores
from unisd_jax.models.layout import place
from unisd_jax.models.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    rotary_angles,
    rotary_frequencies,
    rotate,
)
from unisd_jax.parallel.mesh import build_mesh
from unisd_jax.testing import tiny_config, tiny_model

ROWS, LENGTH = 3, 12
FAMILIES = {
    "llama": {},
    "qwen2": dict(family="qwen2", attention_bias=True, tied_embeddings=True),
    "qwen3": dict(family="qwen3"),
    "gemma3": dict(
        family="gemma3_text", tied_embeddings=True, query_scalar=6.0, num_layers=3, sliding_window=3,
        sliding_layers=(True, False, True), local_rope_theta=50.0,
    ),
    "dynamic": dict(family="internlm3", rope_scaling=DynamicScaling(6.0, 5), max_position=5),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def toy(request):
    """(model, params, hidden(ids, mask)) with `hidden` compiled once for [ROWS, LENGTH]."""
    model, params = toys.random_model(**request.param)
    compiled = jax.jit(model.hidden)
    return model, params, lambda ids, mask: np.asarray(compiled(params, ids, mask))


def lay_out(rows, offsets, filler):
    """Rows of tokens at the given offsets of a [ROWS, LENGTH] batch; `filler` stands on the padding."""
    ids, mask = np.array(filler, np.int32), np.zeros((ROWS, LENGTH), bool)
    for index, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
        ids[index, offset : offset + len(row)] = row
        mask[index, offset : offset + len(row)] = True
    return ids, mask


token = st.integers(0, toys.VOCABULARY - 1)
ragged_rows = st.lists(st.lists(token, min_size=1, max_size=LENGTH), min_size=ROWS, max_size=ROWS)


@settings(max_examples=25, deadline=None)
@given(rows=ragged_rows, data=st.data())
def test_padding_and_neighbours_change_nothing(toy, rows, data):
    *_, hidden = toy
    seed = data.draw(st.integers(0, 1000))
    filler = toys.random_tokens(np.random.default_rng(seed), (2, ROWS, LENGTH))
    offsets = [data.draw(st.integers(0, LENGTH - len(row))) for row in rows]
    order = data.draw(st.permutations(range(ROWS)))
    ids, mask = lay_out(rows, [0] * ROWS, filler[0])
    plain = hidden(ids, mask)[mask]
    ids, mask = lay_out([rows[i] for i in order], [offsets[i] for i in order], filler[1])
    moved = hidden(ids, mask)
    back = np.concatenate([moved[order.index(i)][mask[order.index(i)]] for i in range(ROWS)])
    np.testing.assert_allclose(back, plain, atol=1e-5)


def test_a_token_sees_only_what_stands_before_it(toy):
    *_, hidden = toy
    rng = np.random.default_rng(0)
    ids, mask = toys.random_tokens(rng, (ROWS, LENGTH)), np.ones((ROWS, LENGTH), bool)
    changed = ids.copy()
    changed[:, 7] = (ids[:, 7] + 1) % toys.VOCABULARY
    before, after = hidden(ids, mask), hidden(changed, mask)
    np.testing.assert_allclose(after[:, :7], before[:, :7], atol=1e-6)
    assert np.all(np.max(np.abs(after - before), axis=-1)[:, 7:] > 1e-3), "every later token sees the change"


def test_order_matters(toy):
    *_, hidden = toy
    ids = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    mask = np.ones((ROWS, LENGTH), bool)
    swapped = ids.copy()
    swapped[:, [2, 3]] = ids[:, [3, 2]]
    assert np.max(np.abs(hidden(ids, mask) - hidden(swapped, mask))[:, -1]) > 1e-3


def test_a_row_without_tokens_is_finite(toy):
    *_, hidden = toy
    mask = np.array([[0] * LENGTH, [1] * LENGTH, [0] * (LENGTH - 1) + [1]], bool)
    assert np.isfinite(hidden(toys.random_tokens(np.random.default_rng(2), (ROWS, LENGTH)), mask)).all()


@pytest.mark.parametrize("prompt", [1, 4, LENGTH])
def test_the_cache_gives_what_one_pass_gives(toy, prompt):
    """A prompt at once and then token by token, whatever stands in the slots between them."""
    model, params, hidden = toy
    if isinstance(model.config.rope_scaling, DynamicScaling):
        pytest.skip("its base moves with the length, while keys in a cache stay as they were turned")
    rng = np.random.default_rng(1)
    ids = toys.random_tokens(rng, (ROWS, LENGTH))
    mask = np.arange(LENGTH) >= np.minimum([[0], [3], [4]], prompt - 1)
    counts = mask[:, :prompt].sum(axis=1)
    states, cache = jax.jit(model.prefill, static_argnums=3)(params, ids[:, :prompt], mask[:, :prompt], LENGTH)
    # The slots that hold no token must not be seen.
    slots = np.arange(prompt + LENGTH)
    empty = (slots >= counts[:, None]) & ((slots < prompt) | (slots >= 2 * LENGTH))
    cache = jax.tree.map(lambda x: jnp.where(empty[:, None, :, None], 7.0, x), cache)
    found, extend = [states], jax.jit(model.extend)
    for step in range(LENGTH - prompt):
        seen = (slots < counts[:, None]) | ((slots >= prompt) & (slots <= prompt + step))
        token = ids[:, prompt + step, None]
        states, cache = extend(params, token, (counts + step)[:, None], seen[:, None], cache, prompt + step)
        found.append(states[:, 0])
    np.testing.assert_allclose(np.stack(found, axis=1), hidden(ids, mask)[:, prompt - 1 :], atol=1e-5)


def test_several_tokens_extend_the_cache(toy):
    model, params, hidden = toy
    if isinstance(model.config.rope_scaling, DynamicScaling):
        pytest.skip("its base moves with the length, while keys in a cache stay as they were turned")
    ids = toys.random_tokens(np.random.default_rng(1), (ROWS, LENGTH))
    shape = (model.config.num_layers, ROWS, model.config.num_kv_heads, LENGTH + 2, model.config.head_dim)
    cache = KVCache(jnp.full(shape, 7.0), jnp.full(shape, 7.0))
    found, start, extend = [], 0, jax.jit(model.extend)
    for size in (5, 4, 3):
        positions = jnp.tile(jnp.arange(start, start + size), (ROWS, 1))
        attend = jnp.arange(LENGTH + 2) <= positions[..., None]
        states, cache = extend(params, ids[:, start : start + size], positions, attend, cache, start)
        found.append(states)
        start += size
    np.testing.assert_allclose(np.concatenate(found, axis=1), hidden(ids, np.ones_like(ids, bool)), atol=1e-5)


@pytest.mark.parametrize("changes", [dict(attention="splash_interpret"), dict(remat="layer"), dict(remat="products")])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_options_change_neither_states_nor_gradient(family, changes):
    model, params = toys.random_model(**FAMILIES[family])
    ids = jnp.asarray(toys.random_tokens(np.random.default_rng(3), (ROWS, LENGTH)))
    mask = jnp.arange(LENGTH) >= jnp.array([[0], [3], [8]])

    def states_and_gradient(model):
        def loss(params):
            states = jnp.where(mask[..., None], model.hidden(params, ids, mask), 0)
            return jnp.sum(jnp.sin(states)), states

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    expected, found = (states_and_gradient(model) for model in (model, dataclasses.replace(model, **changes)))
    toys.assert_trees_close(found, expected, atol=1e-4)


@pytest.mark.parametrize("attention", ["xla", "splash_interpret"])
@pytest.mark.parametrize(
    "changes", [{}, dict(num_kv_heads=1), dict(num_heads=3, num_kv_heads=3), FAMILIES["gemma3"]],
    ids=["divided", "shared", "whole", "gemma3"],
)  # fmt: skip
def test_a_mesh_changes_nothing(changes, attention):
    """Two devices for the heads; one key-value head is repeated for them, three query heads stay together."""
    model, params = toys.random_model(**changes)
    mesh = build_mesh(2, 1, 2)
    on_mesh = dataclasses.replace(model, attention=attention, mesh=mesh)
    ids = toys.random_tokens(np.random.default_rng(6), (4, LENGTH))
    mask = np.arange(LENGTH) >= np.array([[0], [3], [8], [1]])
    found = jax.jit(on_mesh.hidden)(place(params, mesh), ids, mask)
    np.testing.assert_allclose(found[mask], jax.jit(model.hidden)(params, ids, mask)[mask], atol=2e-5)
    states, _ = jax.jit(on_mesh.prefill, static_argnums=3)(place(params, mesh), ids, mask, 2)
    np.testing.assert_allclose(states, found[:, -1], atol=2e-5)


def test_completion_states_are_those_that_predict(toy):
    model, params, hidden = toy
    rng = np.random.default_rng(4)
    prompts, completions = toys.left_padded(rng, ROWS, 7), toys.right_padded(rng, ROWS, LENGTH - 6)
    found = jax.jit(completion_hidden, static_argnums=0)(model, params, None, prompts, completions)
    ids = np.concatenate([prompts.ids, completions.ids[:, :-1]], axis=1)
    mask = np.concatenate([prompts.mask, completions.mask[:, :-1]], axis=1)
    np.testing.assert_allclose(found[completions.mask], hidden(ids, mask)[:, 6:][completions.mask], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"], ids=["untied", "tied"])
def test_padding_of_the_vocabulary_changes_nothing(family):
    model, params = toys.random_model(**FAMILIES[family])
    padded, shapes = Model.build(model.config, vocab_multiple=24)
    assert padded.head_options.vocab_size == toys.VOCABULARY and model.head_options.vocab_size is None
    assert shapes["embed"]["weight"].shape[0] == padded.head(padded.init(0)).shape[0] == 48
    assert not padded.head(padded.init(0))[toys.VOCABULARY :].any()
    # Rows that would win if anything looked at them.
    wide = params | {
        name: {"weight": jnp.pad(params[name]["weight"], ((0, 16), (0, 0)), constant_values=9.0)}
        for name in ("embed", "head")
        if name in params
    }
    rng = np.random.default_rng(5)
    batch = toys.left_padded(rng, ROWS, 7), toys.right_padded(rng, ROWS, 5)
    scores = jax.jit(completion_scores, static_argnums=0)
    toys.assert_trees_close(scores(padded, wide, None, *batch), scores(model, params, None, *batch), atol=1e-6)
    states = jnp.asarray(rng.standard_normal((2, 3, model.config.hidden_size)), jnp.float32)
    np.testing.assert_allclose(padded.logits(wide, states), model.logits(params, states), atol=1e-6)


def test_logits_are_float32_products_with_the_head(toy):
    model, params, hidden = toy
    states = hidden(np.zeros((ROWS, LENGTH), np.int32), np.ones((ROWS, LENGTH), bool))
    name = "embed" if model.config.tied_embeddings else "head"
    np.testing.assert_allclose(
        model.logits(params, jnp.asarray(states)), states @ np.asarray(params[name]["weight"]).T, rtol=1e-4, atol=1e-4
    )
    assert ("head" in params) != model.config.tied_embeddings
    logits = model.logits(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), jnp.asarray(states, jnp.bfloat16))
    assert logits.dtype == jnp.float32


def test_rotary_pairs_are_half_the_width_apart():
    frequencies = rotary_frequencies(4, 100.0)
    np.testing.assert_allclose(frequencies, [1.0, 0.1], rtol=1e-6)
    x = jnp.array([1.0, 2.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    turned = rotate(x, *rotary_angles(jnp.array([[3]]), frequencies))
    expected = [math.cos(3), 2 * math.cos(0.3), math.sin(3), 2 * math.sin(0.3)]
    np.testing.assert_allclose(turned.ravel(), expected, rtol=1e-5)


def test_rotary_products_depend_on_the_distance_only():
    rng = np.random.default_rng(3)
    q, k = jnp.asarray(rng.standard_normal((2, 1, 1, 1, 8)), jnp.float32)

    def product(i, j):
        angles = (rotary_angles(jnp.array([[at]]), rotary_frequencies(8, 1e4)) for at in (i, j))
        return float(jnp.vdot(*(rotate(x, *angle) for x, angle in zip((q, k), angles, strict=True))))

    assert product(5, 2) == pytest.approx(product(13, 10), abs=1e-4)
    assert product(5, 2) != pytest.approx(product(5, 3), abs=1e-2)


def test_llama3_stretches_low_frequencies_only():
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
    plain, stretched = (np.asarray(rotary_frequencies(16, 500_000.0, rope)) for rope in (None, scaling))
    turns = 64 * plain / (2 * math.pi)
    assert (turns > 4).sum() and ((turns > 1) & (turns < 4)).sum() and (turns < 1).sum(), "all three regions occur"
    np.testing.assert_allclose(stretched[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(stretched[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    share = (turns[between] - 1) / 3
    np.testing.assert_allclose(stretched[between], plain[between] * (share + (1 - share) / 8), rtol=1e-5)


def test_linear_scaling_slows_everything_down():
    plain, slow = (np.asarray(rotary_frequencies(16, 1e6, scaling)) for scaling in (None, LinearScaling(8.0)))
    np.testing.assert_allclose(slow, plain / 8)


def test_dynamic_scaling_is_that_of_transformers():
    """`_compute_dynamic_ntk_parameters` for the length of each row; at most max_position tokens change nothing."""
    lengths, (theta, factor, longest, dim) = np.array([1, 64, 65, 200]), (5e7, 6.0, 64, 16)
    found = rotary_frequencies(dim, theta, DynamicScaling(factor, longest), jnp.asarray(lengths))
    for row, length in zip(np.asarray(found), lengths, strict=True):
        seen = max(int(length), longest)
        base = theta * ((factor * seen / longest) - (factor - 1)) ** (dim / (dim - 2))
        np.testing.assert_allclose(row, 1.0 / (base ** (np.arange(0, dim, 2) / dim)), rtol=2e-6)
    np.testing.assert_allclose(found[:2], np.tile(rotary_frequencies(dim, theta), (2, 1)), rtol=1e-6)
    assert np.all(found[2, 1:] < found[1, 1:])


def test_the_model_is_a_static_argument():
    """Two builds of one architecture are the same key of jit's cache."""
    first, second = (Model.build(tiny_config())[0] for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert first != Model.build(tiny_config(num_layers=3))[0]


def test_building_allocates_nothing_and_init_has_the_same_shapes():
    _, shapes = Model.build(tiny_config(), dtype=jnp.bfloat16)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    model, params = tiny_model()
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    assert described == shapes
    assert shapes["layers"]["mlp"]["down"]["kernel"].shape == (2, 64, 32)
    other = model.init(1)["embed"]["weight"]
    assert not np.array_equal(other, params["embed"]["weight"])
    layers = params["layers"]["attention"]["q"]["kernel"]
    assert not np.array_equal(layers[0], layers[1]), "layers start from different numbers"
