import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from kernel_oracle import with_whole_normalisers

from unisd_jax.kernels.fused_linear_jsd import pallas_triton, rows

pytestmark = pytest.mark.slow
# The route is deprecated: a jax without it makes every test of its values moot, but not the one of its error.
needs_triton = pytest.mark.skipif(not pallas_triton.available(), reason="this jax has no Pallas route through Triton")


def random_logits(tokens, width, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    student, teacher = (rng.normal(size=(tokens, width)).astype(np.float32) * np.float32(scale) for _ in range(2))
    return student, teacher, rng.integers(0, width, tokens)


def call(function, student, teacher, targets, settings, **arguments):
    if "wanted" not in arguments:
        arguments["wanted"] = ("student_logp",) if settings.alpha is None else ("divergence", "student_logp")
    teacher = None if settings.alpha is None else jnp.asarray(teacher)
    return function(jnp.asarray(student), teacher, jnp.asarray(targets), settings=settings, **arguments)


def score(student, teacher, targets, settings, **arguments):
    return call(pallas_triton.score_rows, student, teacher, targets, settings, interpret=True, **arguments)


def float64_scores(student, teacher, targets, settings):
    """The definitions in float64, written without any shared code: divergence, two log-probs, entropy."""

    def log_probs(logits):
        logits = np.asarray(logits, np.float64)
        if settings.soft_cap is not None:
            logits = settings.soft_cap * np.tanh(logits / settings.soft_cap)
        logits = logits[:, : settings.vocab_size] / settings.temperature
        logits = logits - logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    ls = log_probs(student)
    p, rows_ = np.exp(ls), np.arange(len(targets))
    divergence = teacher_logp = None
    if settings.alpha is not None:
        lt = log_probs(teacher)
        q, alpha = np.exp(lt), settings.alpha
        mixture = np.log((1 - alpha) * p + alpha * q)
        if alpha in (0, 1):
            divergence = (q * (lt - ls) if alpha == 0 else p * (ls - lt)).sum(axis=1)
        else:
            divergence = (alpha * q * (lt - mixture) + (1 - alpha) * p * (ls - mixture)).sum(axis=1)
        teacher_logp = lt[rows_, targets]
    return rows.RowScores(divergence, ls[rows_, targets], teacher_logp, -(p * ls).sum(axis=1))


def assert_close(found, expected, rtol=2e-5, atol=2e-6):
    """Scores, and statistics where they are expected; what is None must be None."""
    found, expected = with_whole_normalisers(found), with_whole_normalisers(expected)
    for name, value in expected._replace(statistics=None)._asdict().items():
        if value is None:
            assert name == "statistics" or getattr(found, name) is None, name
        else:
            np.testing.assert_allclose(getattr(found, name), value, rtol, atol, err_msg=name)
    if expected.statistics is not None:
        for name, value in expected.statistics._asdict().items():
            assert (getattr(found.statistics, name) is None) == (value is None), name
            if value is not None:
                np.testing.assert_allclose(getattr(found.statistics, name), value, rtol, atol, err_msg=name)


SETTINGS = [
    rows.Settings(alpha=0.0),
    rows.Settings(alpha=1.0, temperature=0.7),
    rows.Settings(alpha=0.3, temperature=1.5, soft_cap=4.0),
    rows.Settings(alpha=0.5, soft_cap=6.0, vocab_size=1003),
    rows.Settings(alpha=None, temperature=2.0, vocab_size=1003),
]


@needs_triton
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("width", [1003, 1024, 2500])
def test_scores_and_factors_agree_with_the_row_pass_and_with_float64(settings, width):
    student, teacher, targets = random_logits(3, width)
    targets %= 1003
    scores, factors = score(student, teacher, targets, settings)
    expected, expected_factors = call(rows.score_rows, student, teacher, targets, settings)
    assert_close(scores, expected)
    assert_close(scores, float64_scores(student, teacher, targets, settings))
    assert all(value.dtype == jnp.float32 for value in jax.tree.leaves(scores))
    assert list(factors) == list(expected_factors)
    for name, factor in expected_factors.items():
        assert factors[name].shape == (3, width)
        np.testing.assert_allclose(factors[name], factor, rtol=2e-4, atol=2e-7, err_msg=name)


@needs_triton
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_factors_are_the_derivatives_of_the_float64_scores(alpha):
    settings = rows.Settings(alpha=alpha, temperature=1.5, soft_cap=4.0, vocab_size=7)
    student, teacher, targets = random_logits(2, 9, seed=1)
    targets %= 7
    _, factors = score(student, teacher, targets, settings)
    step = 1e-5
    for column in range(9):
        moved = np.zeros(9)
        moved[column] = step
        above, below = (
            float64_scores(student.astype(np.float64) + sign * moved, teacher, targets, settings) for sign in (1, -1)
        )
        for name, factor in factors.items():
            derivative = (getattr(above, name) - getattr(below, name)) / (2 * step)
            np.testing.assert_allclose(factor[:, column], 1.5 * derivative, rtol=1e-4, atol=1e-6, err_msg=name)


@needs_triton
@hypothesis_settings(deadline=None, max_examples=12)
@given(
    tokens=st.integers(0, 4),
    width=st.sampled_from([1, 2, 3, 100, 1024, 1025]),
    alpha=st.sampled_from([None, 0.0, 0.2, 1.0]),
    padding=st.integers(0, 3),
    seed=st.integers(0, 3),
)
def test_any_shape_agrees_with_float64(tokens, width, alpha, padding, seed):
    student, teacher, targets = random_logits(tokens, width, seed)
    columns = max(width - padding, 1)
    settings = rows.Settings(alpha=alpha, temperature=1.3, vocab_size=columns)
    targets %= columns
    scores, factors = score(student, teacher, targets, settings)
    assert_close(scores, float64_scores(student, teacher, targets, settings))
    for name, factor in factors.items():
        np.testing.assert_allclose(factor.sum(axis=1), np.zeros(tokens), atol=2e-5, err_msg=name)


@needs_triton
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_extreme_logits_give_the_row_pass_s_numbers_and_no_nan(alpha):
    student, teacher, targets = random_logits(4, 1500)
    student[0, [3, 1200]] = 1e4, -1e4
    teacher[1, [1200, 3]] = 1e4, -1e4
    student[2] = 1e4 * np.sign(student[2])
    student[3, :1024] = -np.inf  # a whole slice without probability
    targets[3] = 5
    settings = rows.Settings(alpha=alpha)
    scores, factors = score(student, teacher, targets, settings)
    expected, expected_factors = call(rows.score_rows, student, teacher, targets, settings)
    # The kernel carries log Σ exp as one float32 number, which at 1e4 is good to 1e-3.
    assert_close(scores, expected, rtol=1e-3, atol=2e-3)
    assert scores.student_logp[3] == -np.inf and not any(np.isnan(x).any() for x in jax.tree.leaves(scores))
    for name, factor in factors.items():
        assert np.isfinite(factor).all(), name
        # Where p is 1 the reverse KL's factor is a difference of log-ratios of 1e4.
        atol = 0.02 if (alpha, name) == (1.0, "divergence") else 2e-3
        np.testing.assert_allclose(factor, expected_factors[name], rtol=1e-2, atol=atol, err_msg=name)


@needs_triton
def test_targets_outside_the_vocabulary_get_nan_and_change_no_other_row():
    student, teacher, _ = random_logits(5, 1030)
    targets = np.array([0, -1, 1030, 1024, 1023])
    scores, _ = score(student, teacher, targets, rows.Settings(alpha=0.5, vocab_size=1024))
    for name in ("student_logp", "teacher_logp"):
        np.testing.assert_array_equal(np.isnan(getattr(scores, name)), [False, True, True, True, False])
    assert np.isfinite(scores.divergence).all() and np.isfinite(scores.student_entropy).all()


@needs_triton
def test_only_the_wanted_factors_are_made_in_the_wanted_type():
    student, teacher, targets = random_logits(2, 40)
    settings = rows.Settings(alpha=0.5)
    assert score(student, teacher, targets, settings, wanted=())[1] == {}
    for name in ("divergence", "student_logp"):
        _, factors = score(student, teacher, targets, settings, wanted=(name,), factor_dtype=jnp.bfloat16)
        _, both = score(student, teacher, targets, settings, wanted=("student_logp", "divergence"))
        assert list(factors) == [name] and factors[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(factors[name], both[name].astype(jnp.bfloat16))


@needs_triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": rows.Settings(alpha=0.5, entry_ceiling=0.1)}, "entry_ceiling is 0.1"),
        ({"wanted": ("student_entropy",)}, "'student_entropy'"),
        ({"settings": rows.Settings(alpha=None)}, "teacher is not None"),
        ({"teacher": None}, "alpha is 0.5 and teacher is None"),
        ({"settings": rows.Settings(alpha=None), "teacher": None, "wanted": ("divergence",)}, "needs a teacher"),
        ({"targets": jnp.zeros((3,), jnp.int32)}, r"targets \(3,\)"),
        ({"teacher": jnp.zeros((2, 5))}, r"teacher is \(2, 5\)"),
        ({"student": jnp.zeros((2, 4), jnp.bfloat16)}, "student is bfloat16"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    arguments = dict(student=jnp.zeros((2, 4)), teacher=jnp.zeros((2, 4)), targets=jnp.zeros((2,), jnp.int32))
    arguments |= dict(settings=rows.Settings(alpha=0.5), interpret=True) | change
    with pytest.raises(ValueError, match=message):
        pallas_triton.score_rows(**arguments)


def test_a_jax_without_the_route_is_reported(monkeypatch):
    monkeypatch.setattr(pallas_triton, "triton", None)
    assert not pallas_triton.available()
    with pytest.raises(RuntimeError, match="no longer compiles Pallas kernels through Triton"):
        score(*random_logits(1, 4), rows.Settings(alpha=0.5))


@needs_triton
@pytest.mark.parametrize("settings", SETTINGS[2:], ids=str)
@pytest.mark.parametrize("width", [1003, 152064])
def test_the_kernel_lowers_for_cuda_without_a_gpu(settings, width):
    logits = jax.ShapeDtypeStruct((64, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((64,), jnp.int32)
    wanted = ("student_logp",) if settings.alpha is None else ("divergence", "student_logp")

    def run(student, teacher, targets):
        teacher = None if settings.alpha is None else teacher
        return pallas_triton.score_rows(student, teacher, targets, settings=settings, wanted=wanted)

    # Newer jax asks which card it lowers for; this machine need not have one.
    card = AbstractDevice(device_kind="NVIDIA A100", num_cores=108, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=card)):
        text = jax.jit(run).trace(logits, logits, targets).lower(lowering_platforms=("cuda",)).as_text()
    assert "__gpu$xla.gpu.triton" in text
