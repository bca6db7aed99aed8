import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from unisd_jax.kernels.fused_linear_logprob import pallas_gpu, reference

# Older jax takes seconds for each block, so what needs many blocks is checked on newer ones alone.
quick_simulator = pytest.mark.skipif(
    not hasattr(pallas_gpu.plgpu, "InterpretGPUParams"), reason="this jax simulates kernels slowly and without wgmma"
)
needs_mosaic = pytest.mark.skipif(not pallas_gpu.available(), reason="this jax builds GPU kernels only with absl-py")


@pytest.fixture
def one_split(monkeypatch):
    """Every block takes all tiles of the vocabulary, as on a card of one multiprocessor."""
    monkeypatch.setattr(pallas_gpu, "MULTIPROCESSORS", 1)


def random_inputs(tokens, width, vocabulary, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(tokens, width)) * 4 / np.sqrt(width), jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(vocabulary, width)), jnp.bfloat16)
    return hidden, head, rng.integers(0, vocabulary, tokens).astype(np.int32)


def float64_scores(logits, targets, temperature=1.0, soft_cap=None, vocab_size=None):
    """The definition in float64, written without any shared code."""
    logits = np.asarray(logits, np.float64)
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    logits = logits[:, :vocab_size] / temperature
    logits = logits - logits.max(axis=1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    probs = np.exp(log_probs)
    return log_probs[np.arange(len(targets)), targets], -(probs * np.where(probs > 0, log_probs, 0)).sum(axis=1)


def float64_logits(hidden, head):
    return np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T


def assert_close(scores, expected, atol=2e-5):
    for found, value in zip(scores, expected, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=atol)


@needs_mosaic
def test_ragged_tokens_and_vocabulary_agree_with_the_reference_and_with_float64(one_split):
    hidden, head, targets = random_inputs(70, 192, 603)  # of 2 · 64 rows, in three tiles and three steps each
    targets[[3, 68]] = -1, 603
    scores = pallas_gpu.score_tokens(hidden, head, jnp.asarray(targets), interpret=True)
    assert_close(scores, reference.score_tokens(hidden, head, jnp.asarray(targets)))
    valid = np.ones(70, bool)
    valid[[3, 68]] = False
    np.testing.assert_array_equal(np.isnan(scores.logp), ~valid)
    expected = float64_scores(float64_logits(hidden, head), np.where(valid, targets, 0))
    assert_close((scores.logp[valid], scores.entropy), (expected[0][valid], expected[1]))


@needs_mosaic
def test_temperature_soft_cap_and_padding_agree_with_the_reference_and_with_float64(one_split):
    hidden, head, targets = random_inputs(9, 320, 520)  # five steps in four stages
    options = {"temperature": 0.7, "soft_cap": 3.0, "vocab_size": 300}
    targets %= 300
    targets[2] = 300
    scores = pallas_gpu.score_tokens(hidden, head, jnp.asarray(targets), interpret=True, **options)
    assert_close(scores, reference.score_tokens(hidden, head, jnp.asarray(targets), **options))
    assert np.isnan(scores.logp[2])
    expected = float64_scores(float64_logits(hidden, head), np.where(targets < 300, targets, 0), **options)
    assert_close((np.delete(scores.logp, 2), scores.entropy), (np.delete(expected[0], 2), expected[1]))


@needs_mosaic
def test_parts_of_the_vocabulary_are_merged(monkeypatch):
    make_plan = pallas_gpu.make_plan
    monkeypatch.setattr(
        pallas_gpu, "make_plan", lambda *call: dataclasses.replace(make_plan(*call), tiles_per_split=2)
    )  # parts of two tiles and of one
    hidden, head, targets = random_inputs(5, 64, 700)
    targets[:2] = 511, 512  # the last of the first part, the first of the second
    scores = pallas_gpu.score_tokens(hidden, head, jnp.asarray(targets), interpret=True)
    assert_close(scores, float64_scores(float64_logits(hidden, head), targets))


@needs_mosaic
def test_extreme_logits(one_split):
    """Logits are exact here: hidden states are 100 in one place, the head is 0 or ±100."""
    hidden, head = np.zeros((5, 64)), np.zeros((300, 64))
    hidden[[0, 1, 2], [0, 1, 2]] = 100.0
    hidden[4] = np.nan
    head[[7, 290], 0], head[:, 1] = (100.0, -100.0), -100.0
    head[5, 2] = -(2.0**120)
    hidden[3, 2] = 2.0**120  # a logit of -2^240 = -inf
    hidden, head = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    scores = pallas_gpu.score_tokens(hidden, head, jnp.array([7, 1, 5, 5, 0]), interpret=True)
    np.testing.assert_allclose(scores.logp, [0.0, -np.log(300), -100 * 2.0**120, -np.inf, np.nan], rtol=1e-6)
    np.testing.assert_allclose(scores.entropy, [0.0, np.log(300), np.log(299), np.log(299), np.nan], rtol=1e-6)


@quick_simulator
@hypothesis_settings(deadline=None, max_examples=6)
@given(
    tokens=st.integers(0, 300),
    steps=st.integers(1, 6),
    vocabulary=st.integers(1, 1100),
    multiprocessors=st.sampled_from([1, 132]),
    seed=st.integers(0, 3),
)
def test_any_shape_agrees_with_float64(tokens, steps, vocabulary, multiprocessors, seed):
    hidden, head, targets = random_inputs(tokens, 64 * steps, vocabulary, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_gpu, "MULTIPROCESSORS", multiprocessors)
        scores = pallas_gpu.score_tokens(hidden, head, jnp.asarray(targets), interpret=True)
    assert_close(scores, float64_scores(float64_logits(hidden, head), targets))


@quick_simulator
def test_no_stage_is_overwritten_while_it_is_read(one_split, monkeypatch):
    """The simulator raises an error where two accesses are not ordered by barriers."""
    simulator = pallas_gpu._simulator()
    monkeypatch.setattr(pallas_gpu, "_simulator", lambda: dataclasses.replace(simulator, detect_races=True))
    hidden, head, targets = random_inputs(70, 448, 601)
    scores = pallas_gpu.score_tokens(hidden, head, jnp.asarray(targets), interpret=True)
    assert_close(scores, float64_scores(float64_logits(hidden, head), targets))


@hypothesis_settings(deadline=None, max_examples=10)
@given(
    columns=st.integers(1, 1000),
    parts=st.integers(1, 3),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    soft_cap=st.sampled_from([None, 4.0]),
    scale=st.sampled_from([0.1, 3.0, 1e4]),
    seed=st.integers(0, 3),
)
def test_folding_tiles_and_merging_parts_is_log_softmax(columns, parts, temperature, soft_cap, scale, seed):
    """The mathematics of the kernel alone, on logits that no product made."""
    tile, rows = pallas_gpu.TILE, pallas_gpu.ROWS
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, columns, rows)
    plan = pallas_gpu.Plan(rows, columns, 64, 1, temperature, soft_cap)
    logits = (rng.normal(size=(rows, plan.tiles * tile)) * scale).astype(np.float32)
    sums = [pallas_gpu.empty_sums() for _ in range(parts)]
    for index in range(plan.tiles):
        piece = jnp.asarray(logits[:, index * tile : (index + 1) * tile])
        here = jnp.asarray((targets // tile == index).any())
        part = index % parts
        sums[part] = pallas_gpu.fold(sums[part], piece, jnp.int32(index * tile), jnp.asarray(targets), here, plan)
    scores = pallas_gpu.merge(jnp.stack([jnp.stack(part) for part in sums]))
    expected = float64_scores(logits, targets, temperature, soft_cap, columns)
    assert_close(scores, expected, atol=2e-5 + 2e-7 * scale / temperature)


@pytest.mark.parametrize(
    ("tokens", "columns"), [(1, 5), (129, 300), (1000, 152064), (2049, 49152), (8192, 151936), (10_000, 262144)]
)
def test_the_grid_visits_every_part_of_every_row_once(tokens, columns):
    plan = pallas_gpu.make_plan(tokens, columns, 64, 1.0, None)
    assert (plan.splits - 1) * plan.tiles_per_split < plan.tiles <= plan.splits * plan.tiles_per_split
    places = plan.blocks * plan.splits
    block, split = pallas_gpu._position(jnp.arange(places), plan)
    assert block.min() == split.min() == 0 and block.max() == plan.blocks - 1 and split.max() == plan.splits - 1
    assert len(np.unique(np.asarray(block) * plan.splits + np.asarray(split))) == places


@pytest.mark.parametrize(("tokens", "columns"), [(8192, 152064), (1, 152064), (700, 49152)])
def test_few_tokens_still_occupy_most_of_the_card(tokens, columns):
    plan = pallas_gpu.make_plan(tokens, columns, 896, 1.0, None)
    waves = -(-plan.blocks * plan.splits // pallas_gpu.MULTIPROCESSORS)
    time = waves * plan.tiles_per_split * pallas_gpu.MULTIPROCESSORS
    assert plan.blocks * plan.tiles / time > 0.75


@needs_mosaic
def test_no_tokens_give_no_scores():
    scores = pallas_gpu.score_tokens(*(jnp.asarray(array) for array in random_inputs(0, 64, 10)))
    assert scores.logp.shape == scores.entropy.shape == (0,)


def test_a_jax_without_mosaic_is_reported(monkeypatch):
    hidden, head, targets = (jnp.asarray(array) for array in random_inputs(1, 64, 5))
    monkeypatch.setattr(pallas_gpu, "plgpu", None)
    assert not pallas_gpu.available() and not pallas_gpu.supports(hidden, head)
    with pytest.raises(RuntimeError, match="it needs absl-py"):
        pallas_gpu.score_tokens(hidden, head, targets)


@needs_mosaic
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden": jnp.zeros((2, 100), jnp.bfloat16), "head": jnp.zeros((9, 100), jnp.bfloat16)},
            r"\(9, 100\).*of 64",
        ),
        ({"hidden": jnp.zeros((2, 128), jnp.bfloat16)}, r"hidden is \(2, 128\) and head \(9, 64\)"),
        ({"hidden": jnp.zeros((2, 64), jnp.float32)}, "hidden is float32"),
        ({"head": jnp.zeros((0, 64), jnp.bfloat16)}, "V > 0"),
        ({"targets": jnp.zeros((3,), jnp.int32)}, r"targets are \(3,\)"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    arguments = {"hidden": jnp.zeros((2, 64), jnp.bfloat16), "head": jnp.zeros((9, 64), jnp.bfloat16)}
    assert pallas_gpu.supports(**arguments)
    arguments |= {"targets": jnp.zeros((2,), jnp.int32)} | change
    if not {"targets", "vocab_size"} & set(change):
        assert not pallas_gpu.supports(arguments["hidden"], arguments["head"])
    with pytest.raises(ValueError, match=message):
        pallas_gpu.score_tokens(**arguments)


@needs_mosaic
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "soft_cap": 30.0, "vocab_size": 1000}], ids=str)
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(8192, 896, 151936), (131, 576, 50257), (3, 64, 5)])
def test_the_kernel_lowers_for_cuda_without_a_gpu(tokens, width, vocabulary, options):
    def run(hidden, head, targets):
        return pallas_gpu.score_tokens(hidden, head, targets, **options)

    hidden, head = (jax.ShapeDtypeStruct((size, width), jnp.bfloat16) for size in (tokens, vocabulary))
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    text = jax.jit(run).trace(hidden, head, targets).lower(lowering_platforms=("cuda",)).as_text()
    assert "@mosaic_gpu" in text
