"""Who lends whom a solved example: for every item and every auxiliary view, the indices of its donors.

A donor is never the item itself nor another item with the same question: its solution would be the item's own. What is
drawn for an item depends on the seed, on its own text and on the list of questions, not on a shared random stream.
"""

import random
from collections.abc import Sequence

from unisd_jax.errors import UserError
from unisd_jax.teacher.retrieval import Ranking

Donors = list[list[list[int]]]  # [item][view] -> indices of the donors, nearest first


def random_donors(questions: Sequence[str], *, views: int, per_view: int, seed: int | str) -> Donors:
    """Donors drawn uniformly from the other questions (UniSD section 2.2; the release ignores `per_view`, A10).

    The donors of one item ask different questions while there are enough of them, then they repeat in order. Two items
    with the same question stand for one donor, drawn among the two.

    Args:
      questions: the text of every item.
      views: auxiliary views of each item.
      per_view: donors in each view.
      seed: of the run, and of what the donors are for.

    Raises:
      UserError: there is no other question at all.
    """
    keys, members = _groups(questions)
    _require_others(members, questions, views * per_view)
    names = list(members)
    place = {key: number for number, key in enumerate(names)}
    seen: dict[str, int] = {}
    donors = []
    for key in keys:
        seen[key] = seen.get(key, 0) + 1
        generator = random.Random(f"{seed}/donors/{seen[key]}/{key}")
        # Sampled without a list of candidates for each item: that would be quadratic (the release's A5).
        count = min(views * per_view, len(names) - 1)
        groups = [number + (number >= place[key]) for number in generator.sample(range(len(names) - 1), count)]
        donors.append(_deal([generator.choice(members[names[group]]) for group in groups], views, per_view))
    return donors


def nearest_donors(questions: Sequence[str], *, views: int, per_view: int, rank: Ranking) -> Donors:
    """The nearest other questions: view 0 gets the `per_view` nearest, view 1 the next, and so on.

    Neighbours with the item's own question, or with one that a nearer donor asks, are passed over (the release finds
    the item itself in one dataset, D-13 and A4, and near-duplicates in others, A22).

    Args:
      questions: the text of every item.
      views: auxiliary views of each item.
      per_view: donors in each view.
      rank: see `retrieval.bm25_ranking`.

    Raises:
      UserError: there is no other question at all.
    """
    keys, members = _groups(questions)
    needed = views * per_view
    _require_others(members, questions, needed)
    count = min(needed, len(members) - 1)
    return [
        _deal(_nearest(item, keys, len(members[key]), count, rank), views, per_view) for item, key in enumerate(keys)
    ]


def assign_instructions(count: int, instructions: Sequence[str], *, views: int, seed: int) -> list[list[str]]:
    """`views` induced instructions for each of `count` items, different ones while there are enough.

    Seeded for every task; the release draws with replacement, for one task from an unseeded generator (D-19, A11).

    Raises:
      UserError: there is no instruction.
    """
    pool = list(dict.fromkeys(instructions))
    if not pool and views:
        raise UserError(
            "there is no induced instruction, expected at least one: raise teacher.contexts.induction_max_length or "
            "choose another teacher.contexts.method"
        )
    assigned = []
    for item in range(count):
        drawn = random.Random(f"{seed}/instructions/{item}").sample(pool, min(views, len(pool)))
        assigned.append([drawn[view % len(drawn)] for view in range(views)])
    return assigned


def released_random_donors(count: int, *, views: int, seed: int) -> Donors:
    """Donors as the release draws them: one generator for all items, one donor a view, the same question no obstacle.

    Its draw from the explicit list of the other items is this one from a range, number for number (spec 1.7).
    """
    generator, donors = random.Random(seed), []
    for item in range(count):
        others = range(count - 1)
        enough = len(others) >= views
        drawn = generator.sample(others, views) if enough else generator.choices(others, k=views)
        donors.append([[other + (other >= item)] for other in drawn])
    return donors


def released_nearest_donors(count: int, *, views: int, per_view: int, rank: Ranking, itself: bool) -> Donors:
    """The nearest items as the release takes them; with `itself` the item may be its own donor (D-13, A4)."""
    needed, donors = views * per_view, []
    for item in range(count):
        found = [other for other in rank(item, needed + 1) if itself or other != item]
        donors.append(_deal(found[:needed], views, per_view))
    return donors


def released_instructions(count: int, instructions: Sequence[str], *, views: int, seed: int) -> list[list[str]]:
    """Instructions as the release assigns them: drawn with replacement, one list for all items."""
    drawn = random.Random(seed).choices(range(len(instructions)), k=count * views)
    return [[instructions[drawn[item * views + view]] for view in range(views)] for item in range(count)]


def same_question(text: str) -> str:
    """What two questions have in common if they are the same: the text, case and runs of white space aside."""
    return " ".join(text.casefold().split())


def _groups(questions: Sequence[str]) -> tuple[list[str], dict[str, list[int]]]:
    """The key of every item, and the items of every key, in order of appearance."""
    keys = [same_question(question) for question in questions]
    members: dict[str, list[int]] = {}
    for item, key in enumerate(keys):
        members.setdefault(key, []).append(item)
    return keys, members


def _require_others(members: dict[str, list[int]], questions: Sequence[str], needed: int) -> None:
    if needed and questions and len(members) < 2:
        raise UserError(
            f"no item can lend another a solved example: all {len(questions)} ask one and the same question, expected "
            "two different ones; add items, or set teacher.contexts.num_auxiliary_contexts=0 and teacher.condition=gold"
        )


def _nearest(item: int, keys: Sequence[str], own: int, count: int, rank: Ranking) -> list[int]:
    """The first `count` neighbours with different questions; asks for more neighbours until it has them."""
    asked = min(count + own, len(keys))
    while True:
        found: dict[str, int] = {}
        for neighbour in rank(item, asked):
            if keys[neighbour] != keys[item]:
                found.setdefault(keys[neighbour], neighbour)
        if len(found) >= count or asked == len(keys):
            return list(found.values())[:count]
        asked = min(2 * asked, len(keys))


def _deal(donors: list[int], views: int, per_view: int) -> list[list[int]]:
    """In order, view after view; from the start again when they run out."""
    return [[donors[(view * per_view + n) % len(donors)] for n in range(per_view)] for view in range(views)]
