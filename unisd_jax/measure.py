"""What is measured of one checkpoint: replies, their grades, and scores beside its base.

Replies and scores are kept by all that they depend on: what was interrupted goes on where it was, and the base's
replies serve every checkpoint that is compared with it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unisd_jax.config import Config, to_dict
from unisd_jax.data.chat import load_chat
from unisd_jax.data.pipeline import Example
from unisd_jax.data.tasks.base import Grade
from unisd_jax.errors import ConfigError
from unisd_jax.eval.generation import Reply, generate_replies
from unisd_jax.eval.grading import grade_all
from unisd_jax.eval.retention import without_stop
from unisd_jax.eval.scores import Network, Pairs, Sums, distance_sums, logprob_sums
from unisd_jax.experiment import Experiment, new_state, student_params
from unisd_jax.inputs import load_model
from unisd_jax.models import local_checkpoint
from unisd_jax.parallel import multihost
from unisd_jax.random import purpose_key
from unisd_jax.resources import Meter
from unisd_jax.rollout import JaxSampler, RolloutEngine, Sampling
from unisd_jax.teacher.cache import cache_folder, open_cache, read_records, text_hash
from unisd_jax.teacher.weights_hash import adapter_hash, weights_hash

FORMAT = 1
Identity = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network, the engine that generates with it, and `identity`: what its weights are, whatever their path."""

    network: Network
    engine: RolloutEngine
    identity: Identity


@dataclasses.dataclass(frozen=True)
class Measured:
    """Everything known of one checkpoint's replies; lists are by row, `samples` rows for each item in turn.

    `retried` are the rows that were sampled again, with the last reply. `distances` are of these replies and the base,
    None without one.
    """

    replies: list[Reply]
    texts: list[str]
    grades: list[Grade]
    released: list[Grade] | None
    gold: list[Sums]
    retried: dict[int, tuple[Reply, Grade]]
    distances: list[Sums] | None = None


def adapted_and_base(experiment: Experiment) -> tuple[Subject, Subject | None]:
    """The checkpoint to be measured and the one it was trained from, where that is known.

    Raises:
      ConfigError: `measure.base` has another vocabulary, tokenizer or chat template.
      UserError: a checkpoint cannot be read.
    """
    config, adapter = experiment.config, experiment.config.model.lora.start
    own = Network(experiment.model, experiment.base)
    identity = _weights(config, experiment.checkpoint)
    base = None
    if adapter is not None:
        base = Subject(own, experiment.sampler, identity)
        own = Network(experiment.model, student_params(experiment, new_state(experiment)))
        identity = identity | {"adapter": adapter_hash(adapter, config.teacher.cache_dir)}
    if config.measure.base is not None:
        base = _other(experiment, config.measure.base)
    return Subject(own, JaxSampler(experiment.model), identity), base


def measure(
    experiment: Experiment, subject: Subject, meter: Meter, *, base: Subject | None = None, retries: int = 0
) -> Measured:
    """Generates, grades and scores the replies of `subject` to all test items."""
    task, chat = experiment.task, experiment.chat
    rows = sample_rows(experiment)
    with meter.phase("generation") as phase:
        replies = _generate(experiment, subject, rows)
        phase.add(
            prompt_tokens=sum(len(row.student) for row in rows),
            completion_tokens=sum(len(reply.ids) for reply in replies),
        )
    items = [row.item for row in rows]
    with meter.phase("grading"):
        texts = [chat.text(reply.ids) for reply in replies]
        parallel = task.family == "code"
        grades = grade_all(task.grade, texts, items, parallel=parallel)
        released = grade_all(task.released, texts, items, parallel=parallel) if task.released else None
    if parallel:
        seconds = meter.seconds("grading")
        print(
            f"ran the code of {len(texts)} replies in {seconds:.1f} s, {len(texts) / seconds:.0f} a second", flush=True
        )
    retried = {}
    if retries:
        with meter.phase("retries") as phase:
            retried = _retry(experiment, subject, rows, grades, phase)
    with meter.phase("scoring") as phase:
        own = [(row.student, reply.ids) for row, reply in zip(rows, replies, strict=True)]
        gold = [(row.student, row.gold) for row in experiment.test]
        fit = logprob_sums(subject.network, _scored(experiment, gold), **_batching(experiment))
        distances = None
        scored = gold
        if base is not None:
            distances = _distances(experiment, subject, base, own, replies_of=subject)
            scored = [*gold, *own, *own]
        phase.add(prompt_tokens=_tokens(scored, 0), completion_tokens=_tokens(scored, 1))
    return Measured(replies, texts, grades, released, fit, retried, distances)


