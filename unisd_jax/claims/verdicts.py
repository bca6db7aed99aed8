"""From what was measured to verdicts: each claim is a list of findings, each with an interval and a predicted side."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Float

from unisd_jax.claims.runs import Finished
from unisd_jax.claims.variants import CLEAN, FREE, NOISY, WRONG
from unisd_jax.eval.statistics import Interval, paired_bootstrap, paired_seeds_interval

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
Values = Sequence[float] | Float[np.ndarray, " S"]
# [variant][method] -> the finished seeds
Runs = Mapping[str, Mapping[str, Sequence[Finished]]]
# One part of UniSD at a time on the student's own samples; in this order in the tables.
SINGLE = ("plain", "ema", "match_joint", "match_repr", "clip", "agreement_tok", "agreement_seq")


class Finding(NamedTuple):
    """Something measured. `predicted` is the side of `null` on which the claim puts it, + or -; "" is told only."""

    what: str
    interval: Interval
    unit: str
    predicted: str = ""
    null: float = 0.0

    @property
    def verdict(self) -> str:
        """Which side the interval is on, if it is on one."""
        if not self.predicted:
            return ""
        mean, low, high = self.interval
        if not np.isfinite([mean, low, high]).all():
            return UNDECIDED
        above, below = low > self.null, high < self.null
        if not above and not below:
            return UNDECIDED
        return HOLDS if above == (self.predicted == "+") else FAILS


class Claim(NamedTuple):
    """A claim of the paper, by its number in our list, and what was found."""

    number: str
    text: str
    findings: list[Finding]
    note: str = ""

    @property
    def verdict(self) -> str:
        """It holds if all that it predicts does, and does not if any part does not."""
        found = {finding.verdict for finding in self.findings} - {""}
        if not found or FAILS in found:
            return FAILS if found else UNDECIDED
        return HOLDS if found == {HOLDS} else UNDECIDED


def student_interval(values: Values, *, level: float = 0.95) -> Interval:
    """Mean over seeds with Student's interval; without one (nan) where there are fewer than two."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return Interval(float(np.mean(values)), float("nan"), float("nan"))
    arm = float(scipy.stats.t.ppf((1 + level) / 2, len(values) - 1) * scipy.stats.sem(values))
    mean = float(np.mean(values))
    return Interval(mean, mean - arm, mean + arm)


def resampled(
    statistic: Callable[[Any], float], groups: Sequence[int], *, samples: int = 1000, seed: int = 0
) -> Interval:
    """`statistic(places)` of all places, with its percentile bootstrap interval, drawing whole groups of places.

    `groups` says to which group (an item, with all its tokens) each place belongs. Draws without a value are left out.
    """
    groups = np.asarray(groups)
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.unique(groups[order], return_index=True)[1][1:])
    random = np.random.default_rng(seed)
    drawn = [
        statistic(np.concatenate([members[place] for place in random.integers(len(members), size=len(members))]))
        for _ in range(samples)
    ]
    drawn = [value for value in drawn if np.isfinite(value)]
    ends = np.percentile(drawn, [2.5, 97.5]) if drawn else (float("nan"), float("nan"))
    return Interval(float(statistic(np.arange(len(groups)))), float(ends[0]), float(ends[1]))


def grade_difference(first: Sequence[Finished], second: Sequence[Finished], grade: str = "exact") -> Interval:
    """first - second of a grade after training, in points; items and seeds resampled."""
    scores = [np.stack([run.grade(grade) for run in runs]) for runs in (second, first)]
    return _times(paired_seeds_interval(*scores), 100)


def gain(runs: Sequence[Finished], grade: str = "exact") -> Interval:
    """after - before of a grade, in points; items and seeds resampled."""
    before = np.stack([runs[0].grade(grade, at="before")])
    return _times(paired_seeds_interval(before, np.stack([run.grade(grade) for run in runs])), 100)


def fit(run: Finished) -> float:
    """log PPL_fit: minus the mean log-prob per token of the gold replies, after training."""
    return -run.after["means"]["gold_logprob"]


def fit_before(run: Finished) -> float:
    """log PPL_fit before training."""
    return -run.before["means"]["gold_logprob"]


def drift(run: Finished) -> float:
    """Mean token JSD from the base on unrelated prompts, nats."""
    return run.result.details["drift"]


