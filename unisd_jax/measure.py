"""What is measured of one checkpoint: replies, their grades, and scores beside its base.

Replies and distances are kept by all that they depend on: what was interrupted goes on where it was, and the base's
replies serve every checkpoint that is compared with it.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from unisd_jax.config import Config
from unisd_jax.data.pipeline import Example
from unisd_jax.data.tasks.base import Grade
from unisd_jax.eval.generation import Replies, Reply, generate_replies
from unisd_jax.eval.grading import grade_all, has_form
from unisd_jax.eval.retention import without_stop
from unisd_jax.eval.scores import Pairs, Sums, distance_sums, logprob_sums
from unisd_jax.experiment import Experiment, require_finite
from unisd_jax.parallel import multihost
from unisd_jax.random import purpose_key
from unisd_jax.resources import Meter, Phase
from unisd_jax.rollout import Sampling
from unisd_jax.subject import (
    Identity,
    Subject,
    distance_identity,
    generation_identity,
    sampling_of,
)
from unisd_jax.teacher import student_messages
from unisd_jax.teacher.cache import cache_folder, open_cache, read_records


class Graded(NamedTuple):
    """A reply with its text, its grade, and the release's where the task has that."""

    reply: Reply
    text: str
    grade: Grade
    released: Grade | None


@dataclasses.dataclass(frozen=True)
class Measured:
    """Everything known of one checkpoint's replies; lists are by row, `samples` rows for each item in turn.

    `gold` are the log-prob sums of each item's gold reply. `retried` are the rows that were sampled again, with the
    last reply. `distances` are of the first replies and the base, None without one.
    """

    rows: list[Graded]
    gold: list[Sums]
    retried: dict[int, Graded]
    distances: list[Sums] | None = None


def measure(
    experiment: Experiment, subject: Subject, meter: Meter, *, base: Subject | None = None, retries: int = 0
) -> Measured:
    """Generates, grades and scores the replies of `subject` to all test items.

    Raises:
      UserError: the weights give numbers that are not finite.
    """
    rows = sample_rows(experiment)
    with meter.phase("generation") as phase:
        replies = _generate(experiment, subject, rows, phase)
    graded = _grade(experiment, rows, replies, meter)
    retried = {}
    if retries:
        retried = _retry(experiment, subject, rows, graded, retries, meter)
    with meter.phase("scoring") as phase:
        gold = _scored(experiment, [(example.student, example.gold) for example in experiment.test])
        fit = logprob_sums(subject.network, gold, **_batching(experiment))
        _count(phase, gold)
        require_finite("the log-prob of the gold replies", sum(row["logp"] for row in fit), 0)
    distances = None
    if base is not None:
        distances = distances_on(experiment, subject, base, replies, meter, replies_of=subject)
    return Measured(graded, fit, retried, distances)


def distances_on(
    experiment: Experiment,
    subject: Subject,
    base: Subject,
    replies: Sequence[Reply],
    meter: Meter,
    *,
    replies_of: Subject,
) -> list[Sums]:
    """How far `subject` and `base` are apart on the replies of one of them.

    Raises:
      UserError: a distance is not finite.
    """
    identity = distance_identity(experiment, subject, base, replies_of)
    rows = zip(sample_rows(experiment), replies, strict=True)
    pairs = _scored(experiment, [(row.student, reply.ids) for row, reply in rows])
    with (
        meter.phase("scoring") as phase,
        kept(experiment.config, "distances", identity, len(replies)) as (known, add),
    ):

        def record(new: Mapping[int, Sums]) -> None:
            for sums in new.values():
                require_finite("the distance from the base", sum(sums.values()), 0)
            _count(phase, Pairs(*([column[row] for row in new] for column in pairs)), times=2)
            add(new)

        return distance_sums(
            subject.network, base.network, pairs, known=known, record=record, **_batching(experiment)
        )  # fmt: skip


def option_logprobs(experiment: Experiment, subject: Subject, meter: Meter) -> list[list[float]]:
    """For each item of a multiple-choice task, the log-prob of the reply that names each option (nats)."""
    pairs, numbers = [], []
    for number, example in enumerate(experiment.test):
        replies = option_replies(experiment, example)
        pairs += [(example.student, ids) for ids in replies]
        numbers += [number] * len(replies)
    with meter.phase("options") as phase:
        scored = Pairs(*zip(*pairs, strict=True))
        sums = logprob_sums(subject.network, scored, **_batching(experiment))
        _count(phase, scored)
    found: list[list[float]] = [[] for _ in experiment.test]
    for number, row in zip(numbers, sums, strict=True):
        found[number].append(row["logp"])
    return found


def option_replies(experiment: Experiment, example: Example) -> list[list[int]]:
    """The token ids of the reply that names each option."""
    replies = experiment.task.options(example.item)
    messages = student_messages(example.item.prompt, example.item.earlier)
    ids = experiment.chat.replies_ids([messages] * len(replies), replies, [example.student] * len(replies))
    return [reply.tolist() for reply in ids]


def sample_rows(experiment: Experiment) -> list[Example]:
    """Every test item as often as replies are sampled to it."""
    return [example for example in experiment.test for _ in range(experiment.config.measure.samples)]


