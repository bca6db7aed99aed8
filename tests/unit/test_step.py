"""The train step: it learns, splitting changes nothing, padding has no say, and the teacher is the one asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from unisd_jax.losses import Objective, log_probs, reduction_weights, score_tokens, weighted_sum
from unisd_jax.models import completion_hidden, merge
from unisd_jax.step import StepSettings, init_state, train_step
from unisd_jax.teacher import ema_update, start_ema
from unisd_jax.types import Completions

# Plain descent: the change of the weights is the gradient, times the rate.
RATE, DECAY, TEMPERATURE = 0.25, 0.9, 0.7
OPTIMIZER = optax.sgd(RATE)
TARGETS = ("q", "down")

PLAIN = StepSettings(Objective(alpha=0.3, normalize="upstream", temperature=TEMPERATURE))
# `start` begins at step 1, so the teacher follows in the first step and not in the second.
EMA = StepSettings(Objective(alpha=0.5, normalize="sequence"), ema_decay=DECAY, ema_sync_steps=2)
NLL = StepSettings(Objective(loss="nll", normalize="batch"))


def split(settings, micro_batches):
    return StepSettings(settings.objective, micro_batches, settings.ema_decay, settings.ema_sync_steps)


def reduced(settings, normalize):
    options = Objective(settings.objective.loss, settings.objective.alpha, normalize, settings.objective.temperature)
    return StepSettings(options, settings.micro_batches, settings.ema_decay, settings.ema_sync_steps)


@functools.cache
def toy():
    return toys.random_model()


@functools.cache
def compiled(settings):
    step = functools.partial(train_step, model=toy()[0], optimizer=OPTIMIZER, settings=settings)
    return jax.jit(step)


def start(kind, settings):
    """A state whose student, and teacher where there is one, have both left their start."""
    _, params = toy()
    student = params if kind == "full" else toys.random_lora(params, targets=TARGETS)
    state = init_state(student, OPTIMIZER, settings)._replace(step=jnp.int32(1))
    if state.teacher is None:
        return state
    other = toys.random_model(seed=1)[1] if kind == "full" else toys.random_lora(params, seed=1, targets=TARGETS)
    return state._replace(teacher=ema_update(start_ema(student), other, decay=0.7))


def views_for(settings, **changes):
    """Without a teacher's view where no teacher is asked, as in supervised training."""
    views = toys.random_views(**changes)
    return views._replace(teacher=None) if settings.objective.loss == "nll" else views


def asked_the_same(views):
    """The teacher gets the student's prompts, padded to the width of its own."""
    wider = views.teacher.ids.shape[1] - views.student.ids.shape[1]
    return views._replace(teacher=type(views.student)(*(np.pad(x, ((0, 0), (wider, 0))) for x in views.student)))


def run(kind, settings, views=None):
    """(state before, state after, metrics) of one step."""
    before = start(kind, settings)
    return before, *compiled(settings)(before, toy()[1], views_for(settings) if views is None else views)


def assert_same_state(found, expected):
    """To rounding; an EMA adapter by its products, whose factors are only unique up to a rotation."""
    assert int(found.step) == int(expected.step) == 2
    toys.assert_trees_close((found.student, found.optimizer), (expected.student, expected.optimizer), atol=2e-5)
    if hasattr(expected.teacher, "factors"):
        toys.assert_trees_close(toys.products(found.teacher), toys.products(expected.teacher), atol=2e-5)
    else:
        toys.assert_trees_close(found.teacher, expected.teacher, atol=2e-5)


def assert_same_metrics(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("kind", "settings", "splits"),
    [
        ("lora", PLAIN, (4,)),
        ("lora", EMA, (4,)),
        ("lora", NLL, (4,)),
        ("full", PLAIN, (2,)),
        ("full", reduced(EMA, "batch"), (4,)),
        ("full", reduced(NLL, "sequence"), (8,)),
    ],
    ids=lambda value: f"{value.objective.loss}-{value.objective.normalize}" if hasattr(value, "objective") else None,
)
def test_micro_batches_change_nothing(kind, settings, splits):
    _, expected, metrics = run(kind, settings)
    assert float(metrics["gradient_norm"]) > 1e-2
    for micro_batches in splits:
        _, found, again = run(kind, split(settings, micro_batches))
        assert_same_state(found, expected)
        assert_same_metrics(again, metrics)


