"""The report's tables: results, gains, scorers, sensitivity."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath

from unisd_jax.overview.blocks import Block, Cell, Heading, Table, Text
from unisd_jax.overview.estimates import NOTHING, Estimate, difference, over_seeds
from unisd_jax.overview.groups import GAMMA, Group, K, Study, differing, rows, short
from unisd_jax.overview.measurements import Column, Measurement, without_base

MISSING = Cell("not measured")
BASE = "base model"
_HOW = (
    "A cell is the mean over seeds in percent and its 95% interval; below, seeds × items (`?`: their number is not "
    "stored) and what the interval is over: `s+i` seeds and items, both resampled; `i` items, of one seed; `s` seeds "
    "(Student's t), where grades of single items are not there. With fewer than five seeds `s+i` is too narrow for "
    "other seeds."
)
Row = tuple[Cell, dict[Column, list[Measurement]]]


def results(study: Study) -> Iterator[Block]:
    """Modes against tasks, for each model."""
    yield Heading("Results")
    if not study.columns:
        yield Text("Not measured: no run here has finished its evaluation, and there is no other.")
        return
    yield Text(_HOW)
    yield Text(
        "The best of a column is set off only where the 95% interval of its difference to the next excludes 0; no "
        "interval is corrected for the number of comparisons."
    )
    for model in _models(study):
        yield Heading(short(model), 3)
        yield _results_of(study, model, "exact", f"Exact match (%) of {model}")
        yield from _apart(study, model)


def scorers(study: Study) -> Iterator[Block]:
    """The strict scorer beside the release's."""
    yield Heading("Strict and released scorers")
    columns = [column for column in study.columns if any(_has(study, column, "released"))]
    if not columns:
        yield Text("Not measured: no evaluation here has a task for which the release has a scorer of its own.")
        return
    yield Text("The same replies, graded by the strict scorer and by the release's.")
    for model in _models(study):
        table = []
        for label, cells in _rows(study, model):
            pairs = [[over_seeds(cells.get(column, ()), name) for name in ("exact", "released")] for column in columns]
            if any(released for _, released in pairs):
                table.append([label, *(percent(found) for pair in pairs for found in pair)])
        names = column_names(study.columns)
        headings = [f"{names[column]}, {scorer}" for column in columns for scorer in ("strict", "released")]
        yield Table(f"Exact match (%) of {model} by both scorers", [_ROWS, *headings], table)


def gains(study: Study) -> Iterator[Block]:
    """Before, after, gain, and what it cost in drift."""
    yield Heading("Before, after, gain")
    yield Text(
        "Gain is in points over the model before training, or over the one that the task is said to be compared with, "
        "on the same items; before is what that model had. Drift is the mean JSD to it in "
        "nats per token: of `evaluate` on the replies to the task, of a training run on prompts that have nothing to "
        "do with it. The two are no one measure. PPL_fit is of the gold replies, PPL_ret of the model's own under "
        "the base."
    )
    names, empty = column_names(study.columns), True
    for model in _models(study):
        table = []
        for label, cells in _rows(study, model, base=False):
            for column in sorted(cells):
                found = cells[column]
                base = study.bases.get(model, {}).get(column)
                before = over_seeds([base], "exact") if base else over_seeds(found, "before")
                shares = [percent(before), percent(over_seeds(found, "exact"))]
                gain = percent(over_seeds(found, "gain"), "+")
                rest = [amount(over_seeds(found, name), form) for name, form in _KEPT.items()]
                table.append([label, names[column], *shares, gain, *rest])
        if table:
            headings = [_ROWS, "task", "before (%)", "after (%)", "gain (points)", "drift (nats)", "PPL_fit", "PPL_ret"]
            yield Table(f"Before and after training {model}", headings, table, left=2)
            empty = False
    if empty:
        yield Text("Not measured: no run here has an evaluation.")


