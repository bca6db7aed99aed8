"""Do agreement weights go down where the supervision was spoilt? Measured by scoring alone, nothing is trained.

The same completions, sampled by the student, are scored under clean auxiliary views and under spoilt ones of the same
donors, and by the teacher with a right and with a wrong demonstration. Which views are spoilt is then drawn with a
known rate, and the mechanism's own weights (`losses.token_agreement`, `sequence_agreement`) are compared with it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Bool, Float, Int

from unisd_jax.claims.runs import Settings, composed
from unisd_jax.claims.variants import NOISES
from unisd_jax.data.batching import pad_completions, pad_prompts
from unisd_jax.data.pipeline import Example
from unisd_jax.eval.scores import token_logps
from unisd_jax.experiment import Experiment, build
from unisd_jax.losses import sequence_agreement, token_agreement
from unisd_jax.models import load_hf
from unisd_jax.random import purpose_key

VIEWS = 3
GAMMA = 1.0
CLEAN = "clean"


class Scored(NamedTuple):
    """Log-probs of sampled completions; K views, N items, T tokens.

    `views` has the clean ones and each kind of spoilt ones, of the same donors. `right` and `wrong` are the teacher's
    with the item's own demonstration and with another answer in it.
    """

    mask: Bool[np.ndarray, "N T"]
    views: dict[str, Float[np.ndarray, "K N T"]]
    right: Float[np.ndarray, "N T"]
    wrong: Float[np.ndarray, "N T"]
    exact: Bool[np.ndarray, " N"]


def score(settings: Settings, data: Path, *, seed: int, items: int, student: Path | None) -> Scored:
    """Samples a completion for each of `items` training items and scores it under all views.

    `student` is a trained checkpoint; None: the teacher itself, as before any training. The teacher is the base.
    """
    experiments = {CLEAN: _experiment(settings, seed)} | {
        noise: _experiment(settings, seed, f"--data.train_path={data / f'{noise}.jsonl'}") for noise in NOISES
    }
    wrong = _experiment(settings, seed, f"--data.train_path={data / 'all-wrong.jsonl'}")
    clean = experiments[CLEAN]
    places = _places(settings, clean, seed, items)
    examples = [clean.train[place] for place in places]
    params = clean.base if student is None else load_hf(student, dtype=np.float32)[1]
    ids, mask = _sampled(clean, params, examples, seed)
    views = {
        name: np.stack(
            [_logps(clean, [one.train[place].contexts[k] for place in places], ids, mask) for k in range(VIEWS)]
        )
        for name, one in experiments.items()
    }
    right, other = (_logps(clean, [one.train[place].teacher for place in places], ids, mask) for one in (clean, wrong))
    texts = [clean.chat.text(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)]
    exact = [clean.task.grade(text, example.item)["exact"] == 1 for text, example in zip(texts, examples, strict=True)]
    return Scored(mask, views, right, other, np.array(exact))


def _experiment(settings: Settings, seed: int, *options: str) -> Experiment:
    """The data, views and model of token agreement with random donors: the same donors whatever they lend."""
    # Items are compared by their place: none may be dropped.
    own = [f"--teacher.contexts.num_auxiliary_contexts={VIEWS}", "--data.overlong=error"]
    return build(composed(settings, "agreement_tok_random", seed, [*own, *options]))


def _places(settings: Settings, experiment: Experiment, seed: int, items: int) -> Int[np.ndarray, " N"]:
    """Training items, other ones for each seed: what is pooled over seeds has no item twice."""
    mixed = np.random.default_rng(0).permutation(len(experiment.train))
    part = settings.seeds.index(seed)
    return mixed[part * items : (part + 1) * items]


def _sampled(
    experiment: Experiment, params: dict[str, Any], examples: Sequence[Example], seed: int
) -> tuple[Int[np.ndarray, "N T"], Bool[np.ndarray, "N T"]]:
    """One completion of each item at the training's temperature."""
    prompts = pad_prompts([example.student for example in examples], **_padding(experiment))
    experiment.sampler.publish(params, 0)
    key = purpose_key(seed, 0, "rollout")
    rollout = experiment.sampler.begin(*prompts, experiment.sampling, key=key, version=0).result()
    return np.asarray(rollout.ids), np.asarray(rollout.mask)


