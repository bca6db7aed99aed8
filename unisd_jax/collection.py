"""From a batch of examples to its views: who samples the completions, and what the teacher is shown beside them."""

import functools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unisd_jax.data.batching import pad_completions, pad_contexts, pad_prompts
from unisd_jax.data.pipeline import Example
from unisd_jax.experiment import Experiment, student_params
from unisd_jax.random import purpose_key
from unisd_jax.teacher import teacher_messages
from unisd_jax.types import Completions, Contexts, Prompts, TrainState, Views


class OwnAnswers(NamedTuple):
    """The student's majority answers: the teacher's prompt of each row, and the share of samples that gave the answer.

    A row without enough agreement has its own question as prompt and is not `accepted`.
    """

    prompts: list[list[int]]
    shares: list[float]
    accepted: np.ndarray


def collect_views(
    experiment: Experiment, state: TrainState, examples: Sequence[Example]
) -> tuple[Views, dict[str, float]]:
    """The views of one batch, and what the host knows of how they came about."""
    config, chat, step = experiment.config, experiment.chat, int(state.step)
    pad = functools.partial(pad_prompts, pad_id=chat.pad_id, multiple=config.data.length_multiple)
    student = Prompts(*pad([example.student for example in examples]))
    own, labelless = _samples_from_student(experiment, step), config.teacher.condition == "self"
    params = student_params(experiment, state) if own or labelless else None
    completions, logps, metrics = _completions(experiment, params if own else None, student, examples, step)
    if config.objective.loss == "nll":
        return Views(student, None, completions, logps), metrics
    prompts = [example.teacher for example in examples]
    if labelless:
        answers = own_answers(experiment, params, examples, step)
        prompts, completions = answers.prompts, completions._replace(mask=completions.mask & answers.accepted[:, None])
        metrics |= {"self_agreement": float(np.mean(answers.shares)), "self_accepted": float(np.mean(answers.accepted))}
    contexts = negative = None
    if examples[0].contexts:
        rows = [example.contexts for example in examples]
        contexts = Contexts(*pad_contexts(rows, pad_id=chat.pad_id, multiple=config.data.length_multiple))
    if examples[0].negative is not None:
        negative = Prompts(*pad([example.negative for example in examples]))
    return Views(student, Prompts(*pad(prompts)), completions, logps, contexts, negative), metrics


def own_answers(experiment: Experiment, params: dict[str, Any], examples: Sequence[Example], step: int) -> OwnAnswers:
    """Samples `teacher.self_samples` replies to each question and takes one that gives the most frequent answer.

    No label is read: the task only brings a reply into the form in which answers are compared.
    """
    config, chat, task = experiment.config, experiment.chat, experiment.task
    number = config.teacher.self_samples
    rows = [example.student for example in examples for _ in range(number)]
    ids, mask = pad_prompts(rows, pad_id=chat.pad_id, multiple=config.data.length_multiple)
    experiment.sampler.publish(params, step)
    key = purpose_key(config.seed, step, "own_answers")
    rollout = experiment.sampler.generate(ids, mask, experiment.sampling, key=key, version=step)
    sampled = [
        [int(token) for token in row[kept]]
        for row, kept in zip(np.asarray(rollout.ids), np.asarray(rollout.mask), strict=True)
    ]
    finished = np.asarray(rollout.stopped)
    prompts, shares, accepted = [], [], []
    for index, example in enumerate(examples):
        own = range(index * number, (index + 1) * number)
        texts = [chat.text(sampled[row]) for row in own if finished[row]]
        reply, share = majority([(text, task.parse(text, example.item)) for text in texts], number)
        prompt = None
        if reply is not None and share >= config.teacher.self_min_agreement:
            question, placement = example.item.prompt, config.teacher.placement
            prompt = chat.prompt_ids(teacher_messages(question, reply, condition="self", placement=placement))
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


def _completions(experiment: Experiment, params, student: Prompts, examples: Sequence[Example], step: int):
    """(Completions, the sampler's log-probs or None, metrics): sampled under `params` or the base, or gold."""
    config, chat = experiment.config, experiment.chat
    metrics = {} if config.rollout.on_policy_share == 1 else {"on_policy": float(params is not None)}
    if params is None and config.rollout.source != "base":
        gold, length = [example.gold for example in examples], config.rollout.max_completion_length
        completions = Completions(*pad_completions(gold, pad_id=chat.pad_id, length=length))
        return completions, None, metrics | _lengths(completions.mask, np.ones(len(gold), bool))
    own = params is not None
    experiment.sampler.publish(params if own else experiment.base, step)
    key = purpose_key(config.seed, step, "rollout")
    rollout = experiment.sampler.generate(student.ids, student.mask, experiment.sampling, key=key, version=step)
    ids, mask, stopped = (np.asarray(array) for array in (rollout.ids, rollout.mask, rollout.stopped))
    metrics |= _lengths(mask, stopped)
    if config.rollout.mask_truncated_completions:
        mask = mask & stopped[:, None]
    if config.rollout.min_completion_length > 0:
        mask = mask & (mask.sum(axis=1) >= config.rollout.min_completion_length)[:, None]
    return Completions(ids, mask), np.asarray(rollout.logps) if own else None, metrics


def _lengths(mask: np.ndarray, stopped: np.ndarray) -> dict[str, float]:
    """Of the completions as they are, before any is left out of the loss."""
    eos_rate = float(np.mean(stopped))
    length = float(np.mean(mask.sum(axis=1)))
    return {"completion_length": length, "eos_rate": eos_rate, "truncated_share": 1.0 - eos_rate}
