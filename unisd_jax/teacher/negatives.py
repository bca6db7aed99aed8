"""Wrong replies for the contrast, each one checked: the task itself must grade it as wrong.

Made by rule (`rule_negatives`) or by a model (`model_negatives`). An item for which none passes gets none; it never
gets an empty or a right reply, as items of the release do (its defects D-15 and A23).
"""

import json
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

from unisd_jax.errors import UserError
from unisd_jax.teacher.corruption import CHOICES, Family, corruptions
from unisd_jax.teacher.corruption_code import FENCE, parse_python
from unisd_jax.teacher.induction import Generate
from unisd_jax.teacher.negative_prompts import Problem, request_messages
from unisd_jax.teacher.retrieval import Ranking

IsWrong = Callable[[int, str], bool]

CALL_SIZE = 8  # items whose wrong replies are asked for together
RULE_CALL_SIZE = 32  # items whose wrong replies are made by rule before they are recorded
PEERS = 32
TRIES_PER_REPLY = 6
LABEL = re.compile(r"(?m)^[ \t]*([A-Z][A-Za-z_ ]{0,24}):")


def rule_negatives(
    problems: Sequence[Problem],
    *,
    family: Family,
    per_item: int,
    seed: int,
    is_wrong: IsWrong,
    rank: Ranking | None = None,
    keep: Mapping[str, list[str]] = MappingProxyType({}),
    record: Callable[[dict[str, list[str]]], None] = lambda made: None,
) -> list[list[str]]:
    """Up to `per_item` different wrong replies of each item, made by rule.

    Args:
      problems: the items.
      family: how replies of this task look.
      per_item: how many to make of each.
      seed: of the run; an item's changes depend on it and on the item's id.
      is_wrong: whether the task grades a reply to item number i as wrong; for code this runs the tests, so it is called
        from several threads.
      rank: whose answers are borrowed first, see `retrieval`: those of the nearest questions are harder to tell from
        the right one. Without it they are drawn from all items.
      keep: replies of an earlier run by item id, as `record` was given them.
      record: is given the replies of some items when they are made.
    """

    def make(number: int, nearest: Sequence[int], rng: random.Random) -> list[str]:
        problem, accepted = problems[number], []
        peers = _peers(problems, number, family, nearest)
        candidates = corruptions(problem.completion, problem.answer, family=family, peers=peers, rng=rng)
        for text in candidates[: TRIES_PER_REPLY * per_item]:
            if len(accepted) < per_item and is_wrong(number, text):
                accepted.append(text)
        return accepted

    replies = dict(keep)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(problems), RULE_CALL_SIZE):
            items = range(start, min(start + RULE_CALL_SIZE, len(problems)))
            items = [item for item in items if problems[item].id not in replies]
            rngs = [random.Random(f"{seed}/negatives/{problems[item].id}") for item in items]
            # A ranking may keep what it computed last: asked from one thread.
            nearest = [
                rank(item, PEERS) if rank else _any(len(problems), rng) for item, rng in zip(items, rngs, strict=True)
            ]
            made = {
                problems[item].id: found
                for item, found in zip(items, pool.map(make, items, nearest, rngs), strict=True)
            }
            record(made)
            replies |= made
    return [list(replies[problem.id]) for problem in problems]


def _any(number: int, rng: random.Random) -> list[int]:
    return rng.sample(range(number), min(PEERS, number))


