"""The GPU kernel, interpreted, and its translation for CUDA, which needs no GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kernel_oracle import with_whole_normalisers

from unisd_jax.kernels.fused_linear_jsd import pallas_gpu, rows

BOTH = ("divergence", "student_logp")
VOCABULARIES = (1, 130, 1003, 32000, 49152, 151936, 152064, 262144)


def random_logits(tokens, vocabulary, seed=0, scale=2.0, distance=1.0):
    """Student's and teacher's logits, `distance` apart, and targets."""
    rng = np.random.default_rng(seed)
    student = rng.normal(size=(tokens, vocabulary)) * scale
    teacher = student + rng.normal(size=(tokens, vocabulary)) * distance
    return student.astype(np.float32), teacher.astype(np.float32), rng.integers(0, vocabulary, tokens)


@functools.cache
def compiled(function, settings, wanted, factor_dtype, interpret=None, division=None):
    """Compiled once for all tests; `division` only tells apart what was compiled under different patches."""
    options = {"settings": settings, "wanted": wanted, "factor_dtype": factor_dtype}
    return jax.jit(functools.partial(function, **options, **({} if interpret is None else {"interpret": interpret})))


def score(student, teacher, targets, settings, wanted=BOTH, factor_dtype=jnp.float32, division=None):
    """The kernel's answer, and that of `rows`."""
    arrays = jnp.asarray(student), None if settings.alpha is None else jnp.asarray(teacher), jnp.asarray(targets)
    kernel = compiled(pallas_gpu.score_rows, settings, wanted, factor_dtype, True, division)
    return kernel(*arrays), compiled(rows.score_rows, settings, wanted, factor_dtype)(*arrays)


def expected_scores(student, teacher, targets, settings):
    """Scores and factors in float64 from their definitions, written without any shared code; finite logits only."""
    alpha, each = settings.alpha, np.arange(len(targets))

    def squash(logits):
        return np.tanh(logits.astype(np.float64) / (settings.soft_cap or 1e12))

    def log_probs(logits):
        logits = (settings.soft_cap or 1e12) * squash(logits)[:, : settings.vocab_size] / settings.temperature
        logits = logits - logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    ls, lt = log_probs(student), log_probs(teacher)
    p, q = np.exp(ls), np.exp(lt)
    if alpha == 0:
        divergence, factor = (q * (lt - ls)).sum(axis=1), p - q
    elif alpha == 1:
        divergence = (p * (ls - lt)).sum(axis=1)
        factor = p * (ls - lt - divergence[:, None])
    else:
        mixture = np.logaddexp(np.log1p(-alpha) + ls, np.log(alpha) + lt)
        divergence = (alpha * q * (lt - mixture) + (1 - alpha) * p * (ls - mixture)).sum(axis=1)
        gain = ls - mixture
        factor = (1 - alpha) * p * (gain - (p * gain).sum(axis=1, keepdims=True))
    hit = np.zeros_like(p)
    hit[each, targets] = 1
    padding = ((0, 0), (0, student.shape[1] - p.shape[1]))
    slope = 1 - squash(student) ** 2
    factors = {"divergence": factor, "student_logp": hit - p}
    scores = {
        "divergence": divergence,
        "student_logp": ls[each, targets],
        "teacher_logp": lt[each, targets],
        "student_entropy": -(p * ls).sum(axis=1),
    }
    return scores, {name: np.pad(factor, padding) * slope for name, factor in factors.items()}


def assert_close(found, reference, rtol, atol):
    np.testing.assert_allclose(np.asarray(found, np.float64), np.asarray(reference, np.float64), rtol=rtol, atol=atol)


