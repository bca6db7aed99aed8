"""The public functions: they check their arguments and hand them on."""

import math
from collections.abc import Callable
from typing import Any, Literal, Required, TypedDict, Unpack, get_args

import jax
import jax.numpy as jnp

from unisd_jax.kernels.fused_linear_jsd import gradients, reference
from unisd_jax.kernels.fused_linear_jsd.clip import clip, find_ceiling
from unisd_jax.kernels.fused_linear_jsd.dispatch import Options, score
from unisd_jax.kernels.fused_linear_jsd.rows import RowScores, Settings
from unisd_jax.kernels.fused_linear_jsd.types import Layout, Operands, TokenScores

Implementation = Literal["auto", "chunked", "pallas_gpu", "pallas_triton", "pallas_tpu", "reference"]
IMPLEMENTATIONS = get_args(Implementation)


class JsdOptions(TypedDict, total=False):
    """The options of `fused_linear_jsd`, where they are described; `alpha` must be given."""

    alpha: Required[float]
    temperature: float
    mask: jax.Array | None
    ceiling: float | jax.Array | None
    quantile: float | None
    entry_ceiling: float | None
    soft_cap: float | None
    vocab_size: int | None
    chunk_size: int | None
    vocab_block: int | None
    layout: Layout | None
    implementation: Implementation
    interpret: bool


def fused_linear_jsd(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array | None,
    targets: jax.Array,
    *,
    alpha: float,
    temperature: float = 1.0,
    mask: jax.Array | None = None,
    ceiling: float | jax.Array | None = None,
    quantile: float | None = None,
    entry_ceiling: float | None = None,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    vocab_block: int | None = None,
    layout: Layout | None = None,
    implementation: Implementation = "auto",
    interpret: bool = False,
) -> TokenScores:
    """Divergence between teacher and student per token, straight from hidden states: [N, V] is never held.

    With p = softmax(student_hidden @ student_head.T / temperature) and q the teacher's, in nats:

    * alpha = 0: forward KL, KL(q ‖ p)
    * alpha = 1: reverse KL, KL(p ‖ q)
    * between: alpha·KL(q ‖ m) + (1−alpha)·KL(p ‖ m) with m = (1−alpha)·p + alpha·q, at most ln 2

    Gradients are exact and reach student_hidden and student_head, nothing else. Where the loss is a weighted sum of
    clipped divergences and the head is trained, `fused_linear_jsd_loss` needs four products instead of six.

    Args:
      student_hidden: [N, H], in any floating dtype; products are summed in float32.
      student_head: [V, H] output embeddings. Not differentiated (LoRA, `stop_gradient`): its gradient is not computed.
      teacher_hidden: [N, H'].
      teacher_head: [V, H']; None: the student's.
      targets: [N] sampled token ids. One outside the vocabulary gets NaN log-probs.
      alpha: in [0, 1].
      temperature: divides the logits of both; positive.
      mask: [N] bool; tokens where it is False cost no work, whatever stands there. None: all count.
      ceiling: the clip's κ in nats, a number or one per token.
      quantile: or the quantile, in (0, 1], of the divergence of all tokens that count (over all devices).
      entry_ceiling: caps every vocabulary entry's part of the divergence; those above it give no gradient.
      soft_cap: logits become soft_cap · tanh(logits / soft_cap), as Gemma 2 does at the end.
      vocab_size: columns from here on are padding and have probability 0.
      chunk_size: tokens whose logits are held at once. None: an eighth of the tokens, 256 to 1024.
      vocab_block: low-memory mode: at most so many columns of the vocabulary at a time, for more products.
      layout: how tokens and vocabulary are divided over a mesh; None: one device, or left to the compiler.
      implementation: "chunked" (what "auto" takes) runs everywhere; "pallas_gpu" (Hopper and newer), "pallas_triton"
        and "pallas_tpu" replace its row pass; "reference" holds all logits and is differentiated by JAX.
      interpret: run a Pallas kernel in interpret mode, on any machine.

    Returns:
      `TokenScores`. Tokens above the ceiling have a clipped value without gradient, those at it keep theirs.

    Raises:
      ValueError: shapes that do not fit together, a setting out of its range, an implementation that lacks something.
    """
    options, operands, ceiling = _prepare(
        student_hidden, student_head, teacher_hidden, teacher_head, targets, alpha=alpha, temperature=temperature,
        mask=mask, ceiling=ceiling, quantile=quantile, entry_ceiling=entry_ceiling, soft_cap=soft_cap,
        vocab_size=vocab_size, chunk_size=chunk_size, vocab_block=vocab_block, layout=layout,
        implementation=implementation, interpret=interpret,
    )  # fmt: skip
    if implementation == "reference":
        scores = reference.score_tokens(operands, options.settings)
    else:
        scores = gradients.score_tokens(options, operands)
    ceiling = find_ceiling(scores.divergence, mask, ceiling, quantile)
    return _token_scores(scores, ceiling, mask)


