"""Rotary positions and masked grouped-query attention in plain XLA."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unisd_jax.models.config import ModelConfig

# Finite, so that a row with every key masked (a padded query) gives garbage nobody reads instead of NaN.
MASKED_SCORE = -1e30
CAUSAL_BLOCK = 256


def rotary_frequencies(config: ModelConfig) -> Float[Array, "half"]:
    """Angular frequency of each rotary pair, radians per position; θ^(−2i/d), stretched where Llama 3.1 asks."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position / wavelengths
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return frequencies * (smooth + (1 - smooth) / scaling.factor)


def rotary_angles(
    positions: Int[Array, "B S"], config: ModelConfig
) -> tuple[Float[Array, "B S half"], Float[Array, "B S half"]]:
    """Cosine and sine of every position's rotation, float32."""
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B S N D"], cos: Float[Array, "B S half"], sin: Float[Array, "B S half"]):
    """Turns each (x_i, x_{i+D/2}) pair by its angle: the half-split order of Hugging Face checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attention(
    query: Float[Array, "B S N D"],
    key: Float[Array, "B K T D"],
    value: Float[Array, "B K T D"],
    attend: Bool[Array, "B S T"],
) -> Float[Array, "B S N D"]:
    """softmax(q·kᵀ/√D) v over the keys that `attend` allows; N query heads share K key-value heads.

    The query heads of one key head are laid end to end, so that both products are plain matrix products per key head.
    Scores and softmax are float32; the result has the dtype of `query`.
    """
    batch, length, heads, dim = query.shape
    kv_heads, groups = key.shape[1], heads // key.shape[1]
    rows = (query * dim**-0.5).reshape(batch, length, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, groups * length, dim)
    scores = jnp.einsum("bkrd,bktd->bkrt", rows, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, groups, length, -1) + jnp.where(attend, 0.0, MASKED_SCORE)[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype).reshape(batch, kv_heads, groups * length, -1)
    mixed = jnp.einsum("bkrt,bktd->bkrd", weights, value).reshape(batch, kv_heads, groups, length, dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)


def causal_attention(
    query: Float[Array, "B S N D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S D"],
    attend: Bool[Array, "B S S"],
) -> Float[Array, "B S N D"]:
    """`attention` for an `attend` that never looks ahead: queries in blocks, each over the keys up to its own end.

    Saves the products above the diagonal, almost half of them for long sequences.
    """
    length = query.shape[1]
    blocks = []
    for start in range(0, length, CAUSAL_BLOCK):
        end = min(start + CAUSAL_BLOCK, length)
        seen = (key[:, :, :end], value[:, :, :end], attend[:, start:end, :end])
        blocks.append(attention(query[:, start:end], *seen))
    return jnp.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]


def causal(mask: Bool[Array, "B S"]) -> Bool[Array, "B S S"]:
    """Which keys each position may see: itself and the unpadded ones before it."""
    return jnp.tril(jnp.ones((mask.shape[1], mask.shape[1]), bool)) & mask[:, None, :]
