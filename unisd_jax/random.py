"""All randomness, as a function of (seed, step, purpose): resuming needs no stored key."""

import jax
from jaxtyping import PRNGKeyArray

# The order is part of every run's numbers: new purposes go to the end.
PURPOSES = ("adapter_init", "rollout", "evaluation", "dropout", "own_answers", "reserved", "induction", "negatives")


def purpose_key(seed: int, step: int, purpose: str) -> PRNGKeyArray:
    """The key of one purpose at one step.

    Raises:
      ValueError: a purpose that is not listed in PURPOSES.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), PURPOSES.index(purpose))
