"""One page on many runs: `python scripts/make_report.py runs/ema-0 runs/ema-1 runs/sft-0`, or the folder of them all.

Run directories and evaluations are found below what is named, finished or not. Written are one HTML file that needs
nothing else, and the same as Markdown beside it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from unisd_jax.errors import UserError, report_error
from unisd_jax.overview.page import make_report
from unisd_jax.overview.reading import file_of_a_run


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 where there is no run."""
    parser = argparse.ArgumentParser(description="One page on many runs, as HTML and Markdown.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run directory, or a folder of runs")
    where = "default: report.html in the folder, where that is one folder of runs, else here"
    parser.add_argument("--out", type=Path, metavar="FILE.html", help=where)
    options = parser.parse_args(arguments)
    out = options.out or _default(options.folders)
    try:
        study = make_report(options.folders, out)
    except (UserError, OSError) as error:
        return report_error(error)
    print(f"{len(study.runs)} runs: {out}, {out.with_suffix('.md')}")
    for problem in study.problems:
        print(f"not used: {problem.where}: {problem.what}", file=sys.stderr)
    return 0


def _default(folders: Sequence[Path]) -> Path:
    """Beside the runs; the folder of a run or of an evaluation has a report.md already."""
    of_runs = len(folders) == 1 and file_of_a_run(folders[0]) is None
    return (folders[0] if of_runs else Path()) / "report.html"


if __name__ == "__main__":
    sys.exit(main())
