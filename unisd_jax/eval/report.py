"""An evaluation for a reader: `report.md` and `plots/*.png`, made from what `summary.json` holds."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unisd_jax.io import write_bytes_atomic, write_text_atomic
from unisd_jax.markdown import table
from unisd_jax.resources import render

Estimate = dict[str, Any]
_OWN, _BASE = "#0072b2", "#999999"
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}


def write_report(folder: Path, details: dict[str, Any]) -> Path:
    """Writes `report.md` and its plots; no difference stands there without an interval.

    Args:
      folder: of the evaluation.
      details: the contents of `summary.json`.
    """
    plots = _write_plots(folder / "plots", details)
    sections = [
        f"# {details['task']}: {details['model']}",
        _headline(details),
        "\n".join(f"![{name}](plots/{name}.png)" for name in plots),
        *_sections(details),
    ]
    path = folder / "report.md"
    write_text_atomic(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def _headline(details: dict[str, Any]) -> str:
    exact, detectable = details["metrics"]["exact"], details["minimum_detectable"]
    text = f"**{_points(exact)}** percent of {details['items']} items right."
    if detectable is not None:
        text += (
            f" So many items can show a difference of {100 * detectable:.1f} points to another checkpoint (McNemar's "
            "test, level 95%, power 80%, were the two independent)."
        )
    if details["gain"]:
        gain = details["gain"]["exact"]
        test = gain.get("mcnemar")
        counted = f", {test['gained']} gained, {test['lost']} lost, p = {test['p_value']:.2g}" if test else ""
        text += f"\n\nGain over {details['base']}: **{_difference(gain)}** points{counted}."
    if details["retention"] and details["retention"]["jsd"]:
        jsd = _value(details["retention"]["jsd"], ".4f")
        text += f"\n\nDrift from it: {jsd} nats per token of the replies (JSD)."
    return text


def _sections(details: dict[str, Any]) -> Iterator[str]:
    yield f"## Scores\n\n{_scores(details)}"
    yield from _counted("Categories", details["counts"])
    if details["released"]:
        yield from _counted("Categories of the release's scorer", details["released"]["counts"])
    if "pass_at_k" in details:
        rows = [[k, _points(value)] for k, value in details["pass_at_k"].items()]
        yield f"## pass@k of {details['samples']} replies\n\n{table(['k', 'items with a right reply'], rows)}"
    if details["retries"]:
        yield f"## With retries\n\n{_retries(details['retries'])}"
    if details["subjects"]:
        rows = [[name, found["items"], _points(found["exact"])] for name, found in details["subjects"].items()]
        yield f"## Subjects\n\n{table(['subject', 'items', 'exact'], rows)}"
    if details["retention"]:
        yield f"## Retention\n\n{_retention(details)}"
    yield "## Resources\n\n" + "\n".join(render(details["resources"]))
    yield f"## Settings\n\n{_settings(details)}"


def _scores(details: dict[str, Any]) -> str:
    """One row per measure; with a base also its value and the difference."""
    before, gain, rows = details["before"], details["gain"] or {}, []
    own, other = _named(details), _named(before) if before else {}
    for name, found in own.items():
        row = [name.replace("_", " ", 1) if name.startswith(("released_", "option_")) else name, _points(found)]
        if before:
            row += [_points(other.get(name)), _difference(gain[name]) if name in gain else "-"]
        rows.append(row)
    for name, form in (("truncated", _points), ("reply_tokens", _tokens), ("ppl_fit", _ratio)):
        row = [name, form(details[name])]
        if before:
            change = details["retention"]["reply_tokens_change"] if name == "reply_tokens" else None
            row += [form(before[name]), "-" if change is None else _value(change, "+.1f")]
        rows.append(row)
    note = (
        "Percent of the items; `reply_tokens` are tokens. `ppl_fit` is the perplexity of the gold replies after the "
        "question alone, pooled over tokens."
    )
    if details["released"]:
        note += " `released` is the release's scorer of the same replies."
    headings = ["measure", "95% interval", *(["base", "difference"] if before else [])]
    return f"{table(headings, rows)}\n\n{note}"


def _named(details: dict[str, Any]) -> dict[str, Estimate]:
    """All shares by the names that gains have."""
    released = (details["released"] or {}).get("metrics", {})
    options = details.get("option_likelihood") or {}
    found = {f"released_{name}": value for name, value in released.items()}
    return details["metrics"] | found | {f"option_{name}": value for name, value in options.items()}


def _retries(found: dict[str, Any]) -> str:
    rows = [[name, _points(value)] for name, value in found["metrics"].items()]
    rows += [[f"released {name}", _points(value)] for name, value in (found["released"] or {}).items()]
    counted = (
        f"{found['failed_first_pass']} replies lacked the asked-for form and were sampled again; "
        f"{found['recovered']} then had it."
    )
    return f"{counted} The scores above are those of the first pass.\n\n{table(['measure', 'with retries'], rows)}"


def _retention(details: dict[str, Any]) -> str:
    """Both directions side by side."""
    found = details["retention"]
    rows = []
    for name, digits in (
        ("ppl_base", ".3f"), ("ppl_adapted", ".3f"), ("jsd", ".4f"), ("kl_from_base", ".4f"), ("kl_to_base", ".4f"),
        ("entropy_adapted", ".3f"), ("entropy_base", ".3f"),
    ):  # fmt: skip
        rows.append([name, *(_value(found[side][name], digits) for side in ("forward", "reverse"))])
    lengths = found["reply_tokens_change"]
    pairs = found["paired"]
    text = (
        f"{table(['measure', 'on its own replies', 'on the replies of the base'], rows)}\n\n"
        f"`ppl_base` on its own replies is PPL_ret. Distances are nats per token, over {found['forward']['tokens']} "
        f"and {found['reverse']['tokens']} tokens; kl_from_base = KL(base ‖ adapted), kl_to_base = KL(adapted ‖ base). "
        f"The replies' length has changed by {lengths['mean']:+.1f} tokens [{lengths['low']:+.1f}, "
        f"{lengths['high']:+.1f}]."
    )
    if pairs["pairs"]:
        delta = pairs["logp_delta"]
        entropy = pairs["entropy_change"]
        text += (
            f" Their entropy by {entropy['mean']:+.3f} nats per token [{entropy['low']:+.3f}, {entropy['high']:+.3f}]."
            f" In {100 * pairs['logp_delta_above_0']:.1f}% of {pairs['pairs']} pairs the base finds the adapted "
            f"model's reply likelier per token than the adapted model finds the base's (mean difference "
            f"{delta['mean']:+.3f} nats [{delta['low']:+.3f}, {delta['high']:+.3f}])."
        )
    released = found["released"]
    rows = [
        [name, *(_number(released[side][name]) for side in ("retention", "reverse"))]
        for name in ("ppl_mean_avg", "ppl_mean_median", "logp_mean_avg", "jsd_mean_avg")
    ]
    return text + f"\n\nAs the release averages, every reply alike:\n\n{table(['', 'forward', 'reverse'], rows)}"


def _settings(details: dict[str, Any]) -> str:
    options, measured = details["settings"]["evaluation"], details["settings"]["measure"]
    rows = [
        *([name, details[name]] for name in ("model", "adapter", "base", "key", "samples", "device", "commit")),
        ["temperature", measured["temperature"]],
        ["evaluation.max_completion_length", options["max_completion_length"]],
        ["data.form", details["settings"]["data"]["form"]],
    ]
    rows += list(details["versions"].items())
    return table(["setting", "value"], [[name, "-" if value is None else value] for name, value in rows])


def _counted(title: str, counts: dict[str, dict[str, int]]) -> Iterator[str]:
    if counts:
        rows = [[name, value, number] for name, found in counts.items() for value, number in found.items()]
        yield f"## {title}\n\n{table(['grade', 'value', 'replies'], rows)}"


def _write_plots(folder: Path, details: dict[str, Any]) -> list[str]:
    # Imported here: it is slow to load.
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figures = {"accuracy": _draw_accuracy(details)}
        if details["gain"] and details["retention"]["jsd"]:
            figures["drift_and_gain"] = _draw_drift_and_gain(details)
        for name, figure in figures.items():
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=130)
            write_bytes_atomic(folder / f"{name}.png", image.getvalue())
    return list(figures)


def _draw_accuracy(details: dict[str, Any]):
    """Accuracy with its interval: ours, the release's scorer, the base, the subjects."""
    from matplotlib.figure import Figure

    bars = [("exact", details["metrics"]["exact"], _OWN)]
    if details["released"]:
        bars.append(("release's\nscorer", details["released"]["metrics"]["exact"], _OWN))
    if details["before"]:
        bars.append(("base", details["before"]["metrics"]["exact"], _BASE))
    bars += [(name[:20], found["exact"], _OWN) for name, found in list(details["subjects"].items())[:12]]
    figure = Figure(figsize=(2.2 + 0.7 * len(bars), 3.0), layout="constrained")
    axes = figure.subplots()
    for place, (_, found, color) in enumerate(bars):
        axes.bar(place, 100 * found["mean"], color=color, width=0.65)
        axes.vlines(place, 100 * found["low"], 100 * found["high"], color="black", linewidth=1.4)
    axes.set_xticks(range(len(bars)), [name for name, _, _ in bars], rotation=30 if len(bars) > 4 else 0)
    axes.set(ylabel="right (%), 95% interval", ylim=(0, 100))
    return figure


