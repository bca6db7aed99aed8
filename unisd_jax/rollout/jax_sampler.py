"""The in-process sampler: one compiled prefill and decode loop with a KV cache, for left-padded batches."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from unisd_jax.models import Lora, Model, merge
from unisd_jax.models.layout import place_rows
from unisd_jax.rollout.protocol import Rollout, RolloutEngine, Sampling, require_version


class JaxSampler(RolloutEngine):
    """A `RolloutEngine` in this process. Row i of a batch draws from `fold_in(key, i)`, whatever stands beside it.

    Prompts are numpy arrays, the whole batch on every host, or arrays that are laid out already.
    """

    def __init__(self, model: Model):
        self.model = model
        self.params: dict[str, Any] | None = None
        self.version: int | None = None

    def publish(self, params: dict[str, Any], version: int, lora: Lora | None = None) -> None:
        self.params, self.version = merge(params, lora), version

    def generate(self, prompt_ids, prompt_mask, sampling: Sampling, *, key: PRNGKeyArray, version: int) -> Rollout:
        require_version(self.version, version)
        if isinstance(prompt_ids, np.ndarray):
            prompt_ids, prompt_mask = place_rows((prompt_ids, prompt_mask), self.model.mesh)
        ids, mask, logps, stopped = sample(
            self.params, prompt_ids, prompt_mask, key, model=self.model, sampling=sampling
        )
        return Rollout(ids, mask, logps, stopped, version)


@functools.partial(jax.jit, static_argnames=("model", "sampling"))
def sample(
    params: dict[str, Any],
    prompt_ids: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    key: PRNGKeyArray,
    *,
    model: Model,
    sampling: Sampling,
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"], Float[Array, "B T"], Bool[Array, "B"]]:
    """Draws completions until every row has stopped or is full; returns `(ids, mask, logps, stopped)` as in Rollout."""
    batch, prompt_length = prompt_ids.shape
    length = sampling.max_completion_length
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    stop_ids = jnp.asarray(sampling.stop_ids, jnp.int32)

    def draw(hidden, step):
        logits = model.logits(params, hidden)
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
        return choose_token(logits, keys, sampling)

    hidden, cache = model.prefill(params, prompt_ids, prompt_mask, length)
    token, logp = draw(hidden, 0)
    prompt_lengths = jnp.sum(prompt_mask, axis=1)
    slots = jnp.arange(prompt_length + length)

    ids = jnp.full((batch, length), sampling.pad_id, jnp.int32)
    state = (
        jnp.int32(0),
        cache,
        token,
        logp,
        jnp.zeros((batch,), bool),
        ids,
        jnp.zeros((batch, length), bool),
        jnp.zeros((batch, length), jnp.float32),
    )

    def record(state):
        step, cache, token, logp, stopped, ids, mask, logps = state
        ids = ids.at[:, step].set(jnp.where(stopped, sampling.pad_id, token))
        mask = mask.at[:, step].set(~stopped)
        logps = logps.at[:, step].set(jnp.where(stopped, 0.0, logp))
        stopped = stopped | jnp.isin(token, stop_ids)
        return step + 1, cache, token, logp, stopped, ids, mask, logps

    def unfinished(state):
        step, *_, stopped, _, _, _ = state
        return (step < length) & ~jnp.all(stopped)

    def decode(state):
        step, cache, token, _, stopped, ids, mask, logps = state
        slot = prompt_length + step - 1
        seen = (slots < prompt_lengths[:, None]) | ((slots >= prompt_length) & (slots <= slot))
        positions = (prompt_lengths + step - 1)[:, None]
        hidden, cache = model.extend(params, token[:, None], positions, seen[:, None, :], cache, slot)
        token, logp = draw(hidden[:, -1], step)
        return record((step, cache, token, logp, stopped, ids, mask, logps))

    *_, stopped, ids, mask, logps = jax.lax.while_loop(unfinished, decode, record(state))
    return ids, mask, logps, stopped


def choose_token(
    logits: Float[Array, "B V"], keys: PRNGKeyArray, sampling: Sampling
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token per row and its log-prob under the untruncated softmax at the sampling temperature."""
    logps = jax.nn.log_softmax(logits / (sampling.temperature or 1.0))
    drawable = logps
    if sampling.vocab_size is not None:
        drawable = jnp.where(jnp.arange(logits.shape[-1]) < sampling.vocab_size, logps, -jnp.inf)
    if sampling.temperature == 0:
        token = jnp.argmax(drawable, axis=-1)
    else:
        allowed = truncate(drawable, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
        token = jax.vmap(jax.random.categorical)(keys, allowed)
    token = token.astype(jnp.int32)
    return token, jnp.take_along_axis(logps, token[:, None], axis=-1)[:, 0]


def truncate(logps: Float[Array, "B V"], *, top_k: int, top_p: float, min_p: float) -> Float[Array, "B V"]:
    """−inf for tokens outside the top k, outside the smallest set with mass top_p, or below min_p · max; in that order.

    The likeliest token always stays.
    """
    if 0 < top_k < logps.shape[-1]:
        logps = jnp.where(logps >= jax.lax.top_k(logps, top_k)[0][:, -1:], logps, -jnp.inf)
    if top_p < 1.0:
        descending = -jnp.sort(-jax.nn.log_softmax(logps), axis=-1)
        before = jnp.cumsum(jnp.exp(descending), axis=-1) - jnp.exp(descending)
        kept = jnp.where(before < top_p, descending, descending[:, :1])
        logps = jnp.where(jax.nn.log_softmax(logps) >= jnp.min(kept, axis=-1, keepdims=True), logps, -jnp.inf)
    if min_p > 0.0:
        floor = jnp.max(logps, axis=-1, keepdims=True) + jnp.log(min_p)
        logps = jnp.where(logps >= floor, logps, -jnp.inf)
    return logps
