"""How many programs the sandbox runs in a second, and whether every reference solution passes its tests there.

    python scripts/bench_sandbox.py [--data FOLDER] [--workers 2]

FOLDER has the rows of MBPP (full and sanitized) and HumanEval, see data.path; each split that is there is run. Without
--data, trivial programs are. The exit status is 1 if any program fails, and the names of those that do are printed.
"""

import argparse
import sys
import time
from pathlib import Path

from unisd_jax.data.loading import load_items
from unisd_jax.data.sources import Place
from unisd_jax.data.tasks import humaneval, mbpp
from unisd_jax.errors import UserError, report_error
from unisd_jax.sandbox import describe_containment, run_many

TRIVIAL = {f"trivial-{number}": f"assert {number} + 1 == {number + 1}" for number in range(200)}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of rows")
    parser.add_argument("--workers", type=int, help="programs at a time; by default one for each CPU")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds each program may take")
    return parser.parse_args(argv)


def reference_programs(data: Path) -> dict[str, dict[str, str]]:
    """Split -> the item's id -> its reference solution with its tests, for every split in the folder.

    Raises:
      UserError: the folder has no such split.
    """
    found, problem = {}, None
    for benchmark in (mbpp, humaneval):
        for split in benchmark.SOURCE.sizes:
            try:
                items = load_items(benchmark.TASK, "test", place=Place(path=data), split=split).items
            except UserError as error:
                problem = error
                continue
            found[f"{benchmark.TASK.name} {split}"] = {item.id: benchmark.program(item.answer, item) for item in items}
    if not found:
        raise problem
    return found


def bench(programs: dict[str, str], timeout: float, workers: int | None) -> tuple[dict[str, str], float]:
    """The programs that do not pass, with the reason, and seconds."""
    began = time.monotonic()
    outcomes = run_many([*programs.values()], timeout=timeout, workers=workers)
    seconds = time.monotonic() - began
    outcomes = dict(zip(programs, outcomes, strict=True))
    return {name: f"{kind}: {message}" for name, (kind, message) in outcomes.items() if kind != "pass"}, seconds


def main(argv: list[str] | None = None) -> int:
    """Prints a table; returns the exit status."""
    arguments = parse_arguments(argv)
    try:
        groups = {"trivial": TRIVIAL} if arguments.data is None else reference_programs(arguments.data)
        print(describe_containment())
        if arguments.data is None:
            print("no --data: trivial programs instead of reference solutions")
        print(f"\n{'programs':<28}{'number':>8}{'pass':>8}{'seconds':>10}{'a second':>10}")
        failed = {}
        for name, programs in groups.items():
            wrong, seconds = bench(programs, arguments.timeout, arguments.workers)
            failed |= {f"{name}, {program}": reason for program, reason in wrong.items()}
            count = len(programs)
            print(f"{name:<28}{count:>8}{count - len(wrong):>8}{seconds:>10.1f}{count / seconds:>10.1f}", flush=True)
    except (UserError, OSError) as error:
        return report_error(error)
    for name, reason in failed.items():
        print(f"{name}: {reason}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
