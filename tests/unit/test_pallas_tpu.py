import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kernel_oracle import with_whole_normalisers

from unisd_jax.kernels.fused_linear_jsd import pallas_tpu, rows

BOTH = ("divergence", "student_logp")


def random_logits(tokens, vocabulary, seed=0, scale=2.0, distance=1.0):
    """Student's and teacher's logits, `distance` apart, and targets."""
    rng = np.random.default_rng(seed)
    student = rng.normal(size=(tokens, vocabulary)) * scale
    teacher = student + rng.normal(size=(tokens, vocabulary)) * distance
    return student.astype(np.float32), teacher.astype(np.float32), rng.integers(0, vocabulary, tokens)


def call(function, student, teacher, targets, settings, **arguments):
    teacher = None if settings.alpha is None else jnp.asarray(teacher)
    arguments = {"wanted": BOTH if settings.alpha is not None else BOTH[1:]} | arguments
    function = jax.jit(functools.partial(function, settings=settings, **arguments))
    return function(jnp.asarray(student), teacher, jnp.asarray(targets))


def score(*arguments, slice_width=256, **options):
    """The kernel, interpreted; in narrow slices, so that a small vocabulary has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_tpu, "SLICE", slice_width)
        return call(pallas_tpu.score_rows, *arguments, interpret=True, **options)


def float64_scores(student, teacher, targets, settings):
    """Scores and factors from their definitions, written without any shared code."""

    def scaled(logits):
        logits = np.asarray(logits, np.float64)
        if settings.soft_cap is not None:
            logits = settings.soft_cap * np.tanh(logits / settings.soft_cap)
        return logits[:, : settings.vocab_size] / settings.temperature

    def log_probs(logits):
        logits = scaled(logits)
        logits = logits - logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    ls, lt = log_probs(student), log_probs(teacher)
    p, q, alpha, each = np.exp(ls), np.exp(lt), settings.alpha, np.arange(len(targets))
    if alpha == 0:
        divergence, factor = (q * (lt - ls)).sum(axis=1), p - q
    elif alpha == 1:
        divergence = (p * (ls - lt)).sum(axis=1)
        factor = p * (ls - lt - divergence[:, None])
    else:
        mixture = np.logaddexp(np.log1p(-alpha) + ls, np.log(alpha) + lt)
        rise = ls - mixture
        divergence = (alpha * q * (lt - mixture) + (1 - alpha) * p * rise).sum(axis=1)
        factor = (1 - alpha) * p * (rise - (p * rise).sum(axis=1, keepdims=True))
    factors = np.zeros((2, *np.shape(student)))
    factors[:, :, : ls.shape[1]] = factor, np.eye(ls.shape[1])[targets] - p
    if settings.soft_cap is not None:
        factors *= 1 - np.tanh(np.asarray(student, np.float64) / settings.soft_cap) ** 2
    scores = rows.RowScores(divergence, ls[each, targets], lt[each, targets], -(p * ls).sum(axis=1))
    return scores, dict(zip(BOTH, factors, strict=True))


def assert_close(found, expected, rtol=2e-5, atol=3e-6):
    """Compares (scores, factors); float64's scores come without statistics."""
    found, expected = (
        dict(with_whole_normalisers(scores)._asdict()) | {"factors": factors} for scores, factors in (found, expected)
    )
    if expected["statistics"] is None:
        found["statistics"] = None
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol, atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "settings"),
    [
        (3, 130, rows.Settings(alpha=0.0)),
        (9, 1000, rows.Settings(alpha=0.0, vocab_size=300, soft_cap=5.0)),
        (8, 768, rows.Settings(alpha=0.1, temperature=1.7, soft_cap=4.0)),
        (9, 1000, rows.Settings(alpha=0.5, vocab_size=300)),
        (11, 1000, rows.Settings(alpha=0.5, temperature=0.6)),
        (8, 256, rows.Settings(alpha=1.0)),
        (11, 1000, rows.Settings(alpha=1.0, temperature=1.7, soft_cap=4.0, vocab_size=999)),
    ],
    ids=str,
)
def test_scores_and_factors_agree_with_the_row_pass_and_with_float64(tokens, vocabulary, settings):
    student, teacher, targets = random_logits(tokens, vocabulary)
    inputs = student, teacher, targets % (settings.vocab_size or vocabulary), settings
    found = score(*inputs)
    assert_close(found, call(rows.score_rows, *inputs))
    assert_close(found, float64_scores(*inputs))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}