def check(student, teacher, targets, settings, division=None, atol=2e-6):
    """Kernel against `rows`, statistics and all, and against float64."""
    (scores, factors), (reference, reference_factors) = score(student, teacher, targets, settings, division=division)
    scores, reference = with_whole_normalisers(scores), with_whole_normalisers(reference)
    assert jax.tree.structure(scores) == jax.tree.structure(reference)
    jax.tree.map(functools.partial(assert_close, rtol=2e-5, atol=atol), scores, reference)
    assert factors.keys() == reference_factors.keys() == set(BOTH)
    expected, expected_factors = expected_scores(student, teacher, targets, settings)
    for name, value in expected.items():
        assert_close(getattr(scores, name), value, rtol=2e-5, atol=atol)
    for name, factor in factors.items():
        assert_close(factor, reference_factors[name], rtol=1e-4, atol=atol)
        assert_close(factor, expected_factors[name], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("distance", [1e-3, 1.0])
def test_agrees_with_rows_and_with_float64(alpha, distance):
    student, teacher, targets = random_logits(3, 1003, distance=distance)
    check(student, teacher, targets, rows.Settings(alpha=alpha))


def test_small_divergences_keep_their_digits():
    student, teacher, targets = random_logits(3, 1003, seed=1, distance=1e-2)
    settings = rows.Settings(alpha=0.1)
    (scores, _), _ = score(student, teacher, targets, settings)
    expected, _ = expected_scores(student, teacher, targets, settings)
    assert expected["divergence"].max() < 1e-5
    assert_close(scores.divergence, expected["divergence"], rtol=1e-4, atol=0)


def test_temperature_soft_cap_and_padding_columns():
    student, teacher, targets = random_logits(2, 2500, seed=2)
    student[:, 2100:] = 50.0  # Padding would dominate if it counted.
    settings = rows.Settings(alpha=0.5, temperature=0.7, soft_cap=3.0, vocab_size=2100)
    check(student, teacher, np.minimum(targets, 2099), settings)


def check_divided(monkeypatch, arrays, warpgroups, chunks, chunk):
    """`check` with a row divided over warpgroups that run at the same time, and into small chunks."""
    monkeypatch.setattr(pallas_gpu, "CHUNK", chunk)
    monkeypatch.setattr(pallas_gpu, "BLOCKS", 1)  # So that a block has several rows.
    monkeypatch.setattr(pallas_gpu, "_interpreted", lambda _: pallas_gpu._Plan(1, warpgroups, chunks))
    check(*arrays, rows.Settings(alpha=0.5), division=(warpgroups, chunks, chunk))


def test_rows_one_after_the_other(monkeypatch):
    """The next row's logits are loaded where this row's factors are."""
    check_divided(monkeypatch, random_logits(5, 1100, seed=3), warpgroups=1, chunks=5, chunk=2)


def test_parts_exchange_their_sums(monkeypatch):
    """The second part ends within a chunk, the third has no columns."""
    check_divided(monkeypatch, random_logits(2, 850, seed=4), warpgroups=3, chunks=2, chunk=2)


def test_without_teacher():
    student, _, targets = random_logits(3, 300, seed=5)
    settings = rows.Settings(alpha=None)
    (scores, factors), (reference, reference_factors) = score(student, None, targets, settings, BOTH[1:])
    assert scores.divergence is None and scores.teacher_logp is None
    scores, reference = with_whole_normalisers(scores), with_whole_normalisers(reference)
    jax.tree.map(functools.partial(assert_close, rtol=1e-5, atol=1e-6), scores, reference)
    assert_close(factors["student_logp"], reference_factors["student_logp"], rtol=1e-5, atol=1e-7)


def test_only_what_is_wanted_in_bfloat16():
    student, teacher, targets = random_logits(2, 300, seed=6)
    settings = rows.Settings(alpha=0.0)
    (_, factors), (_, reference) = score(student, teacher, targets, settings, BOTH[:1], jnp.bfloat16)
    assert factors.keys() == {"divergence"} and factors["divergence"].dtype == jnp.bfloat16
    assert_close(factors["divergence"], reference["divergence"], rtol=1e-2, atol=1e-8)
    assert np.abs(np.asarray(factors["divergence"], np.float32)).max() > 1e-3


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_huge_logits_and_bad_targets(alpha):
    """Certain and opposite distributions give no NaN; a target outside the vocabulary gives it to its log-probs."""
    student, teacher, _ = random_logits(3, 1003)
    student[0, 7], teacher[0, 8] = 1e4, 1e4
    student[1], teacher[1] = -1e4, 1e4
    student[2, 5] = teacher[2, 6] = -np.inf
    targets = np.array([7, 1003, -1])
    (scores, factors), (reference, reference_factors) = score(student, teacher, targets, rows.Settings(alpha=alpha))
    np.testing.assert_array_equal(np.isnan(scores.student_logp), [False, True, True])
    np.testing.assert_array_equal(np.isnan(scores.teacher_logp), [False, True, True])
    assert np.isfinite(scores.divergence).all() and np.isfinite(scores.student_entropy).all()
    # The kernel carries log Σ exp as one float32 number, which at 1e4 is good to 1e-3.
    scores, reference = with_whole_normalisers(scores), with_whole_normalisers(reference)
    jax.tree.map(functools.partial(assert_close, rtol=1e-3, atol=2e-3), scores, reference)
    for name, factor in factors.items():
        assert np.isfinite(factor).all()
        assert_close(factor, reference_factors[name], rtol=1e-2, atol=2e-3)


@hypothesis_settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(0.1, 20),
    distance=st.floats(0.01, 20),
    shift=st.floats(-50, 50),
    alpha=st.sampled_from([0.1, 0.5, 1.0]),
)
def test_properties(seed, scale, distance, shift, alpha):
    """A divergence has bounds, its factors sum to 0, and constants added to all logits of a row change nothing."""
    student, teacher, targets = random_logits(3, 1003, seed, scale, distance)
    (scores, factors), _ = score(student, teacher, targets, rows.Settings(alpha=alpha))
    (shifted, _), _ = score(student + np.float32(shift), teacher, targets, rows.Settings(alpha=alpha))
    entropy = np.inf if alpha == 1 else -alpha * np.log(alpha) - (1 - alpha) * np.log1p(-alpha)
    assert (scores.divergence >= 0).all() and (scores.divergence <= entropy + 1e-6).all()
    for name in BOTH:
        assert np.abs(np.asarray(factors[name], np.float64).sum(axis=1)).max() < 1e-4 * (1 + np.abs(student).max())
    assert_close(shifted.divergence, scores.divergence, rtol=1e-3, atol=1e-4)
    assert_close(shifted.student_logp, scores.student_logp, rtol=1e-4, atol=1e-4)


