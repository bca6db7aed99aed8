"""Random models, adapters and batches for tests, made with numpy so that nothing has to be compiled first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisd_jax.models import Lora, LoraFactors, Model
from unisd_jax.models.lora import TARGETS
from unisd_jax.testing import tiny_config
from unisd_jax.types import Completions, Prompts, Views

# Options of jax.jit for programs that run once or twice.
QUICK = {"xla_backend_optimization_level": 0}
VOCABULARY = 32
SMALL = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2, head_dim=4)


@pytest.fixture(scope="module", autouse=True)
def quick_compile():
    """Programs of a test run once or twice: compiled without the last optimizations they are ready in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def build(**changes):
    """(model, shapes of its parameters) of `SMALL` with any field changed."""
    return Model.build(tiny_config(**(SMALL | changes)))


def random_model(seed=0, **changes):
    """A model whose norms and biases are random too, and whose logits are a few nats apart."""
    model, shapes = build(**changes)
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        name = path[-1].key
        noise = rng.standard_normal(shape.shape, np.float32)
        values = {"scale": 1 + 0.2 * noise, "bias": 0.3 * noise, "kernel": 0.3 * noise, "weight": 0.6 * noise}
        return jnp.asarray(values[name])

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def random_lora(params, seed=0, *, rank=2, targets=("q", "down"), scale=2.0, size=0.3):
    """An adapter that has already been trained: both factors are random."""
    rng = np.random.default_rng(seed)

    def draw(path):
        group, name = path.split("/")
        layers, inputs, outputs = params["layers"][group][name]["kernel"].shape
        shapes = (layers, inputs, rank), (layers, rank, outputs)
        return LoraFactors(*(jnp.asarray(size * rng.standard_normal(shape, np.float32)) for shape in shapes))

    return Lora({TARGETS[name]: draw(TARGETS[name]) for name in targets}, scale)


def zero_lora(shapes, *, rank=8):
    """An adapter of all projections that does nothing, for a tree of parameters or of their shapes."""
    factors = {}
    for path in TARGETS.values():
        group, name = path.split("/")
        layers, inputs, outputs = shapes["layers"][group][name]["kernel"].shape
        factors[path] = LoraFactors(jnp.zeros((layers, inputs, rank)), jnp.zeros((layers, rank, outputs)))
    return Lora(factors, 2.0)


def products(lora):
    """{path: scale · A·B} in float64: what the adapter adds to each matrix."""
    return {
        path: lora.scale * (np.asarray(factors.a, np.float64) @ np.asarray(factors.b, np.float64))
        for path, factors in lora.factors.items()
    }


def random_tokens(rng, shape, vocabulary=VOCABULARY):
    return rng.integers(0, vocabulary, shape).astype(np.int32)


def left_padded(rng, batch, length):
    """Prompts of length 1 to `length`, at least one of them full."""
    lengths = rng.integers(1, length + 1, batch)
    lengths[0] = length
    return Prompts(random_tokens(rng, (batch, length)), np.arange(length) >= length - lengths[:, None])


def right_padded(rng, batch, length):
    """Completions of length 1 to `length`, at least one of them full."""
    lengths = rng.integers(1, length + 1, batch)
    lengths[-1] = length
    return Completions(random_tokens(rng, (batch, length)), np.arange(length) < lengths[:, None])


def random_views(seed=0, *, batch=8, student=6, teacher=9, completion=5):
    """A ragged batch with all views; the sampler's log-probs are made up."""
    rng = np.random.default_rng(seed)
    prompts = left_padded(rng, batch, student), left_padded(rng, batch, teacher)
    completions = right_padded(rng, batch, completion)
    logps = -rng.exponential(2.0, completions.mask.shape).astype(np.float32)
    return Views(*prompts, completions, logps)


def assert_trees_close(found, expected, *, rtol=0.0, atol=0.0):
    """Leaf by leaf, naming the leaf; `atol` is a share of the leaf's largest value."""
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), have in zip(leaves, jax.tree.leaves(found), strict=True):
        want, have = np.asarray(want), np.asarray(have)
        assert want.shape == have.shape and want.dtype == have.dtype, jax.tree_util.keystr(path)
        scale = np.max(np.abs(want), initial=0.0)
        np.testing.assert_allclose(have, want, rtol=rtol, atol=atol * scale, err_msg=jax.tree_util.keystr(path))
