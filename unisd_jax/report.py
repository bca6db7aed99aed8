"""What a run did, for a reader: `plots/*.png` and `report.md`, made from the files in its directory alone."""

import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from unisd_jax.errors import UserError
from unisd_jax.io import write_bytes_atomic, write_text_atomic
from unisd_jax.markdown import table
from unisd_jax.metrics import METRICS_FILE, read_metrics
from unisd_jax.resources import render

RESULT_FILE, SAMPLES_FILE, CONFIG_FILE = "result.json", "samples.jsonl", "config.yaml"

# File under plots/ -> the metrics drawn side by side in it, with the label of each axis.
CURVES = {
    "loss": {"loss": "loss", "divergence": "divergence (nats per token)"},
    "completions": {"entropy": "entropy (nats per token)", "completion_length": "completion length (tokens)"},
    "sampler_gap": {"sampler_gap": "sampler gap, mean (nats)", "sampler_gap_max": "largest (nats)"},
}
# The same for what `evaluation.every` measures on the way; drawn only where it did.
PROGRESS_CURVES = {"progress": {"eval_exact": "exact match (share)", "eval_drift": "drift from the base (nats)"}}
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
}
_BEFORE, _AFTER, _GAIN = "#999999", "#0072b2", "#009e73"
# What a reader asks of a run's configuration first; the rest is in config.yaml, which the report links.
_SETTINGS = {
    "data": ("task",),
    "model": ("trainable",),
    "teacher": ("condition", "placement", "ema"),
    "objective": ("loss", "alpha"),
    "rollout": ("temperature", "max_completion_length"),
    "optimizer": ("learning_rate",),
    "train": ("batch_size",),
}
_REQUIRED = {"mode": str, "steps": int, "seconds": dict}  # what every result has, evaluated or not
_RUN_DIRECTORY = "the directory of a run, such as runs/quickstart"
_SAMPLES_SHOWN = 8
_LAST = 10  # steps averaged in the table of metrics


class _Run(NamedTuple):
    """The files of a run directory; `missing` says in words which parts are not there."""

    name: str
    result: dict[str, Any]
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: dict[str, Any]
    missing: list[str]


def write_report(run_dir: str | Path) -> Path:
    """Draw `plots/*.png`, write `report.md` and return its path; the report names the parts that are missing.

    Raises:
      UserError: `run_dir` holds neither metrics nor a result, or a file in it cannot be read.
    """
    run_dir = Path(run_dir)
    run = _read_run(run_dir)
    plots = _write_plots(run_dir / "plots", run)
    sections = [
        f"# {run.name}",
        _headline(run.result),
        "## What was run",
        _what_was_run(run),
        "## Before and after",
        _before_and_after(run.result),
        "## Training",
        _metrics_table(run.records),
        "\n".join(f"![{name}](plots/{name}.png)" for name in plots),
        f"## Samples\n\n{_samples(run.samples)}",
        "## Time and versions",
        table(["phase", "seconds"], [[k, f"{v:.1f}"] for k, v in run.result.get("seconds", {}).items()]),
        "\n".join(render(run.result["resources"])) if "resources" in run.result else "",
        table(["package", "version"], list((run.result.get("versions") or {}).items())),
    ]
    if run.missing:
        sections += ["## Not in this report", "\n".join(f"- {line}" for line in run.missing)]
    path = run_dir / "report.md"
    write_text_atomic(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def read_result(run_dir: str | Path) -> dict[str, Any]:
    """The `result.json` of a finished run.

    Raises:
      UserError: `run_dir` is no run directory, its run did not finish, or the file is not a result.
    """
    path = Path(run_dir) / RESULT_FILE
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a directory: expected {_RUN_DIRECTORY}")
    if not path.is_file():
        raise UserError(f"{path} is not there: it comes at the end of a run; expected {_RUN_DIRECTORY}")
    try:
        result = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): expected {_RUN_DIRECTORY}") from None
    found = result if isinstance(result, dict) else {}
    absent = [key for key, kind in _REQUIRED.items() if not isinstance(found.get(key), kind)]
    if absent:
        raise UserError(f"{path} has no valid {', '.join(absent)}: expected {_RUN_DIRECTORY}")
    return result


def percent(fraction: float | None) -> str:
    """A fraction as a percentage, "-" when it was not measured."""
    return "-" if fraction is None else f"{100 * fraction:.1f}%"


def gain_text(result: dict[str, Any]) -> str:
    """Gain in points of exact match and its interval, as in "+52.0 [+45.0, +59.0]"; "-" if not measured."""
    if result.get("gain") is None:
        return "-"
    ends = ", ".join(f"{100 * end:+.1f}" for end in result.get("gain_interval") or ())
    return f"{100 * result['gain']:+.1f}" + (f" [{ends}]" if ends else "")