def sensitivity(study: Study) -> Iterator[Block]:
    """Heat maps over K and gamma of runs that differ in nothing else."""
    yield Heading("Sensitivity to K and gamma")
    families: dict[str, list[Group]] = defaultdict(list)
    for one in study.groups:
        if one.config.get(K):
            others = {name: value for name, value in one.config.items() if name not in (K, GAMMA)}
            families[repr(sorted(others.items(), key=str))].append(one)
    names, drawn = column_names(study.columns), 0
    for family in families.values():
        if not differing([one.config for one in family]):
            continue
        for column in sorted({column for one in family for column in one.measured}):
            drawn += 1
            yield _heat_map(family, column, names[column])
    if not drawn:
        yield Text(
            f"Not shown: no evaluated runs differ in `{K}` (K) or `{GAMMA}` (gamma) and in nothing else but the seed."
        )
    else:
        yield Text("A stronger colour is a higher mean; the colours of one map span its own lowest to highest.")


def percent(found: Estimate | None, sign: str = "") -> Cell:
    """A share in percent, or a difference of shares in points, with interval and n."""
    return MISSING if found is None else _cell(found, 100.0, f"{sign}.1f")


def amount(found: Estimate | None, form: str) -> Cell:
    """Another number, with interval and n."""
    return MISSING if found is None else _cell(found, 1.0, form)


def column_names(columns: Sequence[Column]) -> dict[Column, str]:
    """The task and another base; the kind of evaluation, items or a number where that does not tell columns apart."""
    found: dict[Column, str] = {}
    bases = _base_names({column.base for column in columns if column.base})
    for column in columns:
        alike = [other for other in columns if other.task == column.task]
        name = column.task
        if len({other.source for other in alike}) > 1:
            name += " at the end of training" if column.source == "training" else " by evaluate"
        alike = [other for other in alike if other.source == column.source]
        name += f" compared with {bases[column.base]}" if column.base else ""
        alike = [other for other in alike if other.base == column.base]
        if len({other.items for other in alike}) > 1:
            name += f", {column.items} items"
        alike = [other for other in alike if other.items == column.items]
        found[column] = name if len(alike) == 1 else f"{name}, setting {alike.index(column) + 1}"
    return found


def _base_names(paths: Iterable[str]) -> dict[str, str]:
    """As many of the last parts of each path as tell it from the others; of a run's `hf` or `adapter` the run too."""
    parts = {path: PurePath(os.path.relpath(path)).parts for path in paths}
    names = {}
    for path, own in parts.items():
        shown = 2 if own[-1] in ("hf", "adapter") else 1
        others = [other for name, other in parts.items() if name != path]
        while shown < len(own) and any(other[-shown:] == own[-shown:] for other in others):
            shown += 1
        names[path] = "/".join(own[-shown:])
    return names


_ROWS = "mode"
_KEPT = {"drift": ".4f", "ppl_fit": ".3f", "ppl_ret": ".3f"}


def _models(study: Study) -> list[str]:
    return list(dict.fromkeys([*(one.model for one in study.groups), *study.bases]))


def _has(study: Study, column: Column, name: str) -> Iterator[bool]:
    for one in study.groups:
        yield any(name in found.values for found in one.measured.get(column, ()))
    for base in study.bases.values():
        yield column in base and name in base[column].values


def _rows(study: Study, model: str, *, base: bool = True) -> Iterator[Row]:
    """The table's rows of a model, each with what it has in the columns."""
    if base and model in study.bases:
        yield Cell(BASE), {column: [found] for column, found in study.bases[model].items()}
    found = rows([one for one in study.groups if one.model == model and one.measured])
    modes = [row[0].mode for row in found]
    for row in found:
        cells = {column: found for one in row for column, found in one.measured.items()}
        # The columns tell the groups of a row apart, but not one row from another.
        noted = len(row) == 1 or modes.count(row[0].mode) > 1
        yield Cell(row[0].mode, tuple(one.note for one in row if one.note) if noted else ()), cells


