"""How a model is asked for a wrong reply: the question, a good reply to take the form from, and the mistake to make."""

from typing import NamedTuple

from unisd_jax.teacher.corruption import Family
from unisd_jax.teacher.prompts import Message


class Problem(NamedTuple):
    """An item that needs wrong replies; `options` are the letters of a choice, in order."""

    id: str
    question: str
    completion: str
    answer: str
    options: tuple[str, ...] = ()


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
RULES: dict[Family, str] = {
    "text": "Keep its layout and about its length.",
    "choice": "Argue for that option in its layout, and give the option's letter where it gives its own.",
    "code": (
        "Keep the name and the parameters of the function. The code must run, look right, and fail at least one test "
        "of the question."
    ),
    "tools": "Keep its labels and their order; what is JSON there must be valid JSON in yours.",
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


def request_messages(problem: Problem, *, family: Family, slot: int) -> list[Message]:
    """Asks for wrong reply number `slot`, in the form of the good reply (the release's defects D-15 and A12)."""
    content = "\n\n".join(
        [
            "A reader is learning to spot mistakes and needs a reply that looks right at first sight and is wrong.",
            f"[Question]\n{problem.question}",
            f"[Good reply]\n{problem.completion}",
            "Write a wrong reply to the same question in the form of the good reply. "
            f"{mistake(problem, family=family, slot=slot)} {RULES[family]} Sound as sure as the good reply does, give "
            "no hint of the mistake, and write nothing before or after the reply.",
        ]
    )
    return [{"role": "user", "content": content}]
