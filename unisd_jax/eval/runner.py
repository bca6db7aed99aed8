"""Greedy replies to the test items, graded; and how likely the model finds the gold replies."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from unisd_jax.data.batching import pad_completions, pad_prompts
from unisd_jax.data.chat import Chat
from unisd_jax.data.pipeline import Example
from unisd_jax.data.tasks.base import Task
from unisd_jax.models import Model, completion_scores
from unisd_jax.models.layout import place_rows
from unisd_jax.parallel.multihost import gather
from unisd_jax.random import purpose_key
from unisd_jax.rollout import RolloutEngine, Sampling
from unisd_jax.types import Completions, Prompts


class Evaluation(NamedTuple):
    """`replies` are the texts, `grades` one dict per item, `means` their means and `gold_logprob` (nats per token)."""

    replies: list[str]
    grades: list[dict[str, float]]
    means: dict[str, float]


def replies(
    engine: RolloutEngine,
    prompts: Sequence[Sequence[int]],
    chat: Chat,
    sampling: Sampling,
    *,
    key: PRNGKeyArray,
    version: int,
    batch_size: int,
    length_multiple: int,
) -> list[list[int]]:
    """One completion of each prompt as token ids, stop token included; all batches have the same shape.

    What is drawn for a prompt depends on `key` and on its place among `prompts`.
    """
    longest = max(map(len, prompts))
    found: list[list[int]] = []
    for number, rows in enumerate(fixed_batches(prompts, batch_size)):
        ids, mask = pad_prompts(rows, pad_id=chat.pad_id, multiple=length_multiple, at_least=longest)
        rollout = engine.generate(ids, mask, sampling, key=jax.random.fold_in(key, number), version=version)
        found += [list(row[kept]) for row, kept in zip(gather(rollout.ids), gather(rollout.mask), strict=True)]
    return [[int(token) for token in reply] for reply in found[: len(prompts)]]


def greedy_replies(
    engine: RolloutEngine,
    prompts: Sequence[Sequence[int]],
    chat: Chat,
    *,
    version: int,
    max_completion_length: int,
    batch_size: int,
    length_multiple: int,
) -> list[list[int]]:
    """`replies` without randomness."""
    sampling = Sampling(max_completion_length, chat.stop_ids, chat.pad_id, temperature=0.0, vocab_size=chat.vocab_size)
    return replies(
        engine, prompts, chat, sampling, key=purpose_key(0, 0, "evaluation"), version=version, batch_size=batch_size,
        length_multiple=length_multiple,
    )  # fmt: skip


def gold_logprob(
    model: Model,
    params: dict[str, Any],
    examples: Sequence[Example],
    chat: Chat,
    *,
    batch_size: int,
    length_multiple: int,
) -> float:
    """Mean log-prob per token of the gold completions after the question alone, pooled over all tokens; nats."""
    length = max(len(example.gold) for example in examples)
    longest = max(len(example.student) for example in examples)
    total, count = 0.0, 0
    for start, rows in zip(range(0, len(examples), batch_size), fixed_batches(examples, batch_size), strict=True):
        prompts = pad_prompts(
            [row.student for row in rows], pad_id=chat.pad_id, multiple=length_multiple, at_least=longest
        )
        ids, mask = pad_completions([row.gold for row in rows], pad_id=chat.pad_id, length=length)
        mask[len(examples) - start :] = False
        logps = token_logps(params, *place_rows((*prompts, ids, mask), model.mesh), model=model)
        total, count = total + float(gather(logps)[mask].sum()), count + int(mask.sum())
    return total / count


@functools.partial(jax.jit, static_argnames="model")
def token_logps(
    params: dict[str, Any],
    prompt_ids: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    model: Model,
) -> Float[Array, "B T"]:
    """log p of each completion token at temperature 1."""
    return completion_scores(model, params, None, Prompts(prompt_ids, prompt_mask), Completions(ids, mask)).logp


def evaluate_examples(
    engine: RolloutEngine,
    model: Model,
    params: dict[str, Any],
    examples: Sequence[Example],
    chat: Chat,
    task: Task,
    *,
    version: int,
    max_completion_length: int,
    batch_size: int,
    length_multiple: int,
) -> Evaluation:
    """Replies greedily to every question (no demonstration) and grades the replies with the task's own grader."""
    engine.publish(params, version)
    prompts = [example.student for example in examples]
    reply_ids = greedy_replies(
        engine, prompts, chat, version=version, max_completion_length=max_completion_length, batch_size=batch_size,
        length_multiple=length_multiple,
    )  # fmt: skip
    texts = [chat.text(ids) for ids in reply_ids]
    grades = [task.grade(text, example.item) for text, example in zip(texts, examples, strict=True)]
    means = {name: float(np.mean([grade[name] for grade in grades])) for name in grades[0]}
    means["gold_logprob"] = gold_logprob(
        model, params, examples, chat, batch_size=batch_size, length_multiple=length_multiple
    )
    means["truncated_share"] = float(np.mean([ids[-1] not in chat.stop_ids for ids in reply_ids]))
    return Evaluation(texts, grades, means)


def fixed_batches(rows: Sequence[Any], size: int) -> list[list[Any]]:
    """Batches of exactly `size`; the last one is filled up with its own first row, whose extra results are dropped."""
    batches = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [batch + batch[:1] * (size - len(batch)) for batch in batches]
