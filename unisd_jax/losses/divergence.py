"""How far the student's next-token distribution is from the teacher's, token by token."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unisd_jax.kernels.fused_linear_jsd.clip import clip
from unisd_jax.losses.reduce import masked_quantile

# Stands in for log 0: finite, so that 0 · log 0 is 0 and no gradient is NaN, and far below any float32 log-prob.
LOG_ZERO = -1e9


def log_probs(logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """log softmax in float32, with log 0 = LOG_ZERO so that masked (−inf) vocabulary entries count as probability 0."""
    return jnp.maximum(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), LOG_ZERO)


def token_divergence(
    student_logits: Float[Array, "B T V"],
    teacher_logits: Float[Array, "B T V"],
    *,
    alpha: float,
    entry_ceiling: float | None = None,
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
      entry_ceiling: caps each vocabulary entry's part of the sum, as OPSD does; entries above it give no gradient, and
        the sum may turn negative. None: no cap.

    Returns:
      float32, unreduced, unmasked.

    Raises:
      ValueError: alpha outside [0, 1], a ceiling that is not positive, or shapes that differ.
    """
    _require_alpha(alpha)
    if entry_ceiling is not None and not entry_ceiling > 0:
        raise ValueError(f"entry_ceiling is {entry_ceiling}; expected a positive number of nats or None")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {student_logits.shape} and teacher logits {teacher_logits.shape} differ in shape"
        )
    student = log_probs(student_logits)
    teacher = jax.lax.stop_gradient(log_probs(teacher_logits))
    if alpha == 0.0:
        entries = _kl_entries(teacher, student)
    elif alpha == 1.0:
        entries = _kl_entries(student, teacher)
    else:
        mixture = jnp.logaddexp(student + math.log1p(-alpha), teacher + math.log(alpha))
        entries = alpha * _kl_entries(teacher, mixture) + (1 - alpha) * _kl_entries(student, mixture)
    if entry_ceiling is not None:
        entries = clip_at(entries, entry_ceiling)
    return jnp.sum(entries, axis=-1)


def largest_divergence(alpha: float) -> float:
    """The least upper bound of `token_divergence` in nats: H(alpha) = −alpha ln alpha − (1−alpha) ln(1−alpha) ≤ ln 2.

    Infinite for the two KL endpoints. A clip at or above it never acts.

    Raises:
      ValueError: alpha outside [0, 1].
    """
    _require_alpha(alpha)
    if alpha in (0.0, 1.0):
        return math.inf
    return -alpha * math.log(alpha) - (1 - alpha) * math.log1p(-alpha)


def clip_divergence(
    divergence: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    ceiling: float | None = None,
    quantile: float | None = None,
) -> Float[Array, "B T"]:
    """min(divergence, κ) per token, in nats.

    κ is `ceiling`, or the `quantile` of the masked tokens; with neither nothing is clipped. The gradient is 1 up to and
    including κ and 0 above it. A κ of at least `largest_divergence(alpha)` never acts; a run's configuration is checked
    for that, here alpha is not known. Source: UniSD Eq. 8; the quantile is the release's.

    Raises:
      ValueError: both are given, a ceiling that is not positive, or a quantile outside (0, 1].
    """
    if ceiling is not None and quantile is not None:
        raise ValueError(f"ceiling is {ceiling} and quantile is {quantile}; expected at most one of them")
    if ceiling is not None and not ceiling > 0:
        raise ValueError(f"ceiling is {ceiling}; expected a positive number of nats")
    if quantile is not None:
        ceiling = quantile_ceiling(divergence, mask, quantile)
    return clip_at(divergence, ceiling)


def clip_at(
    divergence: Float[Array, "*B"], ceiling: float | Float[Array, ""] | Float[Array, "*B"] | None
) -> Float[Array, "*B"]:
    """min(divergence, ceiling) with gradient 1 up to and including the ceiling and 0 above; None: unchanged."""
    return clip(divergence, ceiling)


def quantile_ceiling(divergence: Float[Array, "B T"], mask: Bool[Array, "B T"], quantile: float) -> Float[Array, ""]:
    """The clip's κ as a quantile of the masked tokens' divergence, at least 1e-6 nats; infinite if there are none.

    Raises:
      ValueError: a quantile outside (0, 1].
    """
    if not 0.0 < quantile <= 1.0:
        raise ValueError(f"quantile is {quantile}; expected a number in (0, 1]")
    found = masked_quantile(jax.lax.stop_gradient(divergence), mask, quantile)
    return jnp.where(jnp.any(mask), jnp.maximum(found, 1e-6), jnp.inf)


def entropy(logits: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """−Σ p log p in nats."""
    logp = log_probs(logits)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def token_log_probs(logits: Float[Array, "B T V"], ids: Array) -> Float[Array, "B T"]:
    """log p of the given token at each position, float32."""
    return jnp.take_along_axis(log_probs(logits), ids[..., None], axis=-1)[..., 0]


def _require_alpha(alpha: float) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; expected a number in [0, 1]")


def _kl_entries(p: Float[Array, "*B V"], q: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """The terms whose sum is KL(p ‖ q), from log-probs."""
    return jnp.exp(p) * (p - q)
