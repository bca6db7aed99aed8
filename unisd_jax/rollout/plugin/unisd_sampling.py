"""Sampling inside vLLM as `unisd_jax.rollout.jax_sampler` has it, with the log-probs that training needs.

vLLM reports log-probs either before the temperature, or after top-k, top-p and min-p with what is left renormalised; an
importance ratio needs neither. So temperature and truncation happen here, on log-probs of the whole softmax at the
sampling temperature, and the server, started with `--logprobs-mode processed_logits`, reports the sampled token's value
as it leaves this processor. It runs in vLLM's process with vLLM's libraries; settings come in a request's `extra_args`.
"""

from typing import Any, NamedTuple

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

KEY = "unisd"


class Settings(NamedTuple):
    """How the rows of some requests are sampled; `vocab_size` 0: every id can be drawn."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    vocab_size: int


class Row(NamedTuple):
    """One request: its settings, the tokens it is made to say (None: it samples), and what it has said so far."""

    settings: Settings
    forced: list[int] | None
    said: list[int]


class WholeSoftmax(LogitsProcessor):
    """Turns each row's logits into log-probs of the whole softmax at its temperature, −inf for what is not drawn."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self._rows: dict[int, Row] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses settings that would act a second time on top of ours."""
        if KEY not in (sampling_params.extra_args or {}):
            return
        own = sampling_params.temperature in (0.0, 1.0) and sampling_params.top_p == 1.0
        if not own or sampling_params.top_k > 0 or sampling_params.min_p > 0:
            raise ValueError(f"with extra_args[{KEY!r}] temperature is 0 or 1 and top_k, top_p, min_p are off")

    def is_argmax_invariant(self) -> bool:
        """False: greedy rows come here too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows requests as they enter, move and leave."""
        process_dict_updates(self._rows, batch_update, _new_row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] in, the same out; rows of other clients stay as they are."""
        groups: dict[Settings, list[int]] = {}
        for index, row in self._rows.items():
            groups.setdefault(row.settings, []).append(index)
        for settings, indices in groups.items():
            if len(indices) == logits.shape[0]:
                logits = drawable(logits, settings)
            else:
                logits[indices] = drawable(logits[indices], settings)
        for index, row in self._rows.items():
            if row.forced is not None and len(row.said) < len(row.forced):
                token = row.forced[len(row.said)]
                value = logits[index, token].clone()
                logits[index] = -torch.inf
                logits[index, token] = value
        return logits


def drawable(logits: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Log-probs of the whole softmax, −inf where top k, top p, min p or the vocabulary forbid the token."""
    logps = torch.log_softmax(logits / (settings.temperature or 1.0), dim=-1, dtype=torch.float32)
    if settings.vocab_size:
        logps[:, settings.vocab_size :] = -torch.inf
    if settings.temperature == 0:
        return logps
    if 0 < settings.top_k < logps.shape[-1]:
        logps = logps.masked_fill(logps < logps.topk(settings.top_k).values[:, -1:], -torch.inf)
    if settings.top_p < 1:
        renormalised = torch.log_softmax(logps, dim=-1)
        descending = renormalised.sort(dim=-1, descending=True).values
        before = descending.exp().cumsum(dim=-1) - descending.exp()
        smallest = torch.where(before < settings.top_p, descending, descending[:, :1]).amin(dim=-1, keepdim=True)
        logps = logps.masked_fill(renormalised < smallest, -torch.inf)
    if settings.min_p > 0:
        likeliest = logps.amax(dim=-1, keepdim=True)
        logps = logps.masked_fill(logps < likeliest + torch.log(torch.tensor(settings.min_p)), -torch.inf)
    return logps


def _new_row(params: SamplingParams, _prompt: list[int] | None, said: list[int]) -> Row | None:
    options = (params.extra_args or {}).get(KEY)
    if options is None:
        return None
    settings = Settings(*(options[name] for name in Settings._fields))
    return Row(settings, options.get("forced"), said)
