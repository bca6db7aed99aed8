"""The EMA teacher beside the release's: under LoRA it moves, and float32 keeps what bfloat16 loses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from unisd_jax.losses import Objective
from unisd_jax.step import StepSettings, init_state, train_step
from unisd_jax.teacher import ema_update, start_ema, weight_distance

OPTIMIZER = optax.sgd(0.25)
DECAY, UPDATES = 0.9, 100


@functools.cache
def toy():
    return toys.random_model(num_layers=1)


def step(settings, state):
    model, base = toy()
    call = functools.partial(train_step, model=model, optimizer=OPTIMIZER, settings=settings)
    return jax.jit(call)(state, base, toys.random_views())


def start(settings):
    return init_state(toys.random_lora(toy()[1]), OPTIMIZER, settings)


def test_under_lora_the_teacher_moves_by_default():
    settings = StepSettings(Objective(), ema_decay=DECAY)
    before = start(settings)
    after, metrics = step(settings, before)
    assert settings.ema_adapters and float(metrics["teacher_motion"]) > 1e-4
    moved = toys.products(after.teacher)
    assert any(np.any(moved[path] != product) for path, product in toys.products(before.teacher).items())
    # A tenth of the way to the student.
    distance, whole = (float(weight_distance(teacher, after.student)) for teacher in (after.teacher, before.teacher))
    assert distance == pytest.approx(DECAY * whole, rel=1e-2)


@pytest.fixture
def compiled_as_in_a_run():
    """With all optimizations, under which a difference of equal things need not be exactly 0."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def test_without_adapters_in_the_average_it_never_moves(compiled_as_in_a_run):
    """As in the release, whose average leaves the adapters out: the metric says so."""
    settings = StepSettings(Objective(), ema_decay=DECAY, ema_adapters=False)
    state, distances = start(settings), []
    first = jax.device_get(state.teacher)
    for _ in range(2):
        state, metrics = step(settings, state)
        assert float(metrics["teacher_motion"]) == 0.0
        assert float(metrics["ema_truncation"]) == 0.0
        distances.append(float(metrics["teacher_distance"]))
    toys.assert_trees_close(state.teacher, first)
    assert distances[1] > distances[0] > 0.01


def test_a_decay_of_one_keeps_the_teacher_as_it_is(compiled_as_in_a_run):
    settings = StepSettings(Objective(), ema_decay=1.0)
    before = start(settings)
    after, metrics = step(settings, before)
    assert float(metrics["teacher_motion"]) == 0.0
    toys.assert_trees_close(after.teacher, jax.device_get(before.teacher))


def test_between_two_updates_the_teacher_does_not_move(compiled_as_in_a_run):
    settings, moved = StepSettings(Objective(), ema_decay=DECAY, ema_sync_steps=2), []
    state = start(settings)
    for _ in range(4):
        state, metrics = step(settings, state)
        moved.append(float(metrics["teacher_motion"]) != 0.0)
    assert moved == [False, True, False, True]


def test_full_weights_move_whatever_is_said_of_adapters():
    settings = StepSettings(Objective(), ema_decay=DECAY, ema_adapters=False)
    _, metrics = step(settings, init_state(toy()[1], OPTIMIZER, settings))
    assert float(metrics["teacher_motion"]) > 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teacher_is_kept_in_the_asked_precision(dtype):
    settings = StepSettings(Objective(), ema_decay=DECAY, ema_dtype=dtype)
    for student in (toy()[1], toys.random_lora(toy()[1])):
        teacher = init_state(student, OPTIMIZER, settings).teacher
        for _ in range(2):
            assert {leaf.dtype for leaf in jax.tree.leaves(teacher)} == {jnp.dtype(dtype)}
            teacher = ema_update(teacher, student, decay=DECAY)


def share_covered(dtype, *, away, updates=UPDATES):
    """How much of the way to a student `away` (a fraction of each weight) from it the teacher goes; 1: all of it."""
    rng = np.random.default_rng(0)
    # Weights that bfloat16 holds exactly, so that only the updates are rounded.
    weights = jnp.asarray(rng.standard_normal(10_000), jnp.bfloat16).astype(jnp.float32)
    student, teacher = {"w": weights * (1 + away)}, start_ema({"w": weights}, dtype=dtype)
    update = jax.jit(functools.partial(ema_update, decay=DECAY))
    for _ in range(updates):
        teacher = update(teacher, student)
    moved = np.asarray(teacher["w"].astype(jnp.float32)) - np.asarray(weights)
    whole = np.asarray(student["w"] - weights)
    return float(moved @ whole / (whole @ whole))


def test_float32_keeps_small_updates_that_bfloat16_loses():
    """A student 0.1% away. After 100 updates with decay 0.9 float32 is there; bfloat16, with steps of 0.4%, is not."""
    exact = 1 - DECAY**UPDATES
    float32, bfloat16 = (share_covered(dtype, away=1e-3) for dtype in (jnp.float32, jnp.bfloat16))
    assert float32 == pytest.approx(exact, abs=1e-3)
    assert abs(bfloat16) < 0.5 * float32


def test_bfloat16_does_not_lose_large_updates():
    assert share_covered(jnp.bfloat16, away=0.5) == pytest.approx(1.0, abs=0.1)
    assert share_covered(jnp.float32, away=0.5) == pytest.approx(1.0, abs=1e-3)
