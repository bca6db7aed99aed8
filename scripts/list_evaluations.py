"""Put evaluations of different tasks into one table: `python scripts/list_evaluations.py runs/smollm2/evaluation/*`."""

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unisd_jax.errors import UserError, report_error
from unisd_jax.io import write_json_atomic
from unisd_jax.markdown import table

ENDS = ("mean", "low", "high")
# What --json keeps of each summary, for a record of results.
KEPT = ("model", "base", "items", "samples", "metrics", "counts", "released", "option_likelihood", "gain", "retention")
KEPT += ("ppl_fit", "truncated", "reply_tokens", "minimum_detectable", "resources", "key", "commit")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 where a folder holds no finished evaluation."""
    parser = argparse.ArgumentParser(description="Put evaluations of different tasks into one Markdown table.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of an evaluation")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write their numbers there")
    options = parser.parse_args(arguments)
    try:
        found = [read_summary(folder) for folder in options.folders]
        if options.json:
            write_json_atomic(options.json, record(found))
    except (UserError, OSError) as error:
        return report_error(error)
    print(
        table(["task", "items", "exact", "form", "release's exact", "reply tokens", "ppl_fit", "seconds"], rows(found))
    )
    return 0


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished evaluation.

    Raises:
      UserError: there is none.
    """
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return found | {"task": found["task"], "metrics": found["metrics"], "resources": found["resources"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} has no summary.json of a finished evaluation") from None


def rows(summaries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Percentages with their 95% intervals; tokens, perplexity and seconds."""

    def percent(found: dict[str, Any] | None) -> str:
        return "-" if found is None else "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * found[x] for x in ENDS))

    def perplexity(found: dict[str, Any] | None) -> str:
        return "-" if found is None or found["mean"] is None else f"{found['mean']:.2f}"

    return [
        [
            f"`{found['task']}`",
            str(found["items"]),
            percent(found["metrics"]["exact"]),
            percent(found["metrics"].get("form")),
            percent((found["released"] or {"metrics": {"exact": None}})["metrics"]["exact"]),
            f"{found['reply_tokens']['mean']:.0f}",
            perplexity(found["ppl_fit"]),
            f"{found['resources']['seconds']:.0f}",
        ]
        for found in summaries
    ]


def record(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of them, with date, machine and versions.

    Raises:
      UserError: two are of one task, or they were made on different machines.
    """
    first = summaries[0]
    tasks = {found["task"]: {name: found[name] for name in KEPT} for found in summaries}
    if len(tasks) < len(summaries):
        raise UserError("two of these evaluations are of the same task: name one folder of each for --json")
    if any((found["device"], found["versions"]) != (first["device"], first["versions"]) for found in summaries):
        raise UserError("these evaluations are from different machines or versions: write a record of each for --json")
    header = {"date": datetime.date.today().isoformat(), "device": first["device"], "versions": first["versions"]}
    return header | {"tasks": tasks}


if __name__ == "__main__":
    sys.exit(main())
