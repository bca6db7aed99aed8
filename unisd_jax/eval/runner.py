"""The evaluation that training makes: greedy replies to the test items, graded; how likely the gold replies are."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unisd_jax.data.chat import Chat
from unisd_jax.data.pipeline import Example
from unisd_jax.data.tasks.base import Grade, Task
from unisd_jax.eval.generation import generate_replies, greedy
from unisd_jax.eval.grading import grade_all, means
from unisd_jax.eval.scores import Network, Pairs, logprob_sums
from unisd_jax.models import Model
from unisd_jax.random import purpose_key
from unisd_jax.rollout import RolloutEngine


class Evaluation(NamedTuple):
    """`replies` are the texts, `grades` one dict per item, `reply_tokens` the lengths of the replies.

    `means` are those of the grades and lengths, `gold_logprob` (nats per token) and `truncated_share`.
    """

    replies: list[str]
    grades: list[Grade]
    means: dict[str, float]
    reply_tokens: list[int]


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
    batching = {"batch_size": batch_size, "length_multiple": length_multiple}
    found = generate_replies(
        engine, [example.student for example in examples], greedy(chat, max_completion_length),
        key=purpose_key(0, 0, "evaluation"), version=version, **batching,
    )  # fmt: skip
    texts = [chat.text(reply.ids) for reply in found]
    items, lengths = [example.item for example in examples], [len(reply.ids) for reply in found]
    (grades,) = grade_all([task.grade], texts, items, parallel=task.family == "code")
    more = {
        "gold_logprob": gold_logprob(Network(model, params), examples, chat, **batching),
        "truncated_share": float(np.mean([not reply.finished for reply in found])),
        "reply_tokens": float(np.mean(lengths)),
    }
    return Evaluation(texts, grades, means(grades) | more, lengths)


def gold_logprob(
    network: Network, examples: Sequence[Example], chat: Chat, *, batch_size: int, length_multiple: int
) -> float:
    """Mean log-prob per token of the gold completions after the question alone, pooled over all tokens; nats."""
    pairs = Pairs([example.student for example in examples], [example.gold for example in examples])
    sums = logprob_sums(network, pairs, pad_id=chat.pad_id, batch_size=batch_size, length_multiple=length_multiple)
    return sum(row["logp"] for row in sums) / sum(row["tokens"] for row in sums)
