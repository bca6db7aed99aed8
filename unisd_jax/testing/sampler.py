"""A sampler that says what it is told to: a rollout without the chance of sampling, with log-probs that are real."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from unisd_jax.data.batching import pad_completions
from unisd_jax.models import Lora, Model, completion_scores, merge
from unisd_jax.rollout import Rollout, RolloutEngine, Sampling
from unisd_jax.rollout.protocol import require_version
from unisd_jax.types import Completions, Prompts

Reply = Callable[[list[int], int, PRNGKeyArray], Sequence[int]]


class FakeSampler(RolloutEngine):
    """A `RolloutEngine` with scripted completions.

    A completion ends where a real engine would end it: after its first stop token, or at `max_completion_length`. Its
    log-probs are the model's own under the published weights, at the sampling temperature.

    Args:
      model: scores the completions.
      reply: token ids of the completions, stop token included: one list per row (row i gets list i modulo their
        number), or a function of (prompt ids without padding, row, the row's key) that returns them.
      logps: what is reported instead of the model's scores, one list per row as in `reply`: a sampler that has left the
        policy.
    """

    def __init__(
        self,
        model: Model,
        reply: Reply | Sequence[Sequence[int]],
        *,
        logps: Sequence[Sequence[float]] | None = None,
    ):
        self.model = model
        self.reply = reply
        self.logps = logps
        self.params: dict[str, Any] | None = None
        self.version: int | None = None

    def publish(self, params: dict[str, Any], version: int, lora: Lora | None = None) -> None:
        """Makes `params`, with `lora` merged, the weights of every later `generate`."""
        self.params, self.version = merge(params, lora), version

    def generate(
        self, prompt_ids: np.ndarray, prompt_mask: np.ndarray, sampling: Sampling, *, key: PRNGKeyArray, version: int
    ) -> Rollout:
        """The scripted completions of left-padded prompts [B, P], as numpy arrays.

        Raises:
          StaleWeights: other weights than `version` are published.
          ValueError: a reply is too short to be whole: neither a stop token nor `max_completion_length` ends it.
        """
        require_version(self.version, version)
        prompts = Prompts(np.asarray(prompt_ids), np.asarray(prompt_mask, bool))
        length = sampling.max_completion_length
        replies = [_ended(self._reply(prompts, row, key), row, sampling) for row in range(len(prompts.ids))]
        completions = Completions(*pad_completions(replies, pad_id=sampling.pad_id, length=length))
        stopped = np.array([reply[-1] in sampling.stop_ids for reply in replies])
        if self.logps is None:
            temperature = sampling.temperature or 1.0
            scores = _scores(self.params, prompts, completions, model=self.model, temperature=temperature)
            logps = np.where(completions.mask, scores, np.float32(0))
        else:
            logps = self._given_logps(completions.mask)
        return Rollout(completions.ids, completions.mask, logps, stopped, version)

    def _reply(self, prompts: Prompts, row: int, key: PRNGKeyArray) -> list[int]:
        if not callable(self.reply):
            return list(self.reply[row % len(self.reply)])
        prompt = prompts.ids[row][prompts.mask[row]].tolist()
        return [int(token) for token in self.reply(prompt, row, jax.random.fold_in(key, row))]

    def _given_logps(self, mask: np.ndarray) -> np.ndarray:
        logps = np.zeros(mask.shape, np.float32)
        for row, count in enumerate(mask.sum(axis=1)):
            given = self.logps[row % len(self.logps)]
            if len(given) < count:
                raise ValueError(f"row {row}: {len(given)} log-probs for a completion of {count} tokens")
            logps[row, :count] = given[:count]
        return logps


def _ended(tokens: list[int], row: int, sampling: Sampling) -> list[int]:
    """`tokens` up to the first stop token or the length limit."""
    tokens = tokens[: sampling.max_completion_length]
    ends = [place for place, token in enumerate(tokens) if token in sampling.stop_ids]
    if ends:
        return tokens[: ends[0] + 1]
    if len(tokens) < sampling.max_completion_length:
        raise ValueError(
            f"row {row}: the reply has {len(tokens)} tokens and no stop token {sampling.stop_ids}; "
            f"expected one, or {sampling.max_completion_length} tokens (max_completion_length)"
        )
    return tokens


@functools.partial(jax.jit, static_argnames=("model", "temperature"))
def _scores(
    params: dict[str, Any], prompts: Prompts, completions: Completions, *, model: Model, temperature: float
) -> Float[Array, "B T"]:
    return completion_scores(model, params, None, prompts, completions, temperature=temperature).logp
