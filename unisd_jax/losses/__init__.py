"""Losses: arrays and plain numbers in, unreduced arrays out; reduction is a step of its own."""

from unisd_jax.losses.divergence import entropy as entropy
from unisd_jax.losses.divergence import log_probs as log_probs
from unisd_jax.losses.divergence import token_divergence as token_divergence
from unisd_jax.losses.divergence import token_log_probs as token_log_probs
from unisd_jax.losses.objective import Objective as Objective
from unisd_jax.losses.objective import TokenScores as TokenScores
from unisd_jax.losses.objective import objective as objective
from unisd_jax.losses.reduce import reduce_tokens as reduce_tokens
from unisd_jax.losses.reduce import reduction_weights as reduction_weights
from unisd_jax.losses.reduce import weighted_sum as weighted_sum
