"""Items to tokenised examples to batches, in an order that a checkpoint can resume exactly."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain

from unisd_jax.data.chat import Chat
from unisd_jax.data.tasks.base import Item
from unisd_jax.errors import UserError

Messages = list[dict[str, str]]


class ViewMessages(NamedTuple):
    """The conversations of one item's views; None or empty for a view that nothing asks for."""

    student: Messages
    teacher: Messages | None = None
    contexts: tuple[Messages, ...] = ()
    negative: Messages | None = None


class Example(NamedTuple):
    """One item as token ids: the prompts of its views and its gold completion (with the stop token)."""

    item: Item
    student: list[int]
    teacher: list[int] | None
    gold: list[int]
    contexts: tuple[list[int], ...] = ()
    negative: list[int] | None = None


def tokenize(
    items: Sequence[Item],
    views: Sequence[ViewMessages],
    chat: Chat,
    *,
    max_prompt_length: int,
    max_gold_length: int | None = None,
    overlong: str = "drop",
) -> tuple[list[Example], int]:
    """Tokenises every item with its views; returns the examples and how many were dropped.

    An item is too long if a prompt has more than `max_prompt_length` tokens or, where that is set, its gold completion
    more than `max_gold_length`. It is dropped or refused as a whole; nothing is ever cut.

    Raises:
      UserError: an item is too long and `overlong` is "error", or none is left.
    """
    examples, dropped = [], 0
    for item, messages in zip(items, views, strict=True):
        example = Example(
            item,
            chat.prompt_ids(messages.student),
            None if messages.teacher is None else chat.prompt_ids(messages.teacher),
            chat.reply_ids(messages.student, item.completion),
            tuple(chat.prompt_ids(context) for context in messages.contexts),
            None if messages.negative is None else chat.prompt_ids(messages.negative),
        )
        reason = _too_long(example, max_prompt_length, max_gold_length)
        if reason is None:
            examples.append(example)
        elif overlong == "error":
            raise UserError(
                f"item {item.id}: {reason}; raise the limit or remove the item "
                "(data.overlong=drop does so, with training items only)"
            )
        else:
            dropped += 1
    if items and not examples:
        raise UserError(
            f"all {len(items)} items are too long (data.max_prompt_length is {max_prompt_length}): nothing is left"
        )
    return examples, dropped


def batches(
    examples: Sequence[Example], *, batch_size: int, seed: int, shuffle: bool, rows: Sequence[int] | None = None
) -> Iterator[list[Example]]:
    """An endless iterator over batches, reshuffled every pass; `get_state` and `set_state` save and restore its place.

    `rows` are those of each batch that this host reads; None: all. The order does not depend on them.

    Raises:
      UserError: fewer examples than one batch needs.
    """
    if len(examples) < batch_size:
        raise UserError(f"train.batch_size is {batch_size}, but there are only {len(examples)} training items")
    dataset = grain.MapDataset.source(range(len(examples))).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    own = range(batch_size) if rows is None else rows
    dataset = dataset.repeat().batch(batch_size, batch_fn=lambda indices: [examples[indices[row]] for row in own])
    # One reading thread: items are already in memory, and more would only race with the training threads.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def _too_long(example: Example, max_prompt_length: int, max_gold_length: int | None) -> str | None:
    prompts = {"the student's prompt": example.student, "the teacher's prompt": example.teacher}
    prompts |= {f"auxiliary prompt {index}": ids for index, ids in enumerate(example.contexts, start=1)}
    prompts["the negative prompt"] = example.negative
    sizes: list[tuple[str, Any, int | None, str]] = [
        *((what, ids, max_prompt_length, "data.max_prompt_length") for what, ids in prompts.items()),
        ("the gold completion", example.gold, max_gold_length, "rollout.max_completion_length"),
    ]
    for what, ids, limit, option in sizes:
        if ids is not None and limit is not None and len(ids) > limit:
            return f"{what} has {len(ids)} tokens, {option} is {limit}"
    return None
