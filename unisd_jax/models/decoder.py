"""One decoder for all families: layers are stacked and scanned.

`Model` is what the rest of the program holds: a hashable description whose methods are pure functions of
`params`, a nested dict of arrays. `lora=None` means the weights as they are.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from unisd_jax.models.attention import attention, causal_attention, within_window
from unisd_jax.models.config import ModelConfig
from unisd_jax.models.head import HeadOptions, head_logits
from unisd_jax.models.layers import Block, KVCache, LayerAdapter, RMSNorm, Setting, insert
from unisd_jax.models.layout import constrain, lookup
from unisd_jax.models.lora import Dropout, Lora
from unisd_jax.models.rope import rotary_angles, rotary_frequencies

# How much of each layer a gradient computes again instead of keeping it: arguments of jax.checkpoint.
REMAT = {"layer": {}, "products": {"policy": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}}


class Embedding(nnx.Module):
    """One row per vocabulary entry, then zeros up to `rows`; input embedding or output head."""

    def __init__(self, vocab: int, rows: int, size: int, *, dtype: Any, rngs: nnx.Rngs):
        weight = 0.02 * jax.random.normal(rngs.params(), (vocab, size), dtype)
        self.weight = nnx.Param(jnp.pad(weight, ((0, rows - vocab), (0, 0))))


class Decoder(nnx.Module):
    """Embedding → `num_layers` blocks → final norm; the head is applied by `Model.logits`.

    The vocabulary has `rows` entries in memory, at least `config.vocab_size`.
    """

    def __init__(self, config: ModelConfig, *, rows: int, dtype: Any, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs):
            return Block(config, dtype=dtype, rngs=rngs)

        self.embed = Embedding(config.vocab_size, rows, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = blocks(rngs)
        self.norm = RMSNorm(config.hidden_size, config, dtype=dtype)
        if not config.tied_embeddings:
            self.head = Embedding(config.vocab_size, rows, config.hidden_size, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self,
        ids: Int[Array, "B S"],
        positions: Int[Array, "#B S"],
        lengths: Int[Array, "B"],
        setting: Setting,
        *,
        lora: Lora | None = None,
        dropout: Dropout | None = None,
        cache: KVCache | None = None,
        keep: bool = False,
        remat: str = "none",
    ) -> tuple[Float[Array, "B S H"], KVCache | None]:
        """States after the final norm, and with `keep` the tokens' keys and values of all layers."""
        x = self._embedded(ids, setting.mesh)
        angles = self._angles(positions, lengths)
        block, stacked = nnx.split(self.layers)
        factors = None if lora is None else lora.factors

        def layer_step(x, layer_inputs):
            weights, factors, layer_cache, layer, sliding = layer_inputs
            layer_dropout = None if dropout is None else dropout.at(layer)
            adapter = None if lora is None else LayerAdapter(factors, lora.scale, layer_dropout)
            turns = angles[0] if sliding is None else jax.tree.map(functools.partial(jnp.where, sliding), *angles[::-1])
            x, (key, value) = nnx.merge(block, weights)(x, turns, sliding, adapter, layer_cache, setting)
            return x, KVCache(key.swapaxes(1, 2), value.swapaxes(1, 2)) if keep else None

        # The layers return their new keys and values only, and the cache is written once: written layer by layer inside
        # the scan, XLA's CPU backend copies the whole cache for every layer.
        layers = jnp.arange(self.config.num_layers)
        sliding = jnp.asarray(self.config.sliding_layers) if self.config.sliding_layers else None
        # A scan's body is compiled apart from what follows, so nothing needs to be kept from merging the two passes.
        if remat != "none":
            layer_step = jax.checkpoint(layer_step, prevent_cse=False, **REMAT[remat])
        x, new = jax.lax.scan(layer_step, x, (stacked, factors, cache, layers, sliding))
        return self.norm(x), new

    def _embedded(self, ids, mesh: Mesh | None):
        weight = self.embed.weight[...]
        x = lookup(weight, ids, mesh)
        # Rounded to the weights' dtype, as in the checkpoint's own implementation.
        x = x * jnp.asarray(self.config.hidden_size**0.5, weight.dtype) if self.config.is_gemma else x
        return constrain(x, "stream", mesh)

    def _angles(self, positions, lengths):
        """Cosine and sine of full layers, and of sliding ones where there are any."""
        config, local = self.config, self.config.local_rope_theta
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, lengths)
        full = rotary_angles(positions, frequencies)
        return (
            (full,) if local is None else (full, rotary_angles(positions, rotary_frequencies(config.head_dim, local)))
        )


def causal_mix(config: ModelConfig, implementation: str, mesh: Mesh | None) -> Callable[..., Array]:
    """`Setting.mix` of a pass over whole sequences: a token sees those before it, in sliding layers the last."""

    def mix(query, key, value, sliding, _):
        options = {"scale": config.attention_scale, "implementation": implementation, "mesh": mesh}

        def near(*heads):
            return causal_attention(*heads, window=config.sliding_window, **options)

        def far(*heads):
            return causal_attention(*heads, **options)

        return far(query, key, value) if sliding is None else jax.lax.cond(sliding, near, far, query, key, value)

    return mix


