"""The page on the claims: every number in it comes from the runs and scores that it is made of."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unisd_jax.claims.findings import Claim, Finding, Runs, drift, fit, fit_before
from unisd_jax.claims.variants import CLEAN, Variant
from unisd_jax.claims.verdicts import different
from unisd_jax.eval.statistics import Interval
from unisd_jax.markdown import table

_SIGNS = {"": "", "+": "above", "-": "below"}
INTRODUCTION = """# The paper's claims in miniature

Written by `make claims` from the runs that it makes: {model}, {steps} updates of {batch} items, {items} test items,
seeds {seeds}, {jobs} runs at a time. {device}; {versions}; commit {commit}; {date}; {minutes} minutes.

**What this can say.** Whether an effect is there on a small model, a synthetic task and a handful of updates, and
in which direction; not how large it is at 7B. *Holds* and *does not hold*: the whole 95% interval lies on the side
that the claim predicts, or on the other one. *Undecided*: the interval has both. A claim of several parts holds if
all of them do, and does not if one does not. Seeds share data order and sampling keys between methods, so methods
are compared seed by seed. Intervals of exact match resample items and seeds, which with {count} seeds makes them
somewhat too narrow; those of distances, perplexities and targets are Student's over seeds, so they are wide; those
of times are Student's over rounds; those of weights and contexts resample items. About one interval in twenty
misses its mark by chance, and {findings} here have a prediction."""
VARIANTS = """## Data

The embedded questions, and three variants of their training items; test items are never spoilt."""
RELEASED = """## UniSD\\* with working EMA and sequence weights, and as released

Three trainings with the same seeds, data and sampling keys; all have sequence-level weights, an EMA teacher (decay 0.9,
every update), the contrast and feature matching. *Ours* as it is. *Cancelled*: `objective.normalize=upstream`, which
divides every completion by its own weight, and so also counts completions alike where ours counts tokens alike. *The
release's*: the EMA leaves the adapters out as well (`teacher.ema_adapters=false`), so that the teacher never moves.
Nine differences are looked at, each at 95%. **{verdict}**"""
TRAININGS = """## All trainings

Means over the seeds. *Exact before* and *after* are shares of the test items in per cent, as are replies *cut off*;
*drift* is the mean JSD from the base on unrelated prompts (nats), *PPL_fit* the perplexity of the gold replies."""
SECONDS = """## Seconds of an update

Medians over rounds in which all methods take turns in one process."""


def write_page(
    claims: Sequence[Claim],
    released: Sequence[Finding],
    runs: Runs,
    variants: Mapping[str, Variant],
    seconds: Mapping[str, Sequence[float]],
    facts: Mapping[str, Any],
) -> str:
    """The page as Markdown."""
    predicted = sum(bool(finding.predicted) for claim in claims for finding in claim.findings)
    overview = [[claim.number, claim.text, f"**{claim.verdict}**"] for claim in claims]
    parts = [INTRODUCTION.format(**facts, findings=predicted), table(["claim", "", "verdict"], overview)]
    parts += [VARIANTS, table(["variant", "what it is"], [[name, one.about] for name, one in variants.items()])]
    for claim in claims:
        note = [claim.note] if claim.note else []
        parts += [f"## {claim.number}: {claim.text}", *note, findings_table(claim.findings)]
    found = different(released)
    said = f"Intervals without zero: {'; '.join(found)}." if found else "Every interval of a difference has zero in it."
    parts += [RELEASED.format(verdict=said), findings_table(released)]
    parts += [TRAININGS, trainings_table(runs), SECONDS, seconds_table(seconds)]
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
            exact = [np.mean([run.grade("exact", at=at).mean() for run in found]) for at in ("before", "after")]
            cut = np.mean([run.after["means"]["truncated_share"] for run in found])
            shares = [f"{100 * exact[0]:.1f}", f"{100 * exact[1]:.1f}", f"{100 * cut:.0f}"]
            distance, perplexity = (np.mean([value(run) for run in found]) for value in (drift, fit))
            rows.append([variant, method, *shares, f"{distance:.4f}", f"{np.exp(perplexity):.2f}"])
    base = runs[CLEAN]["plain"][0]
    cut = base.before["means"]["truncated_share"]
    told = f"On the embedded task {100 * cut:.0f}% of the base's replies are cut off; its PPL_fit is"
    heads = ["variant", "method", "exact before", "after", "cut off", "drift", "PPL_fit"]
    return f"{table(heads, rows)}\n\n{told} {np.exp(fit_before(base)):.2f}."


def seconds_table(seconds: Mapping[str, Sequence[float]]) -> str:
    """The median over the rounds, and its ratio to `plain`."""
    medians = {name: float(np.median(found)) for name, found in seconds.items()}
    rows = [[name, f"{median:.2f}", f"{median / medians['plain']:.2f}"] for name, median in medians.items()]
    return table(["method", "seconds", "to plain"], rows)
