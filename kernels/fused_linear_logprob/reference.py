"""The plain form: all logits at once. The other implementations are tested against it."""

from typing import NamedTuple

import jax

from unisd_jax.kernels.fused_linear_jsd.reference import score_tokens as score_with_settings
from unisd_jax.kernels.fused_linear_jsd.rows import Settings
from unisd_jax.kernels.fused_linear_jsd.types import Operands


class LogprobScores(NamedTuple):
    """What softmax(hidden @ head.T / temperature) says per token, [N], in nats and float32; 0 where the mask is off."""

    logp: jax.Array
    entropy: jax.Array


def score_tokens(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    mask: jax.Array | None = None,
) -> LogprobScores:
    """Scores of N tokens with their [N, V] logits in memory.

    With z = hidden @ head.T / temperature and p = softmax(z): logp = z_target - logsumexp(z) and
    entropy = -sum_v p_v log p_v. A target outside [0, V) gets a NaN, so that a wrong id cannot pass for another token's
    score.
    """
    operands = Operands(hidden, head, None, None, targets, mask)
    scores = score_with_settings(operands, Settings(None, temperature, soft_cap, vocab_size))
    return LogprobScores(scores.student_logp, scores.student_entropy)
