"""Divergences, log-probs and entropies, with their gradients, straight from hidden states and head weights."""

from unisd_jax.kernels.fused_linear_jsd.api import (
    fused_linear_jsd,
    fused_linear_jsd_jacobians,
    fused_linear_jsd_loss,
    fused_linear_jsd_value_and_grad,
)
from unisd_jax.kernels.fused_linear_jsd.types import Layout, TokenScores

__all__ = [
    "Layout",
    "TokenScores",
    "fused_linear_jsd",
    "fused_linear_jsd_jacobians",
    "fused_linear_jsd_loss",
    "fused_linear_jsd_value_and_grad",
]
