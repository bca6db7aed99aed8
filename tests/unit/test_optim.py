"""The schedule by hand and AdamW against its definition."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unisd_jax.optim import adamw, learning_rate_schedule


def rates(steps, warmup_ratio, schedule, peak=1.0):
    rate = learning_rate_schedule(peak, steps=steps, warmup_ratio=warmup_ratio, schedule=schedule)
    return np.array([float(rate(jnp.int32(step))) for step in range(steps)])


def test_warm_up_does_not_waste_the_first_update():
    found = rates(20, 0.2, "constant", peak=3e-4)
    np.testing.assert_allclose(found[:5], 3e-4 * np.array([0.25, 0.5, 0.75, 1.0, 1.0]), rtol=1e-6)
    np.testing.assert_allclose(found[4:], 3e-4, rtol=1e-6)


def test_warm_up_is_rounded_up():
    np.testing.assert_allclose(rates(7, 0.2, "constant")[:3], [0.5, 1.0, 1.0], rtol=1e-6)


def test_no_warm_up():
    np.testing.assert_allclose(rates(4, 0.0, "constant"), 1.0)
    found = rates(4, 0.0, "cosine")
    np.testing.assert_allclose(found, 0.5 * (1 + np.cos(np.pi * np.arange(4) / 4)), atol=1e-6)


def test_the_cosine_falls_from_the_peak_towards_zero():
    found = rates(25, 0.2, "cosine")
    assert found.argmax() in (4, 5) and found[5] == pytest.approx(1.0)
    assert np.all(np.diff(found[5:]) < 0) and 0 < found[-1] < 0.02
    assert found[15] == pytest.approx(0.5, abs=1e-6), "half way"
    rate = learning_rate_schedule(1.0, steps=25, warmup_ratio=0.2, schedule="cosine")
    assert float(rate(25)) == pytest.approx(0.0, abs=1e-7) and float(rate(99)) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(("steps", "warmup_ratio"), [(1, 0.0), (1, 1.0), (3, 1.0)])
def test_short_runs_have_finite_positive_rates(steps, warmup_ratio):
    found = rates(steps, warmup_ratio, "cosine")
    assert np.isfinite(found).all() and np.all(found > 0)


B1, B2, EPS, DECAY = 0.8, 0.95, 1e-6, 0.1


def run(gradients, *, rate, clip, start):
    optimizer = adamw(lambda step: rate[step], b1=B1, b2=B2, eps=EPS, weight_decay=DECAY, max_grad_norm=clip)
    params = {"w": jnp.asarray(start, jnp.float32)}
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params["w"]), state


def test_adamw_by_its_definition():
    """Decoupled decay, bias correction, the rate of each step; gradients cut to the norm bound first."""
    gradients, rate, clip = [[3.0, 4.0], [0.1, -0.2], [0.0, 5.0]], jnp.array([0.1, 0.2, 0.05]), 1.0
    w, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for step, gradient in enumerate(map(np.array, gradients)):
        gradient = gradient * min(1.0, clip / np.linalg.norm(gradient))
        m, v = B1 * m + (1 - B1) * gradient, B2 * v + (1 - B2) * gradient**2
        direction = (m / (1 - B1 ** (step + 1))) / (np.sqrt(v / (1 - B2 ** (step + 1))) + EPS)
        w = w - float(rate[step]) * (direction + DECAY * w)
    found, _ = run(gradients, rate=rate, clip=clip, start=[1.0, -2.0])
    np.testing.assert_allclose(found, w, rtol=1e-5)


def test_clipping_is_by_the_norm_of_all_weights_together():
    optimizer = adamw(lambda step: 1.0, b1=0.0, b2=0.0, eps=1e9, weight_decay=0.0, max_grad_norm=1.0)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    # With a huge epsilon the update is the clipped gradient itself, over 1e9.
    updates, _ = optimizer.update({"a": jnp.array([6.0]), "b": jnp.array([8.0])}, optimizer.init(params), params)
    np.testing.assert_allclose([-1e9 * updates["a"][0], -1e9 * updates["b"][0]], [0.6, 0.8], rtol=1e-5)
    updates, _ = optimizer.update({"a": jnp.array([0.3]), "b": jnp.array([0.4])}, optimizer.init(params), params)
    np.testing.assert_allclose([-1e9 * updates["a"][0], -1e9 * updates["b"][0]], [0.3, 0.4], rtol=1e-5)


def test_the_moments_are_float32():
    _, state = run([[1.0, 1.0]], rate=jnp.ones(1), clip=1.0, start=[0.0, 0.0])
    floats = [leaf for leaf in state if hasattr(leaf, "mu")] or [part for part in state[1] if hasattr(part, "mu")]
    assert floats[0].mu["w"].dtype == floats[0].nu["w"].dtype == jnp.float32
