"""Which tokens count, and how much, by what the student and the sampler say of them; no gradient passes through."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unisd_jax.losses.reduce import masked_quantile


def entropy_mask(entropy: Float[Array, "B T"], mask: Bool[Array, "B T"], *, top: float) -> Bool[Array, "B T"]:
    """The share `top` of the masked tokens with the highest student entropy (nats): entropy ≥ its (1 − top) quantile.

    Source: the release's `top_entropy_quantile`.

    Raises:
      ValueError: `top` outside (0, 1].
    """
    if not 0.0 < top <= 1.0:
        raise ValueError(f"top is {top}; expected a share in (0, 1]")
    entropy = jax.lax.stop_gradient(entropy)
    return mask & (entropy >= masked_quantile(entropy, mask, 1.0 - top))


def importance_weights(
    student_logps: Float[Array, "B T"],
    sampler_logps: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    cap: float = 2.0,
    level: Literal["token", "sequence"] = "sequence",
) -> Float[Array, "B T"]:
    """Truncated importance weights of the sampled tokens, student over sampler; 1 at masked-out tokens.

    ρ = min(exp(ℓ_S − ℓ_sampler), cap) per token. "sequence" replaces it by the arithmetic mean of ρ over the
    completion's masked tokens, as the release does. Source: the release's truncated importance sampling (off there by
    default).

    Args:
      student_logps: log-probs of the tokens under the weights that are trained, at the sampling temperature.
      sampler_logps: log-probs under the weights that sampled.
      mask: the tokens of the loss.
      cap: the largest ratio.
      level: one weight per token or per completion.

    Raises:
      ValueError: a cap that is not positive, or an unknown level.
    """
    if not cap > 0:
        raise ValueError(f"cap is {cap}; expected a positive number")
    # Truncated before exp: a token the sampler could not have drawn would overflow.
    difference = jnp.where(mask, student_logps - sampler_logps, 0.0).astype(jnp.float32)
    ratios = jnp.exp(jnp.minimum(difference, jnp.log(jnp.float32(cap))))
    if level == "sequence":
        means = jnp.sum(jnp.where(mask, ratios, 0.0), axis=1, keepdims=True)
        ratios = jnp.broadcast_to(means / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1), mask.shape)
    elif level != "token":
        raise ValueError(f"level is {level!r}; expected token or sequence")
    return jax.lax.stop_gradient(jnp.where(mask, ratios, 1.0))