def reverse_distances(
    experiment: Experiment, subject: Subject, base: Subject, replies: Sequence[Reply], meter: Meter
) -> list[Sums]:
    """The same distances along the base's own replies."""
    pairs = [(row.student, reply.ids) for row, reply in zip(sample_rows(experiment), replies, strict=True)]
    with meter.phase("scoring") as phase:
        phase.add(prompt_tokens=2 * _tokens(pairs, 0), completion_tokens=2 * _tokens(pairs, 1))
        return _distances(experiment, subject, base, pairs, replies_of=base)


def option_logprobs(experiment: Experiment, subject: Subject, meter: Meter) -> list[list[float]]:
    """For each item of a multiple-choice task, the log-prob of the reply that names each option (nats)."""
    chat, pairs, numbers = experiment.chat, [], []
    for number, example in enumerate(experiment.test):
        for reply in experiment.task.options(example.item):
            messages = [*example.item.earlier, {"role": "user", "content": example.item.prompt}]
            pairs.append((example.student, chat.reply_ids(messages, reply)))
            numbers.append(number)
    with meter.phase("options") as phase:
        phase.add(prompt_tokens=_tokens(pairs, 0), completion_tokens=_tokens(pairs, 1))
        prompts, completions = zip(*pairs, strict=True)
        sums = logprob_sums(subject.network, Pairs(prompts, completions), **_batching(experiment))
    found: list[list[float]] = [[] for _ in experiment.test]
    for number, row in zip(numbers, sums, strict=True):
        found[number].append(row["logp"])
    return found


def sample_rows(experiment: Experiment) -> list[Example]:
    """Every test item as often as replies are sampled to it."""
    return [example for example in experiment.test for _ in range(experiment.config.measure.samples)]


def generation_identity(experiment: Experiment, subject: Subject) -> Identity:
    """All that the replies of a checkpoint depend on."""
    config, options = experiment.config, experiment.config.measure
    return {
        "format": FORMAT,
        **subject.identity,
        "dtype": config.model.dtype,
        "attention": subject.network.model.attention,
        "mesh": list(experiment.mesh.devices.shape),
        "chat": experiment.chat.identity(),
        "prompts": text_hash([int(token) for token in example.student] for example in experiment.test),
        "sampling": dataclasses.asdict(_sampling(experiment)),
        "samples": options.samples,
        "seed": config.seed if options.temperature > 0 else None,
        "batch_size": config.evaluation.batch_size,
        "length_multiple": config.data.length_multiple,
    }


def result_identity(experiment: Experiment, subject: Subject, base: Subject | None) -> Identity:
    """All that the numbers of an evaluation depend on, the code of the graders included."""
    return {
        "generation": generation_identity(experiment, subject),
        "base": None if base is None else generation_identity(experiment, base),
        "seed": experiment.config.seed,
        "items": text_hash(item_hash(example) for example in experiment.test),
        "form": to_dict(experiment.config)["data"]["form"],
        "measure": {name: getattr(experiment.config.measure, name) for name in _MEASURED},
        "graders": _grader_hash(experiment),
    }


def item_hash(example: Example) -> str:
    """16 digits that tell two items with other prompts, gold replies or answers apart."""
    parts = [[int(token) for token in example.student], example.item.completion, example.item.answer]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


_MEASURED = ("retries", "retry_temperature", "option_likelihood", "score_stop")


def _other(experiment: Experiment, path: str) -> Subject:
    """The checkpoint of `measure.base`."""
    config = experiment.config
    checkpoint = local_checkpoint(path)
    model, params = load_model(config, checkpoint, experiment.mesh)
    chat = load_chat(checkpoint, stop=config.rollout.stop, head_rows=model.config.vocab_size)
    if chat.identity() != experiment.chat.identity() or model.config.vocab_size != experiment.model.config.vocab_size:
        raise ConfigError(
            f"measure.base: {path} has another vocabulary, tokenizer or chat template than {config.model.path}; "
            "expected the checkpoint that it was trained from"
        )
    return Subject(Network(model, params), JaxSampler(model), _weights(config, checkpoint))


def _generate(experiment: Experiment, subject: Subject, rows: Sequence[Example]) -> list[Reply]:
    identity = generation_identity(experiment, subject)
    subject.engine.publish(subject.network.params, 0)
    with _kept(experiment.config, "generations", identity, len(rows)) as (known, add):
        return generate_replies(
            subject.engine, [row.student for row in rows], _sampling(experiment),
            key=purpose_key(experiment.config.seed, 0, "evaluation"), version=0,
            known={row: Reply(*value) for row, value in known.items()}, record=add, **_sizes(experiment),
        )  # fmt: skip


