"""How far the student's next-token distribution is from the teacher's, token by token."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Stands in for log 0: finite, so that 0 · log 0 is 0 and no gradient is NaN, and far below any float32 log-prob.
LOG_ZERO = -1e9


def log_probs(logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """log softmax in float32, with log 0 = LOG_ZERO so that masked (−inf) vocabulary entries count as probability 0."""
    return jnp.maximum(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), LOG_ZERO)


def token_divergence(
    student_logits: Float[Array, "B T V"], teacher_logits: Float[Array, "B T V"], *, alpha: float
) -> Float[Array, "B T"]:
    """Divergence between teacher and student over the whole vocabulary, in nats per token.

    With p_S, p_T the student's and the teacher's distributions:

    * alpha = 0: forward KL, KL(p_T ‖ p_S) = Σ p_T (log p_T − log p_S)
    * alpha = 1: reverse KL, KL(p_S ‖ p_T)
    * between: generalised JSD, alpha·KL(p_T ‖ M) + (1−alpha)·KL(p_S ‖ M) with M = (1−alpha)·p_S + alpha·p_T,
      which lies in [0, H(alpha)] with H the entropy of (alpha, 1−alpha). As alpha → 0 it tends to alpha·KL(p_T ‖ p_S),
      not to the forward KL itself.

    Gradients reach the student only. Source: UniSD Eq. 7 and the endpoints named beside it.

    Args:
      student_logits: any float dtype; computed in float32. −inf marks tokens that cannot be produced.
      teacher_logits: same shape.
      alpha: in [0, 1].

    Returns:
      float32, unreduced, unmasked.

    Raises:
      ValueError: alpha outside [0, 1], or shapes that differ.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; expected a number in [0, 1]")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {student_logits.shape} and teacher logits {teacher_logits.shape} differ in shape"
        )
    student = log_probs(student_logits)
    teacher = jax.lax.stop_gradient(log_probs(teacher_logits))
    if alpha == 0.0:
        return _kl(teacher, student)
    if alpha == 1.0:
        return _kl(student, teacher)
    mixture = jnp.logaddexp(student + math.log1p(-alpha), teacher + math.log(alpha))
    return alpha * _kl(teacher, mixture) + (1 - alpha) * _kl(student, mixture)


def entropy(logits: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """−Σ p log p in nats."""
    logp = log_probs(logits)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def token_log_probs(logits: Float[Array, "B T V"], ids: Array) -> Float[Array, "B T"]:
    """log p of the given token at each position, float32."""
    return jnp.take_along_axis(log_probs(logits), ids[..., None], axis=-1)[..., 0]


def _kl(p: Float[Array, "*B V"], q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """KL(p ‖ q) from log-probs."""
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