def seed_difference(
    first: Sequence[Finished], second: Sequence[Finished], value: Callable[[Finished], float]
) -> Interval:
    """first - second, seed by seed (they share data order and sampling keys), with Student's interval."""
    return student_interval([value(one) - value(other) for one, other in zip(first, second, strict=True)])


def time_ratio(first: Sequence[Finished], second: Sequence[Finished]) -> Interval:
    """Mean seconds of a step, first / second: of the logarithms, steps as samples, Welch's interval."""
    logs = [np.log([seconds for run in runs for seconds in run.step_seconds]) for runs in (first, second)]
    interval = scipy.stats.ttest_ind(*logs, equal_var=False).confidence_interval(0.95)
    return Interval(*(float(np.exp(end)) for end in (logs[0].mean() - logs[1].mean(), interval.low, interval.high)))


def trained_claims(runs: Runs) -> list[Claim]:
    """The claims that trainings decide."""
    clean, wrong, noisy, free = (runs[name] for name in (CLEAN, WRONG, NOISY, FREE))
    plain, sft = clean["plain"], clean["sft"]
    points, nats = "points", "nats"

    def exact(what: str, first, second, predicted: str = "") -> Finding:
        return Finding(f"exact match, {what}", grade_difference(first, second), points, predicted)

    return [
        Claim(
            "1",
            "On-policy self-distillation beats supervised fine-tuning",
            [exact("plain - sft", plain, sft, "+")]
            + [exact(f"{name} - sft", clean[name], sft) for name in ("ema", "match_joint", "unisd_star")]
            + [
                Finding(
                    "exact match, wrong demonstrations: plain - sft",
                    grade_difference(wrong["plain"], wrong["sft"]),
                    points,
                )
            ],
        ),
        Claim(
            "2",
            "Supervised fine-tuning helps where one form is asked for and hurts where many replies are right",
            [
                Finding("one form: exact match of sft, after - before", gain(sft), points, "+"),
                Finding(
                    "many replies: share that says the answer, sft, after - before", gain(free["sft"]), points, "-"
                ),
                Finding("many replies: the same, plain", gain(free["plain"]), points),
            ],
        ),
        Claim(
            "3",
            "Supervised fine-tuning drifts further from the base",
            [
                Finding(f"drift, sft - {name}", seed_difference(sft, clean[name], drift), nats, "+")
                for name in ("plain", "unisd_star")
            ],
        ),
        Claim(
            "4",
            "Self-distillation makes the gold replies likelier (lower PPL_fit)",
            [
                Finding(
                    f"log PPL_fit of {name}, after - before",
                    student_interval([fit(run) - fit_before(run) for run in clean[name]]),
                    nats,
                    "-",
                )
                for name in (*SINGLE, "unisd_star")
            ],
        ),
        Claim(
            "5",
            "Matching features beside the divergence is better than alone",
            [
                Finding(
                    "log PPL_fit, match_joint - match_repr",
                    seed_difference(clean["match_joint"], clean["match_repr"], fit),
                    nats,
                    "-",
                ),
                exact("match_joint - match_repr", clean["match_joint"], clean["match_repr"]),
            ],
        ),
        Claim(
            "6",
            "Clipping is the mildest part, and the cheapest",
            [
                Finding("exact match of clip, after - before", gain(clean["clip"]), points, "+"),
                *(
                    Finding(f"drift, clip - {name}", seed_difference(clean["clip"], clean[name], drift), nats, "-")
                    for name in ("ema", "match_joint")
                ),
                Finding("drift, clip - plain", seed_difference(clean["clip"], plain, drift), nats),
                Finding("share of tokens clipped", _shares(clean["clip"], "clip_share"), "share"),
                *(
                    Finding(
                        f"seconds of a step, clip / {name}", time_ratio(clean["clip"], clean[name]), "ratio", "-", 1.0
                    )
                    for name in ("ema", "match_joint", "agreement_tok", "unisd_star")
                ),
            ],
        ),
        Claim(
            "9",
            "Cost: sft < one teacher < agreement < UniSD*, and agreement's grows with K",
            [
                Finding(f"seconds of a step, {one} / {other}", time_ratio(clean[one], clean[other]), "ratio", "+", 1.0)
                for one, other in (
                    ("plain", "sft"),
                    ("agreement_tok", "plain"),
                    ("unisd_star", "agreement_tok"),
                    ("agreement_tok, K = 6", "agreement_tok"),
                )
            ],
        ),
        Claim(
            "15, in training",
            "Agreement weights protect the student where supervision is unreliable",
            [
                exact(f"wrong demonstrations: {name} - plain", wrong[name], wrong["plain"], "+")
                for name in ("agreement_tok", "agreement_seq")
            ]
            # Without auxiliary views the noisy contexts are never seen: plain on clean data is their control.
            + [
                exact(f"noisy contexts: {name} - plain", noisy[name], plain)
                for name in ("agreement_tok", "agreement_seq")
            ],
        ),
    ]


