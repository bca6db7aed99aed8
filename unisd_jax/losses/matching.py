"""Feature matching: the student's final hidden states against the teacher's."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def feature_distance(
    student_hidden: Float[Array, "B T H"], teacher_hidden: Float[Array, "B T H"]
) -> Float[Array, "B T"]:
    """Mean over the hidden size of (h_S − h_T)², per token, in squared activations of the model (no fixed unit).

    The hidden states are those after the final norm that predict each completion token. float32; gradients reach the
    student only. Source: UniSD Eq. 6, whose sum over the hidden size is H times this mean; the release takes the mean.

    Raises:
      ValueError: shapes that differ.
    """
    if student_hidden.shape != teacher_hidden.shape:
        raise ValueError(
            f"student hidden states {student_hidden.shape} and teacher hidden states {teacher_hidden.shape} differ"
        )
    difference = student_hidden.astype(jnp.float32) - jax.lax.stop_gradient(teacher_hidden.astype(jnp.float32))
    return jnp.mean(jnp.square(difference), axis=-1)
