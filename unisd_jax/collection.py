"""From a batch of examples to its views: who samples the completions, and what the teacher is shown beside them.

Every host does this for its own rows of the batch; the arrays that come out are those of the whole batch.
"""

import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray

from unisd_jax.data.batching import pad_completions, pad_contexts, pad_prompts
from unisd_jax.data.buckets import Lengths
from unisd_jax.data.pipeline import Example
from unisd_jax.experiment import Experiment
from unisd_jax.models import Lora
from unisd_jax.parallel import multihost
from unisd_jax.parallel.sharding import batch_sharding
from unisd_jax.random import purpose_key
from unisd_jax.resources import Phase
from unisd_jax.rollout import PendingRollout, Rollout
from unisd_jax.rollout.protocol import require_version
from unisd_jax.step import weights
from unisd_jax.teacher import teacher_messages
from unisd_jax.types import Completions, Contexts, Prompts, TrainState, Views


class Batch(NamedTuple):
    """A batch whose completions are being sampled: for the update `step`, by the weights of `version`.

    `sampled` is None where the completions are gold, `answers` where the teacher is not shown the student's own.
    """

    step: int
    version: int
    examples: Sequence[Example]
    lengths: Lengths
    student: Prompts
    own: bool
    sampled: PendingRollout | None
    answers: PendingRollout | None


class OwnAnswers(NamedTuple):
    """The student's majority answers: the teacher's prompt of each row, and the share of samples that gave the answer.

    A row without enough agreement has its own question as prompt and is not `accepted`.
    """

    prompts: list[Sequence[int]]
    shares: list[float]
    accepted: np.ndarray


def begin_batch(
    experiment: Experiment, state: TrainState, examples: Sequence[Example], step: int | None = None
) -> Batch:
    """Starts sampling for the update `step` (the next one if None) from the weights of `state`.

    `examples` are this host's rows.
    """
    config, version = experiment.config, int(state.step)
    step = version if step is None else step
    batch = unsampled(experiment, examples, step, version)
    labelless = config.teacher.condition == "self"
    sampler, sampled, answers = experiment.sampler, None, None
    if batch.own or labelless:
        sampler.publish(*policy(experiment, state))
    if labelless:
        student = _prompts(experiment, repeated(experiment, examples), batch.lengths.student)
        answers = _begin(experiment, student, purpose_key(config.seed, step, "own_answers"), version)
    if not batch.own and config.rollout.source == "base":
        sampler.publish(experiment.base, version)
    if batch.own or config.rollout.source == "base":
        sampled = _begin(experiment, batch.student, purpose_key(config.seed, step, "rollout"), version)
    return batch._replace(sampled=sampled, answers=answers)


def unsampled(experiment: Experiment, examples: Sequence[Example], step: int, version: int) -> Batch:
    """The batch of the update `step`, of which nothing is being sampled."""
    (bucket,) = multihost.largest(experiment.buckets.index(examples))
    lengths = experiment.buckets.lengths[bucket]
    student = _prompts(experiment, [example.student for example in examples], lengths.student)
    return Batch(step, version, examples, lengths, student, _samples_from_student(experiment, step), None, None)


def policy(experiment: Experiment, state: TrainState) -> tuple[dict[str, Any], int, Lora | None]:
    """The student's (weights, version, adapter), in arrays that outlive the update of `state`."""
    params, lora = weights(state.student, experiment.base)
    if experiment.config.rollout.staleness > 0:
        reused = {id(leaf) for leaf in jax.tree.leaves(state)}
        params, lora = jax.tree.map(lambda leaf: jnp.copy(leaf) if id(leaf) in reused else leaf, (params, lora))
    return params, int(state.step), lora


