"""The train step: it learns, splitting changes nothing, padding has no say, and the teacher is the one asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from unisd_jax.losses import Objective, log_probs, objective, reduction_weights
from unisd_jax.models import completion_hidden, merge
from unisd_jax.optim import adamw
from unisd_jax.step import StepSettings, init_state, train_step
from unisd_jax.teacher import ema_update, start_ema
from unisd_jax.types import Completions, TrainState

BATCH, DECAY = 8, 0.9
DESCENT = optax.sgd(1.0)  # the change of the weights is the gradient
FAST = adamw(lambda step: 0.02, b1=0.9, b2=0.99, eps=1e-6, weight_decay=0.0, max_grad_norm=1.0)


@functools.cache
def toy():
    return toys.random_model()


@functools.cache
def compiled(settings, optimizer=DESCENT):
    step = functools.partial(train_step, model=toy()[0], optimizer=optimizer, settings=settings)
    return jax.jit(step)


def start(kind, settings, optimizer=DESCENT):
    """A state whose student, and teacher where there is one, have both left their start."""
    _, params = toy()
    student = params if kind == "full" else toys.random_lora(params, targets=("q", "down"))
    state = init_state(student, optimizer, settings)
    if state.teacher is None:
        return state
    other = toys.random_model(seed=1)[1] if kind == "full" else toys.random_lora(params, seed=1, targets=("q", "down"))
    return state._replace(teacher=ema_update(start_ema(student), other, decay=0.7))


def run(kind, settings, views=None, optimizer=DESCENT):
    """(state before, state after, metrics) of one step."""
    before = start(kind, settings, optimizer)
    views = toys.random_views(batch=BATCH) if views is None else views
    return before, *compiled(settings, optimizer)(before, toy()[1], views)


def plain(normalize="batch", micro_batches=1, **changes):
    return StepSettings(Objective(**(dict(alpha=0.5, normalize=normalize) | changes)), micro_batches)


def ema(normalize="batch", micro_batches=1, sync_steps=1):
    return StepSettings(Objective(alpha=0.5, normalize=normalize), micro_batches, DECAY, sync_steps)


def nll(normalize="batch", micro_batches=1):
    return StepSettings(Objective(loss="nll", normalize=normalize), micro_batches)


def assert_same_state(found, expected):
    """To rounding; an EMA adapter by its products, whose factors are only unique up to a rotation."""
    assert int(found.step) == int(expected.step)
    toys.assert_trees_close((found.student, found.optimizer), (expected.student, expected.optimizer), atol=2e-5)
    if hasattr(expected.teacher, "factors"):
        ours, theirs = toys.products(found.teacher), toys.products(expected.teacher)
        toys.assert_trees_close(ours, theirs, atol=2e-5)
    else:
        toys.assert_trees_close(found.teacher, expected.teacher, atol=2e-5)


# Every reduction, both kinds of weights and all three objectives, each with every value of the other two.
CASES = [
    ("lora", plain, "batch", (2, 4)),
    ("lora", ema, "sequence", (4,)),
    ("lora", nll, "upstream", (4,)),
    ("full", plain, "upstream", (2,)),
    ("full", ema, "batch", (4,)),
    ("full", nll, "sequence", (8,)),
]


@pytest.mark.parametrize(
    ("kind", "mode", "normalize", "splits"), CASES, ids=[f"{kind}-{mode.__name__}-{how}" for kind, mode, how, _ in CASES]
)
def test_micro_batches_change_nothing(kind, mode, normalize, splits):
    _, expected, metrics = run(kind, mode(normalize))
    assert float(metrics["gradient_norm"]) > 1e-2
    for micro_batches in splits:
        _, found, split = run(kind, mode(normalize, micro_batches))
        assert_same_state(found, expected)
        assert split.keys() == metrics.keys()
        for name, value in metrics.items():
            assert float(split[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


def test_one_step_by_its_definition():
    """Loss, gradient and update written out with merged weights, dense logits and no adapters."""
    model, params = toy()
    settings = plain("sequence", temperature=0.7, alpha=0.3)
    views = jax.tree.map(jnp.asarray, toys.random_views(batch=BATCH))
    before, after, metrics = run("full", settings, views)
    coefficients = reduction_weights(views.completions.mask, normalize="sequence")

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(student):
        student_logits, teacher_logits = (
            model.logits(weights, completion_hidden(model, weights, None, prompts, views.completions))
            for weights, prompts in ((student, views.student), (params, views.teacher))
        )
        return objective(
            student_logits, teacher_logits, views.completions.ids, views.completions.mask, coefficients,
            settings=settings.objective,
        )  # fmt: skip

    (value, scores), gradient = loss(before.student)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["gradient_norm"]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    toys.assert_trees_close(after.student, jax.tree.map(jnp.subtract, before.student, gradient), atol=1e-5)
    mask = np.asarray(views.completions.mask)
    for name, values in (("divergence", scores.divergence), ("entropy", scores.entropy)):
        assert float(metrics[name]) == pytest.approx(np.asarray(values)[mask].mean(), rel=1e-5), name
    assert float(metrics["completion_length"]) == pytest.approx(mask.sum(axis=1).mean())
    assert "teacher_distance" not in metrics and "sampler_gap" not in metrics


@pytest.mark.parametrize(
    ("kind", "settings"), [("lora", ema()), ("full", plain()), ("lora", nll("upstream"))], ids=["ema", "plain", "nll"]
)
def test_the_loss_of_a_repeated_batch_goes_down(kind, settings):
    views = toys.random_views(batch=BATCH)
    state, losses = start(kind, settings, FAST), []
    for _ in range(12):
        state, metrics = compiled(settings, FAST)(state, toy()[1], views)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0], losses
    assert int(state.step) == 12


@pytest.mark.parametrize("settings", [plain(), ema(), nll()], ids=["plain", "ema", "nll"])
def test_what_is_masked_has_no_say(settings):
    """Other ids on all padding: prompts, completions, and log-probs that are not numbers."""
    kind = "full" if settings == plain() else "lora"
    views = toys.random_views(batch=BATCH)._replace(sampler_logps=np.full((BATCH, 5), -1.0, np.float32))
    rng = np.random.default_rng(9)

    def scramble(part):
        return part._replace(ids=np.where(part.mask, part.ids, toys.random_tokens(rng, part.ids.shape)))

    logps = np.where(views.completions.mask, views.sampler_logps, np.nan)
    changed = type(views)(*map(scramble, views[:3]), logps)
    assert not np.array_equal(changed.completions.ids, views.completions.ids)
    _, expected, metrics = run(kind, settings, views)
    _, found, same = run(kind, settings, changed)
    assert_same_state(found, expected)
    for name, value in metrics.items():
        assert float(same[name]) == pytest.approx(float(value), rel=1e-5), name


def test_a_batch_without_completions_moves_nothing():
    views = toys.random_views(batch=BATCH)
    nothing = Completions(views.completions.ids, np.zeros_like(views.completions.mask))
    before, after, metrics = run("full", plain(), views._replace(completions=nothing))
    toys.assert_trees_close(after.student, before.student)
    assert all(np.isfinite(float(value)) for value in metrics.values())
    assert float(metrics["loss"]) == float(metrics["gradient_norm"]) == 0.0


def test_the_sampler_gap():
    """Mean and largest |trainer − sampler| over the completion tokens, at the sampling temperature."""
    model, params = toy()
    views = toys.random_views(batch=BATCH)
    mask, settings = views.completions.mask, plain(temperature=0.7)
    merged = merge(params, start("lora", settings).student)
    hidden = jax.jit(completion_hidden, static_argnums=0)(model, merged, None, views.student, views.completions)
    logps = np.asarray(log_probs(model.logits(merged, hidden) / 0.7))
    exact = np.take_along_axis(logps, views.completions.ids[..., None], axis=-1)[..., 0]
    _, _, metrics = run("lora", settings, views._replace(sampler_logps=exact))
    assert float(metrics["sampler_gap"]) < 1e-5 and float(metrics["sampler_gap_max"]) < 1e-4
    off = exact - 0.01
    row, column = np.argwhere(mask)[3]
    off[row, column] += 0.51
    _, _, metrics = run("lora", settings, views._replace(sampler_logps=off))
    count = mask.sum()
    assert float(metrics["sampler_gap"]) == pytest.approx((0.5 + 0.01 * (count - 1)) / count, abs=1e-5)
    assert float(metrics["sampler_gap_max"]) == pytest.approx(0.5, abs=1e-4)


def test_the_teacher_follows_every_so_many_steps():
    settings = ema(sync_steps=3)
    views, state, moved = toys.random_views(batch=BATCH), start("lora", settings), []
    for _ in range(6):
        before = state
        state, metrics = compiled(settings)(state, toy()[1], views)
        moved.append(not np.array_equal(state.teacher.factors["attention/q"].b, before.teacher.factors["attention/q"].b))
        if not moved[-1]:
            toys.assert_trees_close(state.teacher, before.teacher)
            assert float(metrics["ema_truncation"]) == 0.0
    assert moved == [False, False, True, False, False, True]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_teacher_follows_the_updated_student(kind):
    """decay · teacher before + (1 − decay) · student after, of effective weights."""
    before, after, metrics = run(kind, ema())

    def effective(tree):
        return toys.products(tree) if kind == "lora" else tree

    old, new, found = map(effective, (before.teacher, after.student, after.teacher))
    expected = jax.tree.map(lambda a, b: DECAY * a + (1 - DECAY) * b, old, new)
    # The teacher of rank 4 has seen two adapters of rank 2 here; a third would not fit, this is still the first.
    toys.assert_trees_close(found, expected, atol=0.05 if kind == "lora" else 1e-6)
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(new), strict=True)
    apart = np.sqrt(sum(np.sum((np.float64(a) - np.float64(b)) ** 2) for a, b in leaves))
    size = np.sqrt(sum(np.sum(np.float64(b) ** 2) for b in jax.tree.leaves(new)))
    assert float(metrics["teacher_distance"]) == pytest.approx(apart / size, rel=1e-3)
    assert (float(metrics["ema_truncation"]) > 0) == (kind == "lora")


def test_without_ema_the_teacher_is_the_frozen_base():
    """The student may be anywhere: the teacher's part of the loss is that of the base."""
    _, params = toy()
    settings, views = plain(alpha=0.0), toys.random_views(batch=BATCH)
    _, _, metrics = run("lora", settings, views)
    full = TrainState(jnp.int32(0), merge(params, start("lora", settings).student), None, ())
    _, merged = compiled(settings, optax.sgd(0.0))(full, params, views)
    assert float(metrics["loss"]) == pytest.approx(float(merged["loss"]), rel=1e-5)
    # Asked the student's own question, the base is its own teacher: nothing to learn.
    same = views._replace(teacher=views.student)
    state = TrainState(jnp.int32(0), params, None, ())
    _, metrics = compiled(settings, optax.sgd(0.0))(state, params, same)
    assert float(metrics["loss"]) == pytest.approx(0.0, abs=1e-6)


