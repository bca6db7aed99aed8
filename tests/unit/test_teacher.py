"""The teacher's weights against dense float64 arithmetic, and what the teacher is shown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from unisd_jax.models import Lora, LoraFactors, init_lora
from unisd_jax.teacher import (
    ema_update,
    ema_update_measured,
    start_ema,
    student_messages,
    teacher_messages,
    weight_distance,
)

DECAY = 0.8
update = jax.jit(ema_update_measured, static_argnames="decay")


@pytest.fixture(scope="module")
def params():
    return toys.random_model()[1]


def students(params, count):
    """Adapters that have nothing in common: the average of n of them has n times the rank."""
    return [toys.random_lora(params, seed=seed) for seed in range(count)]


def assert_products(lora, expected, atol=1e-5):
    found = toys.products(lora)
    assert found.keys() == expected.keys()
    for path, product in expected.items():
        np.testing.assert_allclose(found[path], product, atol=atol * np.abs(product).max(), err_msg=path)


def average(old, new, decay=DECAY):
    return {path: decay * old[path] + (1 - decay) * new[path] for path in old}


def test_full_weights_are_averaged_in_float32(params):
    student = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    teacher = start_ema(student)
    toys.assert_trees_close(teacher, jax.tree.map(lambda x: x.astype(jnp.float32), student))
    # Smaller than half a bfloat16 step: an average kept in bfloat16 would not move at all.
    moved = jax.tree.map(lambda x: x.astype(jnp.float32) * (1 + 1e-3), student)
    updated, lost = update(teacher, moved, decay=0.9)
    expected = jax.tree.map(lambda old, new: 0.9 * np.float64(old) + 0.1 * np.float64(new), teacher, moved)
    toys.assert_trees_close(updated, jax.tree.map(np.float32, expected), rtol=3e-7)
    assert float(lost) == 0.0
    assert not np.array_equal(updated["embed"]["weight"], teacher["embed"]["weight"])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_decay_one_keeps_and_zero_copies(params, kind):
    if kind == "full":
        teacher, student = start_ema(params), jax.tree.map(lambda x: x + 1, params)
        toys.assert_trees_close(update(teacher, student, decay=1.0)[0], teacher)
        toys.assert_trees_close(update(teacher, student, decay=0.0)[0], student)
        return
    first, second = students(params, 2)
    teacher = update(start_ema(first), first, decay=0.0)[0]
    assert_products(teacher, toys.products(first))
    assert_products(update(teacher, second, decay=1.0)[0], toys.products(first))
    assert_products(update(teacher, second, decay=0.0)[0], toys.products(second))


def test_the_ema_of_full_weights_forgets_geometrically(params):
    """After n updates from 0 towards 1: 1 − decayⁿ."""
    teacher, student = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}
    for _ in range(5):
        teacher = ema_update(teacher, student, decay=DECAY)
    np.testing.assert_allclose(teacher["w"], 1 - DECAY**5, rtol=1e-6)


def test_the_start_is_the_students_start(params):
    fresh = init_lora(jax.random.key(0), params, rank=2, alpha=4.0, targets=("q", "down"))
    teacher = start_ema(fresh)
    assert teacher.scale == fresh.scale
    assert teacher.factors["attention/q"].a.shape == (2, 16, 4), "twice the student's rank"
    assert_products(teacher, toys.products(fresh))
    assert float(weight_distance(teacher, fresh)) == 0.0


def test_an_adapter_that_was_already_trained_is_its_teachers_start(params):
    student = toys.random_lora(params)
    teacher = start_ema(student)
    assert_products(teacher, toys.products(student))
    buffers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((teacher, student))}
    assert len(buffers) == 8, "no memory is shared: the step donates both"


def test_the_rank_stops_at_the_matrix(params):
    """Matrices of 16 x 8 hold no more than rank 8."""
    student = toys.random_lora(params, rank=6, targets=("k",))
    teacher = start_ema(student)
    assert teacher.factors["attention/k"].a.shape == (2, 16, 8)
    expected = toys.products(student)
    for _ in range(3):
        student = jax.tree.map(lambda x: x + 0.1, student)
        expected = average(expected, toys.products(student))
        teacher, lost = update(teacher, student, decay=DECAY)
        assert_products(teacher, expected, atol=1e-4)
        assert float(lost) < 1e-10


def test_products_are_averaged_exactly_while_the_rank_suffices(params):
    """Two unrelated students of rank 2 fit in a teacher of rank 4."""
    first, second = students(params, 2)
    teacher = start_ema(jax.tree.map(jnp.zeros_like, first))
    expected = {path: np.zeros_like(product) for path, product in toys.products(first).items()}
    for student in (first, second):
        teacher, lost = update(teacher, student, decay=DECAY)
        expected = average(expected, toys.products(student))
        assert_products(teacher, expected)
        assert float(lost) < 1e-10
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(teacher))


def test_what_the_rank_cannot_hold_is_the_least_possible_and_is_measured(params):
    """The third unrelated student: the best rank-4 approximation of the exact average, by dense SVD."""
    *before, last = students(params, 3)
    teacher = start_ema(jax.tree.map(jnp.zeros_like, last))
    for student in before:
        teacher, _ = update(teacher, student, decay=DECAY)
    exact = average(toys.products(teacher), toys.products(last))
    teacher, share = update(teacher, last, decay=DECAY)
    best, lost, total = {}, 0.0, 0.0
    for path, product in exact.items():
        u, s, v = np.linalg.svd(product, full_matrices=False)
        best[path] = (u[..., :4] * s[..., None, :4]) @ v[..., :4, :]
        lost, total = lost + np.sum(s[..., 4:] ** 2), total + np.sum(s**2)
    assert lost / total > 1e-3, "something is lost in this example"
    assert_products(teacher, best, atol=1e-4)
    assert float(share) == pytest.approx(lost / total, rel=1e-3)


def test_averaging_the_factors_would_give_another_matrix(params):
    """A and B with their signs flipped are the same adapter; averaged one by one they cancel."""
    student = toys.random_lora(params)
    flipped = jax.tree.map(jnp.negative, student)
    assert_products(flipped, toys.products(student))
    teacher, _ = update(start_ema(student), flipped, decay=0.5)
    assert_products(teacher, toys.products(student))
    naive = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, student, flipped)
    assert all(not np.any(product) for product in toys.products(naive).values())


def test_the_teacher_moves_under_lora(params):
    student = toys.random_lora(params)
    teacher = start_ema(jax.tree.map(jnp.zeros_like, student))
    distances = []
    for _ in range(4):
        teacher, _ = update(teacher, student, decay=DECAY)
        distances.append(float(weight_distance(teacher, student)))
    np.testing.assert_allclose(distances, [DECAY**n for n in range(1, 5)], rtol=1e-3)


def test_distance_of_adapters_is_that_of_their_products(params):
    teacher, student = students(params, 2)
    ours, theirs = toys.products(teacher), toys.products(student)
    apart = np.sqrt(sum(np.sum((ours[path] - theirs[path]) ** 2) for path in ours))
    size = np.sqrt(sum(np.sum(product**2) for product in theirs.values()))
    assert float(weight_distance(teacher, student)) == pytest.approx(apart / size, rel=1e-4)
    # Near zero the Gram matrices cancel: this is the floor of the measurement.
    assert float(weight_distance(student, student)) < 2e-3


def test_distance_of_full_weights():
    teacher, student = (
        {"a": jnp.array([1.0, 2.0]), "b": jnp.array([0.0])},
        {"a": jnp.array([1.0, 0.0]), "b": jnp.array([3.0])},
    )
    assert float(weight_distance(teacher, student)) == pytest.approx(np.sqrt((4 + 9) / (1 + 9)), rel=1e-6)


def test_distance_from_nothing_is_a_number():
    zero = Lora({"attention/q": LoraFactors(jnp.zeros((1, 4, 2)), jnp.zeros((1, 2, 4)))}, 1.0)
    assert float(weight_distance(zero, zero)) == 0.0


def test_the_student_sees_the_question_only():
    assert student_messages("2+2?") == [{"role": "user", "content": "2+2?"}]


def test_a_demonstration_as_chat_turns():
    messages = teacher_messages("2+2?", "It is 4.", condition="gold", placement="turns")
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [message["content"] for message in messages] == ["2+2?", "It is 4.", "2+2?"]


def test_a_demonstration_inside_the_user_message():
    (message,) = teacher_messages("2+2?", "It is 4.", condition="gold", placement="inline")
    assert message["role"] == "user"
    assert message["content"].startswith("2+2?") and "It is 4." in message["content"]


@pytest.mark.parametrize("placement", ["turns", "inline"])
def test_without_a_demonstration_the_teacher_sees_what_the_student_sees(placement):
    assert teacher_messages("2+2?", "It is 4.", condition="none", placement=placement) == student_messages("2+2?")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(condition="silver", placement="turns"), "condition is 'silver'; expected gold or none"),
        (dict(condition="gold", placement="below"), "placement is 'below'; expected turns or inline"),
    ],
)
def test_unknown_prompt_options(options, message):
    # Past the shape hook, which checks literals too.
    with pytest.raises(ValueError, match=message):
        teacher_messages.__wrapped__("2+2?", "4", **options)


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-5])
def test_the_distance_of_nearly_equal_adapters_is_not_lost_to_rounding(apart):
    """A slow teacher moves by little; the metric must tell that from standing still."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 576, 16)).astype(np.float32), rng.standard_normal((2, 16, 192)).astype(np.float32)
    near = (b * (1 + apart * rng.standard_normal(b.shape))).astype(np.float32)
    one, two = (Lora({"attention/q": LoraFactors(jnp.asarray(a), jnp.asarray(x))}, 1.0) for x in (b, near))
    exact = np.linalg.norm(a.astype(float) @ (b.astype(float) - near.astype(float)))
    exact /= np.linalg.norm(a.astype(float) @ near.astype(float))
    assert float(weight_distance(one, two)) == pytest.approx(exact, rel=2e-2)
