"""The public function: checks its arguments and chooses an implementation."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unisd_jax.kernels.fused_linear_logprob.chunked import score_tokens_in_chunks
from unisd_jax.kernels.fused_linear_logprob.reference import LogprobScores, score_tokens


def fused_linear_logprob(
    hidden: Float[Array, "N H"],
    head: Float[Array, "V H"],
    targets: Int[Array, " N"],
    *,
    temperature: float = 1.0,
    chunk_size: int = 256,
    implementation: Literal["auto", "reference", "chunked"] = "auto",
) -> LogprobScores:
    """Log-probability of each target, and the entropy, under softmax(hidden @ head.T / temperature).

    For scoring only: inputs pass through `stop_gradient`, so every gradient of the result is zero.

    Args:
      hidden: hidden states, one row per token, in any floating dtype; products are summed in float32.
      head: output embeddings, one row per vocabulary entry.
      targets: token ids in [0, V). Any other id gets a NaN log-probability.
      temperature: divides the logits; positive and finite.
      chunk_size: tokens whose logits are held at once by "chunked": chunk_size * V * 4 bytes.
      implementation: "reference" holds [N, V] logits, "chunked" [chunk_size, V]; "auto" takes "chunked" where
        N is larger than `chunk_size` and "reference" otherwise.

    Returns:
      `LogprobScores(logp, entropy)`, each float32 [N], in nats. A logit of -inf is a token of probability
      zero: it adds nothing to the entropy.

    Raises:
      ValueError: shapes that do not fit together, targets that are not integers, a temperature or chunk size
        that is not positive, or an unknown implementation.
    """
    _check_arguments(hidden, head, targets, temperature, chunk_size)
    hidden, head = jax.lax.stop_gradient((hidden, head))
    match implementation:
        case "auto":
            use_chunks = targets.shape[0] > chunk_size
        case "reference" | "chunked":
            use_chunks = implementation == "chunked"
        case _:
            raise ValueError(f"implementation is {implementation!r}; expected 'auto', 'reference' or 'chunked'")
    if use_chunks:
        return score_tokens_in_chunks(hidden, head, targets, temperature, chunk_size)
    return score_tokens(hidden, head, targets, temperature)


def _check_arguments(hidden, head, targets, temperature, chunk_size) -> None:
    shapes = f"hidden {hidden.shape}, head {head.shape}, targets {targets.shape}"
    if (hidden.ndim, head.ndim, targets.ndim) != (2, 2, 1):
        raise ValueError(f"got {shapes}; expected hidden [N, H], head [V, H] and targets [N]")
    if hidden.shape[1] != head.shape[1]:
        raise ValueError(f"got {shapes}; the last axes of hidden and head must be equal")
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"got {shapes}; the first axes of hidden and targets must be equal")
    if head.shape[0] == 0:
        raise ValueError(f"got {shapes}; the head must have at least one row")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets have dtype {targets.dtype}; expected integers")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a positive finite number")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1")
