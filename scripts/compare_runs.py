"""Print finished runs side by side: `python scripts/compare_runs.py runs/quickstart runs/quickstart-sft`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unisd_jax.errors import UserError
from unisd_jax.report import gain_text, percent, read_result


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 when the first run's gain is below --require-gain, 2 for bad input, else 0."""
    options = _parser().parse_args(arguments)
    try:
        results = [read_result(run_dir) for run_dir in options.run_dirs]
    except UserError as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 2
    names = [run_dir.resolve().name for run_dir in options.run_dirs]
    if len(set(names)) < len(names):
        names = [str(run_dir) for run_dir in options.run_dirs]
    columns = [_column(name, result) for name, result in zip(names, results, strict=True)]
    print(_side_by_side(columns))
    if options.require_gain is None:
        return 0
    return _check_gain(names[0], results[0].get("gain"), options.require_gain)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Print finished runs side by side.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="such as runs/quickstart")
    parser.add_argument(
        "--require-gain",
        type=_fraction,
        metavar="FRACTION",
        help="exit with 1 when the first run gained less exact match, as in 0.30 for 30 points",
    )
    return parser


def _fraction(text: str) -> float:
    value = float(text)
    if not -1.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction: write 0.30 for 30 points")
    return value


def _column(name: str, result: dict[str, Any]) -> dict[str, str]:
    after = result.get("after_metrics") or {}
    seconds = (result["seconds"] or {}).get("training")
    return {
        "run": name,
        "mode": str(result["mode"]),
        "steps": str(result["steps"]),
        "exact before": percent(result.get("before")),
        "exact after": percent(result.get("after")),
        "gain (points)": gain_text(result),
        "form after": percent(after.get("form")),
        "contains after": percent(after.get("contains")),
        "gold log-prob after": _number(after.get("gold_logprob"), ".3f"),
        "drift (nats)": _number(result.get("drift"), ".4f"),
        "minutes training": _number(None if seconds is None else seconds / 60, ".1f"),
    }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _side_by_side(columns: list[dict[str, str]]) -> str:
    label_width = max(map(len, columns[0]))
    widths = [max(map(len, column.values())) for column in columns]
    lines = []
    for label in columns[0]:
        cells = [column[label].rjust(width) for column, width in zip(columns, widths, strict=True)]
        lines.append("  ".join([label.ljust(label_width), *cells]))
    return "\n".join(lines)


def _check_gain(name: str, gain: float | None, required: float) -> int:
    if gain is None:
        print(
            f"compare_runs: {name} has no gain, its evaluation was off; {required:+.3f} is required",
            file=sys.stderr,
        )
        return 1
    if gain < required:
        print(
            f"compare_runs: {name} gained {gain:+.3f} exact match; {required:+.3f} is required",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
