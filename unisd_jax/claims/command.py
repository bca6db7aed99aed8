"""The command make_claims.py: trains and scores what is not there yet, then writes the page."""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unisd_jax import train
from unisd_jax.claims import page, runs
from unisd_jax.claims.reliability import reliability_claims
from unisd_jax.claims.runs import Run, Settings
from unisd_jax.claims.teacher import target_changes
from unisd_jax.claims.variants import CLEAN, Variant, write_variants
from unisd_jax.claims.verdicts import context_claim, released_findings, smoothing_claim, trained_claims
from unisd_jax.claims.weights import Scored, gold_logps, score
from unisd_jax.config import load_config
from unisd_jax.errors import ConfigError, UserError, report_error
from unisd_jax.interrupt import INTERRUPTED, Interrupted
from unisd_jax.io import write_json_atomic, write_text_atomic
from unisd_jax.models import local_checkpoint
from unisd_jax.provenance import environment

SOME_FAILED = 1
SPOILT = 0.4  # share of the training items
SOURCES = {
    "random": (),
    "retrieval": ("--mode=agreement_tok_retrieval", "--teacher.contexts.method=retrieval"),
    "induction": (
        "--mode=agreement_tok_induction",
        "--teacher.contexts.method=induction",
        "--teacher.contexts.induction_instructions=4",
        "--teacher.contexts.induction_max_length=48",
        "--data.max_prompt_length=256",
    ),
}
STUDENTS = ("untrained", "trained")


class Task(NamedTuple):
    """Something to be made, by name; `work(settings, variants, *arguments)` makes it."""

    name: str
    work: Any
    arguments: tuple


def main(argv: Sequence[str], repository: Path) -> int:
    """The exit status: 0 the page is written, 1 something failed, 2 bad input, 130 interrupted."""
    try:
        options, settings = parse(argv, repository)
        local_checkpoint(settings.model)
        variants = write_variants(settings.out / "data", rate=SPOILT)
        for run in runs.planned(settings.seeds):
            runs.configuration(run, variants, settings)  # what is wrong with an option is said before anything starts
        tasks = [*trainings(settings), *scorings(settings, options.scored)]
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            failed = work_off(tasks, settings, variants, options.jobs)
        finally:
            signal.signal(signal.SIGTERM, previous)
        if failed:
            print(f"{len(failed)} of {len(tasks)} failed; the same command makes them again", file=sys.stderr)
            return SOME_FAILED
        text = write(settings, variants, options)
    except (UserError, OSError) as error:
        return report_error(error)
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return INTERRUPTED
    print(text.partition("\n## ")[0])
    print(f"\n{options.page}")
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def parse(argv: Sequence[str], repository: Path) -> tuple[argparse.Namespace, Settings]:
    """The command line; words like `--train.steps=4` are options of all trainings.

    Raises:
      ConfigError: a word that is not understood.
    """
    parser = argparse.ArgumentParser(description="Measures the paper's claims on a small model and writes a page.")
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="where runs and scores are kept")
    parser.add_argument("--page", type=Path, default=Path("docs/claims.md"), help="the page that is written")
    parser.add_argument("--config", type=Path, default=repository / "configs" / "claims.yaml", help="of all trainings")
    parser.add_argument("--seeds", type=_numbers, default=(0, 1, 2), help="such as 0,1,2; at least two")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one CPU core each")
    parser.add_argument("--scored", type=int, default=32, help="training items whose weights are looked at, per seed")
    own, rest = parser.parse_known_args(argv)
    for word in rest:
        if not word.startswith("--") or "." not in word.partition("=")[0] or "=" not in word:
            raise ConfigError(f"{word!r} is not understood, expected options such as --train.steps=4; see --help")
    if len(set(own.seeds)) < 2:
        raise ConfigError(f"--seeds is {own.seeds}, expected at least two different ones: intervals need them")
    if own.jobs < 1 or own.scored < 2:
        raise ConfigError(f"--jobs {own.jobs} and --scored {own.scored}: expected at least 1 and 2")
    return own, Settings(own.out, own.config, repository / "configs" / "modes", own.model, own.seeds, tuple(rest))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def trainings(settings: Settings) -> list[Task]:
    """All trainings, seed after seed."""
    return [Task(run.name, _train, (run,)) for run in runs.planned(settings.seeds)]