def _results_of(study: Study, model: str, name: str, caption: str) -> Table:
    # What a gain is over says nothing of the score itself.
    found = [(label, _whatever_the_base(cells)) for label, cells in _rows(study, model)]
    names = column_names(list(dict.fromkeys(without_base(column) for column in study.columns)))
    columns = [column for column in names if any(column in cells for _, cells in found)]
    table = [[label] for label, _ in found]
    for column in columns:
        measured = [cells.get(column, []) for _, cells in found]
        means = [over_seeds(cell, name) for cell in measured]
        best = _best(measured, means, name)
        for place, row in enumerate(table):
            row.append(percent(means[place])._replace(best=place == best))
    return Table(caption, [_ROWS, *(names[column] for column in columns)], table)


def _whatever_the_base(cells: dict[Column, list[Measurement]]) -> dict[Column, list[Measurement]]:
    """The cells by columns without a base; a run that was compared with several models is one seed all the same."""
    found: dict[Column, list[Measurement]] = {}
    for column, measurements in cells.items():
        there = found.setdefault(without_base(column), [])
        there += [one for one in measurements if one.run is None or one.run not in [other.run for other in there]]
    return found


def _best(cells: Sequence[list[Measurement]], means: Sequence[Estimate | None], name: str) -> int | None:
    """The row with the highest mean, if it is above the next by more than chance."""
    ranked = sorted((place for place, mean in enumerate(means) if mean), key=lambda place: -means[place].mean)
    if len(ranked) < 2:
        return None
    found = difference(cells[ranked[0]], cells[ranked[1]], name)
    return ranked[0] if found and found.low is not None and found.low > 0 else None


def _apart(study: Study, model: str) -> Iterator[Text]:
    modes = [one.mode for one in study.groups if one.model == model and one.note and one.config]
    several = [mode for mode in dict.fromkeys(modes) if modes.count(mode) > 1]
    if several:
        yield Text(
            f"Runs of {', '.join(f'`{mode}`' for mode in several)} differ in more than the seed. They are not averaged "
            "together: each configuration has a row or a column of its own, named by what differs."
        )


def _heat_map(family: Sequence[Group], column: Column, name: str) -> Table:
    cells = {(one.config.get(K), one.config.get(GAMMA)): one.measured.get(column, []) for one in family}
    found = {place: over_seeds(cell, "exact") for place, cell in cells.items()}
    means = [estimate.mean for estimate in found.values() if estimate]
    low, span = min(means), max(means) - min(means)
    gammas, ks = sorted({gamma for _, gamma in cells}, key=_size), sorted({k for k, _ in cells}, key=_size)
    table = []
    for k in ks:
        estimates = [found.get((k, gamma)) for gamma in gammas]
        shades = [None if one is None else (one.mean - low) / span if span > 1e-9 else 0.5 for one in estimates]
        table.append(
            [f"K = {k}", *(percent(one)._replace(heat=heat) for one, heat in zip(estimates, shades, strict=True))]
        )
    caption = f"{family[0].mode} on {name}, {short(family[0].model)}: exact match (%) over K and gamma"
    return Table(caption, ["", *(f"gamma = {gamma}" for gamma in gammas)], table)


def _size(value: object) -> tuple[float, str]:
    return (float(value), "") if isinstance(value, int | float) else (float("inf"), str(value))


def _cell(found: Estimate, scale: float, form: str) -> Cell:
    count = f"{found.seeds} × {found.items}" if found.items else f"{found.seeds} × ?"
    if found.low is None or found.high is None:
        return Cell(f"{scale * found.mean:{form}}", (f"{count}, no interval" if found.over == NOTHING else count,))
    ends = f"[{scale * found.low:{form}}, {scale * found.high:{form}}]"
    return Cell(f"{scale * found.mean:{form}}", (ends, f"{count}, {found.over}"))
