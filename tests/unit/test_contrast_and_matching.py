"""The contrast and feature matching by hand: values, gradients, what they refuse, and their terms and metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisd_jax.losses import (
    Objective,
    TeacherScores,
    TokenScores,
    contrastive_hinge,
    feature_distance,
    mechanism_metrics,
    objective,
    reduce_tokens,
    token_plan,
)

# Margin 1/2. Distances to the positive view 1, 3, 1; to the negative view 3, 1, 1.
STUDENT = jnp.array([[-2.0, -2.0, -2.0]])
POSITIVE = jnp.array([[-1.0, -5.0, -3.0]])
NEGATIVE = jnp.array([[-5.0, -1.0, -3.0]])
HINGE = [[0.0, 2.5, 0.5]]
ALL = jnp.ones((1, 3), bool)


def hinge_gradient(student, positive, negative, margin):
    return jax.grad(lambda x: contrastive_hinge(x, positive, negative, margin=margin).sum())(student)


def test_hinge_by_hand():
    found = contrastive_hinge(STUDENT, POSITIVE, NEGATIVE, margin=0.5)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, HINGE)


def test_hinge_gradient_by_hand():
    """sign(ℓ_S − ℓ₊) − sign(ℓ_S − ℓ₋) where the hinge is above 0."""
    np.testing.assert_array_equal(hinge_gradient(STUDENT, POSITIVE, NEGATIVE, 0.5), [[0.0, 2.0, 0.0]])
    np.testing.assert_array_equal(hinge_gradient(STUDENT, POSITIVE, NEGATIVE, 4.0), [[-2.0, 2.0, 0.0]])


def test_no_gradient_where_the_hinge_is_exactly_zero():
    """Distances 1 and 3, margin 2."""
    args = STUDENT[:, :1], POSITIVE[:, :1], NEGATIVE[:, :1]
    assert contrastive_hinge(*args, margin=2.0).item() == 0.0
    assert hinge_gradient(*args, 2.0).item() == 0.0
    assert hinge_gradient(*args, 2.5).item() == -2.0


def test_a_distance_of_zero_has_no_gradient():
    at = jnp.array([[-2.0]])
    near, far = jnp.array([[-1.0]]), jnp.array([[-1.5]])
    assert hinge_gradient(at, at, far, 1.0).item() == 1.0, "only the negative distance pushes"
    assert hinge_gradient(at, near, at, 1.0).item() == -1.0, "only the positive distance pulls"
    assert hinge_gradient(at, at, at, 1.0).item() == 0.0


def test_no_contrast_gradient_reaches_the_teacher():
    loss = lambda positive, negative: contrastive_hinge(STUDENT, positive, negative, margin=4.0).sum()  # noqa: E731
    for gradient in jax.grad(loss, argnums=(0, 1))(POSITIVE, NEGATIVE):
        np.testing.assert_array_equal(gradient, 0.0)


def test_a_negative_margin():
    with pytest.raises(ValueError, match="margin is -0.5; expected 0 or more"):
        contrastive_hinge(STUDENT, POSITIVE, NEGATIVE, margin=-0.5)


def test_tokens_that_views_rule_out_are_finite():
    gone = jnp.full((1, 3), -jnp.inf)
    for student in (STUDENT, gone):
        for positive in (POSITIVE, gone):
            for negative in (NEGATIVE, gone):
                assert np.isfinite(contrastive_hinge(student, positive, negative, margin=0.5)).all()
                assert np.isfinite(hinge_gradient(student, positive, negative, 0.5)).all()
    np.testing.assert_array_equal(contrastive_hinge(gone, gone, gone, margin=0.5), 0.5)


def test_low_precision_log_probs_are_compared_in_float32():
    half = [x.astype(jnp.bfloat16) for x in (STUDENT, POSITIVE, NEGATIVE)]
    found = contrastive_hinge(*half, margin=0.1)
    assert found.dtype == jnp.float32
    expected = contrastive_hinge(*(x.astype(jnp.float32) for x in half), margin=0.1)
    np.testing.assert_array_equal(found, expected)


# Matching.

STUDENT_HIDDEN = jnp.array([[[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]]])
TEACHER_HIDDEN = jnp.array([[[1.0, 4.0], [0.0, 0.0], [0.0, 0.0]]])


def test_feature_distance_by_hand():
    found = feature_distance(STUDENT_HIDDEN, TEACHER_HIDDEN)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [[2.0, 0.0, 5.0]])


def test_feature_gradient_by_hand():
    """2(h_S − h_T)/H at the student, none at the teacher."""
    loss = lambda student, teacher: feature_distance(student, teacher).sum()  # noqa: E731
    student, teacher = jax.grad(loss, argnums=(0, 1))(STUDENT_HIDDEN, TEACHER_HIDDEN)
    np.testing.assert_allclose(student, STUDENT_HIDDEN - TEACHER_HIDDEN)
    np.testing.assert_array_equal(teacher, 0.0)


def test_low_precision_hidden_states_are_compared_in_float32():
    """257² has no room in bfloat16, and neither has the difference of its neighbours."""
    student, teacher = jnp.full((1, 1, 4), 258.0, jnp.bfloat16), jnp.full((1, 1, 4), 1.0, jnp.bfloat16)
    found = feature_distance(student, teacher)
    assert found.dtype == jnp.float32 and found.item() == 257.0**2


def test_hidden_shapes_that_differ(without_shape_hook):
    with pytest.raises(ValueError, match=r"student hidden states \(1, 3, 2\) and teacher hidden states \(1, 3, 1\)"):
        feature_distance(STUDENT_HIDDEN, TEACHER_HIDDEN[..., :1])


# Both as terms of the objective.

SCORES = TokenScores(jnp.array([[1.0, 2.0, 3.0]]), STUDENT, jnp.zeros((1, 3)))
TAUGHT = TeacherScores(TEACHER_HIDDEN, POSITIVE, NEGATIVE)


def terms_of(settings, mask=ALL, scores=SCORES, hidden=STUDENT_HIDDEN, taught=TAUGHT):
    plan = token_plan(mask, settings=settings)
    return {name: float(x) for name, x in objective(scores, hidden, taught, mask, plan, settings=settings).items()}


def test_the_terms_by_hand():
    settings = Objective(contrast_weight=0.1, contrast_margin=0.5, matching_weight=0.01)
    assert terms_of(settings) == pytest.approx({"divergence": 2.0, "contrast": 0.1, "matching": 0.01 * 7 / 3})
    mask = jnp.array([[True, True, False]])
    assert terms_of(settings, mask) == pytest.approx({"divergence": 1.5, "contrast": 0.125, "matching": 0.01})


def test_terms_have_the_names_that_the_settings_announce():
    for loss in ("divergence", "nll", "none"):
        for contrast in (0.0, 0.1):
            for matching in (0.0, 0.1):
                settings = Objective(loss=loss, contrast_weight=contrast, matching_weight=matching)
                names = [name for name in (loss,) if name != "none"]
                names += ["contrast"] * (contrast > 0) + ["matching"] * (matching > 0)
                assert settings.terms == tuple(names)
                assert tuple(terms_of(settings)) == settings.terms


def test_clip_and_agreement_leave_the_other_terms_alone():
    settings = Objective(contrast_weight=1.0, matching_weight=1.0, clip_ceiling=0.25)
    assert terms_of(settings) == pytest.approx({"divergence": 0.25, "contrast": 1.0, "matching": 7 / 3})


def test_what_masked_tokens_hold_does_not_matter():
    mask = jnp.array([[True, True, False]])
    settings = Objective(contrast_weight=1.0, matching_weight=1.0, clip_ceiling=5.0)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        spoil = lambda x, bad=bad: x.at[:, 2].set(bad)  # noqa: E731
        scores, taught = TokenScores(*map(spoil, SCORES[:3])), TeacherScores(*map(spoil, TAUGHT[:3]))
        found = terms_of(settings, mask, scores, spoil(STUDENT_HIDDEN), taught)
        assert found == pytest.approx(terms_of(settings, mask))


def test_a_teacher_without_a_number_at_masked_tokens_leaves_the_contrast_gradient_alone():
    mask = jnp.array([[True, True, False]])
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        teacher = [x.at[:, 2].set(bad) for x in (POSITIVE, NEGATIVE)]
        loss = lambda x, teacher=teacher: reduce_tokens(contrastive_hinge(x, *teacher, margin=4.0), mask)  # noqa: E731
        np.testing.assert_allclose(jax.grad(loss)(STUDENT), [[-1.0, 1.0, 0.0]])


def test_a_batch_without_tokens_has_terms_and_gradients_of_zero():
    settings = Objective(contrast_weight=1.0, matching_weight=1.0)
    nothing = jnp.zeros((1, 3), bool)
    plan = token_plan(nothing, settings=settings)

    def loss(divergence, logp, hidden):
        scores = TokenScores(divergence, logp, jnp.zeros((1, 3)))
        return sum(objective(scores, hidden, TAUGHT, nothing, plan, settings=settings).values())

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(SCORES.divergence, STUDENT, STUDENT_HIDDEN)
    assert float(value) == 0.0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


def contrast_metrics(mask, **options):
    settings = Objective(**options)
    found = mechanism_metrics(SCORES, TAUGHT, mask, token_plan(mask, settings=settings), settings)
    return {name: float(value) for name, value in found.items()}


def test_metrics_of_the_contrast():
    """Two of the three hinges are above 0; distances (1, 3, 1) and (3, 1, 1)."""
    expected = {
        "contrast_active_share": 2 / 3,
        "contrast_positive_distance": 5 / 3,
        "contrast_negative_distance": 5 / 3,
    }
    assert contrast_metrics(ALL, contrast_weight=0.1, contrast_margin=0.5) == pytest.approx(expected)
    first = jnp.array([[True, False, False]])
    assert contrast_metrics(first, contrast_weight=0.1, contrast_margin=0.5) == pytest.approx(
        {"contrast_active_share": 0.0, "contrast_positive_distance": 1.0, "contrast_negative_distance": 3.0}
    )


def test_a_hinge_at_zero_is_not_active():
    first = jnp.array([[True, False, False]])
    assert contrast_metrics(first, contrast_weight=0.1, contrast_margin=2.0)["contrast_active_share"] == 0.0
    assert contrast_metrics(first, contrast_weight=0.1, contrast_margin=2.5)["contrast_active_share"] == 1.0


def test_no_contrast_no_metrics():
    assert contrast_metrics(ALL, contrast_weight=0.0) == {}
