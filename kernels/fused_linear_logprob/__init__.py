"""Log-probabilities and entropies straight from hidden states and head weights."""

from unisd_jax.kernels.fused_linear_logprob.api import LogprobScores, fused_linear_logprob

__all__ = ["LogprobScores", "fused_linear_logprob"]
