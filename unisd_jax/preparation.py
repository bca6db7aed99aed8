"""What the views of the training items show: donors, induced instructions, wrong replies. Made once, then kept.

Contexts by `random` or `retrieval` and negatives by rule need no model. Induced instructions, and negatives that the
model writes, are sampled from the initial weights and cached by what they depend on, so that all runs share them.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unisd_jax.config import Config
from unisd_jax.data.chat import Chat
from unisd_jax.data.pipeline import Messages, ViewMessages
from unisd_jax.data.tasks.base import Item, Task
from unisd_jax.errors import UserError
from unisd_jax.eval.runner import replies
from unisd_jax.models import local_checkpoint
from unisd_jax.parallel import multihost
from unisd_jax.random import purpose_key
from unisd_jax.rollout import JaxSampler, Sampling
from unisd_jax.teacher.cache import RecordCache, is_complete, open_cache, stale, text_hash
from unisd_jax.teacher.contexts import assign_instructions, nearest_donors, random_donors
from unisd_jax.teacher.induction import Generate, example_groups, induce
from unisd_jax.teacher.negatives import Problem, model_negatives, require_coverage, rule_negatives
from unisd_jax.teacher.prompts import auxiliary_messages, induction_messages, student_messages, teacher_messages
from unisd_jax.teacher.retrieval import Ranking, bm25_ranking, minilm_ranking
from unisd_jax.teacher.weights_hash import weights_hash

CACHE_FORMAT = 1
PROMPT_MULTIPLE = 64  # tokens; prompts of caches are long and few

LoadSampler = Callable[[], JaxSampler]


class NotPrepared(UserError):
    """A view needs what is still to be made, and nothing may be written."""


def training_views(
    config: Config, task: Task, items: Sequence[Item], chat: Chat, load_sampler: LoadSampler, *, read_only: bool = False
) -> tuple[list[Item], list[ViewMessages]]:
    """The training items that have every view the configuration asks for, with the conversations of those views.

    Raises:
      NotPrepared: something is still to be made, and `read_only` forbids it.
      UserError: a view cannot be made, or too few items have it.
    """
    if config.objective.loss == "nll":
        return list(items), [ViewMessages(student_messages(item.prompt)) for item in items]
    # In this order: what is cheap to get wrong comes before what takes long.
    teachers = primary_messages(config, items)
    contexts = context_messages(config, items, chat, load_sampler, read_only=read_only)
    negatives: Sequence[str | None] = [None] * len(items)
    if config.objective.contrast.contrastive_weight > 0:
        negatives = item_negatives(config, task, items, chat, load_sampler, read_only=read_only)
    placement = config.teacher.placement
    kept, views = [], []
    for item, teacher, context, wrong in zip(items, teachers, contexts, negatives, strict=True):
        negative = None
        if config.objective.contrast.contrastive_weight > 0:
            if wrong is None:
                continue
            negative = teacher_messages(item.prompt, wrong, condition="gold", placement=placement)
        kept.append(item)
        views.append(ViewMessages(student_messages(item.prompt), teacher, tuple(context), negative))
    return kept, views


def shared_views(
    config: Config, task: Task, items: Sequence[Item], chat: Chat, load_sampler: LoadSampler, *, read_only: bool = False
) -> tuple[list[Item], list[ViewMessages]]:
    """`training_views` for all processes of a run: the main one makes what rules can make, the others read it.

    Raises:
      UserError: as `training_views`; among several processes also where the model itself would have to write.
    """
    if multihost.process_count() > 1:

        def refuse():
            raise NotPrepared(
                "what the model writes for the teacher's views is not there yet, and a run of several processes does "
                "not make it: run scripts/prepare_teacher.py with this configuration in one process first"
            )

        load_sampler = refuse
        if multihost.is_main() and not read_only:
            training_views(config, task, items, chat, refuse)
        multihost.wait_for_all("the teacher's views")
        read_only = True
    return training_views(config, task, items, chat, load_sampler, read_only=read_only)


def require_negatives_in_data(config: Config, items: Sequence[Item]) -> None:
    """Refuses a contrast with the data's own negatives where the data has none, before anything is loaded.

    Raises:
      UserError: an item has no `negative`.
    """
    if config.objective.contrast.contrastive_weight == 0 or config.teacher.negatives.source != "data":
        return
    missing = [item.id for item in items if item.negative is None]
    if len(missing) > (1 - config.teacher.negatives.min_coverage) * len(items):
        raise UserError(
            f"teacher.negatives.source is data, but {len(missing)} of {len(items)} training items have no `negative`, "
            f"such as {missing[0]}; add the field, or set teacher.negatives.source=corruption or =model"
        )


def primary_messages(config: Config, items: Sequence[Item]) -> list[Messages | None]:
    """The primary teacher's conversation of every item; None for `self`, which is made from samples at every step."""
    condition, placement = config.teacher.condition, config.teacher.placement
    if condition == "self":
        return [None] * len(items)
    if condition != "other":
        return [
            teacher_messages(item.prompt, item.completion, condition=condition, placement=placement) for item in items
        ]
    donors = _donors(config, items, config.teacher.other_method, views=1, purpose="other")
    return [
        auxiliary_messages(item.prompt, _examples(items, views[0]), placement=placement)
        for item, views in zip(items, donors, strict=True)
    ]


