"""Replies to prompts as token ids, in batches that a caller can keep and go on from."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
from jaxtyping import PRNGKeyArray

from unisd_jax.data.batching import pad_prompts
from unisd_jax.data.chat import Chat
from unisd_jax.eval.batches import filled, length_batches
from unisd_jax.parallel.multihost import gather
from unisd_jax.rollout import RolloutEngine, Sampling


class Reply(NamedTuple):
    """A completion's token ids, the stop token included; `finished` is False where it was cut at the length limit."""

    ids: list[int]
    finished: bool


Replies = Mapping[int, Reply]


def generate_replies(
    engine: RolloutEngine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    key: PRNGKeyArray,
    version: int,
    batch_size: int,
    length_multiple: int,
    known: Replies | None = None,
    record: Callable[[Replies], None] = lambda replies: None,
) -> list[Reply]:
    """One reply to each prompt, whoever the engine is.

    What is drawn for a prompt depends on `key`, on all the prompts and on its place among them. Batches whose replies
    are all `known`, by the prompts' places, are not generated again; `record` gets those of each new batch.
    """
    found = dict(known or {})
    batches = length_batches([(len(prompt),) for prompt in prompts], size=batch_size, multiple=length_multiple)
    for number, rows in enumerate(batches):
        if all(row in found for row in rows.numbers):
            continue
        padded = [prompts[row] for row in filled(rows.numbers, batch_size)]
        ids, mask = pad_prompts(padded, pad_id=sampling.pad_id, at_least=rows.lengths[0])
        rollout = engine.generate(ids, mask, sampling, key=jax.random.fold_in(key, number), version=version)
        arrays = [gather(array) for array in (rollout.ids, rollout.mask, rollout.stopped)]
        new = {
            row: Reply([int(token) for token in ids[mask]], bool(stopped))
            for row, ids, mask, stopped in zip(rows.numbers, *arrays, strict=False)  # the rest is filling
        }
        record(new)
        found |= new
    return [found[row] for row in range(len(prompts))]


def greedy(chat: Chat, max_completion_length: int) -> Sampling:
    """The likeliest token, always."""
    return Sampling(max_completion_length, chat.stop_ids, chat.pad_id, temperature=0.0, vocab_size=chat.vocab_size)