def cached_mix(config: ModelConfig, attend: Bool[Array, "B S T"], slot: Int[Array, ""] | int) -> Callable[..., Array]:
    """`Setting.mix` of tokens whose keys and values go into the cache from `slot` on."""
    near = within_window(attend, config.sliding_window) if config.sliding_layers else None

    def mix(query, key, value, sliding, cache):
        seen = attend if near is None else jnp.where(sliding, near, attend)
        cache = insert(cache, KVCache(key.swapaxes(1, 2), value.swapaxes(1, 2)), slot)
        return attention(query, *cache, seen, scale=config.attention_scale)

    return mix


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder without its weights. Hashable: pass it to jit as a static argument.

    `head_options` say how scores are formed from hidden states, `attention` names an implementation, `remat` what a
    gradient computes again instead of keeping it ("none", "layer", or "products": all but matrix products). Activations
    are laid out on `mesh`; the rows of embedding and head are a multiple of `vocab_multiple`. All of them change no
    number but for rounding.
    """

    config: ModelConfig
    graph: nnx.GraphDef
    head_options: HeadOptions = HeadOptions()
    remat: str = "none"
    attention: str = "xla"
    mesh: Mesh | None = None
    vocab_multiple: int = 1

    @classmethod
    def build(
        cls, config: ModelConfig, *, dtype: Any = jnp.float32, vocab_multiple: int = 1
    ) -> tuple["Model", dict[str, Any]]:
        """The model and the shapes of its parameters (nested dict of ShapeDtypeStruct); nothing is allocated."""
        rows = _rounded_up(config.vocab_size, vocab_multiple)
        abstract = nnx.eval_shape(lambda: Decoder(config, rows=rows, dtype=dtype, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(abstract)
        options = HeadOptions(vocab_size=config.vocab_size if rows > config.vocab_size else None)
        return cls(config, graph, options, vocab_multiple=vocab_multiple), nnx.to_pure_dict(state)

    def init(self, seed: int, *, dtype: Any = jnp.float32) -> dict[str, Any]:
        """Random parameters, for tests and toys."""
        rows = _rounded_up(self.config.vocab_size, self.vocab_multiple)
        decoder = Decoder(self.config, rows=rows, dtype=dtype, rngs=nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.split(decoder)[1])

    def hidden(
        self,
        params: dict[str, Any],
        ids: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
        *,
        lora: Lora | None = None,
        dropout: Dropout | None = None,
        first: int = 0,
    ) -> Float[Array, "B T H"]:
        """States after the final norm of tokens `first` to S, in one pass; the state of token i predicts token i + 1.

        `mask` is False on padding, which stands on either side of a row's tokens and not between them, and changes
        nothing; states at padding mean nothing. `dropout` acts on the inputs of the adapters, where the student is
        trained; None everywhere else.
        """
        left, offsets, setting = self._moved_left(ids, mask)
        states, _ = nnx.merge(self.graph, params)(*left, setting, lora=lora, dropout=dropout, remat=self.remat)
        return _take(states, (jnp.arange(first, ids.shape[1]) - offsets) % ids.shape[1])

    def prefill(
        self, params: dict[str, Any], ids: Int[Array, "B S"], mask: Bool[Array, "B S"], length: int
    ) -> tuple[Float[Array, "B H"], KVCache]:
        """The state of each row's last token, and a cache with room for `length` more tokens from slot S on.

        A row's n tokens, padded like those of `hidden`, are in slots 0 to n − 1; slots n to S − 1 hold nothing.
        """
        left, _, setting = self._moved_left(ids, mask)
        states, new = nnx.merge(self.graph, params)(*left, setting, keep=True)
        last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)
        cache = KVCache(*(jnp.pad(x, ((0, 0),) * 3 + ((0, length), (0, 0))) for x in new))
        return _take(states, last[:, None])[:, 0], cache

    def extend(
        self,
        params: dict[str, Any],
        ids: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        attend: Bool[Array, "B S T"],
        cache: KVCache,
        slot: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B S H"], KVCache]:
        """`hidden` for S more tokens whose keys and values go into `cache` from `slot` on.

        `attend` are the slots of all tokens up to each one, itself included, in their order.
        """
        setting = Setting(cached_mix(self.config, attend, slot), self.mesh)
        lengths = jnp.max(positions, axis=1) + 1
        decoder = nnx.merge(self.graph, params)
        states, new = decoder(ids, positions, lengths, setting, cache=cache, keep=True)
        return states, insert(cache, new, slot)

    def head(self, params: dict[str, Any]) -> Float[Array, "V H"]:
        """The output matrix, padding included; the embedding itself where they are tied."""
        return params["embed" if self.config.tied_embeddings else "head"]["weight"]

    def logits(self, params: dict[str, Any], hidden: Float[Array, "*B H"]) -> Float[Array, "*B V"]:
        """Next-token logits in float32, of the entries of the vocabulary only."""
        return head_logits(hidden, self.head(params))[..., : self.config.vocab_size]

    def _moved_left(self, ids, mask):
        """((ids, positions, lengths), how far each row was moved [B, 1], setting): padding to the right of every row.

        Causal attention then never sees it, and no [B, S, S] mask is needed.
        """
        offsets, places = jnp.argmax(mask, axis=1)[:, None], jnp.arange(ids.shape[1])
        moved = _take(ids, (places + offsets) % ids.shape[1])
        setting = Setting(causal_mix(self.config, self.attention, self.mesh), self.mesh)
        return (moved, places[None], jnp.sum(mask, axis=1)), offsets, setting


def _take(x: Shaped[Array, "B S *H"], places: Int[Array, "B T"]) -> Shaped[Array, "B T *H"]:
    """`x[b, places[b]]` for different places of each row, so that the gradient is written without additions."""
    return jax.vmap(lambda row, at: row.at[at].get(unique_indices=True, mode="promise_in_bounds"))(x, places)


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
