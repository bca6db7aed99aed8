"""How far training has moved a model from its base: on its replies to a task, and on unrelated prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unisd_jax.data.chat import Chat
from unisd_jax.eval.generation import generate_replies, greedy
from unisd_jax.eval.scores import Network, Pairs, Sums, distance_sums
from unisd_jax.eval.statistics import Interval, paired_bootstrap, ratio_interval
from unisd_jax.random import purpose_key
from unisd_jax.rollout import RolloutEngine

UNRELATED_PROMPTS = (
    "Write a short note thanking a neighbour for watering the plants.",
    "Why does bread rise when it is baked?",
    "Give me three tips for sleeping better.",
    "Explain what a mortgage is to a teenager.",
    "Tell me a story about a lighthouse keeper who found a map.",
    "How do I remove a coffee stain from a white shirt?",
    "What should I pack for a weekend of hiking in autumn?",
    "Describe the sound of rain on a tin roof.",
    "Write a Python function that reverses a string.",
    "What is the difference between weather and climate?",
    "Suggest a name for a small bookshop and say why it fits.",
    "How can a team keep its meetings short?",
    "Write two sentences about the history of the bicycle.",
    "What makes a good apology?",
    "Explain how a rainbow forms.",
    "Draft an email asking to move an appointment to next week.",
)


def base_replies(
    engine: RolloutEngine,
    base: dict[str, Any],
    chat: Chat,
    *,
    max_completion_length: int,
    batch_size: int = 8,
    length_multiple: int,
) -> Pairs:
    """The base model's greedy replies to prompts that have nothing to do with any task."""
    prompts = [chat.prompt_ids([{"role": "user", "content": prompt}]) for prompt in UNRELATED_PROMPTS]
    engine.publish(base, 0)
    replies = generate_replies(
        engine, prompts, greedy(chat, max_completion_length), key=purpose_key(0, 0, "evaluation"), version=0,
        batch_size=batch_size, length_multiple=length_multiple,
    )  # fmt: skip
    return Pairs(prompts, [reply.ids for reply in replies])


def drift(
    trained: Network, base: Network, replies: Pairs, chat: Chat, *, batch_size: int = 8, length_multiple: int
) -> float:
    """Mean token JSD (alpha = 0.5; nats, at most ln 2) of the two models over `replies`, pooled over the tokens."""
    sums = distance_sums(
        trained, base, replies, pad_id=chat.pad_id, batch_size=batch_size, length_multiple=length_multiple
    )
    return sum(row["jsd"] for row in sums) / sum(row["tokens"] for row in sums)


def perplexity(sums: Sequence[Sums], logp: str = "logp", *, seed: int = 0) -> Interval | None:
    """exp(−Σ log p / Σ tokens) over all tokens of all completions (paper, PPL_fit and PPL_ret), with its interval.

    The interval is the bootstrap's over the rows; None without a token.
    """
    if not (pooled := _pooled(sums, logp, seed)):
        return None
    # The perplexity falls as the mean log-prob rises, so the ends change places.
    return Interval(*_perplexities((pooled.mean, pooled.high, pooled.low)))


def distances(sums: Sequence[Sums], *, seed: int = 0) -> dict[str, Any]:
    """What `distance_sums` come to, a row for each item: means per token with bootstrap intervals, and perplexities.

    `ppl_base` and `ppl_adapted` are the completions' perplexities under either model.
    """
    names = ("jsd", "kl_from_base", "kl_to_base", "entropy_adapted", "entropy_base")
    perplexities = {f"ppl_{which}": perplexity(sums, f"logp_{which}", seed=seed) for which in ("adapted", "base")}
    return {
        "items": len(sums),
        "empty": sum(not row["tokens"] for row in sums),
        "tokens": int(sum(row["tokens"] for row in sums)),
        **{name: _pooled(sums, name, seed) for name in names},
        **perplexities,
    }


def released(sums: Sequence[Sums], logp: str) -> dict[str, Any]:
    """The release's summary of the same scores: every completion counts alike, whatever its length (spec 3.7, E13).

    `ppl_mean_avg` is the arithmetic mean of the perplexities of single completions, which a few outliers drive.
    """
    kept = [row for row in sums if row["tokens"]]
    logps = [row[logp] / row["tokens"] for row in kept]
    named = {"logp_mean": logps, "ppl_mean": _perplexities(logps)}
    named["jsd_mean"] = [row["jsd"] / row["tokens"] for row in kept]
    found: dict[str, Any] = {
        "num_examples": len(kept),
        "num_empty_completions": len(sums) - len(kept),
        "total_tokens": int(sum(row["tokens"] for row in kept)),
    }
    for name, values in named.items():
        found |= {f"{name}_avg": float(np.mean(values)) if values else None}
        if name != "ppl_mean":
            found[f"{name}_std"] = float(np.std(values)) if values else None
        for title, share in (("p10", 0.1), ("p25", 0.25), ("median", 0.5), ("p75", 0.75), ("p90", 0.9)):
            found[f"{name}_{title}"] = float(np.quantile(values, share)) if values else None
    return found


def paired(adapted: Sequence[Sums], base: Sequence[Sums], *, seed: int = 0) -> dict[str, Any]:
    """The same items in both directions: the base on the adapted model's replies, less the adapted on the base's.

    Args:
      adapted: distances on the adapted model's replies, a row for each item.
      base: distances on the base's replies to the same items, in the same order.
      seed: of the bootstrap.

    Returns:
      pairs: the items for which both have said something; the rest is over these.
      logp_delta: of the mean log-prob per token; logp_delta_median, logp_delta_above_0: its median, the share above 0.
      jsd_delta: of the mean JSD per token.
      entropy_change: the adapted model's entropy on its own replies, less the base's on its own.
    """
    both = [(own, other) for own, other in zip(adapted, base, strict=True) if own["tokens"] and other["tokens"]]
    if not both:
        return {"pairs": 0}

    def of_each(name: str, rows: Sequence[Sums]) -> np.ndarray:
        return np.array([row[name] / row["tokens"] for row in rows])

    own, other = zip(*both, strict=True)
    logps = of_each("logp_base", own), of_each("logp_adapted", other)
    return {
        "pairs": len(both),
        "logp_delta": paired_bootstrap(logps[1], logps[0], seed=seed),
        "logp_delta_median": float(np.median(logps[0] - logps[1])),
        "logp_delta_above_0": float(np.mean(logps[0] > logps[1])),
        "jsd_delta": paired_bootstrap(of_each("jsd", other), of_each("jsd", own), seed=seed),
        "entropy_change": paired_bootstrap(of_each("entropy_base", other), of_each("entropy_adapted", own), seed=seed),
    }


def without_stop(completions: Sequence[Sequence[int]], stop_ids: Sequence[int]) -> list[list[int]]:
    """Completions without the token that ends them, as perplexities are usually counted."""
    return [list(ids[:-1] if len(ids) and ids[-1] in stop_ids else ids) for ids in completions]


def _perplexities(logps: Sequence[float]) -> list[float]:
    with np.errstate(over="ignore"):  # infinity is what it is
        return np.exp(-np.array(logps, float)).tolist()


def _pooled(sums: Sequence[Mapping[str, float]], name: str, seed: int) -> Interval | None:
    tokens = np.array([row["tokens"] for row in sums], float)
    if not tokens.sum():
        return None
    return ratio_interval(np.array([row[name] for row in sums]), tokens, seed=seed)