def finish_batch(experiment: Experiment, batch: Batch, phase: Phase | None = None) -> tuple[Views, dict[str, float]]:
    """The views of a batch once its completions are there, and what the host knows of how they came about.

    What was generated is counted in `phase`.

    Raises:
      StaleWeights: an engine answered with other weights than it was asked to.
    """
    config, examples, phase = experiment.config, batch.examples, phase or Phase()
    begun = time.monotonic()
    for rollout, times in ((batch.sampled, 1), (batch.answers, config.teacher.self_samples)):
        if rollout is not None:
            found = jax.block_until_ready(rollout.result())
            require_version(found.policy_version, batch.version)
            prompt_tokens = times * int(jnp.sum(batch.student.mask))
            phase.add(prompt_tokens=prompt_tokens, completion_tokens=int(jnp.sum(found.mask)))
    waited = time.monotonic() - begun
    completions, logps, metrics = _completions(experiment, batch)
    metrics |= {"seconds_waiting": waited, "policy_version": batch.version}
    if config.objective.loss == "nll":
        return Views(batch.student, None, completions, logps), metrics
    prompts, lengths = [example.teacher for example in examples], batch.lengths
    if batch.answers is not None:
        answers = own_answers(experiment, batch.answers.result(), examples)
        lengths = lengths._replace(teacher=_own_answer_length(experiment, lengths.student, answers.prompts))
        (accepted,) = whole(experiment, (answers.accepted,))
        prompts, completions = answers.prompts, completions._replace(mask=completions.mask & accepted[:, None])
        metrics["self_agreement"] = multihost.mean(answers.shares)
        metrics["self_accepted"] = multihost.mean(answers.accepted)
    contexts = negative = None
    if examples[0].contexts:
        rows = [example.contexts for example in examples]
        contexts = Contexts(*whole(experiment, pad_contexts(rows, **_padding(experiment, lengths.contexts))))
    if examples[0].negative is not None:
        negative = _prompts(experiment, [example.negative for example in examples], lengths.negative)
    teacher = _prompts(experiment, prompts, lengths.teacher)
    return Views(batch.student, teacher, completions, logps, contexts, negative), metrics


def repeated(experiment: Experiment, examples: Sequence[Example]) -> list[Sequence[int]]:
    """The prompts from which own answers are sampled, each as often as there are samples."""
    return [example.student for example in examples for _ in range(experiment.config.teacher.self_samples)]


def own_answers(experiment: Experiment, rollout: Rollout, examples: Sequence[Example]) -> OwnAnswers:
    """Of the `teacher.self_samples` replies to each question, one that gives the most frequent answer.

    No label is read: the task only brings a reply into the form in which answers are compared.
    """
    config, chat, task = experiment.config, experiment.chat, experiment.task
    number = config.teacher.self_samples
    rows = multihost.own_rows(batch_sharding(experiment.mesh), config.train.batch_size * number)
    ids, mask, finished = (multihost.gather(x)[rows] for x in (rollout.ids, rollout.mask, rollout.stopped))
    sampled = [[int(token) for token in row[kept]] for row, kept in zip(ids, mask, strict=True)]
    prompts, shares, accepted = [], [], []
    for index, example in enumerate(examples):
        own = range(index * number, (index + 1) * number)
        texts = [chat.text(sampled[row]) for row in own if finished[row]]
        reply, share = majority([(text, task.parse(text, example.item)) for text in texts], number)
        prompt = None
        if reply is not None and share >= config.teacher.self_min_agreement:
            question, placement = example.item.prompt, config.teacher.placement
            messages = teacher_messages(
                question, reply, condition="self", placement=placement, earlier=example.item.earlier
            )
            prompt = chat.prompt_ids(messages)
        accepted.append(prompt is not None and len(prompt) <= config.data.max_prompt_length)
        prompts.append(prompt if accepted[-1] else example.student)
        shares.append(share)
    return OwnAnswers(prompts, shares, np.array(accepted))


