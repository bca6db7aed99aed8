"""The report's charts: gain against drift, and the curves of training."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from unisd_jax.overview.blocks import Block, Chart, Charts, Heading, Legend, Table, Text
from unisd_jax.overview.estimates import over_seeds
from unisd_jax.overview.files import number
from unisd_jax.overview.groups import Group, Study, short
from unisd_jax.overview.measurements import Column
from unisd_jax.overview.reading import Run
from unisd_jax.overview.svg import COLORS, Line, Point, Style, lines, scatter, swatch
from unisd_jax.overview.tables import column_names

CURVES = {
    "loss": "loss (nats)",
    "divergence": "divergence (nats per token)",
    "entropy": "entropy (nats per token)",
    "eval_exact": "eval_exact (share)",
}
_TOGETHER = 8  # lines in one chart; more cannot be told apart
_PLACES = 120  # points of a line; longer runs are drawn as means over as many stretches


def gain_against_drift(study: Study) -> Iterator[Block]:
    """One point per run and one chart per way of measuring."""
    yield Heading("Gain against drift")
    names, styles, charts, shown = column_names(study.columns), mode_styles(study), [], set()
    for column in study.columns:
        points = list(_points(study, column, styles))
        if points:
            shown |= {point.style.color for point, _ in points}
            charts.append(_scatter(points, column, names[column]))
    if not charts:
        yield Text("Not measured: no run here has both a gain and a drift.")
        return
    yield Text(
        "One point per run. Up is better, left has moved less from the model before training. Bars are 95% intervals "
        "over items, where they were computed: a drift at the end of training has none."
    )
    entries = [(swatch(style, line=False), mode) for mode, style in styles.items() if style.color in shown]
    yield Charts(Legend(entries), charts)


def curves(study: Study) -> Iterator[Block]:
    """What was logged while training, by model and task."""
    yield Heading("Training curves")
    together: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for one in study.groups:
        if any(run.records for run in one.runs):
            together[one.model, str(one.config.get("data.task", "unknown task"))].append(one)
    if not together:
        yield Text("Not measured: no run here has logged a step.")
        return
    yield Text(
        "The mean over the seeds, in a band from their lowest to their highest; of one seed the 95% interval where it "
        f"was logged. Runs of more than {_PLACES} steps are drawn as means over stretches of steps, and where a seed "
        "has stopped early the mean is of the others. Losses of different modes are different sums."
    )
    styles = mode_styles(study)
    for (model, task), groups in together.items():
        yield Heading(f"{short(model)} on {task}", 3)
        size = math.ceil(len(groups) / math.ceil(len(groups) / _TOGETHER))
        for start in range(0, len(groups), size):
            yield _curves_of(groups[start : start + size], styles)


def mode_styles(study: Study) -> dict[str, Style]:
    """One colour and marker for each mode, the same in all charts."""
    # First those that were measured: so the colours of the points of gain against drift last longest.
    modes = dict.fromkeys(one.mode for one in sorted(study.groups, key=lambda one: not one.measured))
    return {mode: Style(place) for place, mode in enumerate(modes)}


def _points(study: Study, column: Column, styles: dict[str, Style]) -> Iterator[tuple[Point, list[str]]]:
    for one in study.groups:
        for found in one.measured.get(column, ()):
            gain, drift = over_seeds([found], "gain"), over_seeds([found], "drift")
            if gain is None or drift is None:
                continue
            run = found.run.label
            gains = [None if end is None else 100 * end for end in (gain.mean, gain.low, gain.high)]
            told = f"{one.label}, {run}: {_ends(gains, '+.1f')} points, drift {_ends(drift[:3], '.4f')} nats"
            x_ends = None if drift.low is None or drift.high is None else (drift.low, drift.high)
            y_ends = None if None in gains else (gains[1], gains[2])
            point = Point(drift.mean, gains[0], x_ends, y_ends, styles[one.mode], told)
            yield point, [run, one.label, _ends(drift[:3], ".4f"), _ends(gains, "+.1f"), str(gain.items)]


def _scatter(points: Sequence[tuple[Point, list[str]]], column: Column, name: str) -> Chart:
    of = "the replies to the task" if column.source == "evaluate" else "unrelated prompts"
    title = f"{name}: gain against drift"
    svg = scatter([point for point, _ in points], title, f"drift, JSD on {of} (nats per token)", "gain (points)")
    headings = ["run", "mode", "drift (nats)", "gain (points)", "items"]
    return Chart(title, svg, Table(f"Numbers of {title}", headings, [row for _, row in points], left=2))


def _curves_of(groups: Sequence[Group], styles: dict[str, Style]) -> Charts:
    seen: dict[str, int] = defaultdict(int)
    own = {}
    for one in groups:
        own[one] = Style(styles[one.mode].color, styles[one.mode].color // COLORS + seen[one.mode])
        seen[one.mode] += 1
    charts = []
    for metric, label in CURVES.items():
        drawn = [(one, line) for one in groups if (line := _line(one, metric, own[one]))]
        if drawn:
            rows = [[one.label, str(_logged(one, metric)), *_course(line)] for one, line in drawn]
            headings = ["mode", "seeds", "first", "a third", "two thirds", "last"]
            numbers = Table(f"Numbers of {label}: mean over seeds along the steps", headings, rows)
            charts.append(Chart(label, lines([line for _, line in drawn], label, "step"), numbers))
    entries = [(swatch(style, line=True), f"{one.label}, n = {len(one.runs)}") for one, style in own.items()]
    return Charts(Legend(entries), charts)


def _logged(one: Group, metric: str) -> int:
    return sum(any(number(record, metric) is not None for record in run.records) for run in one.runs)


def _line(one: Group, metric: str, style: Style) -> Line | None:
    found = [points for run in one.runs if (points := _values(run, metric))]
    if not found:
        return None
    steps = sorted({step for points in found for step in points})
    stretches = np.array_split(np.array(steps), min(len(steps), _PLACES))
    xs, means, lows, highs = [], [], [], []
    for stretch in stretches:
        seeds = [[v for step in stretch if (v := points.get(int(step))) is not None] for points in found]
        values = [float(np.mean(some)) for some in seeds if some]
        xs.append(float(np.mean(stretch)))
        means.append(float(np.mean(values)) if values else None)
        lows.append(min(values) if len(values) > 1 else None)
        highs.append(max(values) if len(values) > 1 else None)
    if len(found) == 1 and len(steps) == len(stretches):
        run = next(run for run in one.runs if _values(run, metric))
        lows, highs = (list(map(_values(run, f"{metric}_{end}").get, steps)) for end in ("low", "high"))
    name = f"{one.label}, seeds: {len(found)}"
    return None if set(means) == {None} else Line(xs, means, lows, highs, style, name)


def _values(run: Run, metric: str) -> dict[int, float | None]:
    """By step; None where it was logged and not finite."""
    return {record["step"]: number(record, metric) for record in run.records if metric in record}


def _course(line: Line) -> list[str]:
    last = len(line.ys) - 1
    values = [line.ys[round(last * share)] for share in (0, 1 / 3, 2 / 3, 1)]
    return ["not finite" if value is None else f"{value:.4g}" for value in values]


def _ends(found: Sequence[float | None], form: str) -> str:
    mean, low, high = found
    return f"{mean:{form}}" + ("" if low is None or high is None else f" [{low:{form}}, {high:{form}}]")
