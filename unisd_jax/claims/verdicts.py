"""From what was measured to verdicts on the paper's claims."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from unisd_jax.claims.findings import (
    Claim,
    Finding,
    Runs,
    Values,
    difference_of_differences,
    drift,
    fit,
    fit_before,
    gain,
    grade_difference,
    run_means,
    seed_difference,
    time_ratio,
)
from unisd_jax.claims.runs import MORE_VIEWS
from unisd_jax.claims.teacher import Targets
from unisd_jax.claims.variants import CLEAN, FREE, NOISY, WRONG
from unisd_jax.eval.statistics import Interval, paired_bootstrap, student_interval

_SHARE = "agreement_effective_share"
AGREEMENT = ("agreement_tok", "agreement_seq")
# One part of UniSD at a time on the student's own samples; in this order in the tables.
SINGLE = ("plain", "ema", "match_joint", "match_repr", "clip", "agreement_tok", "agreement_seq")


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
                exact("wrong demonstrations: plain - sft", wrong["plain"], wrong["sft"]),
                Finding(
                    "says the answer, free form: plain - sft", grade_difference(free["plain"], free["sft"]), points
                ),
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
            "15, in training",
            "Agreement weights help more where supervision is unreliable",
            [
                Finding(
                    f"exact match, {name} - plain: with wrong demonstrations less with right ones",
                    difference_of_differences((wrong[name], wrong["plain"]), (clean[name], plain)),
                    points,
                    "+",
                )
                for name in AGREEMENT
            ]
            + [exact(f"wrong demonstrations: {name} - plain", wrong[name], wrong["plain"]) for name in AGREEMENT]
            + [exact(f"{name}: noisy contexts - clean ones", noisy[name], clean[name]) for name in AGREEMENT]
            + [
                Finding(
                    f"effective share of the weights, {name}, {where}", run_means(runs[where][name], _SHARE), "share"
                )
                for where in (CLEAN, WRONG, NOISY)
                for name in AGREEMENT
            ],
            "The effective share is (sum of w)² / (n · sum of w²): 1 where all weights are alike and so do nothing.",
        ),
    ]


def cost_claims(runs: Runs, seconds: Mapping[str, Values]) -> list[Claim]:
    """`seconds` of an update of each method, round by round (`timing.step_seconds`)."""
    clean = runs[CLEAN]

    def ratio(one: str, other: str, predicted: str) -> Finding:
        found = time_ratio(seconds[one], seconds[other])
        return Finding(f"seconds of an update, {one} / {other}", found, "ratio", predicted, 1.0)

    return [
        Claim(
            "6",
            "Clipping is the mildest part, and the cheapest",
            [
                Finding("exact match of clip, after - before", gain(clean["clip"]), "points", "+"),
                *(
                    Finding(f"drift, clip - {name}", seed_difference(clean["clip"], clean[name], drift), "nats", "-")
                    for name in ("ema", "match_joint")
                ),
                Finding("drift, clip - plain", seed_difference(clean["clip"], clean["plain"], drift), "nats"),
                Finding("share of tokens clipped", run_means(clean["clip"], "clip_share"), "share"),
                *(ratio("clip", name, "-") for name in ("ema", "match_repr", "match_joint", "agreement_tok")),
                ratio("clip", "plain", ""),
            ],
            "Clipped at 2 nats: the release's 10 would hardly ever act here.",
        ),
        Claim(
            "9",
            "Cost: sft < one teacher < agreement < UniSD*, and agreement's grows with K",
            [
                ratio("plain", "sft", "+"),
                ratio("agreement_tok", "plain", "+"),
                ratio("unisd_star", "agreement_tok", "+"),
                ratio(MORE_VIEWS, "agreement_tok", "+"),
            ],
            "All methods in one process, taking turns, from the untrained model.",
        ),
    ]


def released_findings(runs: Runs) -> list[Finding]:
    """UniSD* as it should be, with its weights cancelled, and as released."""
    clean = runs[CLEAN]
    ours, cancelled, theirs = (clean[f"unisd_star{part}"] for part in ("", ", weights cancelled", ", released"))
    pairs = {
        "ours - the release's": (ours, theirs),
        "the weights' part, ours - cancelled": (ours, cancelled),
        "the EMA's part, cancelled - the release's": (cancelled, theirs),
    }
    found = []
    for name, (first, second) in pairs.items():
        found += [
            Finding(f"exact match, {name}", grade_difference(first, second), "points"),
            Finding(f"log PPL_fit, {name}", seed_difference(first, second, fit), "nats"),
            Finding(f"drift, {name}", seed_difference(first, second, drift), "nats"),
        ]
    return found + [
        Finding("effective share of the weights, ours", run_means(ours, _SHARE), "share"),
        Finding("motion of the teacher at an update, ours", run_means(ours, "teacher_motion"), "share"),
        Finding("motion of the teacher at an update, the release's", run_means(theirs, "teacher_motion"), "share"),
    ]


def different(findings: Sequence[Finding]) -> list[str]:
    """The differences (points or nats) whose interval leaves zero out."""
    compared = [one for one in findings if one.unit in ("points", "nats")]
    return [one.what for one in compared if one.interval.low > 0 or one.interval.high < 0]


def smoothing_claim(runs: Runs, targets: Mapping[str, Sequence[Targets]]) -> Claim:
    """`targets` moved so, by method and seed."""
    clean, ema, live = runs[CLEAN], targets["ema"], targets["live teacher"]

    def ratio(value: Callable[[Targets], float]) -> Interval:
        return time_ratio([value(one) for one in ema], [value(one) for one in live])

    return Claim(
        "10",
        "An EMA smooths the teacher's targets",
        [
            Finding(
                "path of the targets over all updates / how far they got, EMA (0.9) / live teacher",
                ratio(lambda one: sum(one.steps) / one.net),
                "ratio",
                "-",
                1.0,
            ),
            Finding(
                "change of the targets at an update, EMA / live", ratio(lambda one: float(np.mean(one.steps))), "ratio"
            ),
            Finding("exact match, EMA - live teacher", grade_difference(clean["ema"], clean["live teacher"]), "points"),
            Finding("exact match, EMA - frozen teacher", grade_difference(clean["ema"], clean["plain"]), "points"),
            Finding("drift, EMA - live teacher", seed_difference(clean["ema"], clean["live teacher"], drift), "nats"),
        ],
        "Changes are root mean squares over the tokens of 8 gold replies. An EMA's are smaller by lag alone; the first "
        "line takes that out: it is 1 for targets that move in a straight line.",
    )


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
