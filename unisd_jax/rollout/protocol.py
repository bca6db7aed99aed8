"""What every rollout engine offers: publish weights under a version, generate with exactly that version."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from unisd_jax.errors import UserError
from unisd_jax.models.lora import Lora


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off.

    Ids from `vocab_size` on are never drawn: entries of the head without a token. They stay part of the softmax whose
    log-probs are recorded.
    """

    max_completion_length: int
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    vocab_size: int | None = None


class Rollout(NamedTuple):
    """Sampled completions, right-padded; arrays of the global batch.

    `logps` are log-probs of the sampled tokens under the whole softmax at the sampling temperature (at 1 when greedy),
    before any truncation by top-p, top-k or min-p: what the trainer's own scores should equal.
    """

    ids: Any  # [B, T] int32
    mask: Any  # [B, T] bool; the stop token is part of the completion
    logps: Any  # [B, T] float32
    stopped: Any  # [B] bool; False: cut at max_completion_length
    policy_version: int


class PendingRollout:
    """Completions that are being sampled; `result` waits for them, once, and raises what went wrong."""

    def __init__(self, wait: Callable[[], Rollout]):
        self._wait = wait
        self._rollout: Rollout | None = None

    def result(self) -> Rollout:
        """The rollout."""
        if self._rollout is None:
            self._rollout = self._wait()
        return self._rollout


class RolloutEngine(Protocol):
    """Anything that samples: in this process or another one. A subclass needs `publish` and `generate`."""

    def publish(self, params: dict[str, Any], version: int, lora: Lora | None = None) -> None:
        """Makes `params`, with the adapter `lora` on top, the weights of every later `generate`.

        The arrays must stay as they are until the next `publish`.
        """

    def generate(
        self, prompt_ids: np.ndarray, prompt_mask: np.ndarray, sampling: Sampling, *, key: Any, version: int
    ) -> Rollout:
        """Completes left-padded prompts [B, P] with the weights of `version`.

        Raises:
          StaleWeights: other weights than `version` are published.
        """

    def begin(
        self, prompt_ids: np.ndarray, prompt_mask: np.ndarray, sampling: Sampling, *, key: Any, version: int
    ) -> PendingRollout:
        """Starts what `generate` does; a later `publish` does not change what has begun."""
        rollout = self.generate(prompt_ids, prompt_mask, sampling, key=key, version=version)
        return PendingRollout(lambda: rollout)

    def measurements(self) -> dict[str, float]:
        """What docs/metrics.md lists of the engine, since the last call."""
        return {}

    def close(self) -> None:
        """Ends what the engine has started."""


class RolloutFailed(UserError):
    """The engine cannot go on; what the trainer has learnt so far is as good as before."""


class StaleWeights(RolloutFailed):
    """A rollout was asked of a policy version the engine does not hold."""


def require_version(found: int | None, wanted: int) -> None:
    """Refuses to sample from weights other than the ones asked for."""
    if found != wanted:
        raise StaleWeights(
            f"rollout engine holds policy version {found}, asked for {wanted}: publish the weights first"
        )