def released_findings(runs: Runs) -> list[Finding]:
    """UniSD* as it should be less UniSD* with the release's EMA and normalisation, all else alike."""
    ours, theirs = runs[CLEAN]["unisd_star"], runs[CLEAN]["unisd_star, released"]
    return [
        Finding("exact match", grade_difference(ours, theirs), "points"),
        Finding("log PPL_fit", seed_difference(ours, theirs, fit), "nats"),
        Finding("drift from the base", seed_difference(ours, theirs, drift), "nats"),
        Finding("motion of the teacher in a step, ours", _shares(ours, "teacher_motion"), "share"),
        Finding("motion of the teacher in a step, release's", _shares(theirs, "teacher_motion"), "share"),
    ]


def differs(findings: Sequence[Finding]) -> bool:
    """Whether any interval of a difference (points or nats) leaves zero out."""
    compared = [one.interval for one in findings if one.unit in ("points", "nats")]
    return any(interval.low > 0 or interval.high < 0 for interval in compared)


def smoothing_claim(runs: Runs, changes: Mapping[str, Sequence[Float[np.ndarray, " S"]]]) -> Claim:
    """`changes` are those of the teacher's targets at each update, by method and seed."""
    clean = runs[CLEAN]
    ratio = student_interval(
        [np.log(ours.mean() / live.mean()) for ours, live in zip(changes["ema"], changes["live teacher"], strict=True)]
    )
    return Claim(
        "10",
        "An EMA smooths the teacher's targets",
        [
            Finding(
                "change of the targets at an update, EMA (0.9) / live teacher", Interval(*map(np.exp, ratio)),
                "ratio", "-", 1.0,
            ),
            Finding("exact match, EMA - live teacher", grade_difference(clean["ema"], clean["live teacher"]), "points"),
            Finding("exact match, EMA - frozen teacher", grade_difference(clean["ema"], clean["plain"]), "points"),
            Finding("drift, EMA - live teacher", seed_difference(clean["ema"], clean["live teacher"], drift), "nats"),
        ],
        "The frozen teacher's targets never change. A change is the root mean square over 8 gold replies' tokens.",
    )  # fmt: skip


def context_claim(gold: Mapping[str, Mapping[str, Sequence[Float[np.ndarray, " N"]]]]) -> Claim:
    """`gold` is the log-prob per token of gold replies, by toy, by source of the context, by seed."""

    def difference(toy: str, first: str, second: str) -> Interval:
        return paired_bootstrap(*(np.concatenate(list(gold[toy][source])) for source in (second, first)))

    return Claim(
        "13",
        "Retrieved contexts help where neighbours say something, induced instructions where form is all",
        [
            Finding(
                "paraphrased questions: retrieved - random",
                difference("paraphrased", "retrieval", "random"),
                "nats",
                "+",
            ),
            Finding(
                "embedded task (form): induced - random", difference("embedded", "induction", "random"), "nats", "+"
            ),
            Finding("embedded task: retrieved - random", difference("embedded", "retrieval", "random"), "nats"),
            Finding(
                "paraphrased questions: induced - random", difference("paraphrased", "induction", "random"), "nats"
            ),
        ],
        "The teacher's log-prob per token of the gold reply with one context of each source; nothing is trained.",
    )


def _shares(runs: Sequence[Finished], metric: str) -> Interval:
    return student_interval([float(np.mean(run.metric(metric))) for run in runs])


def _times(interval: Interval, factor: float) -> Interval:
    return Interval(*(factor * end for end in interval))
