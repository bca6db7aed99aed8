"""From hidden states to scores: the one place that runs the output matrix over many tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unisd_jax.kernels import (
    Layout,
    LogprobScores,
    TokenScores,
    fused_linear_jsd,
    fused_linear_jsd_jacobians,
    fused_linear_logprob,
)


class HeadOptions(NamedTuple):
    """How the fused kernels run: which implementation, tokens and vocabulary columns at a time, over which mesh.

    The names are those of `fused_linear_jsd`. They change memory and speed, and no number but for rounding;
    `vocab_size` says where the padding of a padded output matrix begins.
    """

    implementation: str = "auto"
    chunk_size: int | None = None
    vocab_block: int | None = None
    layout: Layout | None = None
    vocab_size: int | None = None


def sampled_token_scores(
    hidden: Float[Array, "*B H"],
    head: Float[Array, "V H"],
    ids: Int[Array, "*B"],
    mask: Bool[Array, "*B"] | None = None,
    *,
    temperature: float = 1.0,
    options: HeadOptions = HeadOptions(),  # noqa: B008 (immutable)
) -> LogprobScores:
    """Log-prob of each given token and the entropy at its place, without gradient; 0 where the mask is off."""
    hidden, head = jax.lax.stop_gradient((hidden, head))
    scores = fused_linear_logprob(
        _rows(hidden), head, ids.reshape(-1), temperature=temperature, mask=None if mask is None else mask.reshape(-1),
        **options._asdict(),
    )  # fmt: skip
    return jax.tree.map(lambda values: values.reshape(ids.shape), scores)


def divergence_scores(
    student_hidden: Float[Array, "*B H"],
    student_head: Float[Array, "V H"],
    teacher_hidden: Float[Array, "*B H"],
    teacher_head: Float[Array, "V H"],
    ids: Int[Array, "*B"],
    mask: Bool[Array, "*B"],
    *,
    alpha: float,
    temperature: float = 1.0,
    entry_ceiling: float | None = None,
    options: HeadOptions = HeadOptions(),  # noqa: B008 (immutable)
) -> TokenScores:
    """The divergence at each place and the given tokens' scores, without gradient; 0 where the mask is off."""
    states = jax.lax.stop_gradient((student_hidden, student_head, teacher_hidden, teacher_head))
    scores = fused_linear_jsd(
        _rows(states[0]), states[1], _rows(states[2]), states[3], ids.reshape(-1), alpha=alpha,
        temperature=temperature, entry_ceiling=entry_ceiling, mask=mask.reshape(-1), **options._asdict(),
    )  # fmt: skip
    return jax.tree.map(lambda values: values.reshape(ids.shape), scores)


def scores_with_jacobians(
    student_hidden: Float[Array, "*B H"],
    student_head: Float[Array, "V H"],
    teacher_hidden: Float[Array, "*B H"] | None,
    teacher_head: Float[Array, "V H"] | None,
    ids: Int[Array, "*B"],
    mask: Bool[Array, "*B"],
    beside: Any = None,
    *,
    options: HeadOptions,
    **arguments: Any,
) -> tuple[TokenScores, dict[str, Float[Array, "*B H"]], Float[Array, "V H"] | None]:
    """`fused_linear_jsd_jacobians` of arrays whose first axes are those of `ids`, in `beside` too."""
    scores, jacobians, head_gradient = fused_linear_jsd_jacobians(
        _rows(student_hidden), student_head, None if teacher_hidden is None else _rows(teacher_hidden), teacher_head,
        ids.reshape(-1), jax.tree.map(lambda x: x.reshape(-1), beside), mask=mask.reshape(-1), **arguments,
        **options._asdict(),
    )  # fmt: skip
    scores, jacobians = jax.tree.map(lambda x: x.reshape(*ids.shape, *x.shape[1:]), (scores, jacobians))
    return scores, jacobians, head_gradient


def head_logits(hidden: Float[Array, "*B H"], head: Float[Array, "V H"]) -> Float[Array, "*B V"]:
    """Next-token logits in float32: all of them, for a look at a few tokens."""
    return jnp.einsum("...h,vh->...v", hidden, head, preferred_element_type=jnp.float32)


def _rows(hidden: Float[Array, "*B H"]) -> Float[Array, "N H"]:
    return hidden.reshape(-1, hidden.shape[-1])