def scorings(settings: Settings, items: int) -> list[Task]:
    """What is read off afterwards."""
    found = []
    for seed in settings.seeds:
        found += [Task(f"weights, {who} student, seed {seed}", _score, (seed, items, who)) for who in STUDENTS]
        found += [Task(f"contexts, {toy}, seed {seed}", _contexts, (seed, items, toy)) for toy in _TOYS]
        found += [Task(f"targets, {name}, seed {seed}", _targets, (seed, name)) for name in _TEACHERS]
    return found


_TOYS = ("embedded", "paraphrased")
_TEACHERS = ("ema", "live teacher")


def work_off(tasks: Sequence[Task], settings: Settings, variants: dict[str, Variant], jobs: int) -> list[str]:
    """Makes what is not there yet, `jobs` at a time; the names of what failed."""
    waiting = [task for task in tasks if not _mark(settings, task).exists()]
    print(f"{len(tasks) - len(waiting)} of {len(tasks)} are there already", flush=True)
    # What reads a training's files comes after all trainings.
    first = [task for task in waiting if task.work is _train]
    failed: list[str] = []
    context, started, done = multiprocessing.get_context("spawn"), time.monotonic(), 0
    cores = context.Queue()
    for core in range(jobs):
        cores.put(core)
    with ProcessPoolExecutor(jobs, context, _take_core, (cores, jobs)) as pool:
        try:
            for part in (first, [task for task in waiting if task.work is not _train]):
                left: dict[Future, Task] = {pool.submit(_run, task, settings, variants): task for task in part}
                while left:
                    for future in wait(left, return_when=FIRST_COMPLETED).done:
                        task = left.pop(future)
                        done += 1
                        line, passed = _said(task, future, settings)
                        failed += [] if passed else [task.name]
                        to_go = (time.monotonic() - started) / done * (len(waiting) - done) / 60
                        print(f"[{done}/{len(waiting)}] {line}; about {to_go:.0f} min to go", flush=True)
                if failed:
                    break
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)  # from a terminal they have it already; a training saves
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return failed


def _said(task: Task, future: Future, settings: Settings) -> tuple[str, bool]:
    error = future.exception()
    if isinstance(error, Interrupted | KeyboardInterrupt):
        raise KeyboardInterrupt
    if error is None:
        return f"{task.name}: {future.result():.0f} s", True
    return f"{task.name} FAILED: {error} (see {_log(settings, task)})", False