def _retry(
    experiment: Experiment, subject: Subject, rows: Sequence[Example], grades: Sequence[Grade], phase: Any
) -> dict[int, tuple[Reply, Grade]]:
    """Samples again, warmer, what has not the form that was asked for; a new reply replaces the older, good or bad."""
    options, task, chat = experiment.config.measure, experiment.task, experiment.chat
    sampling = dataclasses.replace(
        _sampling(experiment), temperature=max(options.temperature, options.retry_temperature)
    )
    identity = generation_identity(experiment, subject)
    last = dict(enumerate(grades))
    found: dict[int, tuple[Reply, Grade]] = {}
    for attempt in range(1, options.retries + 1):
        failed = [row for row, grade in last.items() if not _has_form(grade)]
        if not failed:
            break
        again = {"round": attempt, "rows": failed, "temperature": sampling.temperature, "seed": experiment.config.seed}
        with _kept(experiment.config, "retries", identity | again, len(failed)) as (known, add):
            replies = generate_replies(
                subject.engine, [rows[row].student for row in failed], sampling,
                key=purpose_key(experiment.config.seed, attempt, "evaluation"), version=0,
                known={row: Reply(*value) for row, value in known.items()}, record=add, **_sizes(experiment),
            )  # fmt: skip
        phase.add(
            prompt_tokens=sum(len(rows[row].student) for row in failed),
            completion_tokens=sum(len(reply.ids) for reply in replies),
        )
        texts = [chat.text(reply.ids) for reply in replies]
        graded = grade_all(task.grade, texts, [rows[row].item for row in failed], parallel=task.family == "code")
        found |= dict(zip(failed, zip(replies, graded, strict=True), strict=True))
        last = {row: grade for row, (_, grade) in found.items()}
    return found


def _has_form(grade: Grade) -> bool:
    return float(grade.get("form", grade["exact"])) > 0


def _distances(
    experiment: Experiment, subject: Subject, base: Subject, pairs: Sequence[tuple], *, replies_of: Subject
) -> list[Sums]:
    identity = {
        "replies": generation_identity(experiment, replies_of),
        "adapted": subject.identity,
        "base": base.identity,
        "score_stop": experiment.config.measure.score_stop,
    }
    scored = _scored(experiment, pairs)
    with _kept(experiment.config, "distances", identity, len(pairs)) as (known, add):
        keep = {"known": known, "record": add}
        return distance_sums(subject.network, base.network, scored, **keep, **_batching(experiment))


def _scored(experiment: Experiment, pairs: Sequence[tuple]) -> Pairs:
    prompts, completions = zip(*pairs, strict=True)
    if experiment.config.measure.score_stop:
        return Pairs(prompts, completions)
    return Pairs(prompts, without_stop(completions, experiment.chat.stop_ids))


@contextmanager
def _kept(
    config: Config, kind: str, identity: Identity, total: int
) -> Iterator[tuple[dict[int, Any], Callable[[Mapping[int, Any]], None]]]:
    """What is known by place, and a function that adds to it; the main process writes, the others read."""
    root = Path(config.teacher.cache_dir)
    if not multihost.is_main():
        multihost.wait_for_all(f"what is known of {kind}")
        known = read_records(cache_folder(root, kind, identity))
        yield {int(place): value for place, value in known.items()}, lambda new: None
        return
    with open_cache(root, kind, identity, total) as cache:
        multihost.wait_for_all(f"what is known of {kind}")
        if cache.records and not cache.complete:
            print(f"{kind}: going on after {len(cache.records)} of {total}", flush=True)

        def add(new: Mapping[int, Any]) -> None:
            cache.add({str(place): value for place, value in new.items()})

        yield {int(place): value for place, value in cache.records.items()}, add
        if not cache.complete:
            cache.finish()


def _weights(config: Config, checkpoint: Path) -> Identity:
    return {"weights": weights_hash(checkpoint, config.teacher.cache_dir)}


def _grader_hash(experiment: Experiment) -> str:
    """The hash of the code that grades: a task of one's own is a file that may change."""
    package = Path(__file__).parent
    files = [*package.glob("data/tasks/*.py"), *package.glob("eval/*.py"), *package.glob("sandbox*.py")]
    files += [path] if (path := Path(experiment.config.data.task)).suffix == ".py" else []
    return text_hash(file.read_text(encoding="utf-8") for file in sorted(set(files)))


def _sampling(experiment: Experiment) -> Sampling:
    options, chat = experiment.config.measure, experiment.chat
    return Sampling(
        experiment.config.evaluation.max_completion_length, chat.stop_ids, chat.pad_id, options.temperature,
        options.top_p, options.top_k, options.min_p, chat.vocab_size,
    )  # fmt: skip


def _sizes(experiment: Experiment) -> dict[str, int]:
    config = experiment.config
    return {"batch_size": config.evaluation.batch_size, "length_multiple": config.data.length_multiple}


def _batching(experiment: Experiment) -> dict[str, int]:
    return _sizes(experiment) | {"pad_id": experiment.chat.pad_id}


def _tokens(pairs: Sequence[tuple], column: int) -> int:
    return sum(len(pair[column]) for pair in pairs)
