"""How a model is asked for a wrong reply: the question, the mistake to make, and an exchange that shows the form."""

from typing import NamedTuple

from unisd_jax.teacher.corruption import Family
from unisd_jax.teacher.prompts import Message


class Problem(NamedTuple):
    """An item that needs wrong replies; `options` are the letters of a choice, `earlier` the messages before it."""

    id: str
    question: str
    completion: str
    answer: str
    options: tuple[str, ...] = ()
    earlier: tuple[Message, ...] = ()


# The mistakes of each family, in the order in which an item's wrong replies are asked for.
MISTAKES: dict[Family, tuple[str, ...]] = {
    "text": (
        "It states a wrong fact and so comes to a wrong answer.",
        "Its answer is a near miss: close to the right one, but not it.",
        "It answers a similar question instead of this one.",
        "One detail that the answer depends on is wrong.",
    ),
    "code": (
        "It is off by one: a bound, an index or a count is one too large or too small.",
        "One operator is wrong, a comparison or an arithmetic one.",
        "It handles the common case and misses an edge case that the tests try.",
        "It computes the right thing and returns something else.",
    ),
    "tools": (
        "It calls another action than the right one.",
        "It calls the right action with a wrong argument.",
        "It misunderstands what is asked and acts on that.",
        "It makes one call too many.",
    ),
}


def mistake(problem: Problem, *, family: Family, slot: int) -> str:
    """What is to be wrong in wrong reply number `slot` of an item; they take turns.

    Raises:
      ValueError: a choice without a wrong option.
    """
    if family != "choice":
        return MISTAKES[family][slot % len(MISTAKES[family])]
    return f"It chooses option {wrong_letter(problem, slot)}."


def wrong_letter(problem: Problem, slot: int) -> str:
    """The wrong options in order, round and round.

    Raises:
      ValueError: there is none.
    """
    letters = [letter for letter in problem.options if letter.casefold() != problem.answer.strip().casefold()]
    if not letters:
        raise ValueError(f"item {problem.id} has options {problem.options}, expected one that is wrong")
    return letters[slot % len(letters)]


def request_messages(
    problem: Problem, *, family: Family, slot: int, example: tuple[Problem, str] | None = None
) -> list[Message]:
    """Asks for wrong reply number `slot`, after an exchange that shows how: another question and a wrong reply to it.

    Small models take the form of a reply from an earlier turn and hardly from a description of it.
    """
    before = []
    if example is not None:
        other, wrong = example
        before = [_request(other, family, slot), {"role": "assistant", "content": wrong}]
    return [*problem.earlier, *before, _request(problem, family, slot)]


def _request(problem: Problem, family: Family, slot: int) -> Message:
    content = (
        f"{problem.question}\n\nThis time reply wrongly on purpose, in the form that is asked for, and do not show "
        f"that it is wrong. {mistake(problem, family=family, slot=slot)}"
    )
    return {"role": "user", "content": content}
