"""The data of the claims: the embedded task as it is, and with faults of known rate, each kept beside its row."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from unisd_jax.claims import free_answers
from unisd_jax.data.tasks.short_answers import embedded_path
from unisd_jax.io import write_text_atomic

CLEAN, WRONG, NOISY, FREE = "clean", "wrong demonstrations", "noisy contexts", "free form"
NOISES = ("content", "form")
Row = dict[str, Any]
# Whole sentences: a reply that is cut off would count as one that does not say the answer.
_ROOM = ("--rollout.max_completion_length=40", "--evaluation.max_completion_length=48")


class Variant(NamedTuple):
    """Data to train on: options of a configuration, and what is wrong with them."""

    options: tuple[str, ...]
    about: str


def write_variants(folder: Path, *, rate: float) -> dict[str, Variant]:
    """Writes the rows of every variant below `folder`; `rate` is the share of rows that are spoilt."""
    rows = embedded_rows()
    spoilt = drawn(rows, rate, "rows")
    files = {
        "wrong": with_wrong_answers(rows, spoilt),
        "noisy": with_examples(rows, spoilt, lambda row, wrong: f"I think that it is {wrong}."),
        "all-wrong": with_wrong_answers(rows, set(range(len(rows)))),
        "paraphrased": paraphrased(rows),
    } | {noise: with_examples(rows, set(range(len(rows))), EXAMPLES[noise]) for noise in NOISES}
    for name, found in files.items():
        write_text_atomic(folder / f"{name}.jsonl", "".join(json.dumps(row, sort_keys=True) + "\n" for row in found))
    share = f"{len(spoilt)} of {len(rows)} items"
    return {
        CLEAN: Variant((), "as it is"),
        WRONG: Variant(
            (f"--data.train_path={folder / 'wrong.jsonl'}",),
            f"the demonstration of {share} gives another item's answer: to the teacher, to the views of the items that "
            "borrow it, and to supervised fine-tuning",
        ),
        NOISY: Variant(
            (f"--data.train_path={folder / 'noisy.jsonl'}",),
            f"{share} lend the auxiliary views a wrong answer in another form; what their own teacher sees is right",
        ),
        FREE: Variant(
            (f"--data.task={free_answers.__file__}", *_ROOM),
            "the same questions, no form asked for: a reply is right if it says the answer; room for longer replies",
        ),
    }


def embedded_rows() -> list[Row]:
    """The training rows of the embedded task."""
    return [json.loads(line) for line in embedded_path("train").read_text(encoding="utf-8").splitlines()]


def drawn(rows: list[Row], rate: float, what: str) -> set[int]:
    """The places of `rate` of the rows, rounded, always the same ones."""
    return set(random.Random(f"claims/{what}").sample(range(len(rows)), round(rate * len(rows))))


def wrong_answer(rows: list[Row], place: int) -> str:
    """Another item's answer to the same kind of question."""
    row = rows[place]
    others = sorted({other["answer"] for other in rows if other["family"] == row["family"]} - {row["answer"]})
    return random.Random(f"claims/answer/{row['id']}").choice(others)


def with_wrong_answers(rows: list[Row], spoilt: set[int]) -> list[Row]:
    """The rows, where `spoilt` with another answer as gold, and `spoilt` in each."""
    return [
        row | {"answer": wrong_answer(rows, place) if place in spoilt else row["answer"], "spoilt": place in spoilt}
        for place, row in enumerate(rows)
    ]


def with_examples(rows: list[Row], spoilt: set[int], example: Callable[[Row, str], str]) -> list[Row]:
    """The rows, of which the `spoilt` ones lend the other items' views `example(row, wrong answer)`."""
    return [
        row
        | ({"example": example(row, wrong_answer(rows, place))} if place in spoilt else {})
        | {"spoilt": place in spoilt}
        for place, row in enumerate(rows)
    ]


def paraphrased(rows: list[Row]) -> list[Row]:
    """Every question in two wordings: the nearest other item gives the very answer, a random one says nothing of it."""
    return [
        row | {"id": f"{row['id']}-{number}", "question": words.format(row["question"])}
        for row in rows
        for number, words in enumerate(("{}", "Please tell me: {}"))
    ]


EXAMPLES: dict[str, Callable[[Row, str], str]] = {
    "content": lambda row, wrong: json.dumps({"answer": wrong}),
    "form": lambda row, wrong: f"I think that it is {row['answer']}.",
}
