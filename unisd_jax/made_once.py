"""What is made once for all runs and kept by what it depends on: verdicts on gold replies, instructions, negatives.

Negatives by rule need no model. Induced instructions, and negatives that the model writes, are sampled from the initial
weights.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unisd_jax.config import Config
from unisd_jax.data.chat import Chat
from unisd_jax.data.tasks.base import Item, Task
from unisd_jax.errors import UserError
from unisd_jax.eval.generation import generate_replies
from unisd_jax.models import local_checkpoint
from unisd_jax.random import purpose_key
from unisd_jax.rollout import JaxSampler, Sampling
from unisd_jax.sandbox import usable_cpus
from unisd_jax.teacher.cache import RecordCache, is_complete, open_cache, stale, text_hash
from unisd_jax.teacher.induction import Generate, example_groups, induce
from unisd_jax.teacher.negatives import Problem, model_negatives, require_coverage, rule_negatives
from unisd_jax.teacher.retrieval import bm25_ranking
from unisd_jax.teacher.weights_hash import weights_hash

CACHE_FORMAT = 2
CALL_SIZE = 32  # items whose gold is graded before the verdicts are recorded
PROMPT_MULTIPLE = 64  # tokens; prompts of caches are long and few

LoadSampler = Callable[[], JaxSampler]


class NotPrepared(UserError):
    """A view needs what is still to be made, and nothing may be written."""


class Paused(Exception):
    """As many records were made as were asked for; the next call goes on."""


def sound_items(config: Config, task: Task, items: Sequence[Item], *, read_only: bool = False) -> list[Item]:
    """The items whose gold reply the task itself grades as right; a line says which are left out.

    A demonstration that is wrong teaches the wrong thing (the release's repairs of MBPP make some of those, A1).
    Grading code runs it, so for code the verdicts are kept in a cache.

    Raises:
      UserError: no item is left.
    """
    if not task.sound_gold or config.data.form.as_released:
        return list(items)

    def is_right(item: Item) -> bool:
        return not _is_wrong(task, item, item.completion)

    if task.family == "code":
        key = _cache_key(config, items, None) | {"task": task.name}
        with _cache(config, "demonstrations", key, total=len(items), read_only=read_only) as (cache, advance):
            waiting = [item for item in items if item.id not in cache.records]
            with ThreadPoolExecutor(usable_cpus()) as pool:
                for start in range(0, len(waiting), CALL_SIZE):
                    some = waiting[start : start + CALL_SIZE]
                    verdicts = zip(some, pool.map(is_right, some), strict=True)
                    advance(cache, {item.id: right for item, right in verdicts})
            verdicts = cache.records
    else:
        verdicts = {item.id: is_right(item) for item in items}
    wrong = [item.id for item in items if not verdicts[item.id]]
    if len(wrong) == len(items):
        raise UserError(f"task {task.name!r} grades the gold reply of every item as wrong, such as that of {wrong[0]}")
    if wrong:
        print(f"{len(wrong)} training items left out: {task.name} grades their own gold as wrong ({wrong[0]}, ...)")
    return [item for item in items if verdicts[item.id]]


def induced_instructions(
    config: Config,
    items: Sequence[Item],
    chat: Chat,
    load_sampler: LoadSampler,
    *,
    read_only: bool = False,
    limit: int | None = None,
) -> list[str]:
    """What the initial model induces from groups of training items; read from the cache where that has it."""
    options = config.teacher.contexts
    per_set, number = options.induction_demonstrations, options.induction_instructions
    groups = example_groups(len(items), per_set=per_set, instructions=number, seed=config.seed)
    key = _cache_key(config, items, chat) | {
        "views": options.num_auxiliary_contexts,
        "demonstrations": per_set,
        "instructions": number,
        "temperature": options.induction_temperature,
        "max_length": options.induction_max_length,
    }
    with _cache(config, "induction", key, total=len(groups), read_only=read_only, limit=limit) as (cache, advance):
        sampling = (options.induction_temperature, options.induction_max_length)
        found = induce(
            [item.prompt for item in items], [item.completion for item in items], per_set=per_set, instructions=number,
            seed=config.seed, generate=_generate(config, chat, load_sampler, "induction", *sampling),
            keep=cache.records, record=lambda records: advance(cache, records),
        )  # fmt: skip
    return found


def item_negatives(
    config: Config,
    task: Task,
    items: Sequence[Item],
    chat: Chat,
    load_sampler: LoadSampler,
    *,
    read_only: bool = False,
    limit: int | None = None,
) -> list[str | None]:
    """One wrong reply of every item, drawn by the seed from those that the task grades as wrong; None where none is.

    Raises:
      Paused: `limit` more items have theirs, and not all do.
      UserError: fewer items than `teacher.negatives.min_coverage` have one.
    """
    options = config.teacher.negatives
    if options.source == "data":
        found = [[item.negative] if item.negative and _is_wrong(task, item, item.negative) else [] for item in items]
    else:
        found = _made_negatives(config, task, items, chat, load_sampler, read_only, limit)
    require_coverage(found, options.min_coverage)
    return [
        random.Random(f"{config.seed}/negative/{item.id}").choice(replies) if replies else None
        for item, replies in zip(items, found, strict=True)
    ]


def question(item: Item) -> str:
    """What is asked, without the words on how to reply."""
    return item.question or item.prompt


def _made_negatives(
    config: Config, task: Task, items, chat: Chat, load_sampler: LoadSampler, read_only: bool, limit: int | None
) -> list[list[str]]:
    options = config.teacher.negatives
    problems = [
        Problem(item.id, item.prompt, item.completion, item.answer, _letters(item, task), item.earlier)
        for item in items
    ]
    by_model = options.source == "model"
    key = _cache_key(config, items, chat if by_model else None)
    key |= {"task": task.name, "source": options.source, "per_item": options.per_item}
    if by_model:
        key |= {name: getattr(options, name) for name in ("attempts", "temperature", "max_length")}

    def is_wrong(index: int, text: str) -> bool:
        return _is_wrong(task, items[index], text)

    with _cache(config, "negatives", key, total=len(items), read_only=read_only, limit=limit) as (cache, advance):
        if cache.complete:
            return [cache.records[item.id] for item in items]
        if by_model:
            return model_negatives(
                problems, family=task.family, per_item=options.per_item, attempts=options.attempts,
                generate=_generate(config, chat, load_sampler, "negatives", options.temperature, options.max_length),
                is_wrong=is_wrong, keep=cache.records, record=lambda records: advance(cache, records),
            )  # fmt: skip
        return rule_negatives(
            problems, family=task.family, per_item=options.per_item, seed=config.seed, is_wrong=is_wrong,
            rank=bm25_ranking([question(item) for item in items]), keep=cache.records,
            record=lambda records: advance(cache, records),
        )  # fmt: skip


def _is_wrong(task: Task, item: Item, text: str) -> bool:
    return task.grade(text, item)["exact"] < 1


def _letters(item: Item, task: Task) -> tuple[str, ...]:
    if task.family != "choice":
        return ()
    return tuple(chr(ord("A") + index) for index in range(len(item.details["options"])))


def _cache_key(config: Config, items: Sequence[Item], chat: Chat | None) -> dict[str, Any]:
    """What every cache depends on: the items, the seed and, where the model writes (`chat` given), the model."""
    key = {
        "format": CACHE_FORMAT,
        "data": text_hash(
            [item.id, item.prompt, item.completion, item.answer, item.question, json.dumps(item.earlier)]
            for item in items
        ),
        "seed": config.seed,
    }
    if chat is not None:
        key |= {
            "model": weights_hash(local_checkpoint(config.model.path), config.teacher.cache_dir),
            "dtype": config.model.dtype,
            "chat": chat.identity(),
        }
    return key


@contextmanager
def _cache(
    config: Config, kind: str, key: dict[str, Any], *, total: int, read_only: bool, limit: int | None = None
) -> Iterator[tuple[RecordCache, Any]]:
    """The cache of `key` and a function that adds records to it and moves a progress bar; sealed at the end.

    The function raises `Paused` when it has added `limit` records and more are missing.
    """
    root = Path(config.teacher.cache_dir)
    if read_only and not is_complete(root, kind, key):
        raise NotPrepared(f"{kind} for {config.data.task} are still to be made ({total} records in {root})")
    with open_cache(root, kind, key, total) as cache:
        if cache.complete:
            yield cache, lambda cache, records: None
            return
        different = stale(root, kind, key)
        why = f" (another cache is there, but {different})" if different else ""
        print(f"making {kind} for {config.data.task}: {len(cache.records)} of {total} are there{why}", flush=True)
        console = Console()
        columns = TextColumn(kind), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        until = total if limit is None else min(total, len(cache.records) + limit)
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task(kind, total=total, completed=len(cache.records))

            def advance(cache: RecordCache, records: dict[str, Any]) -> None:
                cache.add(records)
                progress.update(bar, completed=len(cache.records))
                if not console.is_terminal:
                    print(f"{kind}: {len(cache.records)}/{total}", flush=True)
                if until <= len(cache.records) < total:
                    raise Paused(f"{kind}: {len(cache.records)} of {total} are there; the same command goes on")

            yield cache, advance
        cache.finish()


def _generate(
    config: Config, chat: Chat, load_sampler: LoadSampler, purpose: str, temperature: float, max_length: int
) -> Generate:
    """Samples replies of the initial model; what is drawn depends on the seed, the number of the call and the row."""

    def generate(conversations: list[list[dict[str, str]]], call: int) -> list[str]:
        prompts = [chat.prompt_ids(messages) for messages in conversations]
        sampler = load_sampler()
        longest, limit = max(map(len, prompts)) + max_length, sampler.model.config.max_position
        if longest > limit:
            raise UserError(
                f"{purpose}: a prompt and its reply take {longest} tokens, the model reads at most {limit}; lower "
                "teacher.contexts.induction_demonstrations, teacher.contexts.induction_max_length or "
                "teacher.negatives.max_length"
            )
        key = jax.random.fold_in(purpose_key(config.seed, 0, purpose), call)
        sampling = Sampling(max_length, chat.stop_ids, chat.pad_id, temperature, vocab_size=chat.vocab_size)
        found = generate_replies(
            sampler, prompts, sampling, key=key, version=0, batch_size=min(8, len(prompts)),
            length_multiple=PROMPT_MULTIPLE,
        )  # fmt: skip
        return [chat.text(reply.ids) for reply in found]

    return generate