def test_slices_as_wide_as_on_a_tpu():
    inputs = *random_logits(2, 2 * pallas_tpu.SLICE + 200), rows.Settings(alpha=0.5)
    found = score(*inputs, slice_width=pallas_tpu.SLICE)
    assert_close(found, float64_scores(*inputs))


@pytest.mark.parametrize("vocabulary", [1, 300])
def test_without_a_teacher(vocabulary):
    student, _, targets = random_logits(5, vocabulary)
    settings = rows.Settings(alpha=None, temperature=1.5)
    found = score(student, None, targets, settings)
    assert_close(found, call(rows.score_rows, student, None, targets, settings))
    expected, factors = float64_scores(student, student, targets, rows.Settings(alpha=0.0, temperature=1.5))
    expected = expected._replace(divergence=None, teacher_logp=None)
    assert_close(found, (expected, {"student_logp": factors["student_logp"]}))


@pytest.mark.parametrize("wanted", [(), ("divergence",), ("student_logp",)])
def test_only_the_factors_that_are_wanted(wanted):
    inputs = *random_logits(4, 300), rows.Settings(alpha=0.5)
    found, expected = score(*inputs, wanted=wanted), call(rows.score_rows, *inputs, wanted=wanted)
    assert set(found[1]) == set(wanted)
    assert_close(found, expected)


