"""Every term of the objective against numbers of another implementation: float64, closed-form inputs, six decimals."""

import jax.numpy as jnp
import numpy as np
import pytest
from toys import quick_compile as quick_compile

from unisd_jax.losses import (
    Agreement,
    Objective,
    TeacherScores,
    clip_divergence,
    contrastive_hinge,
    entropy_mask,
    feature_distance,
    importance_weights,
    loss_mask,
    masked_quantile,
    objective,
    quantile_ceiling,
    reduce_tokens,
    score_tokens,
    sequence_agreement,
    token_agreement,
    token_divergence,
    token_log_probs,
    token_plan,
)

TEMPERATURE = 0.7
TOLERANCE = 2e-6

B, T, V = np.ogrid[:2, :4, :5]
STUDENT = jnp.asarray(np.sin(1.3 * B + 0.7 * T + 1.1 * V), jnp.float32)
TEACHER = jnp.asarray(1.5 * np.cos(0.5 * B + 1.9 * T - 0.8 * V), jnp.float32)
NEGATIVE = jnp.asarray(np.sin(2.0 * B - 0.4 * T + 0.9 * V + 1), jnp.float32)
AUXILIARY = jnp.asarray(
    np.stack([1.2 * np.sin(0.9 * k + 0.3 * B + 0.6 * T * (k + 1) + 0.5 * V) for k in range(3)]), jnp.float32
)
IDS = jnp.asarray((3 * B + 2 * T)[..., 0] % 5)
MASK = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
STUDENT_HIDDEN = jnp.asarray(np.sin(B + T + np.arange(3)), jnp.float32)
TEACHER_HIDDEN = jnp.asarray(np.cos(B - T + 2 * np.arange(3)), jnp.float32)

# alpha: (divergence, loss).
DIVERGENCES = {
    0.0: ([[0.764301, 0.962139, 1.973555, 0.199105], [0.095110, 1.415685, 0.138886, 1.736425]], 0.865086),
    1.0: ([[0.733004, 1.024382, 2.394236, 0.358226], [0.119776, 2.174723, 0.170078, 2.824329]], 1.137356),
    0.1: ([[0.065545, 0.082228, 0.163711, 0.018466], [0.008610, 0.120124, 0.012656, 0.149022]], 0.073427),
    0.5: ([[0.168069, 0.215956, 0.421274, 0.059906], [0.025102, 0.323729, 0.037463, 0.408693]], 0.195358),
    0.9: ([[0.063397, 0.085817, 0.182648, 0.028421], [0.010177, 0.150034, 0.014832, 0.192395]], 0.085088),
}
AUXILIARY_LOGPS = [
    [[-2.468990, -1.355808, -2.520022, -1.241295], [-1.367720, -1.587115, -1.602209, -2.882185]],
    [[-1.587115, -1.850356, -1.836584, -2.270541], [-1.937117, -0.813755, -1.917141, -0.811501]],
    [[-0.967525, -1.917141, -0.885342, -1.338306], [-2.431277, -1.566783, -1.701609, -2.534312]],
]
# statistic: (scale, weights of row 0, weights of the two tokens of row 1, forward loss).
TOKEN_AGREEMENT = {
    "var": (0.647849, [0.532254, 0.873264, 0.490100, 0.667322], [0.695782, 0.769319], 0.852164),
    "range": (1.601377, [0.516100, 0.740449, 0.494854, 0.608745], [0.600907, 0.674339], 0.863777),
}
# statistic: (disagreement, weights).
SEQUENCE_AGREEMENT = {
    "var": ([0.083866, 0.074594], [0.919555, 0.928120]),
    "range": ([0.619450, 0.623594], [0.538240, 0.536015]),
}
ENTROPY = [[1.301724, 1.247952, 1.171312, 1.232283], [1.180630, 1.210257]]
HINGE = [[1.037927, 0.939667, 2.404316, 0.241190], [0.000000, 4.316476]]

NEGATIVE_LOGPS = token_log_probs(NEGATIVE / TEMPERATURE, IDS)
TEACHER_LOGPS = token_log_probs(TEACHER / TEMPERATURE, IDS)
STUDENT_LOGPS = token_log_probs(STUDENT / TEMPERATURE, IDS)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def close_where_counted(found, row, pair):
    """`found` on the four tokens of the first completion and the two of the second."""
    close(found[0], row)
    close(found[1, :2], pair)


def context_logps():
    return token_log_probs(AUXILIARY.reshape(6, 4, 5), jnp.tile(IDS, (3, 1))).reshape(3, 2, 4)


def terms_of(mask=MASK, disagreement=None, sampler_logps=None, **options):
    """The terms of the objective, from logits and hidden states, reduced as the release reduces."""
    settings = Objective(temperature=TEMPERATURE, normalize="upstream", **options)
    scores = score_tokens(STUDENT, TEACHER, IDS, settings=settings)
    plan = token_plan(mask, settings=settings, disagreement=disagreement, scores=scores, sampler_logps=sampler_logps)
    teacher = TeacherScores(TEACHER_HIDDEN, TEACHER_LOGPS, NEGATIVE_LOGPS, disagreement)
    return objective(scores, STUDENT_HIDDEN, teacher, mask, plan, settings=settings)


def test_the_tokens():
    np.testing.assert_array_equal(IDS, [[0, 2, 4, 1], [3, 0, 2, 4]])


@pytest.mark.parametrize("alpha", DIVERGENCES)
def test_divergence_and_loss(alpha):
    divergence, loss = DIVERGENCES[alpha]
    found = token_divergence(STUDENT / TEMPERATURE, TEACHER / TEMPERATURE, alpha=alpha)
    close(found, divergence)
    close(reduce_tokens(found, MASK, normalize="upstream"), loss)
    close(terms_of(alpha=alpha)["divergence"], loss)


