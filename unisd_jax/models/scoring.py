"""Running a view: one set of weights over (prompt, completion) pairs."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from unisd_jax.models.decoder import Model
from unisd_jax.models.lora import Lora
from unisd_jax.types import Completions, Prompts


def completion_hidden(
    model: Model, params: dict[str, Any], lora: Lora | None, prompts: Prompts, completions: Completions
) -> Float[Array, "B T H"]:
    """The states that predict each completion token; the last token itself is not fed."""
    ids = jnp.concatenate([prompts.ids, completions.ids[:, :-1]], axis=1)
    mask = jnp.concatenate([prompts.mask, completions.mask[:, :-1]], axis=1)
    return model.hidden(params, ids, mask, lora=lora)[:, prompts.ids.shape[1] - 1 :]
