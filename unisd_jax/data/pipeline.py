"""Items to tokenised examples to batches, in an order that a checkpoint can resume exactly."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import grain
import numpy as np

from unisd_jax.data.chat import Chat
from unisd_jax.data.chat import Messages as Messages
from unisd_jax.data.tasks.base import Item
from unisd_jax.data.tokens import Columns, TokenTable, build_table
from unisd_jax.errors import UserError

CACHE_FORMAT = 1
HASHED_TOGETHER = 1024  # items


class ViewMessages(NamedTuple):
    """The conversations of one item's views; None or empty for a view that nothing asks for."""

    student: Messages
    teacher: Messages | None = None
    contexts: tuple[Messages, ...] = ()
    negative: Messages | None = None


class Example(NamedTuple):
    """One item as token ids: the prompts of its views and its gold completion (with the stop token)."""

    item: Item
    student: Sequence[int]
    teacher: Sequence[int] | None
    gold: Sequence[int]
    contexts: tuple[Sequence[int], ...] = ()
    negative: Sequence[int] | None = None


class Examples(Sequence[Example]):
    """Examples in a table, each built when it is asked for; its ids are int32 arrays that cannot be written.

    `names` are the segments that these examples have, in the order student, teacher, context-1, ..., negative, gold;
    `lengths` [examples, segments] int32 are their numbers of tokens.
    """

    def __init__(self, items: Sequence[Item], table: TokenTable, rows: np.ndarray | None = None):
        self._items, self._table = items, table
        self._rows = np.arange(len(table)) if rows is None else rows
        self.names, self.lengths = table.names, table.lengths[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        row = int(self._rows[index])
        ids = {name: self._table.segment(row, name) for name in self.names}
        contexts = tuple(ids[name] for name in self.names if is_context(name))
        return Example(self._items[row], ids["student"], ids.get("teacher"), ids["gold"], contexts, ids.get("negative"))

    def only(self, kept: np.ndarray) -> "Examples":
        """Those for which `kept` [examples] is true, in the same order."""
        return Examples(self._items, self._table, self._rows[kept])


def tokenize(
    items: Sequence[Item],
    views: Sequence[ViewMessages],
    chat: Chat,
    *,
    cache: Path | None = None,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> Examples:
    """Every item with its views as token ids, whatever their length.

    Args:
      items: what the examples are of.
      views: of each item; all items have the same ones.
      chat: the tokenizer and its template.
      cache: a folder in which the ids are kept by content, so that the next run reads them; None: nothing is written.
      share: (index, count) of the processes that fill the cache together.
      wait: returns once all processes have come here.

    Raises:
      UserError: text that the template or the model refuses.
      OSError: the cache cannot be written.
      ValueError: the items have different views.
    """
    names = _segments(views)
    completions = [item.completion for item in items]

    def make(rows: range) -> Columns:
        conversations = {name: [_conversation(views[row], name) for row in rows] for name in names[:-1]}
        prompts = [chat.prompts_ids(column) for column in conversations.values()]
        gold = chat.replies_ids(conversations["student"], [completions[row] for row in rows], prompts[0])
        return [*prompts, gold]

    folder = None if cache is None or not items else cache / _content_hash(completions, views, chat)
    return Examples(items, build_table(names, len(items), make, folder=folder, share=share, wait=wait))


def fitting(
    examples: Examples, *, max_prompt_length: int, max_gold_length: int | None = None, overlong: str = "drop"
) -> tuple[Examples, Counter[str]]:
    """The examples that are short enough, and how many are not, by reason.

    An item is too long if a prompt has more than `max_prompt_length` tokens or, where that is set, its gold completion
    more than `max_gold_length`. It is dropped or refused as a whole; nothing is ever cut.

    Raises:
      UserError: an item is too long and `overlong` is "error", or none is left.
    """
    limits = [max_prompt_length] * len(examples.names)
    limits[-1] = np.iinfo(np.int32).max if max_gold_length is None else max_gold_length
    beyond = examples.lengths > limits
    options = ["data.max_prompt_length"] * (len(limits) - 1) + ["rollout.max_completion_length"]
    # The first segment that is too long is the reason.
    found = [(row, int(beyond[row].argmax())) for row in np.flatnonzero(beyond.any(axis=1))]
    if found and overlong == "error":
        row, column = found[0]
        raise UserError(
            f"item {examples[row].item.id}: {_title(examples.names[column])} has {examples.lengths[row, column]} "
            f"tokens, {options[column]} is {limits[column]}; raise the limit or remove the item "
            "(data.overlong=drop does so, with training items only)"
        )
    reasons = Counter(f"{_kind(examples.names[column])} over {options[column]}={limits[column]}" for _, column in found)
    if found and len(found) == len(examples):
        ((most, _),) = reasons.most_common(1)
        raise UserError(f"all {len(examples)} items are too long ({most}): nothing is left; raise the limit")
    return examples.only(~beyond.any(axis=1)), reasons


def length_report(examples: Examples, dropped: Mapping[str, int]) -> list[str]:
    """Lines for the log: the lengths of what is left, and what was dropped for which reason; none without items."""
    if not len(examples):
        return []
    lines = []
    for kind in dict.fromkeys(map(_kind, examples.names)):
        own = examples.lengths[:, [_kind(name) == kind for name in examples.names]]
        numbers = f"{own.min()} / {np.median(own):.0f} / {own.max()}"
        lines.append(f"{kind}: {numbers} tokens (shortest, median, longest)")
    count = sum(dropped.values())
    reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items())
    return [*lines, f"{count} of {len(examples) + count} items dropped" + (f": {reasons}" if reasons else "")]


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


def is_context(name: str) -> bool:
    """Whether a segment is one of the auxiliary prompts."""
    return name.startswith("context-")


def _segments(views: Sequence[ViewMessages]) -> list[str]:
    """The names of the segments that all of `views` have, the gold completion last."""
    found = {(view.teacher is not None, len(view.contexts), view.negative is not None) for view in views}
    if len(found) > 1:
        raise ValueError(f"the items have different views, (teacher, contexts, negative): {sorted(found)}")
    has_teacher, contexts, has_negative = found.pop() if found else (False, 0, False)
    return [
        "student",
        *(["teacher"] if has_teacher else []),
        *(f"context-{number}" for number in range(1, contexts + 1)),
        *(["negative"] if has_negative else []),
        "gold",
    ]


def _conversation(view: ViewMessages, name: str) -> Messages:
    return view.contexts[int(name.removeprefix("context-")) - 1] if is_context(name) else getattr(view, name)


def _title(name: str) -> str:
    """What an error calls one segment."""
    if is_context(name):
        return name.replace("context-", "auxiliary prompt ")
    return {"negative": "the negative prompt", "gold": "the gold completion"}.get(name, f"the {name}'s prompt")


def _kind(name: str) -> str:
    """What the log calls segments of one kind."""
    return "auxiliary prompt" if is_context(name) else _title(name).removeprefix("the ")


def _content_hash(completions: Sequence[str], views: Sequence[ViewMessages], chat: Chat) -> str:
    """The sha256 of everything that decides the token ids."""
    tokenizer = chat.tokenizer
    # A template may write the date, so one text as it is now belongs to the rest.
    probe = chat.rendered([views[0].student], add_generation_prompt=True)
    settings = [CACHE_FORMAT, chat.identity(), chat.head_rows, tokenizer.special_tokens_map, probe]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for start in range(0, len(views), HASHED_TOGETHER):
        rows = slice(start, start + HASHED_TOGETHER)
        digest.update(json.dumps([completions[rows], views[rows]], default=dict).encode() + b"\n")
    return digest.hexdigest()
