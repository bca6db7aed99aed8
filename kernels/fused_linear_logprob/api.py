"""The public function: checks its arguments and hands them on."""

from typing import Literal

import jax

from unisd_jax.kernels.fused_linear_jsd import gradients
from unisd_jax.kernels.fused_linear_jsd.api import check_arrays, check_options, check_scaling
from unisd_jax.kernels.fused_linear_jsd.dispatch import Options
from unisd_jax.kernels.fused_linear_jsd.rows import Settings
from unisd_jax.kernels.fused_linear_jsd.types import Layout, Operands
from unisd_jax.kernels.fused_linear_logprob.reference import LogprobScores, score_tokens


def fused_linear_logprob(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    mask: jax.Array | None = None,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    vocab_block: int | None = None,
    layout: Layout | None = None,
    implementation: Literal["auto", "chunked", "pallas_gpu", "pallas_triton", "pallas_tpu", "reference"] = "auto",
    interpret: bool = False,
) -> LogprobScores:
    """Log-probability of each target, and the entropy, under softmax(hidden @ head.T / temperature).

    [N, V] is never held. Gradients are exact and reach hidden and head: −Σ logp is the cross-entropy. With a frozen
    head that of logp costs one product more than the scores; with a trained head, or for the entropy, the logits are
    formed again.

    Args:
      hidden: [N, H] hidden states, in any floating dtype; products are summed in float32.
      head: [V, H] output embeddings. Not differentiated (LoRA, `stop_gradient`): its gradient is not computed.
      targets: [N] token ids in [0, V). Any other id gets a NaN log-probability.
      temperature: divides the logits; positive and finite.
      mask: [N] bool; tokens where it is False cost no work. None: all count.
      soft_cap: logits become soft_cap · tanh(logits / soft_cap).
      vocab_size: columns from here on are padding and have probability 0.
      chunk_size: tokens whose logits are held at once. None: an eighth of the tokens, 256 to 1024.
      vocab_block: low-memory mode: at most so many columns of the vocabulary at a time.
      layout: how tokens and vocabulary are divided over a mesh; None: one device, or left to the compiler.
      implementation: "chunked" (what "auto" takes) runs everywhere; "pallas_gpu" keeps the logits on the chip where
        nothing is differentiated; "pallas_triton" and "pallas_tpu" replace the row pass; "reference" holds all logits.
      interpret: run a Pallas kernel in interpret mode, on any machine.

    Raises:
      ValueError: shapes that do not fit together, targets that are not integers, a setting out of its range.
    """
    check_arrays({"hidden": hidden}, {"head": head}, targets, mask)
    check_scaling(temperature, soft_cap)
    check_options(implementation, chunk_size, vocab_block, vocab_size, head.shape[0], layout)
    if implementation == "reference":
        return score_tokens(hidden, head, targets, temperature, soft_cap, vocab_size, mask)
    settings = Settings(None, float(temperature), soft_cap, vocab_size)
    options = Options(settings, implementation, chunk_size, vocab_block, layout, interpret)
    scores = gradients.score_tokens(options, Operands(hidden, head, None, None, targets, mask))
    return LogprobScores(scores.student_logp, scores.student_entropy)
