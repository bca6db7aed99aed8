"""The plain form: all logits at once, formulas as they are written, gradients by autodiff. Tests compare with it."""

import math

import jax
import jax.numpy as jnp

from unisd_jax.kernels.fused_linear_jsd.rows import LOG_ZERO, RowScores, Settings
from unisd_jax.kernels.fused_linear_jsd.types import Operands


def score_tokens(operands: Operands, settings: Settings) -> RowScores:
    """Scores of N tokens with their [N, V] logits in memory; whatever stands at masked tokens is not looked at."""
    hidden, teacher_hidden = (_counted(x, operands.mask) for x in (operands.student_hidden, operands.teacher_hidden))
    ls, student_logp = _log_probs(hidden, operands.student_head, operands.targets, settings)
    divergence = teacher_logp = capped = None
    if teacher_hidden is not None:
        taught = _log_probs(teacher_hidden, operands.teacher_head, operands.targets, settings)
        lt, teacher_logp = jax.lax.stop_gradient(taught)
        entries = _divergence_entries(ls, lt, settings.alpha)
        if settings.entry_ceiling is not None:
            above = entries > settings.entry_ceiling
            entries, capped = jnp.where(above, settings.entry_ceiling, entries), jnp.any(above, axis=-1)
        divergence = jnp.sum(entries, axis=-1)
    scores = RowScores(divergence, student_logp, teacher_logp, -jnp.sum(jnp.exp(ls) * ls, axis=-1), capped)
    return jax.tree.map(lambda x: _counted(x, operands.mask), scores)


def _divergence_entries(ls, lt, alpha: float):
    """The parts of KL(p_T ‖ p_S), KL(p_S ‖ p_T) or alpha·KL(p_T ‖ M) + (1−alpha)·KL(p_S ‖ M), M the mixture."""
    if alpha == 0:
        return jnp.exp(lt) * (lt - ls)
    if alpha == 1:
        return jnp.exp(ls) * (ls - lt)
    mixture = jnp.logaddexp(ls + math.log1p(-alpha), lt + math.log(alpha))
    return alpha * jnp.exp(lt) * (lt - mixture) + (1 - alpha) * jnp.exp(ls) * (ls - mixture)


def _log_probs(hidden, head, targets, settings: Settings):
    """Log-probs [N, V] with log 0 = LOG_ZERO, and the targets' own, NaN for an id that the vocabulary does not have."""
    # HIGHEST keeps GPU and TPU from rounding float32 inputs to TF32 or bfloat16 before they multiply them.
    logits = jnp.einsum(
        "nh,vh->nv", hidden, head, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    ).astype(jnp.float32)
    if settings.soft_cap is not None:
        logits = settings.soft_cap * jnp.tanh(logits / settings.soft_cap)
    vocab = head.shape[0] if settings.vocab_size is None else settings.vocab_size
    logits = jnp.where(jnp.arange(head.shape[0]) < vocab, logits / settings.temperature, -jnp.inf)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    valid = (targets >= 0) & (targets < vocab)
    found = jnp.take_along_axis(log_probs, jnp.where(valid, targets, 0)[:, None], axis=-1)[:, 0]
    return jnp.maximum(log_probs, LOG_ZERO), jnp.where(valid, found, jnp.nan)


def _counted(values, mask):
    if values is None or mask is None:
        return values
    return jnp.where(mask.reshape(-1, *[1] * (values.ndim - 1)), values, jnp.zeros((), values.dtype))
