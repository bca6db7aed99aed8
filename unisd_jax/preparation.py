"""What each view of a training item shows: the question, beside its own solution, other items', or an instruction."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from unisd_jax.config import Config
from unisd_jax.data.chat import Chat
from unisd_jax.data.pipeline import Messages, ViewMessages
from unisd_jax.data.tasks.base import Item, Task, identity
from unisd_jax.errors import UserError
from unisd_jax.made_once import LoadSampler, NotPrepared, induced_instructions, item_negatives, question, sound_items
from unisd_jax.parallel import multihost
from unisd_jax.teacher.contexts import (
    assign_instructions,
    nearest_donors,
    random_donors,
    released_instructions,
    released_nearest_donors,
    released_random_donors,
)
from unisd_jax.teacher.prompts import (
    auxiliary_messages,
    induction_messages,
    privileged_messages,
    student_messages,
    teacher_messages,
)
from unisd_jax.teacher.retrieval import Ranking, bm25_ranking, minilm_ranking


class TrainingViews(NamedTuple):
    """The items that have every view asked for, those views, and how many items lack a negative."""

    items: list[Item]
    views: list[ViewMessages]
    without_negative: int


def training_views(
    config: Config, task: Task, items: Sequence[Item], chat: Chat, load_sampler: LoadSampler, *, read_only: bool = False
) -> TrainingViews:
    """The training items that have every view the configuration asks for, with the conversations of those views.

    Raises:
      NotPrepared: something is still to be made, and `read_only` forbids it.
      UserError: a view cannot be made, or too few items have it.
    """
    items = sound_items(config, task, items, read_only=read_only)
    if config.objective.loss == "nll":
        views = [ViewMessages(student_messages(item.prompt, item.earlier)) for item in items]
        return TrainingViews(list(items), views, 0)
    # In this order: what is cheap to get wrong comes before what takes long.
    teachers = primary_messages(config, items)
    contexts = context_messages(config, task, items, chat, load_sampler, read_only=read_only)
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
            negative = teacher_messages(item.prompt, wrong, condition="gold", placement=placement, earlier=item.earlier)
        kept.append(item)
        views.append(ViewMessages(student_messages(item.prompt, item.earlier), teacher, tuple(context), negative))
    return TrainingViews(kept, views, len(items) - len(kept))


def shared_views(
    config: Config, task: Task, items: Sequence[Item], chat: Chat, load_sampler: LoadSampler, *, read_only: bool = False
) -> TrainingViews:
    """`training_views` for all processes of a run: the main one makes what rules can make, the others read it.

    Raises:
      UserError: as `training_views`; among several processes also where the model itself would have to write.
    """
    if multihost.process_count() > 1:

        def refuse():
            raise NotPrepared(
                "what the model writes for the teacher's views is not there yet, and a run of several processes does "
                "not make it: run scripts/prepare_contexts.py and scripts/prepare_negatives.py with this configuration "
                "in one process first"
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
    """The primary teacher's conversation of every item; None for `self`, which is made from samples at every step.

    With `gold` an item's privileged context, where it has one, stands in place of its gold reply.
    """
    condition, placement = config.teacher.condition, config.teacher.placement
    if condition == "self":
        return [None] * len(items)
    if condition != "other":
        return [
            privileged_messages(item.prompt, item.context, item.earlier)
            if condition == "gold" and item.context is not None
            else teacher_messages(
                item.prompt, item.completion, condition=condition, placement=placement, earlier=item.earlier
            )
            for item in items
        ]
    donors = _donors(config, items, config.teacher.other_method, views=1, purpose="other")
    return [_beside_examples(config, items, item, views[0]) for item, views in zip(items, donors, strict=True)]


def context_messages(
    config: Config, task: Task, items: Sequence[Item], chat: Chat, load_sampler: LoadSampler, *, read_only: bool = False
) -> list[list[Messages]]:
    """The K auxiliary conversations of every item."""
    options = config.teacher.contexts
    views = options.num_auxiliary_contexts
    if views == 0:
        return [[] for _ in items]
    if options.method == "induction":
        instructions = induced_instructions(config, items, chat, load_sampler, read_only=read_only)
        assign = released_instructions if options.as_released else assign_instructions
        assigned = assign(len(items), instructions, views=views, seed=config.seed)
        return [
            [induction_messages(item.prompt, instruction, item.earlier) for instruction in chosen]
            for item, chosen in zip(items, assigned, strict=True)
        ]
    asking = items
    if options.as_released:
        donors = _released_donors(config, task, items, views)
        if task.family == "tools" and options.method == "retrieval":
            # There the release puts the examples before its teacher's prompt, gold reply included (D-14, A9).
            shown = [
                teacher_messages(item.prompt, item.completion, condition="gold", placement="inline") for item in items
            ]
            asking = [item._replace(prompt=view[-1]["content"]) for item, view in zip(items, shown, strict=True)]
    else:
        donors = _donors(config, items, options.method, views=views, purpose="contexts")
    return [
        [_beside_examples(config, items, item, view) for view in chosen]
        for item, chosen in zip(asking, donors, strict=True)
    ]


def _donors(config: Config, items: Sequence[Item], method: str, *, views: int, purpose: str):
    asked, per_view = [identity(item) for item in items], config.teacher.contexts.demonstrations
    if method == "random":
        return random_donors(asked, views=views, per_view=per_view, seed=f"{config.seed}/{purpose}")
    return nearest_donors(asked, views=views, per_view=per_view, rank=_ranking(config, items))


def _released_donors(config: Config, task: Task, items: Sequence[Item], views: int):
    options = config.teacher.contexts
    if options.method == "random":
        return released_random_donors(len(items), views=views, seed=config.seed)
    return released_nearest_donors(
        len(items), views=views, per_view=options.demonstrations, rank=_ranking(config, items),
        itself=task.name == "medmcqa",
    )  # fmt: skip


def _ranking(config: Config, items: Sequence[Item]) -> Ranking:
    """Similarity of what is asked; under `as_released` of whole prompts, most of which all items share (A15)."""
    released = config.teacher.contexts.as_released
    questions, size = [item.prompt if released else question(item) for item in items], config.teacher.contexts.pool
    pool = sorted(random.Random(config.seed).sample(range(len(items)), size)) if size < len(items) else None
    if config.teacher.contexts.encoder == "minilm":
        return minilm_ranking(questions, config.teacher.contexts.encoder_path, pool)
    return bm25_ranking(questions, pool)


def _beside_examples(config: Config, items: Sequence[Item], item: Item, donors: Sequence[int]) -> Messages:
    """The item's question beside other items' solved ones: as turns their prompts, inline what they ask.

    The prompt of a donor that ends a conversation would say nothing without it: there it is what is asked as well.
    """
    placement = config.teacher.placement
    lenders = [items[donor] for donor in donors]
    examples = [
        (
            other.prompt if placement == "turns" and not other.earlier else question(other),
            other.example or other.completion,
        )
        for other in lenders
    ]
    return auxiliary_messages(item.prompt, examples, placement=placement, earlier=item.earlier)
