"""Rotary positions: how fast each pair of a head's entries turns, and the scalings that families apply to that."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unisd_jax.models.hf_fields import integer, number, refuse, refuse_unknown


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All frequencies divided by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True)
class DynamicScaling:
    """NTK scaling: a larger base for sequences longer than `max_position`, none for the others."""

    factor: float
    max_position: int


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the low frequencies; lengths in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


Scaling = LinearScaling | DynamicScaling | Llama3Scaling
# rope_type → the fields beside rope_theta that it has.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_scaling(rope: dict[str, Any], max_position: int) -> Scaling | None:
    """The scaling that a `rope_parameters` or `rope_scaling` entry of a config.json asks for.

    Raises:
      UserError: an unknown rope_type, or a field it does not have.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    refuse({"rope_type": kind}, "rope_type", tuple(ROPE_TYPES))
    refuse(rope, "partial_rotary_factor", (1.0,))
    refuse_unknown(
        rope, {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_TYPES[kind]}, f"{kind} rope"
    )
    if kind == "default":
        return None
    factor = number(rope, "factor")
    if kind == "linear":
        return LinearScaling(factor)
    if kind == "dynamic":
        return DynamicScaling(factor, max_position)
    original = integer(rope, "original_max_position_embeddings", max_position)
    return Llama3Scaling(factor, number(rope, "low_freq_factor"), number(rope, "high_freq_factor"), original)


def rope_fields(theta: float, scaling: Scaling | None) -> dict[str, Any]:
    """The `rope_parameters` entry that `read_scaling` reads back."""
    fields: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    match scaling:
        case LinearScaling(factor):
            fields |= {"rope_type": "linear", "factor": factor}
        case DynamicScaling(factor, _):
            fields |= {"rope_type": "dynamic", "factor": factor}
        case Llama3Scaling():
            values = dataclasses.astuple(scaling)
            fields |= {"rope_type": "llama3"} | dict(zip(ROPE_TYPES["llama3"], values, strict=True))
    return fields


def rotary_frequencies(
    head_dim: int, theta: float, scaling: Scaling | None = None, lengths: Int[Array, "B"] | None = None
) -> Float[Array, "*B half"]:
    """Angular frequency of each rotary pair, radians per position: θ^(−2i/d), scaled.

    Only `DynamicScaling` looks at `lengths`, the tokens of each row, and only then is there an axis B:
    θ' = θ · (factor · max(length, max_position) / max_position − factor + 1)^(d / (d − 2)).
    """
    exponents = -jnp.arange(head_dim // 2, dtype=jnp.float32) / (head_dim // 2)
    if isinstance(scaling, DynamicScaling):
        longer = jnp.maximum(lengths, scaling.max_position) / scaling.max_position
        stretch = scaling.factor * longer - (scaling.factor - 1)
        return (theta * stretch ** (head_dim / (head_dim - 2)))[:, None] ** exponents
    frequencies = theta**exponents
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return frequencies * (smooth + (1 - smooth) / scaling.factor)


def rotary_angles(
    positions: Int[Array, "#B S"], frequencies: Float[Array, "*R half"]
) -> tuple[Float[Array, "#B S half"], Float[Array, "#B S half"]]:
    """Cosine and sine of every position's rotation, float32; `frequencies` of all rows together or of each."""
    angles = positions[..., None].astype(jnp.float32) * frequencies[..., None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B S N D"], cos: Float[Array, "#B S half"], sin: Float[Array, "#B S half"]):
    """Turns each (x_i, x_{i+D/2}) pair by its angle: the half-split order of Hugging Face checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
