"""The whole report, as blocks and then as files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from unisd_jax.errors import UserError
from unisd_jax.io import write_text_atomic
from unisd_jax.overview import charts, details, tables
from unisd_jax.overview.blocks import Block, Text
from unisd_jax.overview.groups import Study, group, short
from unisd_jax.overview.html import render_html
from unisd_jax.overview.markdown import render_markdown
from unisd_jax.overview.reading import file_of_a_run, read_all

SECTIONS = (
    tables.results,
    tables.gains,
    tables.scorers,
    charts.gain_against_drift,
    tables.sensitivity,
    charts.curves,
    details.costs,
    details.samples,
    details.configurations,
    details.environments,
    details.directories,
)


def make_report(paths: Sequence[Path], out: Path) -> Study:
    """Reads all runs at or below `paths`, writes `out` and the same as Markdown beside it.

    Raises:
      UserError: no run there, or `out` would lie in a run or an evaluation.
    """
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {out}: expected a name that ends with .html; the Markdown is written beside it as .md")
    if own := file_of_a_run(out.parent):
        raise UserError(
            f"--out {out}: {out.parent} is a run directory or an evaluation (it has {own}) with a report.md of its "
            "own; name a file in another folder"
        )
    study = group(read_all(paths))
    blocks = list(report(study))
    title = "Report of runs"
    write_text_atomic(out, _encodable(render_html(title, blocks)))
    write_text_atomic(out.with_suffix(".md"), _encodable(render_markdown(title, blocks)))
    return study


def report(study: Study) -> Iterator[Block]:
    """All sections."""
    yield Text(_summary(study))
    unfinished = sum(details.state(run) != "finished" for run in study.runs)
    failed = sum(run.job.startswith("failed") for run in study.runs)
    if unfinished or study.problems:
        of_these = f", {failed} of them failed" if failed else ""
        yield Text(
            f"Unfinished runs: {unfinished}{of_these}. Files and evaluations left out or damaged: {len(study.problems)}"
            ". The section Runs at the end names them.",
            warning=True,
        )
    for section in SECTIONS:
        yield from section(study)


def _summary(study: Study) -> str:
    models = sorted({short(one.model) for one in study.groups} | {short(model) for model in study.bases})
    modes = dict.fromkeys(one.mode for one in study.groups)
    tasks = sorted({column.task for column in study.columns})
    parts = [f"Runs: {len(study.runs)}", f"configurations: {len(study.groups)}", f"modes: {', '.join(modes) or 'none'}"]
    parts += [f"models: {', '.join(models) or 'none'}", f"tasks measured: {', '.join(tasks) or 'none'}"]
    return "; ".join(parts) + "."


def _encodable(text: str) -> str:
    """Without the halves of characters that JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")
