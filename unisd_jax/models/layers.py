"""The parts of a decoder layer as Flax NNX modules, each written once for all families."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from unisd_jax.models.config import ModelConfig
from unisd_jax.models.layout import constrain
from unisd_jax.models.lora import TARGETS, Dropout, LoraFactors, low_rank_product
from unisd_jax.models.rope import rotate


class KVCache(NamedTuple):
    """Keys and values of every layer, of one token per slot of the axis S."""

    key: Float[Array, "*L B K S D"]
    value: Float[Array, "*L B K S D"]


def insert(cache: KVCache, new: KVCache, slot: Int[Array, ""] | int) -> KVCache:
    """`cache` with `new` from `slot` on; of all layers or of one (then without the axis L)."""
    start = (*(0,) * (cache.key.ndim - 2), slot, 0)
    return KVCache(*(jax.lax.dynamic_update_slice(old, more, start) for old, more in zip(cache, new, strict=True)))


class LayerAdapter(NamedTuple):
    """One layer's slice of an adapter."""

    factors: dict[str, LoraFactors]
    scale: float
    dropout: Dropout | None = None

    def __call__(self, x: Float[Array, "*B in"], path: str) -> Float[Array, "*B out"]:
        """scale · dropout(x)·A·B of the adapter at `path`."""
        if self.dropout is not None:
            x = self.dropout.at(sorted(TARGETS.values()).index(path)).apply(x)
        a, b = self.factors[path]
        return self.scale * low_rank_product(x, a.astype(x.dtype), b.astype(x.dtype))


class Linear(nnx.Module):
    """x·W (+ bias) (+ scale · x·A·B)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, dtype: Any, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*B in"], adapter: LayerAdapter | None, path: str):
        y = x @ self.kernel[...]
        if self.bias is not None:
            y = y + self.bias[...]
        if adapter is not None and path in adapter.factors:
            y = y + adapter(x, path)
        return y


class RMSNorm(nnx.Module):
    """x / √(mean x² + ε) · scale, computed in float32; Gemma's has 1 + scale, and multiplies before it rounds."""

    def __init__(self, size: int, config: ModelConfig, *, dtype: Any):
        self.scale = nnx.Param((jnp.zeros if config.is_gemma else jnp.ones)((size,), dtype))
        self.eps, self.is_gemma = config.norm_eps, config.is_gemma

    def __call__(self, x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.is_gemma:
            return (wide * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        return self.scale[...] * wide.astype(x.dtype)


class Setting(NamedTuple):
    """What the layers of one pass share: how to attend, and the mesh their activations are laid out on.

    `mix(query, key, value, sliding, cache)` → [B, S, N, D], where `sliding` and `cache` are the layer's own.
    """

    mix: Callable[..., Float[Array, "B S N D"]]
    mesh: Mesh | None


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; also returns the new keys and values."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        size, bias = config.hidden_size, config.attention_bias
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = Linear(size, queries, bias=bias, dtype=dtype, rngs=rngs)
        self.k = Linear(size, keys, bias=bias, dtype=dtype, rngs=rngs)
        self.v = Linear(size, keys, bias=bias, dtype=dtype, rngs=rngs)
        self.o = Linear(queries, size, dtype=dtype, rngs=rngs)
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config, dtype=dtype) if config.qk_norm else None for _ in range(2)
        )
        self.head_dim = config.head_dim

    def __call__(self, x, angles, sliding, adapter, cache, setting: Setting):
        def heads(linear, name, norm=None):
            y = linear(x, adapter, f"attention/{name}")
            y = constrain(y.reshape(*y.shape[:2], -1, self.head_dim), "heads", setting.mesh)
            return y if norm is None else norm(y)

        query = rotate(heads(self.q, "q", self.q_norm), *angles)
        key = rotate(heads(self.k, "k", self.k_norm), *angles)
        value = heads(self.v, "v")
        mixed = constrain(setting.mix(query, key, value, sliding, cache), "heads", setting.mesh)
        return self.o(mixed.reshape(*x.shape[:2], -1), adapter, "attention/o"), (key, value)


class GatedMLP(nnx.Module):
    """(f(x·G) ∘ x·U)·D with SiLU, or Gemma's tanh form of GELU, for f."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        size, inner = config.hidden_size, config.intermediate_size
        self.gate = Linear(size, inner, dtype=dtype, rngs=rngs)
        self.up = Linear(size, inner, dtype=dtype, rngs=rngs)
        self.down = Linear(inner, size, dtype=dtype, rngs=rngs)
        self.is_gemma = config.is_gemma

    def __call__(self, x, adapter, mesh: Mesh | None):
        activation = jax.nn.gelu if self.is_gemma else jax.nn.silu
        gated = activation(self.gate(x, adapter, "mlp/gate")) * self.up(x, adapter, "mlp/up")
        return self.down(constrain(gated, "inner", mesh), adapter, "mlp/down")


class Block(nnx.Module):
    """Attention and MLP, each on normalised input and added to the stream; in Gemma after a norm of its own."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        def norm():
            return RMSNorm(config.hidden_size, config, dtype=dtype)

        self.attention_norm = norm()
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.attention_post_norm = norm() if config.is_gemma else None
        self.mlp_norm = norm()
        self.mlp = GatedMLP(config, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = norm() if config.is_gemma else None

    def __call__(self, x, angles, sliding, adapter, cache, setting: Setting):
        def add(x, y, norm):
            return constrain(x + (y if norm is None else norm(y)), "stream", setting.mesh)

        mixed, new = self.attention(self.attention_norm(x), angles, sliding, adapter, cache, setting)
        x = add(x, mixed, self.attention_post_norm)
        return add(x, self.mlp(self.mlp_norm(x), adapter, setting.mesh), self.mlp_post_norm), new