def test_an_ema_teacher_is_asked_instead_of_the_base():
    views = toys.random_views(batch=BATCH)
    state = start("lora", ema())
    _, with_ema = compiled(ema())(state, toy()[1], views)
    _, without = compiled(plain())(state._replace(teacher=None), toy()[1], views)
    assert abs(float(with_ema["loss"]) - float(without["loss"])) > 1e-3
    # The teacher's weights are the ones scored: with the student's own weights and prompt the loss is zero.
    itself = state._replace(teacher=ema_update(state.teacher, state.student, decay=0.0))
    _, metrics = compiled(ema())(itself, toy()[1], views._replace(teacher=views.student))
    assert float(metrics["loss"]) == pytest.approx(0.0, abs=1e-6)


def test_a_completion_of_one_token():
    views = toys.random_views(batch=BATCH, completion=1)
    before, after, metrics = run("lora", plain(), views)
    assert np.isfinite(float(metrics["loss"])) and float(metrics["completion_length"]) == 1.0
    assert not np.array_equal(after.student.factors["attention/q"].b, before.student.factors["attention/q"].b)


def test_full_training_keeps_float32_weights_beside_a_bfloat16_model():
    """Updates far below a bfloat16 step add up."""
    settings, optimizer = nll(), optax.sgd(1e-6)
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy()[1])
    student = jax.tree.map(lambda x: x.astype(jnp.float32), base)
    state = init_state(student, optimizer, settings)
    after, _ = compiled(settings, optimizer)(state, base, toys.random_views(batch=BATCH))
    kernel = after.student["layers"]["mlp"]["down"]["kernel"]
    assert kernel.dtype == jnp.float32
    assert not np.array_equal(kernel, student["layers"]["mlp"]["down"]["kernel"])
    np.testing.assert_array_equal(kernel.astype(jnp.bfloat16), base["layers"]["mlp"]["down"]["kernel"])


def test_no_teacher_view_no_divergence():
    views = toys.random_views(batch=BATCH)._replace(teacher=None)
    _, _, metrics = run("lora", nll("upstream"), views)
    assert "divergence" not in metrics