def _take_core(cores, jobs: int) -> None:
    """Each worker has a core of its own, so that times can be compared, and ends with the command."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # while it waits for work
    threading.Thread(target=_end_with_parent, daemon=True).start()
    core = cores.get()
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if 1 < jobs <= len(allowed):
        os.sched_setaffinity(0, {allowed[core]})


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(task: Task, settings: Settings, variants: dict[str, Variant]) -> float:
    """Makes one thing with what it says in a log, and marks it as made; its seconds."""
    started, log = time.monotonic(), _log(settings, task)
    log.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            found = task.work(settings, variants, *task.arguments)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    seconds = time.monotonic() - started
    write_json_atomic(_mark(settings, task), {"seconds": seconds, "found": found})
    return seconds


def _mark(settings: Settings, task: Task) -> Path:
    """Where it is written that something is made, and what came out: named by all that it depends on."""
    own = [
        settings.config.read_text(encoding="utf-8"),
        settings.model,
        settings.options,
        task.name,
        task.arguments[1:-1],
    ]
    key = hashlib.sha256(json.dumps(own).encode()).hexdigest()[:8]
    return settings.out / "made" / f"{_word(task.name)}-{key}.json"


def _log(settings: Settings, task: Task) -> Path:
    return settings.out / "logs" / f"{_word(task.name)}.txt"


def _word(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_").replace("=", "")


def _train(settings: Settings, variants: dict[str, Variant], run: Run) -> None:
    train.run(runs.configuration(run, variants, settings))


def _score(settings: Settings, variants: dict[str, Variant], seed: int, items: int, who: str) -> dict[str, Any]:
    student = runs.run_dir(Run(CLEAN, "plain", seed), settings) / "hf" if who == "trained" else None
    scored = score(settings, settings.out / "data", seed=seed, items=items, student=student)
    views = {name: logps.tolist() for name, logps in scored.views.items()}
    arrays = {name: getattr(scored, name).tolist() for name in ("mask", "right", "wrong", "exact")}
    return arrays | {"views": views}


def _contexts(settings: Settings, variants: dict[str, Variant], seed: int, items: int, toy: str) -> dict[str, Any]:
    data = [f"--data.train_path={settings.out / 'data' / 'paraphrased.jsonl'}"] if toy == "paraphrased" else []
    return {
        source: gold_logps(settings, seed=seed, items=items, options=[*options, *data]).tolist()
        for source, options in SOURCES.items()
    }


def _targets(settings: Settings, variants: dict[str, Variant], seed: int, method: str) -> list[float]:
    return target_changes(runs.run_dir(Run(CLEAN, method, seed), settings)).tolist()


def write(settings: Settings, variants: dict[str, Variant], options: argparse.Namespace) -> str:
    """Writes the page, and the same as JSON beside the runs; the page's text."""
    tasks = [*trainings(settings), *scorings(settings, options.scored)]
    made = {task.name: json.loads(_mark(settings, task).read_text()) for task in tasks}
    found: dict[str, dict[str, list]] = {}
    for run in runs.planned(settings.seeds):
        found.setdefault(run.variant, {}).setdefault(run.method, []).append(runs.read(run, settings))

    def of_seeds(name: str) -> list[Any]:
        return [made[f"{name}, seed {seed}"]["found"] for seed in settings.seeds]

    claims = trained_claims(found)
    changes = {name: list(map(np.array, of_seeds(f"targets, {name}"))) for name in _TEACHERS}
    gold = {
        toy: {source: [np.array(one[source]) for one in of_seeds(f"contexts, {toy}")] for source in SOURCES}
        for toy in _TOYS
    }
    claims[-1:-1] = [smoothing_claim(found, changes), context_claim(gold)]
    for who in STUDENTS:
        scored = [_scored(one) for one in of_seeds(f"weights, {who} student")]
        claims += reliability_claims(scored, f"completions of the {who} student")
    seconds = sum(one["seconds"] for one in made.values())
    released = released_findings(found)
    text = page.write_page(claims, released, found, variants, _facts(settings, options, found, seconds))
    write_text_atomic(options.page, text)
    record = {"claims": [[claim._asdict() | {"verdict": claim.verdict}] for claim in claims], "released": released}
    write_json_atomic(settings.out / "claims.json", record | environment())
    return text


def _scored(found: dict[str, Any]) -> Scored:
    views = {name: np.array(logps, np.float32) for name, logps in found["views"].items()}
    arrays = {name: np.array(found[name]) for name in ("mask", "right", "wrong", "exact")}
    return Scored(views=views, **arrays)


def _facts(settings: Settings, options: argparse.Namespace, found, seconds: float) -> dict[str, Any]:
    first = found[CLEAN]["plain"][0].result.details
    config = load_config(runs.run_dir(Run(CLEAN, "plain", settings.seeds[0]), settings) / "config.yaml")
    versions = first["versions"]
    return {
        "model": Path(settings.model).name,
        "steps": config.train.steps,
        "batch": config.train.batch_size,
        "items": first["items"],
        "seeds": ", ".join(map(str, settings.seeds)),
        "count": len(settings.seeds),
        "device": first["device"],
        "versions": f"Python {versions['python']}, jax {versions['jax']}, flax {versions['flax']}",
        "commit": (first["commit"] or "unknown")[:12],
        "date": date.today().isoformat(),
        "minutes": round(seconds / options.jobs / 60),
        "jobs": options.jobs,
    }
