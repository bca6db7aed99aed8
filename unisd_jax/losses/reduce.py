"""From a value per token to one number, with the denominator spelled out."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unisd_jax.kernels.fused_linear_jsd.clip import masked_quantile as quantile_of_tokens

Normalize = Literal["batch", "sequence", "upstream"]


def reduction_weights(
    mask: Bool[Array, "B T"], weights: Float[Array, "B T"] | None = None, *, normalize: Normalize
) -> Float[Array, "B T"]:
    """The factor c[b, t] with which each token's value enters the reduced number, Σ c·value; 0 where masked.

    With μ the mask and w the weights (1 if None):

    * batch: c = μ w / Σ_bt μ w, the mean over all tokens of the batch (UniSD Eq. 9)
    * sequence: c = μ w / (R · Σ_t μ), each row's mean over its tokens, then the mean over the R rows that have any
    * upstream: c = μ w / (B · max(Σ_t μ w, 1)), as the released code does: empty rows count, row weights cancel

    Computed once for the whole batch, so that splitting it into micro-batches or devices changes nothing.

    Raises:
      ValueError: an unknown `normalize`.
    """
    weighted = mask.astype(jnp.float32) * (1.0 if weights is None else weights.astype(jnp.float32))
    if normalize == "batch":
        return weighted / _nonzero(jnp.sum(weighted))
    if normalize == "sequence":
        tokens = jnp.sum(mask, axis=1, keepdims=True).astype(jnp.float32)
        return weighted / (jnp.maximum(tokens, 1.0) * jnp.maximum(jnp.sum(tokens > 0), 1))
    if normalize == "upstream":
        return weighted / (mask.shape[0] * jnp.maximum(jnp.sum(weighted, axis=1, keepdims=True), 1.0))
    raise ValueError(f"normalize is {normalize!r}; expected batch, sequence or upstream")


def reduce_tokens(
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    weights: Float[Array, "B T"] | None = None,
    *,
    normalize: Normalize = "batch",
) -> Float[Array, ""]:
    """Σ c·values with c from `reduction_weights`. Values at masked positions are ignored, NaN included."""
    return weighted_sum(values, mask, reduction_weights(mask, weights, normalize=normalize))


def weighted_sum(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], coefficients: Float[Array, "B T"]
) -> Float[Array, ""]:
    """Σ coefficients·values over the tokens where `mask` holds; what stands elsewhere is never looked at."""
    return jnp.sum(jnp.where(mask, values, 0.0) * jax.lax.stop_gradient(coefficients))


def masked_mean(values: Float[Array, "B T"] | Bool[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean over the tokens where `mask` holds, or the share of True among them; 0 if there are none."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def masked_quantile(values: Float[Array, "B T"], mask: Bool[Array, "B T"], quantile: float) -> Float[Array, ""]:
    """Quantile over the tokens where `mask` holds, linear between order statistics; NaN if there are none."""
    return quantile_of_tokens(values, mask, quantile)


def _nonzero(total: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(total > 0, total, 1.0)
