"""Instruction induction: the model reads a few solved examples and says, in general terms, how such tasks are done.

The instructions are auxiliary views of their own kind (UniSD section 2.2): guidance without any solution.
"""

import random
from collections.abc import Callable, Mapping, Sequence

from unisd_jax.errors import UserError
from unisd_jax.teacher.prompts import Message

# Conversations and the number of the call -> replies. Randomness may depend on that number and on the row only.
Generate = Callable[[list[list[Message]], int], list[str]]
Record = Callable[[dict[str, str]], None]

CALL_SIZE = 8


def meta_messages(examples: Sequence[tuple[str, str]]) -> list[Message]:
    """Asks for one general instruction, given (question, good response) of some items."""
    blocks = [
        f"[Example {number}: task]\n{question}\n\n[Example {number}: response]\n{demonstration}"
        for number, (question, demonstration) in enumerate(examples, start=1)
    ]
    content = "\n\n".join(
        [
            "Here are some tasks of one kind, each with a good response. They are already done; do not do them again.",
            *blocks,
            "Write one short instruction, three or four sentences long, that would help somebody with new tasks of "
            "this kind. Give general rules: what to look for, how to proceed, which form a response has. Mention "
            "nothing that belongs to a single example, and give no answer, no code and no tool call. Write the "
            "instruction only.",
        ]
    )
    return [{"role": "user", "content": content}]


def example_groups(count: int, *, per_set: int, instructions: int, seed: int) -> list[list[int]]:
    """Disjoint groups of `per_set` of `count` items, at most `instructions`, cut from a seeded permutation.

    Raises:
      UserError: fewer items than one group needs.
    """
    if count < per_set:
        raise UserError(
            f"teacher.contexts.induction_demonstrations is {per_set}, but there are only {count} training items; "
            "lower it or add items"
        )
    order = list(range(count))
    random.Random(f"{seed}/induction").shuffle(order)
    return [order[n * per_set : (n + 1) * per_set] for n in range(min(count // per_set, instructions))]


def induce(
    questions: Sequence[str],
    demonstrations: Sequence[str],
    *,
    per_set: int,
    instructions: int,
    seed: int,
    generate: Generate,
    keep: Mapping[str, str],
    record: Record,
) -> list[str]:
    """One instruction from each group of examples; empty replies are left out.

    Calls are cut in the same places in every run, so a run that was stopped and resumed gives what one run would.

    Args:
      questions: the text of every item.
      demonstrations: the good response of every item.
      per_set: examples that one instruction is made from.
      instructions: how many to make at most.
      seed: of the run; the release's grouping is unseeded (D-19).
      generate: samples the replies of a list of conversations.
      keep: replies of an earlier run by group number, as `record` was given them.
      record: is given the replies of each call, empty ones included, so that nothing is asked twice.

    Raises:
      UserError: fewer items than one group needs, or every reply is empty.
    """
    groups = example_groups(len(questions), per_set=per_set, instructions=instructions, seed=seed)
    replies = dict(keep)
    for call, start in enumerate(range(0, len(groups), CALL_SIZE)):
        names = [str(group) for group in range(start, min(start + CALL_SIZE, len(groups)))]
        if all(name in replies for name in names):
            continue
        asked = [
            meta_messages([(questions[item], demonstrations[item]) for item in groups[int(name)]]) for name in names
        ]
        given = {name: reply.strip() for name, reply in zip(names, generate(asked, call), strict=True)}
        record(given)
        replies |= given
    found = [reply for group in range(len(groups)) if (reply := replies[str(group)])]
    if groups and not found:
        raise UserError(
            f"all {len(groups)} induced instructions are empty; raise teacher.contexts.induction_max_length or choose "
            "another teacher.contexts.method"
        )
    return found
