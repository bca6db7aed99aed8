"""The report's other sections: cost, samples, configurations, versions, and what each run lacks."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence

from unisd_jax.overview.blocks import Block, Cell, Heading, Replies, Table, Text, code
from unisd_jax.overview.files import mapping, number
from unisd_jax.overview.groups import Group, Study, differing, short
from unisd_jax.overview.reading import Run
from unisd_jax.overview.tables import MISSING
from unisd_jax.report import RESULT_FILE

_SAMPLES = 3  # replies shown of each configuration
_LENGTH = 1200  # characters shown of each
_TRAINING = ("rollout", "update")  # the phases in which tokens are trained on
_PHASES = ("setup", *_TRAINING, "evaluation", "export")
# A group's column in the table of options: more do not help.
_VALUE = 60


def costs(study: Study) -> Iterator[Block]:
    """Tokens per device-hour, seconds, memory, energy: means over the finished seeds."""
    yield Heading("Cost")
    rows = [_cost(one) for one in study.groups if any(mapping(run.result, "resources") for run in one.runs)]
    if not rows:
        yield Text("Not measured: no run here has finished with a record of its resources.")
        return
    yield Text(
        "Means over the finished seeds, of the process that finished each run. One that was stopped and resumed has "
        "measured only its last part: it is counted as resumed and is in no mean of seconds and energy. Tokens are "
        "those that the networks read or wrote in the phases `rollout` and `update`, prompts and every view included, "
        "and device-hours those of these phases. Energy is of the whole run; its source is `nvml` where the GPUs "
        "counted it, else an estimate from time and constants."
    )
    headings = ["mode", "device", "n", "tokens per device-hour (thousands)", *(f"{name} (s)" for name in _PHASES)]
    headings += [
        "whole run (s)",
        "peak memory (GiB)",
        "of a device (GiB)",
        "energy (kWh)",
        "source",
        "kWh per million tokens",
    ]
    yield Table("Cost of training", headings, rows, left=2)


def samples(study: Study) -> Iterator[Block]:
    """What the models said before and after."""
    yield Heading("Samples")
    shown = [(one, run) for one in study.groups if (run := next((run for run in one.runs if run.samples), None))]
    if not shown:
        yield Text("Not there: no run here has written samples.")
        return
    yield Text(f"The first {_SAMPLES} test items that the first seed of each configuration has written, not a choice.")
    for one, run in shown:
        for sample in run.samples[:_SAMPLES]:
            marks = [_mark(sample, when) for when in ("before", "after")]
            title = f"{one.label}, {run.label}, {sample.get('id', 'no id')}: {' → '.join(marks)}"
            parts = [(part, _cut(sample.get(part))) for part in ("prompt", "gold", "before", "after")]
            yield Replies(f"{short(one.model)}: {title}", parts)


def configurations(study: Study) -> Iterator[Block]:
    """The options that are not alike in all runs."""
    yield Heading("What differs between the configurations")
    known = [one for one in study.groups if one.config]
    if len(known) < len(study.groups):
        yield Text(
            f"The settings of {len(study.groups) - len(known)} runs are unknown and not in this table.", warning=True
        )
    names = differing([one.config for one in known])
    if not names:
        yield Text("Nothing but the seed." if known else "Not known.")
        return
    yield Text(f"{len(names)} options differ; those that are alike in all runs are in each run's `config.yaml`.")
    rows = [["seeds", *(", ".join(run.told("seed", "seed") for run in one.runs) for one in known)]]
    rows += [[name, *(_value(one.config, name) for one in known)] for name in names]
    headings = ["option", *(one.label for one in known)]
    yield Table("Options that differ, by configuration", headings, rows, left=len(headings))


def environments(study: Study) -> Iterator[Block]:
    """With what the numbers were measured."""
    yield Heading("Versions, devices, commits")
    same: dict[str, list[Run]] = defaultdict(list)
    for run in study.runs:
        if run.result:
            same[json.dumps([run.result.get(name) for name in ("device", "commit", "versions")], default=str)].append(
                run
            )
    if not same:
        yield Text("Not known: they are in the result of a finished run, and no run here has one.")
        return
    packages = sorted({name for (run, *_) in same.values() for name in mapping(run.result, "versions")})
    rows = []
    for run, *others in same.values():
        versions = mapping(run.result, "versions")
        told = [str(run.result.get("device") or "unknown"), str(run.result.get("commit") or "unknown")[:12]]
        rows.append([_runs([run, *others]), *told, *(str(versions.get(name) or "not installed") for name in packages)])
    if len(rows) > 1:
        yield Text("The runs were not all made with the same versions, device and commit.", warning=True)
    yield Table("What the runs were made with", ["runs", "device", "commit", *packages], rows, left=3 + len(packages))


def directories(study: Study) -> Iterator[Block]:
    """Every run with its state, then what could not be used."""
    yield Heading("Runs")
    rows = []
    for one in study.groups:
        rows += [
            [run.label, _named(one), short(one.model), run.told("seed", "seed"), state(run), lacks(run)]
            for run in one.runs
        ]
    shown = {run for one in study.groups for run in one.runs}
    rows += [
        [run.label, "-", "-", run.told("seed", "seed"), state(run), "left out"]
        for run in study.runs
        if run not in shown
    ]
    headings = ["run", "mode", "model", "seed", "state", "missing"]
    yield Table("Every run directory", headings, rows, left=len(headings))
    if study.problems:
        yield Heading("Left out or damaged", 3)
        problems = [[problem.where, problem.what] for problem in study.problems]
        yield Table("What was not used, and why", ["where", "what"], problems, left=2)


def state(run: Run) -> str:
    """Finished, or how far it came and what its sweep says of it."""
    if number(run.result, "steps") is not None:
        return "finished"
    if (run.folder / RESULT_FILE).exists():
        return f"{RESULT_FILE} is damaged"
    planned = number(run.config, "train.steps")
    of = f" of {planned:.0f}" if planned is not None else ""
    came = f"unfinished: {run.records[-1]['step'] if run.records else 0}{of} steps"
    return f"{came}; {run.job}" if run.job else came


def lacks(run: Run) -> str:
    """Which parts of a run are not there, in words."""
    finished, result = number(run.result, "steps") is not None, run.result
    broken = [str(record["step"]) for record in run.records if record.get("nonfinite")]
    reasons = {
        "result": not finished,
        "evaluation": finished and number(result, "gain") is None,
        "drift": number(result, "gain") is not None and number(result, "drift") is None,
        "metrics": not run.records,
        "samples": not run.samples,
        "configuration": not run.config,
        f"finite metrics at step {', '.join(broken[:5])}{' …' * (len(broken) > 5)}": broken,
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds) or "nothing"


def _cost(one: Group) -> list[str | Cell]:
    measured = [run for run in one.runs if mapping(run.result, "resources")]
    found, partial = [mapping(run.result, "resources") for run in measured], [_was_resumed(run) for run in measured]
    resumed = (f"{sum(partial)} resumed",) if any(partial) else ()

    def whole(*names: str) -> list[float | None]:
        """What runs have used from their beginning to their end, None where only their last part was measured."""
        return [None if part else number(record, *names) for record, part in zip(found, partial, strict=True)]

    speeds = [_tokens_per_device_hour(record) for record in found]
    peaks = [max(values) if (values := _numbers(record.get("peak_device_memory_gib"))) else None for record in found]
    sources = {str(record.get("energy_source", "unknown")) for record in found}
    devices = {f"{number(record, 'devices') or 0:.0f} × {record.get('device', 'unknown')}" for record in found}
    row: list[str | Cell] = [_named(one), " and ".join(sorted(devices)), Cell(f"{len(found)}", resumed)]
    row += [_mean(speeds, ",.0f", 1e-3), *(_mean(whole("phases", phase, "seconds"), ".1f") for phase in _PHASES)]
    row += [_mean(whole("seconds"), ".1f")]
    row += [_mean([number(record, "peak_memory_gib") for record in found], ".2f"), _mean(peaks, ".2f")]
    row += [_mean(whole("energy_kwh"), ".3g"), " and ".join(sorted(sources))]
    return [*row, _mean(whole("kwh_per_million_tokens"), ".3g")]


def _was_resumed(run: Run) -> bool:
    """Whether the process that finished a run took only some of its steps."""
    continued = number(run.result, "continued_after")
    if continued is not None:
        return continued > 0
    # Where the result does not say: all steps add up to more seconds than this process spent in its phases.
    steps = number(run.result, "seconds", "training")
    phases = [number(run.result, "resources", "phases", name, "seconds") or 0 for name in _TRAINING]
    # The sum is stored to a tenth of a second; reading the energy counters is part of a step and of no phase.
    return steps is not None and steps - sum(phases) > 0.1 + 0.05 * steps


def _named(one: Group) -> Cell:
    return Cell(one.mode, (one.note,) if one.note else ())


def _tokens_per_device_hour(record: dict) -> float | None:
    phases = [mapping(record, "phases", name) for name in _TRAINING]
    tokens = sum(number(phase, name) or 0 for phase in phases for name in ("prompt_tokens", "completion_tokens"))
    hours = sum(number(phase, "seconds") or 0 for phase in phases) / 3600 * (number(record, "devices") or 1)
    return tokens / hours if hours and tokens else None


def _numbers(values: object) -> list[float]:
    found = [number({"": value}, "") for value in values] if isinstance(values, list) else []
    return [value for value in found if value is not None]


def _mean(values: Sequence[float | None], form: str, scale: float = 1.0) -> str | Cell:
    """Of those that are known; says so where some are not."""
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    notes = () if len(known) == len(values) else (f"of {len(known)} only",)
    return Cell(f"{scale * sum(known) / len(known):{form}}", notes)


def _mark(sample: dict, when: str) -> str:
    exact = number(sample, f"exact_{when}")
    return f"{when} not graded" if exact is None else f"{'right' if exact == 1 else 'wrong'} {when}"


def _cut(text: object) -> str:
    told = "(none)" if text is None else str(text)
    rest = len(told) - _LENGTH
    return told if rest <= 0 else f"{told[:_LENGTH]}\n… ({rest} more characters)"


def _value(config: dict, name: str) -> str:
    if name not in config:
        return "not set"
    text = json.dumps(config[name], ensure_ascii=False, default=str)
    return code(text if len(text) <= _VALUE else f"{text[:_VALUE]}…")


def _runs(runs: Sequence[Run]) -> str:
    names = [run.label for run in runs]
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:6])} and {len(names) - 6} more"