def test_static_clip():
    clipped = clip_divergence(jnp.array(DIVERGENCES[0.0][0]), MASK, ceiling=0.3)
    close(reduce_tokens(clipped, MASK, normalize="upstream"), 0.236166)
    close(terms_of(clip_ceiling=0.3)["divergence"], 0.236166)


def test_quantile_clip():
    """0.8 of six tokens is the fifth of them: the ceiling is one of the samples, not a number between two."""
    divergence = token_divergence(STUDENT / TEMPERATURE, TEACHER / TEMPERATURE, alpha=0.0)
    ceiling = quantile_ceiling(divergence, MASK, 0.8)
    close(ceiling, 1.415685)
    assert float(ceiling) == float(divergence[1, 1])
    clipped = clip_divergence(divergence, MASK, quantile=0.8)
    close(reduce_tokens(clipped, MASK, normalize="upstream"), 0.795352)
    close(terms_of(clip_quantile=0.8)["divergence"], 0.795352)


def test_auxiliary_log_probs():
    close(context_logps(), AUXILIARY_LOGPS)


@pytest.mark.parametrize("statistic", TOKEN_AGREEMENT)
def test_token_agreement(statistic):
    scale, row, pair, loss = TOKEN_AGREEMENT[statistic]
    weights, disagreement = token_agreement(context_logps(), MASK, gamma=1.0, statistic=statistic)
    close(masked_quantile(disagreement, MASK, 0.95), scale)
    close_where_counted(weights, row, pair)
    settings = Agreement(level="token", gamma=1.0, statistic=statistic)
    close(terms_of(disagreement=disagreement, agreement=settings)["divergence"], loss)


@pytest.mark.parametrize("statistic", SEQUENCE_AGREEMENT)
def test_sequence_agreement(statistic):
    disagreement, weights = SEQUENCE_AGREEMENT[statistic]
    found, spread = sequence_agreement(context_logps(), MASK, gamma=1.0, statistic=statistic)
    close(spread, disagreement)
    close(found, weights)


def test_sequence_agreement_leaves_the_loss_of_the_release_as_it_was():
    _, disagreement = sequence_agreement(context_logps(), MASK, gamma=1.0)
    settings = Agreement(level="sequence", gamma=1.0)
    close(terms_of(disagreement=disagreement, agreement=settings)["divergence"], 0.865086)


def test_contrast():
    hinge = contrastive_hinge(STUDENT_LOGPS, TEACHER_LOGPS, NEGATIVE_LOGPS, margin=0.5)
    close_where_counted(hinge, *HINGE)
    terms = terms_of(loss="none", contrast_weight=1.0, contrast_margin=0.5)
    assert list(terms) == ["contrast"]
    close(terms["contrast"], 1.657006)
    close(terms_of(contrast_weight=0.1, contrast_margin=0.5)["contrast"], 0.1657006)


def test_student_entropy():
    scores = score_tokens(STUDENT, None, IDS, settings=Objective(temperature=TEMPERATURE))
    close_where_counted(scores.entropy, *ENTROPY)


def test_entropy_mask():
    scores = score_tokens(STUDENT, None, IDS, settings=Objective(temperature=TEMPERATURE))
    close(masked_quantile(scores.entropy, MASK, 0.5), 1.221270)
    np.testing.assert_array_equal(entropy_mask(scores.entropy, MASK, top=0.5), [[1, 1, 0, 1], [0, 0, 0, 0]])
    close(terms_of(top_entropy=0.5)["divergence"], 0.240693)


def test_entropy_mask_and_token_agreement():
    """Tokens that the mask leaves out count with weight 1 in the denominator."""
    _, disagreement = token_agreement(context_logps(), MASK, gamma=1.0)
    terms = terms_of(top_entropy=0.5, disagreement=disagreement, agreement=Agreement(gamma=1.0))
    close(terms["divergence"], 0.224527)


def test_feature_matching():
    distance = feature_distance(STUDENT_HIDDEN, TEACHER_HIDDEN)
    close(reduce_tokens(distance, MASK, normalize="upstream"), 0.935260)
    terms = terms_of(loss="none", matching_weight=1.0)
    assert list(terms) == ["matching"]
    close(terms["matching"], 0.935260)


def test_importance_weights():
    """ρ = min(exp(0.3(b − t)), 2), so the sampler's log-probs lie 0.3(b − t) below the student's."""
    sampler_logps = STUDENT_LOGPS - jnp.asarray(0.3 * (B - T)[..., 0], jnp.float32)
    found = importance_weights(STUDENT_LOGPS, sampler_logps, MASK, cap=2.0, level="sequence")
    close(found[:, 0], [0.674050, 1.174929])
    terms = terms_of(sampler_logps=sampler_logps, importance="sequence", importance_cap=2.0)
    close(terms["divergence"], 0.772293)


def test_skipped_tokens():
    mask = loss_mask(MASK, 1)
    np.testing.assert_array_equal(mask, [[0, 1, 1, 1], [0, 1, 0, 0]])
    close(terms_of(mask)["divergence"], 1.230309)


def test_the_estimate_of_the_kl_from_sampled_tokens():
    """Mean over the tokens of exp(δ) − δ − 1 with δ = ℓ_T − ℓ_S: the release's log of how far the two are apart."""
    gap = np.asarray(TEACHER_LOGPS - STUDENT_LOGPS, np.float64)[np.asarray(MASK)]
    assert np.mean(np.exp(gap) - gap - 1) == pytest.approx(2.312891, abs=1e-5)