def _read_run(run_dir: Path) -> _Run:
    result = read_result(run_dir) if (run_dir / RESULT_FILE).is_file() else {}
    records = read_metrics(run_dir / METRICS_FILE) if (run_dir / METRICS_FILE).is_file() else []
    if not (result or records):
        raise UserError(f"{run_dir} has neither {METRICS_FILE} nor {RESULT_FILE}: expected {_RUN_DIRECTORY}")
    samples, config = _read_samples(run_dir / SAMPLES_FILE), _read_config(run_dir / CONFIG_FILE)
    evaluated = result.get("gain") is not None
    reasons = {
        f"{RESULT_FILE}: the run has not finished, so there is no before and after": not result,
        "exact match before and after: not in the result (evaluation.enabled=false)": result and not evaluated,
        "drift: not measured (evaluation.drift_tokens=0)": evaluated and result.get("drift") is None,
        f"{METRICS_FILE}: no step was logged, so there are no curves": not records,
        f"{SAMPLES_FILE}: no samples (logging.samples=0, or the evaluation has not run)": not samples,
        f"{CONFIG_FILE}: not there, so the settings are unknown": not config,
    }
    missing = [reason for reason, holds in reasons.items() if holds]
    curves = [name for metrics in CURVES.values() for name in metrics if records]
    missing += [f"the curve of {name}: not logged" for name in curves if not _logged(records, name)]
    return _Run(run_dir.resolve().name, result, records, samples, config, missing)


def _read_samples(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    samples = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            sample = json.loads(line)
        except ValueError:
            sample = None
        if not isinstance(sample, dict) or "prompt" not in sample:
            raise UserError(f"{path}, line {number}: expected an object with id, prompt, gold, before, after")
        samples.append(sample)
    return samples


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a YAML mapping: expected the configuration a run writes")
    return config


def _logged(records: list[dict[str, Any]], name: str) -> bool:
    return any(record.get(name) is not None for record in records)


def _write_plots(folder: Path, run: _Run) -> list[str]:
    """Draw what there are numbers for; the names of the plots drawn, in reading order."""
    # Imported here: it is slow to load, and who only reads a result does not draw.
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figures = {"evaluation": _draw_evaluation(run.result)} if run.result.get("gain") is not None else {}
        for plot, metrics in (CURVES | PROGRESS_CURVES).items():
            drawn = {name: label for name, label in metrics.items() if _logged(run.records, name)}
            if drawn:
                figures[plot] = _draw_curves(run.records, drawn)
        if _logged(run.records, "eval_gain") and _logged(run.records, "eval_drift"):
            figures["drift_and_gain"] = _draw_drift_and_gain(run.records)
        for name, figure in figures.items():
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=130)
            write_bytes_atomic(folder / f"{name}.png", image.getvalue())
    return list(figures)


def _draw_curves(records: list[dict[str, Any]], metrics: dict[str, str]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(metrics), 2.8), layout="constrained")
    row = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, (name, label) in zip(row, metrics.items(), strict=True):
        # A step without the value, or with one that is not finite, leaves a gap in the line; but where only some steps
        # are measured, the line joins those.
        measured = [record for record in records if name in record]
        values = [math.nan if record[name] is None else record[name] for record in measured]
        steps = [record["step"] for record in measured]
        axes.plot(steps, values, marker="o" if len(steps) <= 60 else "", color=_AFTER)
        if all(f"{name}_{end}" in record for record in measured for end in ("low", "high")):
            ends = [[record[f"{name}_{end}"] for record in measured] for end in ("low", "high")]
            axes.fill_between(steps, *ends, color=_AFTER, alpha=0.15, linewidth=0)
        axes.set(xlabel="step", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _draw_drift_and_gain(records: list[dict[str, Any]]):
    """The way of the run from where it began: how much was gained, against how far the model has moved."""
    from matplotlib.figure import Figure

    measured = [record for record in records if record.get("eval_gain") is not None]
    measured = [record for record in measured if record.get("eval_drift") is not None]
    figure = Figure(figsize=(4, 2.8), layout="constrained")
    axes = figure.subplots()
    drift = [0.0, *(record["eval_drift"] for record in measured)]
    gain = [0.0, *(100 * record["eval_gain"] for record in measured)]
    axes.plot(drift, gain, marker="o", color=_AFTER)
    for record in measured:
        ends = 100 * record["eval_gain_low"], 100 * record["eval_gain_high"]
        axes.vlines(record["eval_drift"], *ends, color=_AFTER, linewidth=1.0, alpha=0.5)
    for place in sorted({0, len(measured) - 1}) if measured else ():
        record = measured[place]
        at = record["eval_drift"], 100 * record["eval_gain"]
        axes.annotate(f"step {record['step']}", at, textcoords="offset points", xytext=(4, 4))
    axes.set(xlabel="drift from the base (nats)", ylabel="gain (points)")
    return figure


def _draw_evaluation(result: dict[str, Any]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 2.8), layout="constrained")
    axes = figure.subplots()
    heights = [100 * result[name] for name in ("before", "after", "gain")]
    labels = [f"before\n{heights[0]:.1f}", f"after\n{heights[1]:.1f}", f"gain\n{heights[2]:+.1f}"]
    axes.bar(labels, heights, color=[_BEFORE, _AFTER, _GAIN], width=0.6)
    axes.grid(visible=False, axis="x")
    if result.get("gain_interval"):
        low, high = (100 * end for end in result["gain_interval"])
        axes.vlines(2, low, high, color="black", linewidth=1.6)
    axes.set(ylabel="exact match (%)")
    return figure