def context_messages(
    config: Config, items: Sequence[Item], chat: Chat, load_sampler: LoadSampler, *, read_only: bool = False
) -> list[list[Messages]]:
    """The K auxiliary conversations of every item."""
    options, placement = config.teacher.contexts, config.teacher.placement
    views = options.num_auxiliary_contexts
    if views == 0:
        return [[] for _ in items]
    if options.method == "induction":
        instructions = induced_instructions(config, items, chat, load_sampler, read_only=read_only)
        assigned = assign_instructions(len(items), instructions, views=views, seed=config.seed)
        return [
            [induction_messages(item.prompt, instruction) for instruction in chosen]
            for item, chosen in zip(items, assigned, strict=True)
        ]
    donors = _donors(config, items, options.method, views=views, purpose="contexts")
    return [
        [auxiliary_messages(item.prompt, _examples(items, view), placement=placement) for view in chosen]
        for item, chosen in zip(items, donors, strict=True)
    ]


def induced_instructions(
    config: Config, items: Sequence[Item], chat: Chat, load_sampler: LoadSampler, *, read_only: bool = False
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
    with _cache(config, "induction", key, total=len(groups), read_only=read_only) as (cache, advance):
        sampling = (options.induction_temperature, options.induction_max_length)
        found = induce(
            [item.prompt for item in items], [item.completion for item in items], per_set=per_set, instructions=number,
            seed=config.seed, generate=_generate(config, chat, load_sampler, "induction", *sampling),
            keep=cache.records, record=lambda records: advance(cache, records),
        )  # fmt: skip
    return found


def item_negatives(
    config: Config, task: Task, items: Sequence[Item], chat: Chat, load_sampler: LoadSampler, *, read_only: bool = False
) -> list[str | None]:
    """One wrong reply of every item, drawn by the seed from those that the task grades as wrong; None where none is.

    Raises:
      UserError: fewer items than `teacher.negatives.min_coverage` have one.
    """
    options = config.teacher.negatives
    if options.source == "data":
        found = [[item.negative] if item.negative and _is_wrong(task, item, item.negative) else [] for item in items]
    else:
        found = _made_negatives(config, task, items, chat, load_sampler, read_only)
    require_coverage(found, options.min_coverage)
    return [
        random.Random(f"{config.seed}/negative/{item.id}").choice(replies) if replies else None
        for item, replies in zip(items, found, strict=True)
    ]


def _made_negatives(
    config: Config, task: Task, items, chat: Chat, load_sampler: LoadSampler, read_only: bool
) -> list[list[str]]:
    options = config.teacher.negatives
    problems = [Problem(item.id, item.prompt, item.completion, item.answer, _letters(item, task)) for item in items]
    by_model = options.source == "model"
    key = _cache_key(config, items, chat if by_model else None)
    key |= {"task": task.name, "source": options.source, "per_item": options.per_item}
    if by_model:
        key |= {name: getattr(options, name) for name in ("attempts", "temperature", "max_length")}

    def is_wrong(index: int, text: str) -> bool:
        return _is_wrong(task, items[index], text)

    with _cache(config, "negatives", key, total=len(items), read_only=read_only) as (cache, advance):
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
            rank=bm25_ranking([item.prompt for item in items]), keep=cache.records,
            record=lambda records: advance(cache, records),
        )  # fmt: skip


def _is_wrong(task: Task, item: Item, text: str) -> bool:
    return task.grade(text, item)["exact"] < 1


def _letters(item: Item, task: Task) -> tuple[str, ...]:
    if task.family != "choice":
        return ()
    return tuple(chr(ord("A") + index) for index in range(len(item.details["options"])))


def _donors(config: Config, items: Sequence[Item], method: str, *, views: int, purpose: str):
    questions, per_view = [item.prompt for item in items], config.teacher.contexts.demonstrations
    if method == "random":
        return random_donors(questions, views=views, per_view=per_view, seed=f"{config.seed}/{purpose}")
    return nearest_donors(questions, views=views, per_view=per_view, rank=_ranking(config, questions))


def _ranking(config: Config, questions: Sequence[str]) -> Ranking:
    if config.teacher.contexts.encoder == "minilm":
        return minilm_ranking(questions, config.teacher.contexts.encoder_path)
    return bm25_ranking(questions)


def _examples(items: Sequence[Item], indices: Sequence[int]) -> list[tuple[str, str]]:
    return [(items[index].prompt, items[index].completion) for index in indices]


def _cache_key(config: Config, items: Sequence[Item], chat: Chat | None) -> dict[str, Any]:
    """What every cache depends on: the items, the seed and, where the model writes (`chat` given), the model."""
    key = {
        "format": CACHE_FORMAT,
        "data": text_hash([item.id, item.prompt, item.completion, item.answer] for item in items),
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
    config: Config, kind: str, key: dict[str, Any], *, total: int, read_only: bool
) -> Iterator[tuple[RecordCache, Any]]:
    """The cache of `key` and a function that adds records to it and moves a progress bar; sealed at the end."""
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
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task(kind, total=total, completed=len(cache.records))

            def advance(cache: RecordCache, records: dict[str, Any]) -> None:
                cache.add(records)
                progress.update(bar, completed=len(cache.records))
                if not console.is_terminal:
                    print(f"{kind}: {len(cache.records)}/{total}", flush=True)

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
        found = replies(
            sampler, prompts, chat, sampling, key=key, version=0,
            batch_size=min(8, len(prompts)), length_multiple=PROMPT_MULTIPLE,
        )  # fmt: skip
        return [chat.text(ids) for ids in found]

    return generate
