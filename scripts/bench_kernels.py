"""The fused loss beside the plain form, and beside torch where there is one: time, memory and error from one run.

    python scripts/bench_kernels.py [--shapes s1,s2] [--alpha 0.5 0] [--torch-python ENV/bin/python] [--json FILE]

Every form computes the mean of clipped divergences and its gradients, with a trained and with a frozen head, from the
same made-up hidden states and heads; a third table is log-probs without gradient. Repetitions take turns (A/B/A/B)
and ratios are medians over turns. Time is process time on a CPU, where others may be working, and wall time elsewhere.
The floor is what the products alone would take (four with a trained head, three with a frozen one) at the best rate
that the same process reached for such a product. Errors are the largest ones relative to the largest number, against
the plain form in float32. torch runs in --torch-python or, where it is installed here, in this environment: the
upstream form, and Liger's chunked JSD where `liger_kernel` is installed.
"""

import argparse
import datetime
import importlib.util
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_kernels_worker import CEILING, LIGER, MARK, NAIVE, REFERENCE, UPSTREAM, clock_of, counted

SHAPES = {
    "s1": {"tokens": 8192, "hidden": 3584, "vocab": 152064, "dtype": "bfloat16"},
    "s2": {"tokens": 8192, "hidden": 896, "vocab": 151936, "dtype": "bfloat16"},
    "cpu": {"tokens": 512, "hidden": 896, "vocab": 151936, "dtype": "float32"},
}
PRODUCTS = {"trained": 4, "frozen": 3, "logprob": 1}  # [T, V]-sized ones that no form can do without
GIB = 2**30