def fused_linear_jsd_loss(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
    **options: Unpack[JsdOptions],
) -> tuple[jax.Array, TokenScores]:
    """(Σ_t weights_t · min(D_t, κ), scores): the gradient is formed with the value, in the fewest products there are.

    Four [N, V]-sized products with a trained head, three with a frozen one; a quantile clip adds those of the tokens
    that it clips. `weights` [N] carry the denominator: 1/N for a mean; they count where the mask is on and are
    differentiated. The scores are for measuring: no gradient flows through them. The options, the clip's rules and what
    is raised are those of `fused_linear_jsd`. The head's gradient is summed in a float32 array of its shape; where that
    is too much, sum the per-token function or set `vocab_block`.
    """
    prepared, operands, ceiling = _prepare(
        student_hidden, student_head, teacher_hidden, teacher_head, targets, **options
    )
    mask, quantile = options.get("mask"), options.get("quantile")
    weights = _masked_weights(weights, targets, mask)
    if prepared.implementation == "reference":
        scores = reference.score_tokens(operands, prepared.settings)
        ceiling = find_ceiling(scores.divergence, mask, ceiling, quantile)
        loss = jnp.sum(weights * clip(scores.divergence, ceiling))
    else:
        loss, scores, ceiling = gradients.weighted_divergence(prepared, quantile, operands, weights, ceiling)
    return loss, jax.lax.stop_gradient(_token_scores(scores, ceiling, mask))


def fused_linear_jsd_value_and_grad(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
    *,
    head_gradient: bool = True,
    **options: Unpack[JsdOptions],
) -> tuple[tuple[jax.Array, TokenScores], tuple[jax.Array, jax.Array | None]]:
    """`fused_linear_jsd_loss` with its gradients [N, H] and [V, H] in float32, whatever the dtype of the inputs.

    For trainers that add up gradients themselves: the head's gradient is the one float32 array it was summed in.
    `head_gradient` False: it is not computed and None is returned in its place.
    """
    prepared, operands, ceiling = _prepare(
        student_hidden, student_head, teacher_hidden, teacher_head, targets, **options
    )
    if prepared.implementation == "reference":
        raise ValueError("implementation is 'reference', which JAX differentiates; use fused_linear_jsd_loss with it")
    mask, quantile = options.get("mask"), options.get("quantile")
    (loss, scores, ceiling), _, *found = gradients.weighted_gradients(
        prepared, quantile, operands, _masked_weights(weights, targets, mask), ceiling, hidden=True, head=head_gradient
    )
    return (loss, _token_scores(scores, ceiling, mask)), tuple(found)