def test_one_step_by_its_definition():
    """Loss, gradient and update written out without adapters, micro-batches or the step's own helpers."""
    model, params = toy()
    views = jax.tree.map(jnp.asarray, toys.random_views())
    before, after, metrics = run("full", PLAIN, views)
    coefficients = reduction_weights(views.completions.mask, normalize="upstream")

    def loss(student):
        student_logits, teacher_logits = (
            model.logits(weights, completion_hidden(model, weights, None, prompts, views.completions))
            for weights, prompts in ((student, views.student), (params, views.teacher))
        )
        scores = score_tokens(student_logits, teacher_logits, views.completions.ids, settings=PLAIN.objective)
        return weighted_sum(scores.divergence, views.completions.mask, coefficients), scores

    gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, scores), gradient = gradients(before.student)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    norm = np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(gradient)))
    assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    expected = jax.tree.map(lambda w, g: w - RATE * g, before.student, gradient)
    toys.assert_trees_close(after.student, expected, atol=1e-5)
    mask = np.asarray(views.completions.mask)
    for name, values in (("divergence", scores.divergence), ("entropy", scores.entropy)):
        assert float(metrics[name]) == pytest.approx(np.asarray(values)[mask].mean(), rel=1e-5), name
    assert "teacher_distance" not in metrics


@pytest.mark.parametrize(
    ("kind", "settings"), [("lora", EMA), ("full", PLAIN), ("lora", NLL)], ids=["ema", "plain", "nll"]
)
def test_the_loss_of_a_repeated_batch_goes_down(kind, settings):
    views, state, losses = views_for(settings), start(kind, settings), []
    for _ in range(30):
        state, metrics = compiled(settings)(state, toy()[1], views)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0], losses
    assert int(state.step) == 31
    assert ("divergence" in metrics) == (settings is not NLL)


@pytest.mark.parametrize(
    ("kind", "settings"), [("lora", EMA), ("full", PLAIN), ("lora", NLL)], ids=["ema", "plain", "nll"]
)
def test_what_is_masked_has_no_say(kind, settings):
    """Other ids on all padding, of prompts and of completions, and log-probs that are not numbers."""
    views, rng = views_for(settings), np.random.default_rng(9)

    def scramble(part):
        return part and part._replace(ids=np.where(part.mask, part.ids, toys.random_tokens(rng, part.ids.shape)))

    logps = np.where(views.completions.mask, views.sampler_logps, np.nan)
    changed = type(views)(*map(scramble, views[:3]), logps)
    assert not np.array_equal(changed.completions.ids, views.completions.ids)
    assert not np.array_equal(changed.student.ids, views.student.ids)
    _, expected, metrics = run(kind, settings, views)
    _, found, again = run(kind, settings, changed)
    assert_same_state(found, expected)
    assert_same_metrics(again, metrics)


def test_a_batch_without_completions_moves_nothing():
    views = toys.random_views()
    nothing = Completions(views.completions.ids, np.zeros_like(views.completions.mask))
    before, after, metrics = run("full", PLAIN, views._replace(completions=nothing))
    toys.assert_trees_close(after.student, before.student)
    assert all(np.isfinite(float(value)) for value in metrics.values())
    assert float(metrics["loss"]) == float(metrics["gradient_norm"]) == 0.0


def test_the_sampler_gap():
    """Mean and largest |trainer − sampler| over the completion tokens, at the sampling temperature."""
    model, params = toy()
    views = toys.random_views()
    mask = views.completions.mask
    merged = merge(params, start("lora", PLAIN).student)
    hidden = jax.jit(completion_hidden, static_argnums=0)(model, merged, None, views.student, views.completions)
    logps = np.asarray(log_probs(model.logits(merged, hidden) / TEMPERATURE))
    exact = np.take_along_axis(logps, views.completions.ids[..., None], axis=-1)[..., 0]
    _, _, metrics = run("lora", PLAIN, views._replace(sampler_logps=exact))
    assert float(metrics["sampler_gap"]) < 1e-5 and float(metrics["sampler_gap_max"]) < 1e-4
    off = exact - 0.01
    off[tuple(np.argwhere(mask)[3])] += 0.51
    _, _, metrics = run("lora", PLAIN, views._replace(sampler_logps=off))
    count = mask.sum()
    assert float(metrics["sampler_gap"]) == pytest.approx((0.5 + 0.01 * (count - 1)) / count, abs=1e-5)
    assert float(metrics["sampler_gap_max"]) == pytest.approx(0.5, abs=1e-4)


