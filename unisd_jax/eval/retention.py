"""How far training has moved the model on prompts that have nothing to do with the task."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from unisd_jax.data.batching import pad_completions, pad_prompts
from unisd_jax.data.chat import Chat
from unisd_jax.eval.runner import fixed_batches, greedy_replies
from unisd_jax.models import Model, completion_hidden, divergence_scores
from unisd_jax.models.layout import place_rows
from unisd_jax.parallel.multihost import gather
from unisd_jax.rollout import RolloutEngine
from unisd_jax.types import Completions, Prompts

UNRELATED_PROMPTS = (
    "Write a short note thanking a neighbour for watering the plants.",
    "Why does bread rise when it is baked?",
    "Give me three tips for sleeping better.",
    "Explain what a mortgage is to a teenager.",
    "Tell me a story about a lighthouse keeper who found a map.",
    "How do I remove a coffee stain from a white shirt?",
    "What should I pack for a weekend of hiking in autumn?",
    "Describe the sound of rain on a tin roof.",
    "Write a Python function that reverses a string.",
    "What is the difference between weather and climate?",
    "Suggest a name for a small bookshop and say why it fits.",
    "How can a team keep its meetings short?",
    "Write two sentences about the history of the bicycle.",
    "What makes a good apology?",
    "Explain how a rainbow forms.",
    "Draft an email asking to move an appointment to next week.",
)


def drift_from_base(
    engine: RolloutEngine,
    model: Model,
    base: dict[str, Any],
    trained: dict[str, Any],
    chat: Chat,
    *,
    max_completion_length: int,
    batch_size: int = 8,
    length_multiple: int,
) -> float:
    """Mean token JSD (alpha = 0.5; nats, at most ln 2) from the base model on the base's own greedy replies."""
    prompts = [chat.prompt_ids([{"role": "user", "content": prompt}]) for prompt in UNRELATED_PROMPTS]
    engine.publish(base, 0)
    replies = greedy_replies(
        engine, prompts, chat, version=0, max_completion_length=max_completion_length, batch_size=batch_size,
        length_multiple=length_multiple,
    )  # fmt: skip
    total, count, longest = 0.0, 0, max(map(len, prompts))
    batches = fixed_batches(list(zip(prompts, replies, strict=True)), batch_size)
    for start, rows in zip(range(0, len(prompts), batch_size), batches, strict=True):
        views = pad_prompts([row[0] for row in rows], pad_id=chat.pad_id, multiple=length_multiple, at_least=longest)
        ids, mask = pad_completions([row[1] for row in rows], pad_id=chat.pad_id, length=max_completion_length)
        mask[len(prompts) - start :] = False
        divergence = _token_jsd(base, trained, *place_rows((*views, ids, mask), model.mesh), model=model)
        total, count = total + float(gather(divergence)[mask].sum()), count + int(mask.sum())
    return total / count


@functools.partial(jax.jit, static_argnames="model")
def _token_jsd(
    base: dict[str, Any],
    trained: dict[str, Any],
    prompt_ids: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    model: Model,
) -> Float[Array, "B T"]:
    def states(params):
        hidden = completion_hidden(model, params, None, Prompts(prompt_ids, prompt_mask), Completions(ids, mask))
        return hidden, model.head(params)

    return divergence_scores(
        *states(trained), *states(base), ids, mask, alpha=0.5, options=model.head_options
    ).divergence