def majority(replies: Sequence[tuple[str, str | None]], number: int) -> tuple[str | None, float]:
    """The first reply that gives the most frequent answer, and that answer's share of `number` samples."""
    counts = Counter(answer for _, answer in replies if answer is not None)
    if not counts:
        return None, 0.0
    answer, count = counts.most_common(1)[0]
    return next(text for text, given in replies if given == answer), count / number


def _samples_from_student(experiment: Experiment, step: int) -> bool:
    """Whether this step's completions are the student's; with a mixture the seed decides step by step."""
    options = experiment.config.rollout
    if options.source != "student" or options.on_policy_share == 1:
        return options.source == "student"
    return random.Random(f"{experiment.config.seed}/mixture/{step}").random() < options.on_policy_share


def _begin(experiment: Experiment, student: Prompts, key: PRNGKeyArray, version: int) -> PendingRollout:
    return experiment.sampler.begin(student.ids, student.mask, experiment.sampling, key=key, version=version)


def _completions(experiment: Experiment, batch: Batch) -> tuple[Completions, Any, dict[str, float]]:
    """(Completions, the sampler's log-probs or None, metrics): sampled by the student or the base, or gold."""
    config, chat = experiment.config, experiment.chat
    metrics = {} if config.rollout.on_policy_share == 1 else {"on_policy": float(batch.own)}
    if batch.sampled is None:
        gold, length = [example.gold for example in batch.examples], config.rollout.max_completion_length
        padded = pad_completions(gold, pad_id=chat.pad_id, length=length)
        completions = Completions(*whole(experiment, padded))
        return completions, None, metrics | _lengths(completions.mask, jnp.ones(completions.mask.shape[:1], bool))
    rollout = batch.sampled.result()
    mask, stopped = jnp.asarray(rollout.mask), jnp.asarray(rollout.stopped)
    metrics |= _lengths(mask, stopped)
    if config.rollout.mask_truncated_completions:
        mask = mask & stopped[:, None]
    if config.rollout.min_completion_length > 0:
        mask = mask & (mask.sum(axis=1) >= config.rollout.min_completion_length)[:, None]
    return Completions(rollout.ids, mask), rollout.logps if batch.own else None, metrics


def _lengths(mask: Bool[Array, "B T"], stopped: Bool[Array, "B"]) -> dict[str, float]:
    """Of the completions as they are, before any is left out of the loss."""
    eos_rate = float(jnp.mean(stopped))
    length = float(jnp.mean(jnp.sum(mask, axis=1)))
    return {"completion_length": length, "eos_rate": eos_rate, "truncated_share": 1.0 - eos_rate}


def _prompts(experiment: Experiment, own: Sequence[Sequence[int]], length: int) -> Prompts:
    return Prompts(*whole(experiment, pad_prompts(own, **_padding(experiment, length))))


def _own_answer_length(experiment: Experiment, question: int, prompts: Sequence[Sequence[int]]) -> int:
    """Room for a question with a reply of any length and the words between; more only where that is not enough."""
    config = experiment.config
    usual = min(config.data.max_prompt_length, question + config.rollout.max_completion_length + 64)
    (longest,) = multihost.largest(max(map(len, prompts)))
    return usual if longest <= usual else config.data.max_prompt_length


def _padding(experiment: Experiment, length: int) -> dict[str, int]:
    multiple = experiment.config.data.length_multiple
    return {"pad_id": experiment.chat.pad_id, "multiple": multiple, "at_least": length}


def whole(experiment: Experiment, arrays: tuple[np.ndarray, ...], *, all_rows: bool = False) -> tuple[Array, ...]:
    """The batch's arrays, of which `arrays` are this host's rows, or all of them."""
    sharding, size = batch_sharding(experiment.mesh), experiment.config.train.batch_size
    if all_rows:
        arrays = tuple(array[multihost.own_rows(sharding, len(array))] for array in arrays)
    share = size / len(multihost.own_rows(sharding, size))
    return tuple(multihost.join_rows(part, sharding, round(share * len(part))) for part in arrays)