def test_the_teacher_follows_every_so_many_steps():
    views, state, moved = toys.random_views(), start("lora", EMA), []
    for _ in range(4):
        before = state
        state, metrics = compiled(EMA)(state, toy()[1], views)
        moved.append(bool(np.any(state.teacher.factors["attention/q"].b != before.teacher.factors["attention/q"].b)))
        if not moved[-1]:
            toys.assert_trees_close(state.teacher, before.teacher)
            assert float(metrics["ema_truncation"]) == 0.0
    assert moved == [True, False, True, False]


@pytest.mark.parametrize(("kind", "settings"), [("lora", EMA), ("full", reduced(EMA, "batch"))], ids=["lora", "full"])
def test_the_teacher_follows_the_updated_student(kind, settings):
    """decay · teacher before + (1 − decay) · student after, of effective weights."""
    before, after, metrics = run(kind, settings)

    def effective(tree):
        return toys.products(tree) if kind == "lora" else jax.tree.map(np.float64, tree)

    old, new, found = map(effective, (before.teacher, after.student, after.teacher))
    expected = jax.tree.map(lambda a, b: DECAY * a + (1 - DECAY) * b, old, new)

    def norm(tree):
        return np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(tree)))

    # What a teacher of rank 4 cannot hold of three adapters of rank 2 is reported.
    missing = norm(jax.tree.map(np.subtract, found, expected)) / norm(expected)
    assert missing == pytest.approx(float(metrics["ema_truncation"]) ** 0.5, rel=1e-2, abs=1e-6)
    assert missing < 0.05
    assert (float(metrics["ema_truncation"]) > 0) == (kind == "lora")
    distance = norm(jax.tree.map(np.subtract, found, new)) / norm(new)
    assert float(metrics["teacher_distance"]) == pytest.approx(distance, rel=1e-3)


def test_without_ema_the_teacher_is_the_frozen_base():
    """Wherever the student is: an adapter and the weights it merges to have the same loss."""
    _, params = toy()
    views = toys.random_views()
    before, _, metrics = run("lora", PLAIN, views)
    _, merged = compiled(PLAIN)(start("full", PLAIN)._replace(student=merge(params, before.student)), params, views)
    assert float(metrics["loss"]) == pytest.approx(float(merged["loss"]), rel=1e-4)
    assert float(metrics["loss"]) > 0.01
    # Asked the student's own question, the base is its own teacher: nothing to learn.
    _, _, metrics = run("full", PLAIN, asked_the_same(views))
    assert float(metrics["loss"]) == pytest.approx(0.0, abs=1e-6)


def test_an_ema_teacher_is_asked_instead_of_the_base():
    """A teacher with the student's weights and prompt agrees with it; the teacher that it really has does not."""
    views, state = asked_the_same(toys.random_views()), start("lora", EMA)
    itself = state._replace(teacher=ema_update(state.teacher, state.student, decay=0.0))
    _, own = compiled(EMA)(itself, toy()[1], views)
    _, other = compiled(EMA)(state, toy()[1], views)
    assert float(own["loss"]) == pytest.approx(0.0, abs=1e-6) and float(other["loss"]) > 1e-3


def test_a_completion_of_one_token():
    before, after, metrics = run("lora", NLL, views_for(NLL, completion=1))
    assert np.isfinite(float(metrics["loss"]))
    assert np.any(after.student.factors["attention/q"].b != before.student.factors["attention/q"].b)


def test_full_training_keeps_float32_weights_beside_a_bfloat16_model():
    """Updates far below a bfloat16 step are kept."""
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy()[1])
    student = jax.tree.map(lambda x: x.astype(jnp.float32), base)
    optimizer = optax.sgd(1e-6)
    step = functools.partial(train_step, model=toy()[0], optimizer=optimizer, settings=NLL)
    state = init_state(student, optimizer, NLL)
    after, _ = jax.jit(step)(state, base, views_for(NLL))
    kernel = after.student["layers"]["mlp"]["down"]["kernel"]
    assert kernel.dtype == jnp.float32
    assert np.any(kernel != student["layers"]["mlp"]["down"]["kernel"])
    np.testing.assert_array_equal(kernel.astype(jnp.bfloat16), base["layers"]["mlp"]["down"]["kernel"])


def test_the_state_at_the_start():
    _, params = toy()
    plain, ema = (init_state(params, OPTIMIZER, settings) for settings in (PLAIN, EMA))
    assert plain.teacher is None and int(plain.step) == 0
    toys.assert_trees_close(ema.teacher, params)