class Worker:
    """An engine in a process of its own."""

    def __init__(self, engine: str, interpreter: str, work: dict[str, Any]):
        self.engine, self.log = engine, tempfile.TemporaryFile("w+")
        script = Path(__file__).with_name("bench_kernels_worker.py")
        # Threads that spin while they wait for others would count as time on a busy CPU.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
        self.process = subprocess.Popen(
            [interpreter, script, engine, json.dumps(work)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
        )  # fmt: skip
        self.rows: dict[str, dict[str, Any]] = {}
        self.rates: dict[str, float] = {}
        self.about = self.read()

    def read(self) -> dict[str, Any]:
        """The next answer; an error that says what the process left behind if it ended."""
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or [""])[-1][:300]
        return {"error": f"the process ended with status {self.process.wait()}: {last}"}

    def ask(self, do: str, **options) -> dict[str, Any]:
        """The answer to one command."""
        try:
            print(json.dumps({"do": do} | options), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return {"error": "the process had ended"}
        return self.read()

    def close(self) -> None:
        """Ends the process and waits for it."""
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def measure(work: dict[str, Any], reps: int | None, torch_python: str | None, folder: Path) -> dict[str, Any]:
    """All forms of both engines on one shape; on a CPU the engines take turns, elsewhere one follows the other."""
    interpreters = {"jax": sys.executable} | ({"torch": torch_python} if torch_python else {})
    section: dict[str, Any] = {"work": work, "rows": [], "rates": {}, "versions": {}}
    waiting = list(interpreters.items())
    while waiting:
        workers = [Worker(*waiting.pop(0), work)]
        if "error" not in workers[0].about and workers[0].about["platform"] == "cpu" and waiting:
            workers.append(Worker(*waiting.pop(0), work))
        try:
            take_turns(workers, reps, folder)
        finally:
            for worker in workers:
                worker.close()
        for worker in workers:
            collect(section, worker)
    add_ratios(section, folder)
    return section


def take_turns(workers: list[Worker], reps: int | None, folder: Path) -> None:
    """Prepares all forms, then times each once per turn."""
    for worker in workers:
        for form in worker.about.get("forms", []):
            note(f"{worker.engine}: {form}")
            worker.rows[form] = worker.ask("prepare", form=form, file=str(folder / file_name(form)))
        worker.rates = worker.ask("rates") if "forms" in worker.about else {}
    clock = clock_of(workers[0].about.get("platform", "cpu"))
    for turn in range(reps or (5 if clock == "cpu" else 20)):
        for worker in workers:
            for form, row in worker.rows.items():
                if "error" in row or form == REFERENCE:
                    continue
                note(f"turn {turn + 1}, {worker.engine}: {form}")
                took = worker.ask("time", form=form)
                if "error" in took:
                    row |= took
                else:
                    row.setdefault("cpu", []).append(took["cpu"])
                    row.setdefault("wall", []).append(took["wall"])
    note("")


def collect(section: dict[str, Any], worker: Worker) -> None:
    """Moves what a worker found into the section."""
    about = worker.about
    if "error" in about:
        section["rows"].append({"form": worker.engine, "engine": worker.engine, "error": about["error"]})
        return
    section["versions"] |= about["versions"]
    section["rates"][worker.engine] = worker.rates
    section["rows"] += [{"form": form, "engine": worker.engine} | row for form, row in worker.rows.items()]
    if worker.engine == "jax":
        section |= {name: about[name] for name in ("device", "platform", "arguments")}


def add_ratios(section: dict[str, Any], folder: Path) -> None:
    """Medians, ratios in the same turn, time over floor, and errors against the plain form in float32."""
    rows = {row["form"]: row for row in section["rows"]}
    work, clock = section["work"], clock_of(section.get("platform", "cpu"))
    flops = 2.0 * counted(work) * work["hidden"] * work["vocab"]
    exact = folder / file_name(REFERENCE if REFERENCE in rows else NAIVE)
    for row in section["rows"]:
        if "error" in row:
            continue
        row |= errors(folder / file_name(row["form"]), exact)
        if any(math.isnan(row.get(name, 0.0)) for name in ("value_error", "gradient_error")):
            row["error"] = "NaN in the value or in a gradient"
            row |= {"value_error": None, "gradient_error": None}
            continue
        if clock not in row:
            continue
        row["seconds"] = statistics.median(row[clock])
        for name, form in (("over_naive", NAIVE), ("over_torch", UPSTREAM)):
            if clock in rows.get(form, {}) and "error" not in rows[form]:
                pairs = zip(row[clock], rows[form][clock], strict=False)
                row[name] = statistics.median(own / max(other, 1e-9) for own, other in pairs)
        rates = [rate for rate in section["rates"].get(row["engine"], {}).values() if isinstance(rate, float)]
        if rates:
            row["over_floor"] = row["seconds"] * max(rates) / (PRODUCTS[work["head"]] * flops)


def errors(found: Path, exact: Path) -> dict[str, float]:
    """Largest differences of value and gradients, relative to the largest number of each array."""
    import numpy as np

    if not (found.exists() and exact.exists()):
        return {}
    with np.load(found) as ours, np.load(exact) as theirs:
        apart = {
            name: float(np.max(np.abs(ours[name] - theirs[name])) / max(np.max(np.abs(theirs[name])), 1e-30))
            for name in ours.files
        }
    found = {"value_error": apart.pop("value")}
    # A sum, unlike max, never loses a NaN.
    return found | ({"gradient_error": sum(apart.values()) and max(apart.values())} if apart else {})


def file_name(form: str) -> str:
    """Of the arrays that a form leaves for the comparison."""
    return re.sub(r"\W+", "-", form) + ".npz"


def note(text: str) -> None:
    """What is going on, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def print_section(section: dict[str, Any]) -> None:
    """The table of one shape, alpha and kind of head."""
    work = section["work"]
    on_cpu = section.get("platform", "cpu") == "cpu"
    print(f"\n{title(work)}, on {section.get('device')}")
    for engine, rates in section["rates"].items():
        found = [f"{name} {rate / 1e12:.3g}" for name, rate in rates.items() if isinstance(rate, float)]
        unit = "TFLOP/s of a core" if on_cpu else "TFLOP/s"
        print(f"products in {engine}, {unit}: {', '.join(found) or rates.get('error')}")
    heads = ["/naive", "/torch", "/floor", "temp GiB", "peak GiB", "value err", "grad err"]
    print(f"{'':<34}" + "".join(f"{head:>10}" for head in ["CPU ms" if on_cpu else "ms", *heads]))
    for row in section["rows"]:
        if "error" in row:
            print(f"{row['form']:<34}  {row['error'][:200]}")
            continue
        bound = "<=" if row.get("peak_is_bound") else ""
        cells = [
            number(row.get("seconds"), "{:.1f}", 1e3),
            *(number(row.get(name), "{:.2f}") for name in ("over_naive", "over_torch", "over_floor")),
            number(row.get("temp"), "{:.2f}", 1 / GIB),
            bound + number(row.get("peak"), "{:.2f}", 1 / GIB),
            *(number(row.get(name), "{:.1e}") for name in ("value_error", "gradient_error")),
        ]
        print(f"{row['form']:<34}" + "".join(f"{cell:>10}" for cell in cells) + f"  {row.get('note', '')}".rstrip())
    sys.stdout.flush()


def title(work: dict[str, Any]) -> str:
    """The section in words."""
    sizes = f"{work['shape']}: T {work['tokens']}, H {work['hidden']}, V {work['vocab']}, {work['dtype']}"
    share = "" if work["valid_share"] == 1 else f", {work['valid_share']:.0%} of the tokens count"
    if work["head"] == "logprob":
        return f"{sizes}, log-probs without gradient{share}"
    clip = f"quantile {work['quantile']:g}" if work["quantile"] else f"ceiling {CEILING:g}"
    return f"{sizes}, alpha {work['alpha']:g}, {clip}{share}, {work['head']} head"


def number(value: float | None, form: str, factor: float = 1.0) -> str:
    """A cell of the table."""
    return "-" if value is None else form.format(value * factor)


def goals(sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was hoped for on a CPU and on an H200 beside what was found; `met` is None where nothing was measured."""
    found = []

    def goal(text: str, value: float | None, limit: float, at_least: bool = False):
        met = None if value is None else (value >= limit if at_least else value <= limit)
        found.append({"goal": text, "limit": limit, "value": value, "met": met})

    for section in sections:
        work, rows = section["work"], fine_rows(section)
        if work["shape"] == "cpu" and section.get("platform") == "cpu" and work["head"] != "logprob":
            loss, limit = rows.get("loss", {}), 0.75 if 0 < work["alpha"] < 1 else 1.0
            where = f"CPU, alpha {work['alpha']:g}, {work['head']} head: the loss's time over"
            goal(f"{where} naive <= 1.05", loss.get("over_naive"), 1.05)
            goal(f"{where} torch <= {limit}", loss.get("over_torch"), limit)
    large, small = (accelerated(sections, shape) for shape in ("s1", "s2"))
    goal("G9: s1, trained head: best time over floor <= 1.35", over(large, "best", "over_floor"), 1.35)
    goal("G10: s2, trained head: best time over floor <= 2.2", over(small, "best", "over_floor"), 2.2)
    goal("G11: s1: upstream's torch takes >= 3 times the best time", ratio(large, UPSTREAM, "seconds"), 3.0, True)
    goal("G11: s1: and in all >= 10 times the memory of the loss", ratio(large, UPSTREAM, "total"), 10.0, True)
    goal("G12: s1: Liger takes >= 1 times the best time", ratio(large, LIGER, "seconds"), 1.0, True)
    goal("G12: s1: and its loss is >= 100 times as wrong", ratio(large, LIGER, "value_error"), 100.0, True)
    goal("G13: s1: naive takes >= 1.1 times the best time", ratio(large, NAIVE, "seconds"), 1.1, True)
    return found


def fine_rows(section: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Form -> row, without those that failed."""
    return {row["form"]: row for row in section["rows"] if "error" not in row}


def accelerated(sections: list[dict[str, Any]], shape: str) -> dict[str, dict[str, Any]]:
    """The rows of an accelerator at alpha 0.5 and a trained head, with the fastest fused loss as "best"."""
    for section in sections:
        work = section["work"]
        fits = work["shape"] == shape and work["alpha"] == 0.5 and work["head"] == "trained"
        if fits and section.get("platform", "cpu") != "cpu":
            rows = fine_rows(section)
            for row in rows.values():
                if row.get("peak") is not None:
                    row["total"] = row["peak"] + section["arguments"]
            fused = [row for name, row in rows.items() if "loss" in name and "seconds" in row]
            return rows | ({"best": min(fused, key=lambda row: row["seconds"])} if fused else {})
    return {}


def over(rows: dict[str, dict[str, Any]], form: str, name: str) -> float | None:
    """One number of a row, if both are there."""
    return rows.get(form, {}).get(name)


def ratio(rows: dict[str, dict[str, Any]], form: str, name: str) -> float | None:
    """Another form's number over that of the best one; of the plain loss for memory."""
    theirs, ours = over(rows, form, name), over(rows, "loss" if name == "total" else "best", name)
    return theirs / max(ours, 1e-30) if theirs is not None and ours is not None else None


def print_goals(found: list[dict[str, Any]]) -> None:
    """Met, missed or not measured; never an exit status."""
    print("\ngoals")
    for goal in found:
        state = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
        value = "" if goal["value"] is None else f"{goal['value']:.3g}"
        print(f"  {goal['goal']:<66} {value:>8}  {state}")


def git(*arguments: str) -> str | None:
    """What git says about this repository, None where there is none; it never takes a lock."""
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parents[1]), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict[str, Any]:
    """The machine and the commit; versions come from the processes that measured."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "kernels", "scripts", "unisd_jax")),
        "cpu": names[0] if names else None,
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_at_end": os.getloadavg(),
        "peak_memory_of_a_worker_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
    }


def sections_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The work of every table, in order."""
    heads = [name for name in PRODUCTS if getattr(options, name)] or list(PRODUCTS)
    changed = {name: getattr(options, name) for name in ("tokens", "hidden", "vocab", "dtype")}
    changed = {name: value for name, value in changed.items() if value is not None}
    rest = {name: getattr(options, name) for name in ("quantile", "valid_share", "chunk_sizes")}
    found = []
    for shape in options.shapes.split(","):
        name = "custom" if changed else shape
        work = {"shape": name} | SHAPES[shape] | changed | rest
        found += [
            work | {"alpha": alpha, "head": head} for alpha in options.alpha for head in heads if head != "logprob"
        ]
        if "logprob" in heads:
            found.append(work | {"alpha": None, "head": "logprob", "quantile": None})
    return found


def parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="cpu", help="comma-separated, of s1, s2, cpu (default: %(default)s)")
    for name in ("tokens", "hidden", "vocab"):
        parser.add_argument(f"--{name}", type=_positive, metavar="N", help=f"instead of the shape's {name}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="instead of the shape's")
    parser.add_argument("--alpha", type=_alpha, nargs="+", default=[0.5], help="default: 0.5")
    parser.add_argument("--quantile", type=_share, help=f"clip at this quantile instead of at {CEILING:g} nats")
    parser.add_argument("--valid-share", type=_share, default=1.0, help="of the tokens count; the others are masked")
    parser.add_argument("--trained", action="store_true", help="only the tables named, of these three")
    parser.add_argument("--frozen", action="store_true", help="a head without gradient")
    parser.add_argument("--logprob", action="store_true", help="log-probs without gradient")
    parser.add_argument("--chunk-sizes", type=_positive, nargs="*", default=[], metavar="N", help="more chunk sizes")
    parser.add_argument("--reps", type=_positive, metavar="N", help="turns; default: 5 on a CPU, 20 elsewhere")
    parser.add_argument("--torch-python", metavar="PATH", help="an interpreter with torch (and liger_kernel)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: benchmarks/results/kernels-DATE-DEVICE.json"
    )
    return parser


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def _alpha(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return float(text)


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return float(text)


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables and the goals and writes the record."""
    parse = parser()
    options = parse.parse_args(arguments)
    if unknown := set(options.shapes.split(",")) - set(SHAPES):
        parse.error(f"--shapes has {', '.join(sorted(unknown))}; expected some of {', '.join(SHAPES)}")
    from unisd_jax.io import write_json_atomic

    torch_python = options.torch_python or (sys.executable if importlib.util.find_spec("torch") else None)
    if not torch_python:
        print("torch is not installed here and --torch-python names no interpreter: no torch rows")
    sections = []
    for work in sections_of(options):
        with tempfile.TemporaryDirectory() as folder:
            sections.append(measure(work, options.reps, torch_python, Path(folder)))
        print_section(sections[-1])
    found = goals(sections)
    print_goals(found)
    today, device = (
        datetime.date.today().isoformat(),
        str(sections[0].get("device", "unknown")).replace(" ", "-").lower(),
    )
    path = options.json or Path(f"benchmarks/results/kernels-{today}-{device}.json")
    record = {"date": today, "device": sections[0].get("device"), "sections": sections, "goals": found}
    write_json_atomic(path, record | environment())
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