def model_negatives(
    problems: Sequence[Problem],
    *,
    family: Family,
    per_item: int,
    attempts: int,
    generate: Generate,
    is_wrong: IsWrong,
    keep: Mapping[str, list[str]],
    record: Callable[[dict[str, list[str]]], None],
) -> list[list[str]]:
    """Up to `per_item` different wrong replies of each item, sampled from a model.

    What is still missing is asked for again, up to `attempts` times in all. Calls are cut in the same places in every
    run, so a run that was stopped and resumed gives what one run would.

    Args:
      problems: the items.
      family: how replies of this task look.
      per_item: how many to ask for.
      attempts: how often a reply is asked for before it is left out.
      generate: samples the replies of a list of conversations.
      is_wrong: whether the task grades a reply to item number i as wrong.
      keep: accepted replies of an earlier run by item id, as `record` was given them.
      record: is given the replies of some items when no more will be asked for, items without any included.
    """
    replies = dict(keep)
    for start in range(0, len(problems), CALL_SIZE):
        items = range(start, min(start + CALL_SIZE, len(problems)))
        if all(problems[item].id in replies for item in items):
            continue
        found: dict[int, dict[int, str]] = {item: {} for item in items}
        for attempt in range(attempts):
            wanted = [(item, slot) for item in items for slot in range(per_item) if slot not in found[item]]
            wanted = [(item, slot) for item, slot in wanted if _can_be_wrong(problems[item], family)]
            if not wanted:
                break
            asked = [
                request_messages(
                    problems[item], family=family, slot=slot, example=_example(problems, item, slot, family)
                )
                for item, slot in wanted
            ]
            texts = generate(asked, start // CALL_SIZE * attempts + attempt)
            for (item, slot), text in zip(wanted, texts, strict=True):
                reply = in_form(text, problems[item], family=family)
                if reply is not None and reply not in found[item].values() and is_wrong(item, reply):
                    found[item][slot] = reply
        made = {problems[item].id: [found[item][slot] for slot in sorted(found[item])] for item in items}
        record(made)
        replies |= made
    return [list(replies[problem.id]) for problem in problems]


def in_form(text: str, problem: Problem, *, family: Family) -> str | None:
    """A sampled reply in the form of the good one, or None if it has another form or is the good one itself.

    A form of its own would tell wrong from good without any look at the content (the release's defect A12).
    """
    good = problem.completion
    reply = _fenced_alike(text.strip(), good)
    if not reply or reply.split() == good.split():
        return None
    if family in ("choice", "tools") and not set(LABEL.findall(good)) <= set(LABEL.findall(reply)):
        return None
    if family == "choice":
        # An option of the question, at the place where the good reply has its own.
        pattern = next((pattern for pattern in CHOICES if re.search(pattern, good)), None)
        letters = re.findall(pattern, reply) if pattern else []
        options = [option.casefold() for option in problem.options]
        return reply if letters and letters[-1].casefold() in options else None
    if family == "code":
        return reply if _is_python(reply) or not _is_python(good) else None
    shape = _json_keys(good)
    if shape is not None or _json_keys(reply) is not None:
        return reply if _json_keys(reply) == shape else None
    return reply


def require_coverage(negatives: Sequence[Sequence[str]], minimum: float) -> None:
    """Refuses negatives that too few items have.

    Raises:
      UserError: it is below `minimum`.
    """
    covered = sum(bool(replies) for replies in negatives)
    share = covered / max(len(negatives), 1)
    if share < minimum:
        raise UserError(
            f"{covered} of {len(negatives)} items have a wrong reply ({share:.1%}), expected at least {minimum:.1%}: "
            "choose another teacher.negatives.source, raise teacher.negatives.attempts, or lower "
            "teacher.negatives.min_coverage"
        )


def _peers(problems: Sequence[Problem], number: int, family: Family, nearest: Sequence[int]) -> list[str]:
    """What a rule may borrow for item `number`: the question's letters, other items' answers, other items' replies."""
    if family == "choice":
        return list(problems[number].options)
    others = [problems[peer] for peer in nearest if peer != number]
    return list(dict.fromkeys(other.completion if family == "tools" else other.answer for other in others))


def _example(problems: Sequence[Problem], item: int, slot: int, family: Family) -> tuple[Problem, str] | None:
    """Another item with a wrong reply by rule, the same in every attempt; None if no other item has one."""
    rng = random.Random(f"{problems[item].id}/{slot}")
    for other in rng.sample(range(len(problems)), min(PEERS, len(problems))):
        if problems[other].question == problems[item].question or not _can_be_wrong(problems[other], family):
            continue
        problem, peers = problems[other], _peers(problems, other, family, _any(len(problems), rng))
        found = corruptions(problem.completion, problem.answer, family=family, peers=peers, rng=rng)
        if found:
            # For a choice the rules go through the wrong letters in the order of the requests.
            return problem, found[slot % len(found)]
    return None


def _can_be_wrong(problem: Problem, family: Family) -> bool:
    return family != "choice" or any(
        letter.casefold() != problem.answer.strip().casefold() for letter in problem.options
    )


def _fenced_alike(reply: str, good: str) -> str:
    """The reply with or without a fence around it as the good reply has it; models add fences and remarks."""
    block, good_block = FENCE.search(reply), FENCE.search(good)
    if block is None or len(FENCE.findall(reply)) != 1:
        return reply
    if good_block is None:
        return block.group(1).strip() if block.group() == reply else reply
    return block.group() if good_block.group() == good.strip() else reply


def _is_python(text: str) -> bool:
    fenced = FENCE.search(text)
    return parse_python(fenced.group(1) if fenced else text) is not None


def _json_keys(text: str) -> list[str] | None:
    """The keys of a JSON object in order; None for any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return list(value) if isinstance(value, dict) else None
