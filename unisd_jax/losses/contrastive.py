"""The token-level contrast: nearer to the teacher that saw a right solution than to the one that saw a wrong one."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unisd_jax.losses.divergence import LOG_ZERO


def contrastive_hinge(
    student_logps: Float[Array, "B T"],
    positive_logps: Float[Array, "B T"],
    negative_logps: Float[Array, "B T"],
    *,
    margin: float,
) -> Float[Array, "B T"]:
    """max(0, margin + |ℓ_S − ℓ₊| − |ℓ_S − ℓ₋|) per token, in nats, from log-probs of the sampled tokens.

    Gradients reach the student only; they are 0 where the hinge or one of the distances is exactly 0. The hinge lies
    between 0 and margin + |ℓ₊ − ℓ₋|. Source: UniSD Eqs. 4 and 5, where the margin is called γ.

    Args:
      student_logps: ℓ_S, under the question alone.
      positive_logps: ℓ₊, under the question and the right solution.
      negative_logps: ℓ₋, under the question and a wrong solution.
      margin: nats, 0 or more.

    Raises:
      ValueError: a negative margin.
    """
    if not margin >= 0:
        raise ValueError(f"margin is {margin}; expected 0 or more")
    hinge = margin + token_distance(student_logps, positive_logps) - token_distance(student_logps, negative_logps)
    return jnp.where(hinge > 0, hinge, 0.0)


def token_distance(student_logps: Float[Array, "B T"], teacher_logps: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """|ℓ_S − ℓ_T| per token, in nats; gradient to the student, 0 where they are equal."""
    # A token that a view rules out has log-prob −inf, and the difference of two of them would be NaN.
    student, teacher = (jnp.maximum(logps.astype(jnp.float32), LOG_ZERO) for logps in (student_logps, teacher_logps))
    difference = student - jax.lax.stop_gradient(teacher)
    # At 0 the gradient of jnp.abs is 1.
    return jnp.where(difference == 0, 0.0, jnp.abs(difference))