def _logps(experiment: Experiment, prompts: Sequence[Sequence[int]], ids, mask, *, rows: int = 16):
    """log p of the tokens after each prompt, by the base."""
    found = []
    for start in range(0, len(prompts), rows):
        part = slice(start, start + rows)
        padded = pad_prompts(prompts[part], **_padding(experiment))
        found.append(token_logps(experiment.base, *padded, ids[part], mask[part], model=experiment.model))
    return np.concatenate(jax.device_get(found))


def _padding(experiment: Experiment) -> dict[str, int]:
    return {"pad_id": experiment.chat.pad_id, "multiple": 32}


def gold_logps(settings: Settings, *, seed: int, items: int, options: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Mean log-prob per token of the gold replies after the first auxiliary view that `options` ask for."""
    experiment = _experiment(settings, seed, *options)
    places = _places(settings, experiment, seed, items)
    examples = [experiment.train[place] for place in places]
    gold = [example.gold for example in examples]
    ids, mask = pad_completions(gold, pad_id=experiment.chat.pad_id, length=max(map(len, gold)))
    logps = _logps(experiment, [example.contexts[0] for example in examples], ids, mask)
    return logps.sum(axis=1) / mask.sum(axis=1)


def weigh(
    logps: Float[np.ndarray, "K N T"], mask: Bool[np.ndarray, "N T"]
) -> tuple[Float[np.ndarray, "N T"], Float[np.ndarray, " N"]]:
    """The mechanism's own weights at the token and the sequence level."""
    logps, mask = jnp.asarray(logps, jnp.float32), jnp.asarray(mask)
    token, _ = token_agreement(logps, mask, gamma=GAMMA)
    sequence, _ = sequence_agreement(logps, mask, gamma=GAMMA)
    return np.asarray(token, float), np.asarray(sequence, float)


class Drawn(NamedTuple):
    """Weights beside what was spoilt: an entry per completion, `tokens` per token of all completions in a row."""

    spoilt_views: Int[np.ndarray, " N"]
    sequence: Float[np.ndarray, " N"]
    token_means: Float[np.ndarray, " N"]
    tokens: Float[np.ndarray, " M"]
    rows: Int[np.ndarray, " M"]


def draw(scored: Scored, noise: str, *, rate: float, seed: int) -> Drawn:
    """Spoils each view of each item with chance `rate`, and weighs the completions as the mechanism does."""
    spoilt = np.random.default_rng(seed).random((VIEWS, len(scored.mask))) < rate
    logps = np.where(spoilt[..., None], scored.views[noise], scored.views[CLEAN])
    token, sequence = weigh(logps, scored.mask)
    means = np.where(scored.mask, token, 0.0).sum(axis=1) / scored.mask.sum(axis=1)
    return Drawn(
        spoilt.sum(axis=0), sequence, means, token[scored.mask], np.nonzero(scored.mask)[0]
    )  # fmt: skip


def auc(values: Float[np.ndarray, " N"], positive: Bool[np.ndarray, " N"]) -> float:
    """Chance that a value where `positive` is off is above one where it is on, ties counting half; nan without both.

    The area under the ROC curve of "low value" as a detector: 1: always lower where it is on; 0.5: says nothing.
    """
    positive = np.asarray(positive, bool)
    on, off = int(positive.sum()), int((~positive).sum())
    if not on or not off:
        return float("nan")
    ranks = scipy.stats.rankdata(values)
    return float((ranks[~positive].sum() - off * (off + 1) / 2) / (on * off))


def rank_correlation(values: Float[np.ndarray, " N"], others: Float[np.ndarray, " N"]) -> float:
    """Spearman's; nan where one of them does not vary."""
    if np.ptp(values) == 0 or np.ptp(others) == 0:
        return float("nan")
    return float(scipy.stats.spearmanr(values, others).statistic)
