"""The two ways to be differentiated: per token, or as one weighted sum whose gradient is formed with its value."""

import functools

import jax
import jax.numpy as jnp

from unisd_jax.kernels.fused_linear_jsd.clip import clip, find_ceiling, kept
from unisd_jax.kernels.fused_linear_jsd.dispatch import Options, gradients, log_probs_on_chip, score
from unisd_jax.kernels.fused_linear_jsd.rows import RowScores
from unisd_jax.kernels.fused_linear_jsd.types import Operands

DIFFERENTIABLE = ("divergence", "student_logp", "student_entropy")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def score_tokens(options: Options, operands: Operands) -> RowScores:
    """Scores per token, each of which may be differentiated.

    With a frozen head the first score's jacobian is formed with the scores, and its gradient then costs no product
    more. With a head that is trained, or for the other scores, the logits are formed again, block by block.
    """
    if options.settings.alpha is None and options.implementation == "pallas_gpu":
        return log_probs_on_chip(options, operands)
    return score(options, operands).scores._replace(statistics=None)


def _score_forward(options: Options, operands: Operands):
    hidden, head = operands.student_hidden.perturbed, operands.student_head.perturbed
    operands = _values(operands)
    first = "student_logp" if options.settings.alpha is None else "divergence"
    result = score(options, operands, jacobians=(first,) if hidden and not head else ())
    # Residuals are arrays; what is static is said by the structure.
    trained = () if head else None
    return result.scores._replace(statistics=None), (operands, result.scores, result.jacobians, trained)


def _score_backward(options: Options, residuals, cotangents: RowScores):
    operands, scores, jacobians, trained = residuals
    weights = {name: getattr(cotangents, name) for name in DIFFERENTIABLE}
    weights = {
        name: c if operands.mask is None else jnp.where(operands.mask, c, 0.0)
        for name, c in weights.items()
        if not isinstance(c, (jax.custom_derivatives.SymbolicZero, type(None)))
    }
    total = jnp.zeros(operands.student_hidden.shape, jnp.float32)
    for name in weights.keys() & jacobians.keys():
        total += weights.pop(name)[:, None] * jacobians[name]
    head = None
    if weights:
        again, head = gradients(options, operands, scores, weights, head_gradient=trained is not None)
        total += again
    return (Operands(total.astype(operands.student_hidden.dtype), head, None, None, None, None),)


score_tokens.defvjp(_score_forward, _score_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weighted_divergence(options: Options, quantile: float | None, operands: Operands, weights, ceiling):
    """(Σ_t w_t min(D_t, κ), scores, κ) with κ the `ceiling` [N], or the `quantile` of all tokens that count."""
    scores = score(options, operands).scores._replace(statistics=None)
    ceiling = find_ceiling(scores.divergence, operands.mask, ceiling, quantile)
    return jnp.sum(weights * clip(scores.divergence, ceiling)), scores, ceiling


def weighted_gradients(
    options: Options,
    quantile: float | None,
    operands: Operands,
    weights,
    ceiling,
    *,
    hidden: bool,
    head: bool,
    head_dtype=jnp.float32,
):
    """(what `weighted_divergence` gives, clipped values, its gradients to hidden states and head), float32.

    A gradient that is not asked for is None. The low-memory mode obeys `head_dtype`: it needs no float32 array to sum
    in.
    """
    if options.vocab_block is not None:
        wanted = {"hidden": hidden, "head": head, "head_dtype": head_dtype}
        return _weighted_gradients_in_blocks(options, quantile, operands, weights, ceiling, **wanted)
    limits = () if quantile is not None or ceiling is None else (ceiling,)
    wanted = ("divergence",)

    def weigh(scores, rows):
        return {"divergence": kept(scores.divergence, rows[1] if limits else None, rows[0])}

    result = score(
        options, operands, (weights, *limits), jacobians=wanted if hidden else (), weighed=wanted if head else (),
        weigh=weigh,
    )  # fmt: skip
    divergence, head_gradient = result.scores.divergence, result.head_gradient
    ceiling = find_ceiling(divergence, operands.mask, ceiling, quantile)
    if head and quantile is not None:
        # The gradient is linear in the weights, so what the clipped tokens put in is taken out again.
        above = divergence > ceiling
        clipped = operands._replace(mask=above if operands.mask is None else above & operands.mask)
        again = score(options, clipped, (weights,), weighed=wanted, weigh=lambda _, rows: {"divergence": rows[0]})
        head_gradient -= again.head_gradient
    hidden_gradient = None
    if hidden:
        hidden_gradient = kept(divergence, ceiling, weights)[:, None] * result.jacobians["divergence"]
    values = clip(divergence, ceiling)
    outputs = jnp.sum(weights * values), result.scores._replace(statistics=None), ceiling
    return outputs, values, hidden_gradient, head_gradient


def _weighted_gradients_in_blocks(
    options: Options, quantile, operands: Operands, weights, ceiling, *, hidden: bool, head: bool, head_dtype
):
    """`weighted_gradients` of the low-memory mode, where the logits are formed again anyway and κ is known by then."""
    scores = score(options, operands).scores
    ceiling = find_ceiling(scores.divergence, operands.mask, ceiling, quantile)
    found = (None, None)
    if hidden or head:
        passed = {"divergence": kept(scores.divergence, ceiling, weights)}
        found = gradients(options, operands, scores, passed, head_gradient=head, head_dtype=head_dtype)
    values = clip(scores.divergence, ceiling)
    outputs = jnp.sum(weights * values), scores._replace(statistics=None), ceiling
    return outputs, values, found[0] if hidden else None, found[1]


def _weighted_forward(options: Options, quantile, operands: Operands, weights, ceiling):
    trained = {"hidden": operands.student_hidden.perturbed, "head": operands.student_head.perturbed}
    operands, weights, ceiling = _values((operands, weights, ceiling))
    # A scaled loss keeps float16 gradients from vanishing; its factor comes with the cotangent, after this.
    dtype = jnp.float32 if operands.student_head.dtype == jnp.float16 else operands.student_head.dtype
    outputs, values, hidden, head = weighted_gradients(
        options, quantile, operands, weights, ceiling, **trained, head_dtype=dtype
    )
    like = jnp.zeros((), operands.student_hidden.dtype), jnp.zeros((), operands.student_head.dtype)
    return outputs, (hidden, head, values, like)


def _weighted_backward(options: Options, quantile, residuals, cotangents):
    hidden, head, values, like = residuals
    c = cotangents[0]
    if isinstance(c, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    hidden = None if hidden is None else (c * hidden).astype(like[0].dtype)
    head = None if head is None else (c * head.astype(jnp.float32)).astype(like[1].dtype)
    return Operands(hidden, head, None, None, None, None), c * values, None


weighted_divergence.defvjp(_weighted_forward, _weighted_backward, symbolic_zeros=True)


def _values(arguments):
    """The arrays of what a forward rule is given with `symbolic_zeros`."""
    return jax.tree.map(lambda x: x.value, arguments, is_leaf=lambda x: hasattr(x, "perturbed"))