def test_no_tokens():
    (scores, factors), _ = score(
        np.zeros((0, 300)), np.zeros((0, 300)), np.zeros(0, np.int32), rows.Settings(alpha=0.5)
    )
    assert scores.divergence.shape == (0,) and factors["divergence"].shape == (0, 300)


@pytest.mark.parametrize("alpha", [None, 0.5])
@pytest.mark.parametrize("columns", VOCABULARIES)
def test_plans_fit_the_hardware(columns, alpha):
    arrays = 1 if alpha is None else 2
    plan = pallas_gpu._plan(columns, arrays)
    assert pallas_gpu.supports(columns, settings=rows.Settings(alpha=alpha), wanted=BOTH[1:])
    assert plan.parts * plan.tiles * pallas_gpu.LANES >= columns
    assert plan.shared_bytes(arrays) <= 225 * 1024
    assert plan.blocks <= 16
    # One number of a kind per lane of a part's line.
    assert 3 * arrays <= pallas_gpu.LANES


@pytest.mark.parametrize(
    ("columns", "alpha", "wanted"),
    [(130, 0.5, BOTH), (49152, 0.0, ()), (152064, 1.0, BOTH[:1]), (262144, 0.5, BOTH), (152064, None, BOTH[1:])],
)
def test_translates_for_cuda(columns, alpha, wanted):
    pytest.importorskip("absl", reason="Mosaic GPU needs absl-py")
    settings = rows.Settings(alpha=alpha, soft_cap=30.0, temperature=0.7)
    function = compiled(pallas_gpu.score_rows, settings, wanted, jnp.bfloat16)
    logits = jax.ShapeDtypeStruct((16, columns), jnp.float32)
    arguments = logits, None if alpha is None else logits, jax.ShapeDtypeStruct((16,), jnp.int32)
    module = function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert module.count("custom_call @mosaic_gpu") == 1
    # An operation's name in MLIR bytecode; the blocks of a cluster meet, a single block does not.
    assert ("nvvm.cluster.arrive\\00" in module) == (columns > 10_000)


def test_supports_says_what_score_rows_raises():
    student, teacher, targets = (jnp.asarray(x) for x in random_logits(2, 300))
    plain = rows.Settings(alpha=0.5)
    refused = [
        (300, dataclasses.replace(plain, entry_ceiling=0.1), BOTH, "entry_ceiling is 0.1"),
        (300, plain, ("student_entropy",), "student_entropy"),
        (300, rows.Settings(alpha=None), BOTH, "alpha None"),
        (500_000, plain, BOTH, "500000"),
    ]
    assert pallas_gpu.supports(300, settings=plain, wanted=BOTH)
    for columns, settings, wanted, message in refused:
        assert not pallas_gpu.supports(columns, settings=settings, wanted=wanted)
        row = jax.ShapeDtypeStruct((2, columns), jnp.float32)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                functools.partial(pallas_gpu.score_rows, settings=settings, wanted=wanted),
                row, None if settings.alpha is None else row, targets,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": None}, "without teacher"),
        ({"settings": rows.Settings(alpha=None)}, "with teacher"),
        ({"teacher": jnp.zeros((2, 299))}, "299"),
        ({"student": jnp.zeros((2, 300), jnp.bfloat16)}, "bfloat16"),
        ({"targets": jnp.zeros(3, jnp.int32)}, r"\(3,\)"),
        ({"factor_dtype": jnp.float16}, "float16"),
    ],
)
def test_refuses_what_does_not_fit_together(change, message):
    student, teacher, targets = (jnp.asarray(x) for x in random_logits(2, 300))
    arguments = {"student": student, "teacher": teacher, "targets": targets, "settings": rows.Settings(alpha=0.5)}
    with pytest.raises(ValueError, match=message):
        pallas_gpu.score_rows(**(arguments | change))
