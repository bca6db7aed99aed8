"""Low-rank adapters as data: `{path: (A, B)}`, applied to frozen weights without touching them.

One frozen base serves several views of the weights: `lora=None` is the base, the student's adapter is the student,
the EMA adapter is the teacher. The effective weight of an adapted matrix is W + scale · A·B with A [in, r], B [r, out].
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from unisd_jax.errors import UserError

TARGETS = {
    "q": "attention/q",
    "k": "attention/k",
    "v": "attention/v",
    "o": "attention/o",
    "gate": "mlp/gate",
    "up": "mlp/up",
    "down": "mlp/down",
}


class LoraFactors(NamedTuple):
    """One adapted matrix in every layer: A [L, in, r] and B [L, r, out], float32."""

    a: Float[Array, "*L in r"]
    b: Float[Array, "*L r out"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["factors"], meta_fields=["scale"])
class Lora:
    """An adapter: `factors` maps a path inside a layer ("attention/q") to its LoraFactors; `scale` is alpha / rank."""

    def __init__(self, factors: dict[str, LoraFactors], scale: float):
        self.factors = factors
        self.scale = scale


class Dropout(NamedTuple):
    """LoRA dropout of one pass: each adapter's input is zeroed at `rate`, drawn from a key per row of the batch.

    A row's draws depend on its own key alone, so that splitting a batch changes nothing.
    """

    rate: float
    keys: PRNGKeyArray

    def at(self, index: int | Int[Array, ""]) -> "Dropout":
        """The same for one layer, or for one adapter of a layer."""
        return Dropout(self.rate, jax.vmap(jax.random.fold_in, (0, None))(self.keys, index))

    def apply(self, x: Float[Array, "B *S in"]) -> Float[Array, "B *S in"]:
        """`x` with entries zeroed and the others scaled by 1 / (1 − rate)."""
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(self.keys)
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


def init_lora(key: PRNGKeyArray, params: dict[str, Any], *, rank: int, alpha: float, targets: Sequence[str]) -> Lora:
    """A new adapter that leaves the model as it is: A uniform in ±1/√in, B zero (PEFT's default).

    Raises:
      UserError: an unknown target, or a rank larger than a matrix.
    """
    unknown = [name for name in targets if name not in TARGETS]
    if unknown:
        raise UserError(f"model.lora.targets: unknown {unknown[0]!r}; known: {', '.join(TARGETS)}")
    factors = {}
    for index, name in enumerate(TARGETS):
        if name not in targets:
            continue
        layers, inputs, outputs = adapted_kernel(params, TARGETS[name]).shape
        if rank > min(inputs, outputs):
            raise UserError(f"model.lora.rank is {rank}, more than the {inputs} x {outputs} matrix {name!r} can hold")
        bound = inputs**-0.5
        a_key = jax.random.fold_in(key, index)
        a = jax.random.uniform(a_key, (layers, inputs, rank), jnp.float32, -bound, bound)
        factors[TARGETS[name]] = LoraFactors(a, jnp.zeros((layers, rank, outputs), jnp.float32))
    return Lora(factors, alpha / rank)


def merge(params: dict[str, Any], lora: Lora | None) -> dict[str, Any]:
    """A copy of `params` with the adapter added, computed in float32: W + scale · A·B. `params` stays as it is."""
    if lora is None:
        return params
    layers = params["layers"]
    for path, factors in lora.factors.items():
        kernel = adapted_kernel(params, path)
        merged = _add_product(kernel, factors, lora.scale)
        group, name = path.split("/")
        layers = layers | {group: layers[group] | {name: layers[group][name] | {"kernel": merged}}}
    return params | {"layers": layers}


@jax.custom_vjp
def low_rank_product(
    x: Float[Array, "*B in"], a: Float[Array, "in r"], b: Float[Array, "r out"]
) -> Float[Array, "*B out"]:
    """(x·A)·B, with a backward pass of its own.

    Sums over tokens put the narrow factor on the left; the derived backward pass has it on the right, for which XLA's
    CPU backend first transposes the wide [tokens, in] or [tokens, out] array (twice the time of a whole MLP).
    """
    return (x @ a) @ b


def _low_rank_forward(x, a, b):
    inner = x @ a
    return inner @ b, (x, inner, a, b)


def _low_rank_backward(residuals, gradient):
    x, inner, a, b = residuals
    inner_gradient = gradient @ b.T
    a_gradient = jnp.einsum("...r,...i->ri", inner_gradient, x).T
    b_gradient = jnp.einsum("...r,...o->ro", inner, gradient)
    return inner_gradient @ a.T, a_gradient, b_gradient


low_rank_product.defvjp(_low_rank_forward, _low_rank_backward)


@functools.partial(jax.jit, static_argnames="scale")
def _add_product(kernel: Float[Array, "L in out"], factors: LoraFactors, scale: float) -> Float[Array, "L in out"]:
    product = jnp.matmul(factors.a, factors.b, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)


def adapted_kernel(params: dict[str, Any], path: str) -> Float[Array, "L in out"]:
    """The matrix of all layers that the adapter at `path` ("attention/q") belongs to."""
    group, name = path.split("/")
    return params["layers"][group][name]["kernel"]
