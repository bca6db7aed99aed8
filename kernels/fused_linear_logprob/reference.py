"""The plain form: all logits at once. The other implementations are tested against it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LogprobScores(NamedTuple):
    """What softmax(hidden @ head.T / temperature) says per token, in nats and float32."""

    logp: Float[Array, " N"]
    entropy: Float[Array, " N"]


def score_tokens(
    hidden: Float[Array, "N H"],
    head: Float[Array, "V H"],
    targets: Int[Array, " N"],
    temperature: float | Float[Array, ""],
) -> LogprobScores:
    """Scores of N tokens with their [N, V] logits in memory.

    With z = hidden @ head.T / temperature and p = softmax(z): logp = z_target - logsumexp(z) and
    entropy = -sum_v p_v log p_v.
    A target outside [0, V) gets a NaN, so that a wrong id cannot pass for another token's score.
    """
    # HIGHEST keeps GPU and TPU from rounding float32 inputs to TF32 or bfloat16 before they multiply them.
    logits = jnp.einsum(
        "nh,vh->nv", hidden, head, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
    probs = jnp.exp(log_probs)
    # p log p -> 0 as p -> 0, but 0 * -inf is NaN.
    entropy = -jnp.sum(jnp.where(probs > 0, probs * log_probs, 0.0), axis=-1)
    valid = (targets >= 0) & (targets < head.shape[0])
    logp = jnp.take_along_axis(log_probs, jnp.where(valid, targets, 0)[:, None], axis=-1)[:, 0]
    return LogprobScores(logp=jnp.where(valid, logp, jnp.nan), entropy=entropy)
