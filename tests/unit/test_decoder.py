"""The decoder: padding, neighbours and the cache change nothing; attention and rotary positions by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from unisd_jax.errors import UserError
from unisd_jax.models import Model, ModelConfig
from unisd_jax.models import attention as attention_module
from unisd_jax.models.attention import attention, causal, causal_attention, rotary_angles, rotary_frequencies, rotate
from unisd_jax.models.config import Llama3Scaling
from unisd_jax.models.decoder import token_positions
from unisd_jax.testing import tiny_config, tiny_model

ROWS, LENGTH = 3, 12
QWEN = dict(family="qwen2", attention_bias=True, tied_embeddings=True)


@pytest.fixture(scope="module", params=[{}, QWEN], ids=["llama", "qwen2"])
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


@pytest.mark.parametrize("pieces", [(9, 1, 1, 1), (12,), (5, 4, 3)], ids=str)
def test_the_cache_gives_what_one_pass_gives(toy, pieces):
    model, params, hidden = toy
    rng = np.random.default_rng(1)
    ids = toys.random_tokens(rng, (ROWS, LENGTH))
    mask = np.arange(LENGTH) >= np.array([[0], [3], [4]])
    positions, attend = token_positions(jnp.asarray(mask)), causal(jnp.asarray(mask))
    # Room for more tokens than there are: the slots behind the last one must not be seen.
    cache = jax.tree.map(lambda x: jnp.full_like(x, 7.0), model.empty_cache(ROWS, LENGTH + 2, jnp.float32))
    attend = np.pad(attend, ((0, 0), (0, 0), (0, 2)))
    found, start = [], 0
    extend = jax.jit(model.extend)
    for size in pieces:
        part = slice(start, start + size)
        states, cache = extend(params, ids[:, part], positions[:, part], attend[:, part], cache, start)
        found.append(states)
        start += size
    found = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found[mask], hidden(ids, mask)[mask], atol=1e-5)


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


def test_attention_by_hand():
    """Six query heads share two key-value heads in order: 0, 1, 2 read the first one."""
    rng = np.random.default_rng(2)
    query = rng.standard_normal((2, 3, 6, 4)).astype(np.float32)
    key, value = rng.standard_normal((2, 2, 2, 5, 4)).astype(np.float32)
    attend = rng.random((2, 3, 5)) < 0.6
    attend[:, :, 0] = True
    expected = np.zeros_like(query)
    for b, s, n in np.ndindex(2, 3, 6):
        scores = key[b, n // 3][attend[b, s]] @ query[b, s, n] / 2.0
        weights = np.exp(scores) / np.exp(scores).sum()
        expected[b, s, n] = weights @ value[b, n // 3][attend[b, s]]
    mixed = attention(*map(jnp.asarray, (query, key, value, attend)))
    np.testing.assert_allclose(mixed, expected, atol=1e-5)


def test_a_query_that_may_see_nothing_is_not_nan():
    ones = jnp.ones((1, 1, 2, 4))
    mixed = attention(jnp.ones((1, 2, 1, 4)), ones, ones, jnp.zeros((1, 2, 2), bool))
    assert np.isfinite(mixed).all()


@pytest.mark.parametrize("length", [4, 8, 10])
def test_blocks_of_queries_change_nothing(monkeypatch, length):
    monkeypatch.setattr(attention_module, "CAUSAL_BLOCK", 4)
    rng = np.random.default_rng(6)
    query = jnp.asarray(rng.standard_normal((3, length, 4, 4)), jnp.float32)
    key, value = jnp.asarray(rng.standard_normal((2, 3, 2, length, 4)), jnp.float32)
    mask = jnp.arange(length) >= jnp.array([[0], [1], [length - 2]])
    blocks, whole = causal_attention(query, key, value, causal(mask)), attention(query, key, value, causal(mask))
    np.testing.assert_allclose(blocks[mask], whole[mask], atol=1e-6)


def test_rotary_pairs_are_half_the_width_apart():
    config = tiny_config(head_dim=4, rope_theta=100.0)
    np.testing.assert_allclose(rotary_frequencies(config), [1.0, 0.1], rtol=1e-6)
    x = jnp.array([1.0, 2.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    turned = rotate(x, *rotary_angles(jnp.array([[3]]), config))
    expected = [math.cos(3), 2 * math.cos(0.3), math.sin(3), 2 * math.sin(0.3)]
    np.testing.assert_allclose(turned.ravel(), expected, rtol=1e-5)


def test_rotary_products_depend_on_the_distance_only():
    rng = np.random.default_rng(3)
    q, k = jnp.asarray(rng.standard_normal((2, 1, 1, 1, 8)), jnp.float32)
    config = tiny_config(head_dim=8)

    def product(i, j):
        turned = [rotate(x, *rotary_angles(jnp.array([[at]]), config)) for x, at in ((q, i), (k, j))]
        return float(jnp.vdot(*turned))

    assert product(5, 2) == pytest.approx(product(13, 10), abs=1e-4)
    assert product(5, 2) != pytest.approx(product(5, 3), abs=1e-2)


def test_llama3_stretches_low_frequencies_only():
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
    plain, stretched = (
        np.asarray(rotary_frequencies(tiny_config(head_dim=16, rope_theta=500_000.0, rope_scaling=rope)))
        for rope in (None, scaling)
    )
    turns = 64 * plain / (2 * math.pi)
    assert (turns > 4).sum() and ((turns > 1) & (turns < 4)).sum() and (turns < 1).sum(), "all three regions occur"
    np.testing.assert_allclose(stretched[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(stretched[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    share = (turns[between] - 1) / 3
    np.testing.assert_allclose(stretched[between], plain[between] * (share + (1 - share) / 8), rtol=1e-5)


def test_positions_count_unpadded_tokens():
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    np.testing.assert_array_equal(token_positions(mask), [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]])


def test_causal_leaves_out_padding():
    allowed = causal(jnp.array([[False, True, True]]))
    np.testing.assert_array_equal(allowed[0], [[0, 0, 0], [0, 1, 0], [0, 1, 1]])


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


CONFIGS = [
    {},
    dict(rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64), rope_theta=500_000.0),
    QWEN | dict(rope_theta=1e6, norm_eps=1e-6),
]


@pytest.mark.parametrize("changes", CONFIGS, ids=["llama", "llama31", "qwen2"])
def test_a_config_survives_the_round_trip(changes):
    config = tiny_config(**changes)
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_older_config_fields_are_understood():
    """rope_theta and rope_scaling beside each other, no head_dim, no num_key_value_heads."""
    hf = tiny_config().to_hf()
    for field in ("rope_parameters", "head_dim", "num_key_value_heads"):
        del hf[field]
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = ModelConfig.from_hf(hf | {"rope_theta": 5e5, "rope_scaling": scaling})
    assert (config.rope_theta, config.head_dim, config.num_kv_heads) == (5e5, 8, 4)
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 64)
    assert ModelConfig.from_hf(hf | {"rope_scaling": None}).rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; supported: llama, qwen2"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"hidden_size": None}, "hidden_size is None; expected a positive integer"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor is None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor of 4 heads"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_unsupported_field_is_named(changes, message):
    with pytest.raises(UserError) as error:
        ModelConfig.from_hf(tiny_config().to_hf() | changes)
    assert message in str(error.value) and "\n" not in str(error.value)