def _headline(result: dict[str, Any]) -> str:
    if result.get("gain") is None:
        return "No before and after to report; the last section says why."
    text = (
        f"Exact match on {result.get('items', '?')} test items: **{percent(result['before'])}** before, "
        f"**{percent(result['after'])}** after, a gain of **{gain_text(result)}** points "
        "(95% paired bootstrap interval)."
    )
    if result.get("drift") is not None:
        drift = _number(result["drift"])
        text += f"\n\nDrift from the base model: {drift} nats (mean token JSD on unrelated prompts)."
    return text


def _what_was_run(run: _Run) -> str:
    rows = [[key, run.result[key]] for key in ("model", "mode", "steps", "seed") if key in run.result]
    for section, keys in _SETTINGS.items():
        found = run.config.get(section) or {}
        rows += [[f"{section}.{key}", found[key]] for key in keys if key in found]
    rows += [[key, run.result[key]] for key in ("device", "commit", "config_hash") if key in run.result]
    link = f"Every setting: [{CONFIG_FILE}]({CONFIG_FILE})." if run.config else ""
    return "\n\n".join(part for part in (table(["setting", "value"], rows), link) if part)


def _before_and_after(result: dict[str, Any]) -> str:
    before, after = result.get("before_metrics") or {}, result.get("after_metrics") or {}
    rows = []
    for name in sorted({*before, *after}):
        found = (result.get("changes") or {}).get(name)
        change = "-" if found is None else "{mean:+.4g} [{low:+.4g}, {high:+.4g}]".format(**found)
        rows.append([name, _number(before.get(name)), _number(after.get(name)), change])
    note = "Fractions of the test items; gold_logprob is in nats per token of the gold completion."
    return (
        f"{table(['measure', 'before', 'after', 'change, 95% interval'], rows)}\n\n{note}" if rows else "Not measured."
    )


def _metrics_table(records: list[dict[str, Any]]) -> str:
    if not records:
        return "No step was logged."
    first, last, recent = records[0], records[-1], records[-_LAST:]
    rows = []
    for name in dict.fromkeys(name for record in records for name in record):
        if name not in ("step", "nonfinite"):
            values = [record[name] for record in recent if record.get(name) is not None]
            mean = sum(values) / len(values) if values else None
            rows.append([name, _number(first.get(name)), _number(last.get(name)), _number(mean)])
    headings = ["metric", f"step {first['step']}", f"step {last['step']}", f"mean of the last {len(recent)}"]
    text = table(headings, rows)
    broken = [f"{', '.join(r['nonfinite'])} at step {r['step']}" for r in records if r.get("nonfinite")]
    return text + (f"\n\n**Not finite:** {'; '.join(broken)}." if broken else "")


def _samples(samples: list[dict[str, Any]]) -> str:
    shown = min(_SAMPLES_SHOWN, len(samples))
    parts = [f"{shown} of the {len(samples)} in [{SAMPLES_FILE}]({SAMPLES_FILE})."]
    for sample in samples[:_SAMPLES_SHOWN]:
        parts.append(f"### {sample.get('id', '')}")
        for part in ("prompt", "gold", "before", "after"):
            exact = sample.get(f"exact_{part}")
            heading = part if exact is None else f"{part} (exact match {float(exact):g})"
            parts.append(f"{heading}:\n\n{_fenced(sample.get(part))}")
    return "\n\n".join(parts) if samples else "None were written."


def _fenced(text: str | None) -> str:
    """A code block that no backticks in `text` can close, so a model's markdown stays text."""
    text, fence = "(none)" if text is None else str(text), "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
