"""From graded replies to numbers with intervals: what `summary.json` says of one checkpoint."""

import math
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

import numpy as np

from unisd_jax.data.tasks.base import Grade, Item, Task
from unisd_jax.eval.grading import counts, numeric
from unisd_jax.eval.statistics import (
    Interval,
    mcnemar,
    mean_interval,
    minimum_detectable_difference,
    paired_bootstrap,
    pass_at_k,
    wilson_interval,
)

_KS = (1, 2, 5, 10, 20, 50, 100)


def metrics(scores: dict[str, np.ndarray], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """`estimate` of every metric."""
    return {name: estimate(values, seed=seed) for name, values in scores.items()}


def estimate(values: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """The mean of one score per item with its 95% interval: Wilson's for right or wrong, else the bootstrap's."""
    values = np.asarray(values, float)
    if np.isin(values, (0.0, 1.0)).all():
        return wilson_interval(int(values.sum()), len(values))._asdict() | {"interval": "wilson"}
    return mean_interval(values, seed=seed)._asdict() | {"interval": "bootstrap"}


def item_scores(grades: Sequence[Grade], samples: int) -> dict[str, np.ndarray]:
    """The grades that are numbers, as one mean over its samples for each item."""
    names = numeric(grades[0])
    return {name: np.array([grade[name] for grade in grades], float).reshape(-1, samples).mean(1) for name in names}


def graded(grades: Sequence[Grade], samples: int, *, seed: int = 0) -> dict[str, Any]:
    """Metrics, categories and, for several samples, pass@k."""
    found = {"metrics": metrics(item_scores(grades, samples), seed=seed), "counts": counts(grades)}
    if samples > 1:
        right = np.array([grade["exact"] == 1 for grade in grades]).reshape(-1, samples).sum(axis=1)
        ks = sorted({k for k in (*_KS, samples) if k <= samples})
        found["pass_at_k"] = {str(k): mean_interval(pass_at_k(right, samples, k), seed=seed)._asdict() for k in ks}
    return found


def with_retries(grades: Sequence[Grade], retried: dict[int, Grade], samples: int, *, seed: int = 0) -> dict[str, Any]:
    """The same metrics when the replies that were sampled again take the place of the first ones."""
    final = [retried.get(row, grade) for row, grade in enumerate(grades)]
    recovered = sum(grade.get("form", grade["exact"]) > 0 for grade in retried.values())
    return {
        "metrics": metrics(item_scores(final, samples), seed=seed),
        "failed_first_pass": len(retried),
        "recovered": recovered,
        "still_failed": len(retried) - recovered,
    }


def subjects(items: Sequence[Item], exact: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Accuracy by the items' subject, where the data name one."""
    named = np.array([str(item.details.get("subject") or "") for item in items])
    return {
        name: {"items": int((named == name).sum()), "exact": estimate(exact[named == name], seed=seed)}
        for name in sorted(set(named) - {""})
    }


def option_likelihood(
    task: Task, items: Sequence[Item], logps: Sequence[Sequence[float]], *, seed: int = 0
) -> dict[str, Any]:
    """Multiple choice without sampling: the option whose reply is the likeliest, and the probability of the right ones.

    Probabilities are relative to those of the options' replies alone.
    """
    right = [[task.grade(reply, item)["exact"] == 1 for reply in task.options(item)] for item in items]
    best = [bool(row[int(np.argmax(values))]) for row, values in zip(right, logps, strict=True)]
    shares = []
    for row, values in zip(right, logps, strict=True):
        weights = np.exp(np.array(values) - max(values))
        shares.append(float(weights[np.array(row)].sum() / weights.sum()))
    chosen = [{"chosen": ascii_uppercase[int(np.argmax(values))]} for values in logps]
    found = {"exact": np.array(best, float), "probability_of_right": np.array(shares)}
    return {"metrics": metrics(found, seed=seed), "counts": counts(chosen)}


def gain(before: np.ndarray, after: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """after − before over the same items: paired bootstrap, and McNemar's test where every score is right or wrong."""
    interval = paired_bootstrap(before, after, seed=seed)
    discordant = float(np.mean(before != after))
    found = interval._asdict() | {"minimum_detectable": detectable(len(before), discordant)}
    if np.isin([before, after], (0.0, 1.0)).all():
        found["mcnemar"] = mcnemar(before, after)._asdict()
    return found


def detectable_alone(exact: np.ndarray) -> float:
    """What difference to another checkpoint this many items can show, were its replies independent of these."""
    accuracy = float(np.mean(exact))
    return detectable(len(exact), 2 * accuracy * (1 - accuracy))


def detectable(items: int, discordant: float) -> float:
    """`minimum_detectable_difference`, with at least one item on which the two disagree."""
    return minimum_detectable_difference(items, max(discordant, 1 / items))


def plain(value: Any) -> Any:
    """`value` as JSON has it: intervals as objects, what is not finite as null (spec E14)."""
    if isinstance(value, Interval):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
