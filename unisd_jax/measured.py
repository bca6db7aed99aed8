"""What was measured, as numbers with intervals and as one line for each item."""

import json
from typing import Any

import numpy as np

from unisd_jax.eval import retention, summary
from unisd_jax.eval.grading import has_form
from unisd_jax.eval.scores import Sums
from unisd_jax.eval.statistics import paired_bootstrap
from unisd_jax.experiment import Experiment
from unisd_jax.measure import Graded, Measured
from unisd_jax.subject import item_hash


def numbers(
    experiment: Experiment,
    own: Measured,
    other: Measured | None,
    reverse: list[Sums] | None,
    options: list[dict[str, np.ndarray]],
) -> dict[str, Any]:
    """The numbers of summary.json: of a checkpoint and, where there is one, of its base.

    Args:
      experiment: the items and settings.
      own: of the checkpoint.
      other: of its base.
      reverse: the distances on the base's replies.
      options: the scores of the options' likelihoods, the checkpoint's and the base's; empty if not measured.
    """
    seed, samples = experiment.config.seed, experiment.config.measure.samples
    items = [example.item for example in experiment.test]
    scores = _item_scores(own, samples)
    found = _of_replies(experiment, own) | {
        "minimum_detectable": summary.detectable_alone(scores["exact"]),
        "subjects": summary.subjects(items, scores["exact"], seed=seed),
        "option_likelihood": summary.metrics(options[0], seed=seed) if options else None,
        "before": None,
        "gain": None,
        "retention": None,
    }
    if other is None:
        return found
    before = _item_scores(other, samples)
    found["before"] = _of_replies(experiment, other)
    found["gain"] = {name: summary.gain(before[name], scores[name], seed=seed) for name in scores}
    found["retention"] = _retention(experiment, own, other, reverse)
    if options:
        found["before"]["option_likelihood"] = summary.metrics(options[1], seed=seed)
        gains = {name: summary.gain(options[1][name], options[0][name], seed=seed) for name in options[0]}
        found["gain"] |= {f"option_{name}": value for name, value in gains.items()}
    return found


def _item_scores(measured: Measured, samples: int) -> dict[str, np.ndarray]:
    """Scores by item; those of the release's scorer are called `released_...`."""
    found = summary.item_scores([row.grade for row in measured.rows], samples)
    if measured.rows[0].released is not None:
        beside = summary.item_scores([row.released for row in measured.rows], samples)
        found |= {f"released_{name}": values for name, values in beside.items()}
    return found


def _of_replies(experiment: Experiment, measured: Measured) -> dict[str, Any]:
    """What is said of one checkpoint's replies, whichever it is."""
    seed, samples = experiment.config.seed, experiment.config.measure.samples
    released = None
    if measured.rows[0].released is not None:
        released = summary.graded([row.released for row in measured.rows], samples, seed=seed)
    cut = np.array([not row.reply.finished for row in measured.rows], float)
    return summary.graded([row.grade for row in measured.rows], samples, seed=seed) | {
        "released": released,
        "retries": _retries(experiment, measured) if experiment.config.measure.retries else None,
        "ppl_fit": retention.perplexity(measured.gold, seed=seed),
        "truncated": summary.estimate(cut.reshape(-1, samples).mean(1), seed=seed),
        "reply_tokens": summary.amount(_reply_tokens(measured, samples), seed=seed),
    }


def _retries(experiment: Experiment, measured: Measured) -> dict[str, Any]:
    """The scores when the replies that were sampled again take the place of the first ones."""
    seed, samples = experiment.config.seed, experiment.config.measure.samples
    again = measured.retried
    recovered = sum(has_form(row.grade) for row in again.values())
    first, last = [row.grade for row in measured.rows], {place: row.grade for place, row in again.items()}
    found = {"metrics": summary.with_retries(first, last, samples, seed=seed), "released": None}
    if measured.rows[0].released is not None:
        first, last = [row.released for row in measured.rows], {place: row.released for place, row in again.items()}
        found["released"] = summary.with_retries(first, last, samples, seed=seed)
    return found | {
        "failed_first_pass": len(again), "recovered": recovered, "still_failed": len(again) - recovered,
    }  # fmt: skip


def _retention(experiment: Experiment, own: Measured, other: Measured, reverse: list[Sums]) -> dict[str, Any]:
    """How far the checkpoint has moved from its base on this task's items."""
    seed, samples = experiment.config.seed, experiment.config.measure.samples
    by_item = [summary.by_item(sums, samples) for sums in (own.distances, reverse)]
    forward = retention.distances(by_item[0], seed=seed)
    return {
        # The base's perplexity on the adapted model's replies, pooled over tokens; the release averages per reply.
        "ppl_ret": forward["ppl_base"],
        "jsd": forward["jsd"],
        "forward": forward,
        "reverse": retention.distances(by_item[1], seed=seed),
        "paired": retention.paired(*by_item, seed=seed),
        "reply_tokens_change": paired_bootstrap(
            _reply_tokens(other, samples), _reply_tokens(own, samples), seed=seed
        ),
        "released": {
            "retention": retention.released(own.distances, "logp_base"),
            "reverse": retention.released(reverse, "logp_adapted"),
        },
    }  # fmt: skip


def _reply_tokens(measured: Measured, samples: int) -> np.ndarray:
    return np.array([len(row.reply.ids) for row in measured.rows], float).reshape(-1, samples).mean(axis=1)


def item_lines(
    experiment: Experiment, own: Measured, other: Measured | None, options: list[dict[str, np.ndarray]]
) -> str:
    """The contents of items.jsonl: a JSON object for each test item, its scores by name under `grades`."""
    samples, lines = experiment.config.measure.samples, []
    scores = _item_scores(own, samples)
    scores |= {f"option_{name}": values for found in options[:1] for name, values in found.items()}
    for number, example in enumerate(experiment.test):
        rows = range(number * samples, (number + 1) * samples)
        line = {
            "id": example.item.id,
            "item": item_hash(example),
            "prompt": example.item.prompt,
            "gold": example.item.completion,
            "subject": example.item.details.get("subject") or None,
            "grades": {name: values[number] for name, values in scores.items()},
            "replies": [_reply(own, row) for row in rows],
        }
        if other is not None:
            line["base_replies"] = [_reply(other, row) for row in rows]
        lines.append(json.dumps(summary.plain(line), ensure_ascii=False, allow_nan=False) + "\n")
    return "".join(lines)


def _reply(measured: Measured, place: int) -> dict[str, Any]:
    found = _graded(measured.rows[place])
    if measured.distances is not None:
        found["distances"] = measured.distances[place]
    if place in measured.retried:
        found["retried"] = _graded(measured.retried[place])
    return found


def _graded(row: Graded) -> dict[str, Any]:
    reply = row.reply
    return {
        "text": row.text, "ids": reply.ids, "tokens": len(reply.ids), "finished": reply.finished, "grades": row.grade,
        "released": row.released,
    }  # fmt: skip
