"""Attention: every implementation against a float64 reference, and what each of them is lowered to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisd_jax.errors import UserError
from unisd_jax.models import attention as attention_module
from unisd_jax.models.attention import attention, causal_attention, resolve_attention, within_window


def draw(seed, batch, length, heads, kv_heads, dim, dtype=jnp.float32):
    """(query, key, value), unit normal."""
    rng = np.random.default_rng(seed)
    sizes = (heads, kv_heads, kv_heads)
    return tuple(jnp.asarray(rng.standard_normal((batch, length, n, dim)), dtype) for n in sizes)


def reference(query, key, value, *, scale, window=None):
    """In float64, token by token and head by head."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    groups, mixed = query.shape[2] // key.shape[2], np.zeros(query.shape)
    for b, i, n in np.ndindex(*query.shape[:3]):
        seen = slice(0 if window is None else max(0, i - window + 1), i + 1)
        scores = scale * key[b, seen, n // groups] @ query[b, i, n]
        weights = np.exp(scores - scores.max())
        mixed[b, i, n] = weights / weights.sum() @ value[b, seen, n // groups]
    return mixed


def gradients(heads, **options):
    """Of a function whose derivative by each entry of the result differs."""

    def loss(*heads):
        mixed = causal_attention(*heads, **options)
        return jnp.sum(mixed * jnp.sin(jnp.arange(mixed.size).reshape(mixed.shape)))

    return jax.jit(jax.grad(loss, (0, 1, 2)))(*heads)


@pytest.mark.parametrize("window", [None, 1, 3, 4, 50])
@pytest.mark.parametrize("length", [4, 8, 11])
def test_blocks_agree_with_the_reference(monkeypatch, length, window):
    monkeypatch.setattr(attention_module, "CAUSAL_BLOCK", 4)
    heads = draw(0, 2, length, 6, 2, 4)
    found = causal_attention(*heads, scale=0.7, window=window)
    np.testing.assert_allclose(found, reference(*heads, scale=0.7, window=window), atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_forming_scores_again_changes_no_gradient(monkeypatch, window):
    monkeypatch.setattr(attention_module, "CAUSAL_BLOCK", 4)
    heads = draw(1, 2, 14, 4, 2, 4)
    kept = gradients(heads, scale=0.5, window=window)
    monkeypatch.setattr(attention_module, "KEPT_LENGTH", 8)
    again = gradients(heads, scale=0.5, window=window)
    for found, expected in zip(again, kept, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_gradient_agrees_with_differences():
    heads = draw(2, 1, 7, 4, 2, 4)
    found = gradients(heads, scale=0.5, window=3)
    waves = np.sin(np.arange(heads[0].size)).reshape(heads[0].shape)
    directions = draw(3, 1, 7, 4, 2, 4)
    slope = sum(float(jnp.vdot(gradient, step)) for gradient, step in zip(found, directions, strict=True))
    ends = [
        np.sum(
            waves
            * reference(
                *(np.float64(x) + sign * 1e-5 * np.float64(d) for x, d in zip(heads, directions, strict=True)),
                scale=0.5,
                window=3,
            )
        )
        for sign in (1, -1)
    ]
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_attention_over_any_allowed_keys():
    """Six query heads share two key-value heads in order: 0, 1, 2 read the first one."""
    rng = np.random.default_rng(2)
    query = rng.standard_normal((2, 3, 6, 4)).astype(np.float32)
    key, value = rng.standard_normal((2, 2, 2, 5, 4)).astype(np.float32)
    attend = rng.random((2, 3, 5)) < 0.6
    attend[:, :, 0] = True
    expected = np.zeros_like(query)
    for b, s, n in np.ndindex(2, 3, 6):
        scores = key[b, n // 3][attend[b, s]] @ query[b, s, n] / 2.0
        weights = np.exp(scores) / np.exp(scores).sum()
        expected[b, s, n] = weights @ value[b, n // 3][attend[b, s]]
    mixed = attention(*map(jnp.asarray, (query, key, value, attend)), scale=0.5)
    np.testing.assert_allclose(mixed, expected, atol=1e-5)


def test_a_query_that_may_see_nothing_is_not_nan():
    ones = jnp.ones((1, 1, 2, 4))
    mixed = attention(jnp.ones((1, 2, 1, 4)), ones, ones, jnp.zeros((1, 2, 2), bool), scale=0.5)
    assert np.isfinite(mixed).all()


def test_the_window_counts_allowed_keys_only():
    attend = jnp.array([[[1, 1, 1, 0, 0, 1, 1, 0]]], bool)
    np.testing.assert_array_equal(within_window(attend, 3)[0, 0], [0, 0, 1, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(within_window(attend, 9), attend)


@pytest.mark.parametrize("window", [None, 1024])
def test_a_long_gradient_holds_no_square(window):
    shapes = [jax.ShapeDtypeStruct((1, 4096, heads, 16), jnp.bfloat16) for heads in (4, 2, 2)]

    def loss(*heads):
        return jnp.sum(causal_attention(*heads, scale=0.25, window=window).astype(jnp.float32))

    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).as_text()
    assert "4096x4096" not in text
    assert f"512x{4096 if window is None else 512 + window - 1}" in text, "the scores of a block"
    # A block's scores are formed again: between the passes stand whole arrays only.
    residuals = jax.eval_shape(lambda *heads: jax.vjp(loss, *heads)[1], *shapes)
    assert max(x.size for x in jax.tree.leaves(residuals)) <= 4096 * 4 * 16


SPLASH = {
    "plain": dict(length=128, heads=2, kv_heads=2, dim=128, window=None),
    "grouped": dict(length=100, heads=4, kv_heads=2, dim=64, window=None),
    "window": dict(length=200, heads=2, kv_heads=1, dim=16, window=70),
    "itself": dict(length=40, heads=2, kv_heads=1, dim=16, window=1),
}


@pytest.mark.parametrize("case", SPLASH.values(), ids=SPLASH)
def test_splash_agrees_with_xla(case):
    window = case["window"]
    heads = draw(4, 2, *(case[name] for name in ("length", "heads", "kv_heads", "dim")))
    options = dict(scale=0.3, window=window)
    found = causal_attention(*heads, **options, implementation="splash_interpret")
    np.testing.assert_allclose(found, causal_attention(*heads, **options), atol=2e-5)
    found = gradients(heads, **options, implementation="splash_interpret")
    for gradient, expected in zip(found, gradients(heads, **options), strict=True):
        np.testing.assert_allclose(gradient, expected, atol=1e-4)


def lowered(implementation, platform, window, head_dim=64, tokens=256):
    heads = draw(5, 2, tokens, 4, 2, head_dim, jnp.bfloat16)

    def loss(*heads):
        options = dict(scale=0.125, window=window, implementation=implementation)
        return jnp.sum(causal_attention(*heads, **options).astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*heads)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_splash_lowers_for_tpu(window, head_dim):
    text = lowered("splash", "tpu", window, head_dim)
    assert text.count("tpu_custom_call") == 3, "one kernel forward, two backward"


@pytest.fixture
def cudnn_is_there(monkeypatch):
    """The checks of the machine that a lowering on another one cannot pass."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda capability: False)


@pytest.mark.parametrize(("window", "length"), [(None, 0), (100, 100), (1, 1)])
def test_cudnn_lowers_for_cuda(cudnn_is_there, window, length):
    """The length that cuDNN is told includes the token itself, as the window does."""
    text = lowered("cudnn", "cuda", window)
    assert "fmhaSoftmax" in text and "fmhaSoftmaxBackward" in text
    assert f"sliding_window_length\\22: {length}" in text or f'"sliding_window_length": {length}' in text


def test_cudnn_takes_odd_lengths_too(cudnn_is_there):
    """It refuses them itself when there is a gradient; prompts and completions together are mostly of odd length."""
    assert "2x256x4x64" in lowered("cudnn", "cuda", None, tokens=255)


def test_what_auto_stands_for():
    resolve = functools.partial(resolve_attention, "auto")
    assert resolve(backend="gpu", dtype=jnp.bfloat16, head_dim=128) == "cudnn"
    assert resolve(backend="gpu", dtype=jnp.float16, head_dim=256) == "cudnn"
    assert resolve(backend="gpu", dtype=jnp.bfloat16, head_dim=256, capability=8.0) == "xla"
    assert resolve(backend="gpu", dtype=jnp.bfloat16, head_dim=128, capability=8.0) == "cudnn"
    assert resolve(backend="gpu", dtype=jnp.float32, head_dim=128) == "xla"
    assert resolve(backend="gpu", dtype=jnp.bfloat16, head_dim=264) == "xla"
    assert resolve(backend="gpu", dtype=jnp.bfloat16, head_dim=20) == "xla"
    assert resolve(backend="tpu", dtype=jnp.float32, head_dim=64) == "splash"
    assert resolve(backend="cpu", dtype=jnp.bfloat16, head_dim=64) == "xla"


@pytest.mark.parametrize(
    ("name", "backend", "dtype", "head_dim", "message"),
    [
        ("flash", "gpu", "bfloat16", 64, "model.attention is 'flash'; expected one of auto, xla, cudnn, splash"),
        ("cudnn", "cpu", "bfloat16", 64, "model.attention is cudnn, which runs on gpu only, not on cpu"),
        ("splash", "gpu", "bfloat16", 64, "model.attention is splash, which runs on tpu only, not on gpu"),
        ("cudnn", "gpu", "float32", 64, "not float32 and 64; use auto or xla"),
        ("cudnn", "gpu", "bfloat16", 320, "not bfloat16 and 320; use auto or xla"),
    ],
)
def test_what_cannot_run_is_refused(name, backend, dtype, head_dim, message):
    with pytest.raises(UserError) as error:
        resolve_attention(name, backend=backend, dtype=dtype, head_dim=head_dim)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_can_run_stays_as_it_is():
    for name, backend in (("xla", "gpu"), ("xla", "cpu"), ("cudnn", "gpu"), ("splash", "tpu")):
        assert resolve_attention(name, backend=backend, dtype=jnp.bfloat16, head_dim=64) == name
