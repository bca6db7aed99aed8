"""The page on the claims: every number in it comes from the runs and scores that it is made of."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unisd_jax.claims import verdicts
from unisd_jax.claims.variants import CLEAN, Variant
from unisd_jax.claims.verdicts import Claim, Finding, Runs, differs, drift, fit
from unisd_jax.eval.statistics import Interval
from unisd_jax.markdown import table

_SIGNS = {"": "", "+": "above", "-": "below"}
INTRODUCTION = """# The paper's claims in miniature

Written by `make claims` from the runs that it makes: {model}, {steps} updates of {batch} items, {items} test items,
seeds {seeds}, one CPU core a run. {device}; {versions}; commit {commit}; {date};
{minutes} minutes with {jobs} runs at a time.

**What this can say.** Whether an effect is there on a model of 135M parameters, a synthetic task and a handful of
updates, and in which direction; not how large it is at 7B. *Holds* and *does not hold*: the whole 95% interval lies
on the side that the claim predicts, or on the other one. *Undecided*: the interval has both. A claim of several parts
holds if all of them do. Intervals of differences in exact match resample items and seeds; those of distances,
perplexities and targets are Student's over {count} seeds, so they are wide; those of step times are Welch's over
steps; those of weights resample items. About one interval in twenty misses its mark by chance, and
{findings} here have a prediction."""
VARIANTS = """## Data

The embedded questions, and three variants of their training items; test items are never spoilt."""
RELEASED = """## UniSD\\* with working EMA and sequence weights, and as released

Both have sequence-level weights, an EMA teacher (decay 0.9, every update), the contrast and feature matching, with the
same seeds, data and sampling keys. In the release's arithmetic the EMA leaves the adapters out
(`teacher.ema_adapters=false`), and every completion is divided by its own weight (`objective.normalize=upstream`),
which cancels it. **{verdict}**"""
TRAININGS = """## All trainings

Means over the seeds. *Exact before* and *after* are shares of the test items in per cent, *drift* the mean JSD from the
base on unrelated prompts (nats), *PPL_fit* the perplexity of the gold replies, *step* the mean seconds of an update."""


def write_page(
    claims: Sequence[Claim],
    released: Sequence[Finding],
    runs: Runs,
    variants: dict[str, Variant],
    facts: dict[str, Any],
) -> str:
    """The page as Markdown."""
    predicted = sum(bool(finding.predicted) for claim in claims for finding in claim.findings)
    parts = [INTRODUCTION.format(**facts, findings=predicted)]
    overview = [[claim.number, claim.text, f"**{claim.verdict}**"] for claim in claims]
    parts.append(table(["claim", "", "verdict"], overview))
    parts.append(VARIANTS)
    parts.append(table(["variant", "what it is"], [[name, one.about] for name, one in variants.items()]))
    for claim in claims:
        parts += [
            f"## {claim.number}: {claim.text}",
            *([claim.note] if claim.note else []),
            findings_table(claim.findings),
        ]
    said = "There is a difference." if differs(released) else "No difference can be seen."
    parts += [RELEASED.format(verdict=said), findings_table(released)]
    parts += [TRAININGS, trainings_table(runs)]
    return "\n\n".join(parts) + "\n"


def findings_table(findings: Sequence[Finding]) -> str:
    """One line a finding; those that predict nothing have no verdict."""
    rows = []
    for one in findings:
        expected = f"{_SIGNS[one.predicted]} {one.null:g}" if one.predicted else "–"
        rows.append([one.what, show(one.interval, one.unit), expected, one.verdict or "–"])
    return table(["measured", "mean and 95% interval", "predicted", "verdict"], rows)


def show(interval: Interval, unit: str) -> str:
    """`+3.2 [-1.0, +7.4] points`."""
    digits = {"points": "{:+.1f}", "nats": "{:+.4f}"}.get(unit, "{:.3f}")
    mean, low, high = (digits.format(end) if np.isfinite(end) else "?" for end in interval)
    name = {"ratio": "×", "AUC": "", "rho": "", "share": ""}.get(unit, unit)
    return f"{mean} [{low}, {high}] {name}".strip()


def trainings_table(runs: Runs) -> str:
    """Every variant and method."""
    rows = []
    for variant, methods in runs.items():
        for method, found in methods.items():
            ended = [run for run in found if run.after]
            seconds = np.mean([second for run in found for second in run.step_seconds])
            ends = ["–"] * 4
            if ended:
                ends = [
                    f"{100 * np.mean([run.grade('exact', at='before').mean() for run in ended]):.1f}",
                    f"{100 * np.mean([run.grade('exact').mean() for run in ended]):.1f}",
                    f"{np.mean([drift(run) for run in ended]):.4f}",
                    f"{np.exp(np.mean([fit(run) for run in ended])):.2f}",
                ]
            rows.append([variant, method, str(len(found)), *ends, f"{seconds:.2f}"])
    base = np.exp(verdicts.fit_before(runs[CLEAN]["plain"][0]))
    text = table(["variant", "method", "seeds", "exact before", "after", "drift", "PPL_fit", "step"], rows)
    return f"{text}\n\nPPL_fit of the base on the embedded task is {base:.2f}."