def test_factors_are_rounded_once_from_float32():
    inputs = *random_logits(5, 300), rows.Settings(alpha=0.5)
    _, precise = score(*inputs)
    _, rounded = score(*inputs, factor_dtype=jnp.bfloat16)
    for name in BOTH:
        assert rounded[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(rounded[name], precise[name].astype(jnp.bfloat16))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
def test_huge_logits_give_no_nan(alpha):
    rng = np.random.default_rng(1)
    student, teacher = rng.choice(np.float32([-1e4, 0, 1e4]), (2, 8, 300))
    # In the first row each has all the weight where the other has none; in the second all have the same.
    student[:2], teacher[:2], student[0, 3], teacher[0, 5] = -1e4, -1e4, 1e4, 1e4
    inputs = student, teacher, rng.integers(0, 300, 8), rows.Settings(alpha=alpha)
    found, (expected, _) = score(*inputs), float64_scores(*inputs)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    # A normaliser of 1e4 is known to 5e-4, and so are the log-probs; the pure divergences are 1e4 times as large.
    np.testing.assert_allclose(found[0].student_logp, expected.student_logp, rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(found[0].divergence, expected.divergence, rtol=1e-3, atol=1e-6)
    if 0 < alpha < 1:
        bound = -alpha * np.log(alpha) - (1 - alpha) * np.log(1 - alpha)
        np.testing.assert_allclose(found[0].divergence[0], bound, rtol=2e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_banned_tokens(alpha):
    student, teacher, targets = random_logits(8, 300)
    student[:, 10:20], teacher[:, 15:25] = -np.inf, -np.inf
    targets[:4] = [7, 12, 17, 22]
    inputs = student, teacher, targets, rows.Settings(alpha=alpha)
    found, expected = score(*inputs), call(rows.score_rows, *inputs)
    assert_close(found, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found[0].divergence, found[1])))
    np.testing.assert_array_equal(np.isneginf(found[0].student_logp[:4]), [False, True, True, False])
    np.testing.assert_array_equal(np.isneginf(found[0].teacher_logp[:4]), [False, False, True, True])


@pytest.mark.parametrize("alpha", [0.1, 0.5])
@pytest.mark.parametrize("distance", [0.0, 1e-3, 0.3])
def test_small_divergences_keep_their_digits(alpha, distance):
    # Multiples of 2^-20 leave no rounding in the logits themselves.
    rng = np.random.default_rng(2)
    student = np.round(rng.normal(size=(8, 1000)) * 2**20) / 2**20
    teacher = student + np.round(rng.normal(size=student.shape) * distance * 2**20) / 2**20
    inputs = student.astype(np.float32), teacher.astype(np.float32), np.zeros(8, int), rows.Settings(alpha=alpha)
    (scores, factors), (expected, expected_factors) = score(*inputs), float64_scores(*inputs)
    if distance == 0:
        assert np.abs(scores.divergence).max() == np.abs(factors["divergence"]).max() == 0
    else:
        np.testing.assert_allclose(scores.divergence, expected.divergence, rtol=1e-6 / distance)
        found, factor = factors["divergence"], expected_factors["divergence"]
        np.testing.assert_allclose(found, factor, rtol=0, atol=1e-6 / distance * np.abs(factor).max())


def test_targets_outside_the_vocabulary_have_no_log_prob():
    student, teacher, _ = random_logits(6, 300)
    targets = np.array([-1, 0, 199, 200, 299, 300])
    known = [False, True, True, False, False, False]
    found, _ = score(student, teacher, targets, rows.Settings(alpha=0.5, vocab_size=200))
    np.testing.assert_array_equal(~np.isnan(found.student_logp), known)
    np.testing.assert_array_equal(~np.isnan(found.teacher_logp), known)
    assert np.isfinite(found.divergence).all() and np.isfinite(found.student_entropy).all()


def test_no_tokens():
    scores, factors = score(*random_logits(0, 130), rows.Settings(alpha=0.5), factor_dtype=jnp.bfloat16)
    assert scores.divergence.shape == scores.student_logp.shape == (0,)
    assert factors["divergence"].shape == (0, 130) and factors["divergence"].dtype == jnp.bfloat16


@hypothesis_settings(deadline=None, max_examples=5, derandomize=True)
@given(
    tokens=st.integers(1, 17),
    vocabulary=st.integers(1, 600),
    padding=st.integers(0, 300),
    alpha=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    soft_cap=st.sampled_from([None, 8.0]),
    scale=st.sampled_from([0.1, 3.0]),
    seed=st.integers(0, 3),
)
def test_any_shape_and_setting(tokens, vocabulary, padding, alpha, temperature, soft_cap, scale, seed):
    settings = rows.Settings(alpha, temperature, soft_cap, vocabulary if padding else None)
    student, teacher, targets = random_logits(tokens, vocabulary + padding, seed, scale)
    inputs = student, teacher, targets % vocabulary, settings
    # A log-prob of 100 is known to 8e-6; for alpha = 1 that error comes times log(p/q).
    largest = 1 + max(np.abs(student).max(), np.abs(teacher).max()) / temperature
    assert_close(score(*inputs), float64_scores(*inputs), atol=2e-7 * largest**2)


def lowered(tokens, vocabulary, settings, **arguments):
    """The module for a TPU as text; needs none."""
    logits, targets = (
        jax.ShapeDtypeStruct((tokens, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )
    taught = [] if settings.alpha is None else [logits]

    def run(student, targets, *teacher):
        teacher = teacher[0] if teacher else None
        return pallas_tpu.score_rows(student, teacher, targets, settings=settings, **arguments)

    return jax.jit(run).trace(logits, targets, *taught).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "settings", "wanted"),
    [
        (1024, 151936, rows.Settings(alpha=0.0), BOTH),
        (1024, 152064, rows.Settings(alpha=0.5), BOTH),
        (100, 50257, rows.Settings(alpha=1.0, temperature=2.0), ("divergence",)),
        (64, 49152, rows.Settings(alpha=None), ()),
        (24, 262144, rows.Settings(alpha=0.1, soft_cap=30.0, vocab_size=262100), BOTH),
        (3, 130, rows.Settings(alpha=0.5), BOTH),
        (5, 2, rows.Settings(alpha=0.5), BOTH),
    ],
)
def test_it_lowers_for_tpu_as_one_kernel(tokens, vocabulary, settings, wanted):
    text = lowered(tokens, vocabulary, settings, wanted=wanted, factor_dtype=jnp.bfloat16)
    assert text.count("tpu_custom_call") == 1
    # Nothing but the kernel takes or makes an array as large as the logits.
    operations = [
        line for line in text.splitlines() if line.strip().startswith("%") and f"{tokens}x{vocabulary}xf32" in line
    ]
    assert len(operations) == 1 and "tpu_custom_call" in operations[0]


def test_a_vocabulary_too_large_for_vmem_is_refused():
    settings = rows.Settings(alpha=0.5)
    asked = {"settings": settings, "wanted": BOTH}
    assert pallas_tpu.fits(262144, factor_dtype=jnp.bfloat16, **asked)
    assert not pallas_tpu.fits(262144, factor_dtype=jnp.float32, **asked)
    need = pallas_tpu.vmem_need(262144, **asked)
    assert pallas_tpu.fits(262144, vmem_bytes=need, **asked)
    with pytest.raises(ValueError, match=f"262144 columns need {need} bytes of VMEM, but a core has {64 * 2**20}"):
        lowered(8, 262144, settings, wanted=BOTH)
    assert "tpu_custom_call" in lowered(8, 262144, settings, wanted=BOTH, vmem_bytes=need)


def test_vmem_need_counts_every_buffer():
    need = functools.partial(pallas_tpu.vmem_need, 129)
    alone, taught = rows.Settings(alpha=None), rows.Settings(alpha=0.0)
    spare = pallas_tpu.SPARE_BYTES
    # In units of 8 rows of 256 columns: logits and factors twice, and the influences once where a divergence is wanted.
    assert need(settings=alone) - spare == 8 * 256 * 2 * 4
    assert need(settings=taught) - spare == 8 * 256 * 2 * 8
    assert need(settings=taught, wanted=BOTH, factor_dtype=jnp.bfloat16) - spare == 8 * 256 * (2 * (8 + 4) + 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": rows.Settings(alpha=0.5, entry_ceiling=0.1)}, "entry_ceiling is 0.1"),
        ({"wanted": ("student_entropy",)}, "wanted contains 'student_entropy'"),
        ({"settings": rows.Settings(alpha=None)}, "alpha is None and teacher is not None"),
        ({"teacher": None}, "alpha is 0.5 and teacher is None"),
        ({"teacher": None, "settings": rows.Settings(alpha=None), "wanted": BOTH}, "needs a teacher"),
        ({"teacher": jnp.zeros((2, 6))}, r"teacher is float32 \(2, 6\)"),
        ({"student": jnp.zeros((2, 5), jnp.bfloat16)}, "student is bfloat16"),
        ({"student": jnp.zeros((2, 0))}, r"student is \(2, 0\)"),
        ({"targets": jnp.zeros(3, jnp.int32)}, r"targets \(3,\)"),
    ],
)
def test_errors_name_the_argument_and_its_value(change, message):
    arguments = {
        "student": jnp.zeros((2, 5)),
        "teacher": jnp.zeros((2, 5)),
        "targets": jnp.zeros(2, jnp.int32),
        "settings": rows.Settings(alpha=0.5),
    }
    with pytest.raises(ValueError, match=message):
        pallas_tpu.score_rows(**(arguments | change), interpret=True)