def _draw_drift_and_gain(details: dict[str, Any]):
    """How much was gained, against how far the model has moved; the base is the origin."""
    from matplotlib.figure import Figure

    gain, jsd = details["gain"]["exact"], details["retention"]["jsd"]
    figure = Figure(figsize=(4, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=_BASE, linewidth=0.8)
    axes.plot(0, 0, marker="o", color=_BASE)
    axes.errorbar(
        jsd["mean"], 100 * gain["mean"], xerr=_arms(jsd, 1), yerr=_arms(gain, 100), marker="o", color=_OWN, capsize=3
    )
    axes.set(xlabel="drift: JSD to the base (nats per token)", ylabel="gain (points)")
    return figure


def _arms(found: Estimate, scale: float) -> list[list[float]]:
    # A percentile interval need not hold the mean: an arm is never negative.
    return [[max(0.0, scale * arm)] for arm in (found["mean"] - found["low"], found["high"] - found["mean"])]


def _points(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{100 * found['mean']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def _difference(found: Estimate) -> str:
    return f"{100 * found['mean']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def _tokens(found: Estimate) -> str:
    return _value(found, ".1f")


def _ratio(found: Estimate | None) -> str:
    return _value(found, ".3f")


def _value(found: Estimate | None, form: str) -> str:
    if found is None:
        return "-"
    # JSON has no infinity: the perplexity of a model that is far off is null.
    mean, low, high = ("inf" if found[end] is None else f"{found[end]:{form}}" for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