def fused_linear_jsd_jacobians(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array | None,
    teacher_head: jax.Array | None,
    targets: jax.Array,
    beside: Any = None,
    *,
    jacobians: tuple[str, ...] = ("divergence",),
    weighed: tuple[str, ...] = (),
    weigh: Callable[[RowScores, Any], dict[str, jax.Array]] | None = None,
    **options: Unpack[JsdOptions],
) -> tuple[TokenScores, dict[str, jax.Array], jax.Array | None]:
    """(scores, {score: ∂score_t/∂student_hidden_t as [N, H]}, Σ_k Σ_t c_kt ∂score_kt/∂student_head), float32.

    For losses of several terms: every term's gradient at the hidden states is a combination of the jacobians, and no
    term needs products of its own.

    Args:
      student_hidden: and the arrays after it: as in `fused_linear_jsd`. teacher_hidden None: there is no teacher, and
        no divergence.
      student_head: see there.
      teacher_hidden: see there.
      teacher_head: see there.
      targets: see there.
      beside: a tree of arrays [N, …] whose rows `weigh` is given.
      jacobians: which, of "divergence", "student_logp", "student_entropy"; one product each.
      weighed: scores for whose weighted sum the head's gradient is wanted.
      weigh: (scores of n tokens, their rows of `beside`) → c [n] by score, for those in `weighed`; it runs once per
        chunk and may use nothing but its arguments and constants.
      **options: those of `fused_linear_jsd`; a clip only fills the scores' fields.
    """
    if teacher_hidden is None:
        options = options | {"alpha": None}
    prepared, operands, ceiling = _prepare(
        student_hidden, student_head, teacher_hidden, teacher_head, targets, **options
    )
    if prepared.implementation == "reference":
        raise ValueError("implementation is 'reference', which JAX differentiates; expected another one here")
    mask = options.get("mask")
    result = score(prepared, operands, beside, jacobians=jacobians, weighed=weighed, weigh=weigh)
    if teacher_hidden is not None:
        ceiling = find_ceiling(result.scores.divergence, mask, ceiling, options.get("quantile"))
    return _token_scores(result.scores, ceiling, mask), result.jacobians, result.head_gradient


def _masked_weights(weights, targets, mask) -> jax.Array:
    if weights.shape != targets.shape:
        raise ValueError(f"weights have shape {weights.shape}, targets {targets.shape}; expected one weight per token")
    weights = weights.astype(jnp.float32)
    return weights if mask is None else jnp.where(mask, weights, 0.0)


def _token_scores(scores: RowScores, ceiling, mask) -> TokenScores:
    if scores.divergence is None:
        return TokenScores(None, scores.student_logp, None, scores.student_entropy, None, None)
    clipped = jnp.zeros(scores.divergence.shape, bool) if ceiling is None else scores.divergence > ceiling
    if mask is not None:
        clipped &= mask
    values = clip(scores.divergence, ceiling)
    return TokenScores(
        scores.divergence, scores.student_logp, scores.teacher_logp, scores.student_entropy, values, clipped,
        scores.entry_capped,
    )  # fmt: skip