def _generate(experiment: Experiment, subject: Subject, rows: Sequence[Example], phase: Phase) -> list[Reply]:
    identity = generation_identity(experiment, subject)
    with kept(experiment.config, "generations", identity, len(rows)) as cached:
        if len(cached[0]) < len(rows) or experiment.config.measure.retries:
            subject.engine.publish(subject.network.params, 0)
        return _replies(experiment, subject, rows, sampling_of(experiment), cached, phase)


def _replies(
    experiment: Experiment,
    subject: Subject,
    rows: Sequence[Example],
    sampling: Sampling,
    cached: tuple[dict[int, Any], Callable[[Replies], None]],
    phase: Phase,
    *,
    attempt: int = 0,
) -> list[Reply]:
    """A reply to each row; only what is generated now counts in `phase`."""
    known, add = cached

    def record(new: Replies) -> None:
        _count(phase, Pairs([rows[row].student for row in new], [reply.ids for reply in new.values()]))
        add(new)

    return generate_replies(
        subject.engine, [row.student for row in rows], sampling,
        key=purpose_key(experiment.config.seed, attempt, "evaluation"), version=0,
        known={row: Reply(*value) for row, value in known.items()}, record=record, **_sizes(experiment),
    )  # fmt: skip


def _grade(experiment: Experiment, rows: Sequence[Example], replies: Sequence[Reply], meter: Meter) -> list[Graded]:
    """Grades in the main process: what runs code may not come out alike in all of them."""
    task, items = experiment.task, [row.item for row in rows]
    texts = [experiment.chat.text(reply.ids) for reply in replies]
    runs_code = task.family == "code"

    scorers = [task.grade, *([task.released] if task.released else [])]
    started = time.monotonic()
    with meter.phase("grading"):
        grades, *released = multihost.from_main(lambda: grade_all(scorers, texts, items, parallel=runs_code))
    seconds = time.monotonic() - started
    if runs_code and texts:
        speed = len(texts) / seconds
        print(f"ran the code of {len(texts)} replies in {seconds:.1f} s, {speed:.0f} a second", flush=True)
    beside = released[0] if released else [None] * len(texts)
    return [Graded(*row) for row in zip(replies, texts, grades, beside, strict=True)]


def _retry(
    experiment: Experiment,
    subject: Subject,
    rows: Sequence[Example],
    first: Sequence[Graded],
    retries: int,
    meter: Meter,
) -> dict[int, Graded]:
    """Samples again, warmer, what has not the form that was asked for; a new reply replaces the older, good or bad."""
    options = experiment.config.measure
    warmer = max(options.temperature, options.retry_temperature)
    sampling = dataclasses.replace(sampling_of(experiment), temperature=warmer)
    identity = generation_identity(experiment, subject)
    last, found = dict(enumerate(first)), {}
    for attempt in range(1, retries + 1):
        failed = [row for row, graded in last.items() if not has_form(graded.grade)]
        if not failed:
            break
        again: Identity = {"attempt": attempt, "rows": failed, "temperature": warmer, "seed": experiment.config.seed}
        some = [rows[row] for row in failed]
        with (
            meter.phase("retries") as phase,
            kept(experiment.config, "retries", identity | again, len(failed)) as cached,
        ):
            replies = _replies(experiment, subject, some, sampling, cached, phase, attempt=attempt)
        last = dict(zip(failed, _grade(experiment, some, replies, meter), strict=True))
        found |= last
    return found


def _scored(experiment: Experiment, pairs: Sequence[tuple]) -> Pairs:
    prompts, completions = zip(*pairs, strict=True)
    if experiment.config.measure.score_stop:
        return Pairs(prompts, completions)
    return Pairs(prompts, without_stop(completions, experiment.chat.stop_ids))


@contextmanager
def kept(
    config: Config, kind: str, identity: Identity, total: int
) -> Iterator[tuple[dict[int, Any], Callable[[Mapping[int, Any]], None]]]:
    """What is known by place, and a function that adds to it; the main process writes, the others read."""
    root = Path(config.teacher.cache_dir)
    if not multihost.is_main():
        multihost.wait_for_all(f"what is known of {kind}")
        known = read_records(cache_folder(root, kind, identity))
        multihost.wait_for_all(f"all have read what is known of {kind}")
        yield {int(place): value for place, value in known.items()}, lambda new: None
        return
    with open_cache(root, kind, identity, total) as cache:
        multihost.wait_for_all(f"what is known of {kind}")
        multihost.wait_for_all(f"all have read what is known of {kind}")
        if cache.records:
            print(f"{kind}: {len(cache.records)} of {total} are there already", flush=True)

        def add(new: Mapping[int, Any]) -> None:
            cache.add({str(place): value for place, value in new.items()})

        yield {int(place): value for place, value in cache.records.items()}, add
        if not cache.complete:
            cache.finish()


def _count(phase: Phase, pairs: Pairs, *, times: int = 1) -> None:
    prompts, completions = (times * sum(map(len, column)) for column in pairs)
    phase.add(prompt_tokens=prompts, completion_tokens=completions)


def _sizes(experiment: Experiment) -> dict[str, int]:
    config = experiment.config
    return {"batch_size": config.evaluation.batch_size, "length_multiple": config.data.length_multiple}


def _batching(experiment: Experiment) -> dict[str, int]:
    return _sizes(experiment) | {"pad_id": experiment.chat.pad_id}
