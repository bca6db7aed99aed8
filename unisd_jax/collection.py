"""From a batch of examples to its views: who samples the completions, and what the teacher is shown beside them.

Every host does this for its own rows of the batch; the arrays that come out are those of the whole batch.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray

from unisd_jax.data.batching import pad_completions, pad_contexts, pad_prompts
from unisd_jax.data.pipeline import Example
from unisd_jax.experiment import Experiment, student_params
from unisd_jax.parallel import multihost
from unisd_jax.parallel.sharding import batch_sharding
from unisd_jax.random import purpose_key
from unisd_jax.resources import Phase
from unisd_jax.rollout import Rollout
from unisd_jax.teacher import teacher_messages
from unisd_jax.types import Completions, Contexts, Prompts, TrainState, Views


class OwnAnswers(NamedTuple):
    """The student's majority answers: the teacher's prompt of each row, and the share of samples that gave the answer.

    A row without enough agreement has its own question as prompt and is not `accepted`.
    """

    prompts: list[Sequence[int]]
    shares: list[float]
    accepted: np.ndarray


def collect_views(
    experiment: Experiment, state: TrainState, examples: Sequence[Example], phase: Phase | None = None
) -> tuple[Views, dict[str, float]]:
    """The views of one batch, and what the host knows of how they came about. `examples` are this host's rows.

    What is generated is counted in `phase`.
    """
    config, step, phase = experiment.config, int(state.step), phase or Phase()
    (bucket,) = multihost.largest(experiment.buckets.index(examples))
    lengths = experiment.buckets.lengths[bucket]
    student = _prompts(experiment, [example.student for example in examples], lengths.student)
    own, labelless = _samples_from_student(experiment, step), config.teacher.condition == "self"
    params = student_params(experiment, state) if own or labelless else None
    completions, logps, metrics = _completions(experiment, params if own else None, student, examples, step, phase)
    if config.objective.loss == "nll":
        return Views(student, None, completions, logps), metrics
    prompts = [example.teacher for example in examples]
    if labelless:
        answers = own_answers(experiment, params, examples, step, lengths.student, phase)
        lengths = lengths._replace(teacher=_own_answer_length(experiment, lengths.student, answers.prompts))
        (accepted,) = _whole(experiment, (answers.accepted,))
        prompts, completions = answers.prompts, completions._replace(mask=completions.mask & accepted[:, None])
        metrics["self_agreement"] = multihost.mean(answers.shares)
        metrics["self_accepted"] = multihost.mean(answers.accepted)
    contexts = negative = None
    if examples[0].contexts:
        rows = [example.contexts for example in examples]
        contexts = Contexts(*_whole(experiment, pad_contexts(rows, **_padding(experiment, lengths.contexts))))
    if examples[0].negative is not None:
        negative = _prompts(experiment, [example.negative for example in examples], lengths.negative)
    teacher = _prompts(experiment, prompts, lengths.teacher)
    return Views(student, teacher, completions, logps, contexts, negative), metrics


def own_answers(
    experiment: Experiment,
    params: dict[str, Any],
    examples: Sequence[Example],
    step: int,
    length: int,
    phase: Phase | None = None,
) -> OwnAnswers:
    """Samples `teacher.self_samples` replies to each question and takes one that gives the most frequent answer.

    No label is read: the task only brings a reply into the form in which answers are compared.
    """
    config, chat, task = experiment.config, experiment.chat, experiment.task
    number = config.teacher.self_samples
    student = _prompts(experiment, [example.student for example in examples for _ in range(number)], length)
    experiment.sampler.publish(params, step)
    key = purpose_key(config.seed, step, "own_answers")
    rollout = _generate(experiment, student, key, step, phase or Phase())
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


def _generate(experiment: Experiment, student: Prompts, key: PRNGKeyArray, version: int, phase: Phase) -> Rollout:
    rollout = experiment.sampler.generate(student.ids, student.mask, experiment.sampling, key=key, version=version)
    phase.add(prompt_tokens=int(jnp.sum(student.mask)), completion_tokens=int(jnp.sum(rollout.mask)))
    return rollout


def _completions(
    experiment: Experiment, params, student: Prompts, examples: Sequence[Example], step: int, phase: Phase
):
    """(Completions, the sampler's log-probs or None, metrics): sampled under `params` or the base, or gold."""
    config, chat = experiment.config, experiment.chat
    metrics = {} if config.rollout.on_policy_share == 1 else {"on_policy": float(params is not None)}
    if params is None and config.rollout.source != "base":
        gold, length = [example.gold for example in examples], config.rollout.max_completion_length
        padded = pad_completions(gold, pad_id=chat.pad_id, length=length)
        completions = Completions(*_whole(experiment, padded))
        return completions, None, metrics | _lengths(completions.mask, jnp.ones(completions.mask.shape[:1], bool))
    own = params is not None
    experiment.sampler.publish(params if own else experiment.base, step)
    key = purpose_key(config.seed, step, "rollout")
    rollout = _generate(experiment, student, key, step, phase)
    mask, stopped = jnp.asarray(rollout.mask), jnp.asarray(rollout.stopped)
    metrics |= _lengths(mask, stopped)
    if config.rollout.mask_truncated_completions:
        mask = mask & stopped[:, None]
    if config.rollout.min_completion_length > 0:
        mask = mask & (mask.sum(axis=1) >= config.rollout.min_completion_length)[:, None]
    return Completions(rollout.ids, mask), rollout.logps if own else None, metrics


def _lengths(mask: Bool[Array, "B T"], stopped: Bool[Array, "B"]) -> dict[str, float]:
    """Of the completions as they are, before any is left out of the loss."""
    eos_rate = float(jnp.mean(stopped))
    length = float(jnp.mean(jnp.sum(mask, axis=1)))
    return {"completion_length": length, "eos_rate": eos_rate, "truncated_share": 1.0 - eos_rate}


def _prompts(experiment: Experiment, own: Sequence[Sequence[int]], length: int) -> Prompts:
    return Prompts(*_whole(experiment, pad_prompts(own, **_padding(experiment, length))))


def _own_answer_length(experiment: Experiment, question: int, prompts: Sequence[Sequence[int]]) -> int:
    """Room for a question with a reply of any length and the words between; more only where that is not enough."""
    config = experiment.config
    usual = min(config.data.max_prompt_length, question + config.rollout.max_completion_length + 64)
    (longest,) = multihost.largest(max(map(len, prompts)))
    return usual if longest <= usual else config.data.max_prompt_length


def _padding(experiment: Experiment, length: int) -> dict[str, int]:
    multiple = experiment.config.data.length_multiple
    return {"pad_id": experiment.chat.pad_id, "multiple": multiple, "at_least": length}


def _whole(experiment: Experiment, own: tuple[np.ndarray, ...]) -> tuple[Array, ...]:
    """The batch's arrays, of which this host has its rows."""
    sharding, size = batch_sharding(experiment.mesh), experiment.config.train.batch_size
    share = size / len(multihost.own_rows(sharding, size))
    return tuple(multihost.join_rows(part, sharding, round(share * len(part))) for part in own)
