"""The clip: a ceiling κ, given or a quantile of what is clipped, and what it lets through."""

import jax
import jax.numpy as jnp


def masked_quantile(values: jax.Array, mask: jax.Array | None, quantile: float) -> jax.Array:
    """Quantile of the values where `mask` holds, linear between order statistics; NaN if there are none.

    Between two equal values it is exactly that value, so that a clip at it does not clip them.
    """
    values = values.reshape(-1).astype(jnp.float32)
    if values.size == 0:
        return jnp.full((), jnp.nan)
    counted = values if mask is None else jnp.where(mask.reshape(-1), values, jnp.nan)
    ordered = jnp.sort(counted)  # NaN last
    number = jnp.sum(~jnp.isnan(counted))
    place = quantile * jnp.maximum(number - 1, 0).astype(jnp.float32)
    below = jnp.floor(place).astype(jnp.int32)
    low, high = ordered[below], ordered[jnp.minimum(below + 1, jnp.maximum(number - 1, 0))]
    return low + (place - below) * (high - low)


def find_ceiling(divergence: jax.Array, mask: jax.Array | None, ceiling: jax.Array | None, quantile: float | None):
    """κ as a number or one per token, without gradient; None without clip, infinite where there is nothing to clip."""
    if quantile is not None:
        ceiling = masked_quantile(divergence, mask, quantile)
        ceiling = jnp.where(jnp.isnan(ceiling), jnp.inf, ceiling)
    elif ceiling is not None and mask is not None:
        ceiling = jnp.where(mask, ceiling, jnp.inf)
    return None if ceiling is None else jax.lax.stop_gradient(ceiling)


def clip(divergence: jax.Array, ceiling: jax.Array | float | None) -> jax.Array:
    """min(D, κ) with gradient 1 up to and including κ, 0 above; a NaN stays one."""
    # jnp.minimum would halve the gradient at a tie, which a quantile that is one of the samples does produce.
    return divergence if ceiling is None else jnp.where(divergence > ceiling, ceiling, divergence)


def kept(divergence: jax.Array, ceiling: jax.Array | None, weights: jax.Array) -> jax.Array:
    """The weights of the tokens that are not clipped, 0 for the others."""
    return weights if ceiling is None else jnp.where(divergence > ceiling, 0.0, weights)
