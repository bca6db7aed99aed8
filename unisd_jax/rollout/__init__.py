"""Engines that sample completions, and the contract they share."""

from unisd_jax.rollout.jax_sampler import JaxSampler as JaxSampler
from unisd_jax.rollout.protocol import PendingRollout as PendingRollout
from unisd_jax.rollout.protocol import Rollout as Rollout
from unisd_jax.rollout.protocol import RolloutEngine as RolloutEngine
from unisd_jax.rollout.protocol import RolloutFailed as RolloutFailed
from unisd_jax.rollout.protocol import Sampling as Sampling
from unisd_jax.rollout.protocol import StaleWeights as StaleWeights