def check_scaling(temperature: float, soft_cap: float | None) -> None:
    """Raises a ValueError unless both are positive and finite."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a positive finite number")
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise ValueError(f"soft_cap is {soft_cap}; expected a positive finite number or None")


def _prepare(
    student_hidden, student_head, teacher_hidden, teacher_head, targets, *, alpha, temperature=1.0, mask=None,
    ceiling=None, quantile=None, entry_ceiling=None, soft_cap=None, vocab_size=None, chunk_size=None, vocab_block=None,
    layout=None, implementation="auto", interpret=False,
) -> tuple[Options, Operands, jax.Array | None]:  # fmt: skip
    """Checked options, operands without gradient where none may flow, and the ceiling as one number per token."""
    hidden, heads = {"student_hidden": student_hidden}, {"student_head": student_head}
    if teacher_hidden is not None:
        teacher_head = student_head if teacher_head is None else teacher_head
        hidden, heads = hidden | {"teacher_hidden": teacher_hidden}, heads | {"teacher_head": teacher_head}
    check_arrays(hidden, heads, targets, mask)
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected a number in [0, 1]")
    if entry_ceiling is not None and not entry_ceiling > 0:
        raise ValueError(f"entry_ceiling is {entry_ceiling}; expected a positive number of nats or None")
    check_scaling(temperature, soft_cap)
    check_options(implementation, chunk_size, vocab_block, vocab_size, student_head.shape[0], layout)
    if ceiling is not None and quantile is not None:
        raise ValueError(f"ceiling is {ceiling} and quantile is {quantile}; expected at most one of them")
    if isinstance(ceiling, (int, float)) and not ceiling > 0:
        raise ValueError(f"ceiling is {ceiling}; expected a positive number of nats")
    if quantile is not None and not 0 < quantile <= 1:
        raise ValueError(f"quantile is {quantile}; expected a number in (0, 1]")
    if ceiling is not None:
        ceiling = jnp.asarray(ceiling, jnp.float32)
        if ceiling.shape not in ((), targets.shape):
            raise ValueError(
                f"ceiling has shape {ceiling.shape}; expected one number, or one per token {targets.shape}"
            )
        ceiling = jnp.broadcast_to(ceiling, targets.shape)
    operands = Operands(
        student_hidden, student_head, *jax.lax.stop_gradient((teacher_hidden, teacher_head)), targets, mask
    )
    settings = Settings(
        None if alpha is None else float(alpha), float(temperature), soft_cap, vocab_size, entry_ceiling
    )
    return Options(settings, implementation, chunk_size, vocab_block, layout, interpret), operands, ceiling


def check_arrays(hidden: dict, heads: dict, targets, mask) -> None:
    """Raises a ValueError that names the arrays whose shapes or dtypes do not fit together."""
    arrays = hidden | heads | {"targets": targets} | ({} if mask is None else {"mask": mask})
    shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items())
    if any(array.ndim != 2 for array in (*hidden.values(), *heads.values())) or targets.ndim != 1:
        raise ValueError(f"got {shapes}; expected hidden states [N, H], heads [V, H] and targets [N]")
    for (name, states), (head_name, head) in zip(hidden.items(), heads.items(), strict=True):
        if states.shape[1] != head.shape[1]:
            raise ValueError(f"got {shapes}; the last axes of {name} and {head_name} must be equal")
        if states.shape[0] != targets.shape[0]:
            raise ValueError(f"got {shapes}; the first axes of {name} and targets must be equal")
    if len({head.shape[0] for head in heads.values()}) > 1:
        raise ValueError(f"got {shapes}; both heads must have the same vocabulary")
    if next(iter(heads.values())).shape[0] == 0:
        raise ValueError(f"got {shapes}; the head must have at least one row")
    for name, array in (hidden | heads).items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {array.dtype}; expected a floating one")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets have dtype {targets.dtype}; expected integers")
    if mask is not None and (mask.shape != targets.shape or mask.dtype != bool):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; expected bool {tuple(targets.shape)}, like targets"
        )


def check_options(implementation, chunk_size, vocab_block, vocab_size, vocab: int, layout: Layout | None) -> None:
    """Raises a ValueError for an unknown implementation, a size out of range, or axes that the mesh does not have."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    if implementation.startswith("pallas") and (vocab_block is not None or (layout is not None and layout.vocab)):
        raise ValueError(
            f"implementation is {implementation!r}, which scores whole rows of the vocabulary; it needs vocab_block "
            "None and a layout that does not divide the vocabulary"
        )
    for name, size in {"chunk_size": chunk_size, "vocab_block": vocab_block}.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; expected at least 1")
    if vocab_size is not None and not 1 <= vocab_size <= vocab:
        raise ValueError(f"vocab_size is {vocab_size}; expected 1 to {vocab}, the rows of the head")
    if layout is not None and (unknown := set(layout.tokens + layout.vocab) - set(layout.mesh.axis_names)):
        raise ValueError(f"layout names axes {sorted(unknown)}; the mesh has {list(layout.mesh.axis_names)}")
