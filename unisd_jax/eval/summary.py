"""From graded replies to numbers with intervals: what `summary.json` says of one checkpoint."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from unisd_jax.data.tasks.base import Grade, Item, Task
from unisd_jax.eval.grading import counts, numeric
from unisd_jax.eval.scores import Sums
from unisd_jax.eval.statistics import (
    Interval,
    mcnemar,
    mean_interval,
    minimum_detectable_difference,
    newcombe_interval,
    paired_bootstrap,
    pass_at_k,
    wilson_interval,
)

_KS = (1, 2, 5, 10, 20, 50, 100)


def metrics(scores: dict[str, np.ndarray], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """`estimate` of every metric."""
    return {name: estimate(values, seed=seed) for name, values in scores.items()}


def estimate(values: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """The mean of one share per item with its 95% interval: Wilson's for right or wrong, else the bootstrap's."""
    values = np.asarray(values, float)
    if is_binary(values):
        return wilson_interval(int(values.sum()), len(values))._asdict() | {"interval": "wilson"}
    return amount(values, seed=seed)


def amount(values: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """The mean of one number per item, of whatever unit, with the bootstrap's 95% interval."""
    return mean_interval(np.asarray(values, float), seed=seed)._asdict() | {"interval": "bootstrap"}


def is_binary(*scores: np.ndarray) -> bool:
    """Whether every item is right or wrong."""
    return bool(np.isin(scores, (0.0, 1.0)).all())


def by_item(sums: Sequence[Sums], samples: int) -> list[Sums]:
    """Sums over all `samples` completions of an item: these are not independent, so intervals are drawn over items."""
    groups = [sums[start : start + samples] for start in range(0, len(sums), samples)]
    return [{name: sum(row[name] for row in group) for name in group[0]} for group in groups]


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
        found["pass_at_k"] = {str(k): estimate(pass_at_k(right, samples, k), seed=seed) for k in ks}
    return found


def with_retries(first: Sequence[Grade], again: dict[int, Grade], samples: int, *, seed: int = 0) -> dict[str, Any]:
    """The metrics when the replies that were sampled again, by row, take the place of the first ones."""
    final = [again.get(row, grade) for row, grade in enumerate(first)]
    return metrics(item_scores(final, samples), seed=seed)


def subjects(items: Sequence[Item], exact: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Accuracy by the items' subject, where the data name one."""
    named = [str(item.details.get("subject") or "") for item in items]
    found = {}
    for name in sorted(set(named) - {""}):
        some = exact[[other == name for other in named]]
        found[name] = {"items": len(some), "exact": estimate(some, seed=seed)}
    return found


def option_scores(task: Task, items: Sequence[Item], logps: Sequence[Sequence[float]]) -> dict[str, np.ndarray]:
    """For each item: whether the likeliest option's reply is right, and the probability of the right ones.

    Probabilities are relative to those of the options' replies alone.
    """
    exact, shares = [], []
    for item, values in zip(items, logps, strict=True):
        right = np.array([task.grade(reply, item)["exact"] == 1 for reply in task.options(item)])
        weights = np.exp(np.array(values) - max(values))
        exact.append(float(right[int(np.argmax(values))]))
        shares.append(float(weights[right].sum() / weights.sum()))
    return {"exact": np.array(exact), "probability_of_right": np.array(shares)}


def gain(before: np.ndarray, after: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """after − before over the same items with its 95% interval.

    The paired bootstrap's; Newcombe's where items are right or wrong and all changed alike or not at all, of which
    resampling would give an interval without width. For right and wrong also McNemar's test, and the smallest
    difference that it could have found.
    """
    if not is_binary(before, after):
        return paired_bootstrap(before, after, seed=seed)._asdict() | {"interval": "bootstrap"}
    discordant = float(np.mean(before != after))
    alike = np.ptp(np.asarray(after, float) - before) == 0
    interval = newcombe_interval(before, after) if alike else paired_bootstrap(before, after, seed=seed)
    return interval._asdict() | {
        "interval": "newcombe" if alike else "bootstrap",
        "mcnemar": mcnemar(before, after)._asdict(),
        "minimum_detectable": _detectable(len(before), discordant),
    }


def detectable_alone(exact: np.ndarray) -> float | None:
    """What difference to another checkpoint so many items can show, were its replies independent of these.

    None where no difference could be found, or where items are not right or wrong.
    """
    accuracy = float(np.mean(exact))
    return _detectable(len(exact), 2 * accuracy * (1 - accuracy)) if is_binary(exact) else None


def _detectable(items: int, discordant: float) -> float | None:
    found = minimum_detectable_difference(items, discordant)
    return found if found < 1 else None


def plain(value: Any) -> Any:
    """`value` as JSON has it: intervals as objects, what is not finite as null (spec E14)."""
    if isinstance(value, Interval):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    return value if not isinstance(value, float) or math.isfinite(value) else None
