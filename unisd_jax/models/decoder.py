"""The decoder in the Llama layout, as Flax NNX modules; layers are stacked and scanned.

`Model` is what the rest of the program holds: a hashable description whose methods are pure functions of
`params`, a nested dict of arrays. `lora=None` means the weights as they are.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from unisd_jax.models.attention import attention, causal, causal_attention, rotary_angles, rotate
from unisd_jax.models.config import ModelConfig
from unisd_jax.models.head import HeadOptions, head_logits
from unisd_jax.models.lora import TARGETS, Dropout, Lora, LoraFactors, low_rank_product


class KVCache(NamedTuple):
    """Keys and values of every layer; slot `t` of the length axis belongs to token `t` of the padded sequence."""

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
    """x / √(mean x² + ε) · scale, computed in float32."""

    def __init__(self, size: int, *, eps: float, dtype: Any):
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return self.scale[...] * wide.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; `slot` is where new keys and values go in the cache."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        size, bias = config.hidden_size, config.attention_bias
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = Linear(size, queries, bias=bias, dtype=dtype, rngs=rngs)
        self.k = Linear(size, keys, bias=bias, dtype=dtype, rngs=rngs)
        self.v = Linear(size, keys, bias=bias, dtype=dtype, rngs=rngs)
        self.o = Linear(queries, size, dtype=dtype, rngs=rngs)
        self.head_dim = config.head_dim

    def __call__(self, x, angles, attend, adapter, cache, slot):
        def heads(y):
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        query = rotate(heads(self.q(x, adapter, "attention/q")), *angles)
        key = rotate(heads(self.k(x, adapter, "attention/k")), *angles).swapaxes(1, 2)
        value = heads(self.v(x, adapter, "attention/v")).swapaxes(1, 2)
        if cache is None:
            mixed, new = causal_attention(query, key, value, attend), None
        else:
            new = KVCache(key, value)
            mixed = attention(query, *insert(cache, new, slot), attend)
        return self.o(mixed.reshape(*x.shape[:2], -1), adapter, "attention/o"), new


class SwiGLU(nnx.Module):
    """(silu(x·G) ∘ x·U)·D."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        size, inner = config.hidden_size, config.intermediate_size
        self.gate = Linear(size, inner, dtype=dtype, rngs=rngs)
        self.up = Linear(size, inner, dtype=dtype, rngs=rngs)
        self.down = Linear(inner, size, dtype=dtype, rngs=rngs)

    def __call__(self, x, adapter):
        gated = jax.nn.silu(self.gate(x, adapter, "mlp/gate")) * self.up(x, adapter, "mlp/up")
        return self.down(gated, adapter, "mlp/down")


class Block(nnx.Module):
    """Attention and SwiGLU, each on normalised input and added to the stream."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.mlp = SwiGLU(config, dtype=dtype, rngs=rngs)

    def __call__(self, x, angles, attend, adapter, cache, slot):
        mixed, new = self.attention(self.attention_norm(x), angles, attend, adapter, cache, slot)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x), adapter), new


class Embedding(nnx.Module):
    """One row per vocabulary entry; input embedding or output head."""

    def __init__(self, vocab: int, size: int, *, dtype: Any, rngs: nnx.Rngs):
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (vocab, size), dtype))


class Decoder(nnx.Module):
    """Embedding → `num_layers` blocks → final norm; the head is applied by `Model.logits`."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs):
            return Block(config, dtype=dtype, rngs=rngs)

        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = blocks(rngs)
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        if not config.tied_embeddings:
            self.head = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self,
        ids,
        positions,
        attend,
        *,
        lora: Lora | None,
        cache: KVCache | None,
        slot,
        dropout: Dropout | None = None,
        remat: bool = False,
    ):
        x = self.embed.weight[...][ids]
        angles = rotary_angles(positions, self.config)
        block, stacked = nnx.split(self.layers)
        factors = None if lora is None else lora.factors

        def layer_step(x, layer_inputs):
            weights, factors, layer_cache, layer = layer_inputs
            layer_dropout = None if dropout is None else dropout.at(layer)
            adapter = None if lora is None else LayerAdapter(factors, lora.scale, layer_dropout)
            return nnx.merge(block, weights)(x, angles, attend, adapter, layer_cache, slot)

        # The layers return their new keys and values only, and the cache is written once: written layer by layer inside
        # the scan, XLA's CPU backend copies the whole cache for every layer.
        layers = jnp.arange(self.config.num_layers)
        # A scan's body is compiled apart from what follows, so nothing needs to be kept from merging the two passes.
        layer_step = jax.checkpoint(layer_step, prevent_cse=False) if remat else layer_step
        x, new = jax.lax.scan(layer_step, x, (stacked, factors, cache, layers))
        return self.norm(x), None if cache is None else insert(cache, new, slot)


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder without its weights. Hashable: pass it to jit as a static argument.

    `head_options` say how scores are formed from hidden states, `remat` whether a gradient computes each layer again
    instead of keeping its values; they change no number but for rounding.
    """

    config: ModelConfig
    graph: nnx.GraphDef
    head_options: HeadOptions = HeadOptions()
    remat: bool = False

    @classmethod
    def build(cls, config: ModelConfig, *, dtype: Any = jnp.float32) -> tuple["Model", dict[str, Any]]:
        """The model and the shapes of its parameters (nested dict of ShapeDtypeStruct); nothing is allocated."""
        abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(abstract)
        return cls(config, graph), nnx.to_pure_dict(state)

    def init(self, seed: int, *, dtype: Any = jnp.float32) -> dict[str, Any]:
        """Random parameters, for tests and toys."""
        decoder = Decoder(self.config, dtype=dtype, rngs=nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.split(decoder)[1])

    def hidden(
        self,
        params: dict[str, Any],
        ids: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
        *,
        lora: Lora | None = None,
        dropout: Dropout | None = None,
    ) -> Float[Array, "B S H"]:
        """States after the final norm, in one pass without a cache; position i predicts token i + 1.

        `mask` is False on padding (either side). Positions count unpadded tokens, so padding changes nothing. `dropout`
        acts on the inputs of the adapters, where the student is trained; None everywhere else.
        """
        hidden, _ = nnx.merge(self.graph, params)(
            ids, token_positions(mask), causal(mask), lora=lora, cache=None, slot=None, dropout=dropout,
            remat=self.remat,
        )  # fmt: skip
        return hidden

    def extend(
        self,
        params: dict[str, Any],
        ids: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        attend: Bool[Array, "B S T"],
        cache: KVCache,
        slot: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B S H"], KVCache]:
        """`hidden` for S more tokens whose keys and values go into `cache` from `slot` on."""
        return nnx.merge(self.graph, params)(ids, positions, attend, lora=None, cache=cache, slot=slot)

    def head(self, params: dict[str, Any]) -> Float[Array, "V H"]:
        """The output matrix; the embedding itself where they are tied."""
        return params["embed" if self.config.tied_embeddings else "head"]["weight"]

    def logits(self, params: dict[str, Any], hidden: Float[Array, "*B H"]) -> Float[Array, "*B V"]:
        """Next-token logits in float32."""
        return head_logits(hidden, self.head(params))

    def empty_cache(self, batch: int, length: int, dtype: Any) -> KVCache:
        """Room for `length` tokens of `batch` sequences."""
        shape = (self.config.num_layers, batch, self.config.num_kv_heads, length, self.config.head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def token_positions(mask: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """0 for the first unpadded token of each row, and so on; 0 on left padding."""
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
