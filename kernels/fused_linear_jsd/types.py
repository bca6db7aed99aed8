"""What goes in and what comes out."""

import dataclasses
from typing import NamedTuple

import jax

from unisd_jax.kernels.fused_linear_jsd.rows import RowScores


class TokenScores(NamedTuple):
    """One number per token, [N], in nats and float32 (the flags are bool); 0 or False where the mask is off.

    `clipped_divergence` is min(divergence, κ), `clipped` says where κ acted; without a clip they are `divergence` and
    False. `entry_capped` says where the entry ceiling acted and is None without one. Without a teacher, what needs one
    is None. Gradients flow through `divergence`, `clipped_divergence`, `student_logp` and `student_entropy`, to the
    student's hidden states and head; nothing flows to the teacher.
    """

    divergence: jax.Array | None
    student_logp: jax.Array
    teacher_logp: jax.Array | None
    student_entropy: jax.Array
    clipped_divergence: jax.Array | None
    clipped: jax.Array | None
    entry_capped: jax.Array | None = None


class Operands(NamedTuple):
    """The arrays of a call: hidden states [N, H], heads [V, H], ids and mask [N]; None for what there is not."""

    student_hidden: jax.Array
    student_head: jax.Array
    teacher_hidden: jax.Array | None
    teacher_head: jax.Array | None
    targets: jax.Array
    mask: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """Over which axes of `mesh` the tokens and the vocabulary are divided."""

    mesh: jax.sharding.Mesh
    tokens: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()


class Result(NamedTuple):
    """What an implementation computes.

    `jacobians` are ∂score/∂student_hidden per token, [N, H] float32, by score; `head_gradient` is [V, H] float32;
    `computed` counts the rows of tokens that went through the head.
    """

    scores: RowScores
    jacobians: dict[str, jax.Array]
    head_gradient: jax.Array | None
    computed: jax.Array
