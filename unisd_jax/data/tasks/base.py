"""What a task is: where its rows are published, how one becomes an item, how a reply to it is read and graded."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

# The options themselves are how tasks are told; `configs/base.yaml` explains each one (`data.form`).
from unisd_jax.config_options import FormOptions as Form
from unisd_jax.data.rows import Row

Family = Literal["text", "choice", "code", "tools"]
Message = Mapping[str, str]
# How a reply is scored: numbers are averaged over the replies, strings are categories that are counted.
Grade = dict[str, float | str]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Item(NamedTuple):
    """One question: `prompt` is the user message, `completion` the gold reply and demonstration, `answer` is graded.

    `question` is what is asked without the words on how to reply: what other items are shown of it, and what
    similarity is measured on. `same` tells two questions apart whatever the order of their options. `earlier` are the
    messages before the prompt. Only where the data have them: `context` is what the teacher sees instead of the gold
    reply, `negative` a wrong reply, `example` what other items are shown in place of the gold reply. `details` holds
    what only the task itself reads (tests, options).
    """

    id: str
    prompt: str
    completion: str
    answer: str
    negative: str | None = None
    details: Mapping[str, Any] = _NOTHING
    question: str = ""
    same: str = ""
    earlier: tuple[Message, ...] = ()
    context: str | None = None
    example: str | None = None


class Source(NamedTuple):
    """Where the rows are published: a hub `repository` at a pinned `revision` (None: none is known), and its splits.

    A split is called "split", or "config/split" where the data have configs. `sizes` are the rows of each split in that
    revision. `folders` are the names under which each config ("" without) may lie below `data.path`. `tfds` names the
    splits that tensorflow-datasets has too, as "builder:version/split", with the same fields in another order of rows.
    """

    repository: str
    revision: str | None
    sizes: Mapping[str, int]
    folders: Mapping[str, tuple[str, ...]]
    tfds: Mapping[str, str] = _NOTHING


def whole_text(text: str) -> str | None:
    """The answer of a free-form reply: all of it, case and runs of white space aside; None if it is empty."""
    return " ".join(text.casefold().split()) or None


class Task(NamedTuple):
    """A benchmark.

    `make(row, position, form)` builds the item of a row; `position` is the row's place among those that `skip`, which
    gives a reason or None, lets pass. `grade(text, item)` scores a reply: fractions in [0, 1], always with the key
    "exact", and strings, which are categories to be counted. `parse(text, item)` is the canonical answer a reply gives,
    None if it gives none; two replies with the same value agree. `train` and `test` are the splits read where the
    configuration names none; a task without `train` is for evaluation only. `answers` are the forms of reply it can ask
    for. `family` says how wrong replies are made. `embedded(split)` is the package's own file. `sound_gold`: a gold
    reply must be graded as right, else its item is not trained on. `released(text, item)` scores the same reply as the
    release does, its slips included, with keys like those of `grade`. `options(item)` is one reply for each option, in
    the order of the letters, which differ in the letter alone: their likelihoods can be compared.
    """

    name: str
    make: Callable[[Row, int, Form], Item]
    grade: Callable[[str, Item], Grade]
    parse: Callable[[str, Item], str | None] = lambda text, item: whole_text(text)
    family: Family = "text"
    source: Source | None = None
    train: str | None = "train"
    test: str = "test"
    answers: tuple[str, ...] = ("free",)
    skip: Callable[[Row], str | None] = lambda row: None
    embedded: Callable[[str], Path] | None = None
    sound_gold: bool = True
    released: Callable[[str, Item], Grade] | None = None
    options: Callable[[Item], list[str]] | None = None


def identity(item: Item) -> str:
    """What two items have in common exactly if they ask the same: case and white space do not count."""
    return whole_text(item.same or item.question or item.prompt) or ""
