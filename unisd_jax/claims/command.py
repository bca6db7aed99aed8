"""The command make_claims.py: trains and scores what is not there yet, then writes the page."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from unisd_jax import train
from unisd_jax.claims import page, runs
from unisd_jax.claims.findings import Claim, Finding
from unisd_jax.claims.reliability import reliability_claims
from unisd_jax.claims.runs import Run, Settings
from unisd_jax.claims.teacher import Targets, target_changes
from unisd_jax.claims.timing import step_seconds
from unisd_jax.claims.variants import CLEAN, Variant, embedded_rows, write_variants
from unisd_jax.claims.verdicts import (
    context_claim,
    cost_claims,
    released_findings,
    smoothing_claim,
    trained_claims,
)
from unisd_jax.claims.weights import Scored, gold_logps, score
from unisd_jax.claims.work import Task, cores, mark, work_off
from unisd_jax.config import load_config, to_yaml
from unisd_jax.errors import ConfigError, OneLineParser, UserError, report_error
from unisd_jax.interrupt import INTERRUPTED
from unisd_jax.io import write_json_atomic, write_text_atomic
from unisd_jax.models import local_checkpoint
from unisd_jax.provenance import environment
from unisd_jax.teacher.weights_hash import weights_hash

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
TRAINED_STUDENT = (CLEAN, "plain")
TOYS = ("embedded", "paraphrased")
TEACHERS = ("ema", "live teacher")
TIMING = "seconds of an update"


def main(argv: Sequence[str], repository: Path) -> int:
    """The exit status: 0 the page is written, 1 something failed, 2 bad input, 130 interrupted."""
    try:
        options, settings = parse(argv, repository)
        checkpoint = local_checkpoint(settings.model)
        variants = write_variants(settings.out / "data", rate=SPOILT)
        tasks = planned_tasks(settings, variants, options, checkpoint)
        failed = work_off(tasks, settings, variants, options.jobs)
        if failed:
            print(f"{len(failed)} of {len(tasks)} failed; the same command makes them again", file=sys.stderr)
            return SOME_FAILED
        text = write(settings, variants, options, tasks)
    except (UserError, OSError) as error:
        return report_error(error)
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return INTERRUPTED
    print(text.partition("\n## ")[0])
    print(f"\n{options.page}")
    return 0


def parse(argv: Sequence[str], repository: Path) -> tuple[argparse.Namespace, Settings]:
    """The command line; words like `--train.steps=4` are options of all trainings.

    Raises:
      ConfigError: a word that is not understood.
    """
    parser = OneLineParser(
        description="Measures the paper's claims on a small model and writes a page.", allow_abbrev=False
    )
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="where runs and scores are kept")
    parser.add_argument("--page", type=Path, help="the page that is written; else claims.md where the runs are")
    parser.add_argument("--config", type=Path, default=repository / "configs" / "claims.yaml", help="of all trainings")
    parser.add_argument("--seeds", type=_numbers, default=(0, 1, 2), help="such as 0,1,2; at least two")
    parser.add_argument("--jobs", type=int, default=min(cores(), 8), help="runs at a time, one CPU core each")
    parser.add_argument("--scored", type=int, default=24, help="training items whose weights are looked at, per seed")
    parser.add_argument("--rounds", type=int, default=4, help="in which every method's update is timed")
    own, rest = parser.parse_known_args(argv)
    own.page = own.page or own.out / "claims.md"
    for word in rest:
        if not word.startswith("--") or "." not in word.partition("=")[0] or "=" not in word:
            raise ConfigError(f"{word!r} is not understood, expected options such as --train.steps=4; see --help")
    if len(set(own.seeds)) < max(2, len(own.seeds)):
        raise ConfigError(f"--seeds is {own.seeds}, expected at least two, all different: intervals need them")
    least = {"jobs": 1, "scored": 2, "rounds": 2}
    for name, smallest in least.items():
        if getattr(own, name) < smallest:
            raise ConfigError(f"--{name} is {getattr(own, name)}, expected at least {smallest}")
    available = len(embedded_rows()) // len(own.seeds)
    if own.scored > available:
        raise ConfigError(f"--scored is {own.scored}, expected at most {available}: every seed has other items")
    return own, Settings(own.out, own.config, repository / "configs" / "modes", own.model, own.seeds, tuple(rest))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def planned_tasks(
    settings: Settings, variants: dict[str, Variant], options: argparse.Namespace, checkpoint: Path
) -> list[Task]:
    """Trainings, then what is read off them, then the timing, alone.

    Raises:
      ConfigError: an option that no training has, or a value that does not go.
    """
    planned = runs.planned(settings.seeds)
    configs = [runs.configuration(run, variants, settings) for run in planned]
    data = [path.read_text(encoding="utf-8") for path in sorted((settings.out / "data").iterdir())]
    common = "".join([weights_hash(checkpoint, configs[0].teacher.cache_dir), *data])
    found = []
    for run, config in zip(planned, configs, strict=True):
        result = runs.run_dir(run, settings) / "result.json"
        found.append(Task(run.name, train_one, (run,), common + to_yaml(config), output=result))
    after = common + to_yaml(configs[0]) + str(options.scored)
    for seed in settings.seeds:
        reads = {f"weights, {who} student": (_score, (seed, options.scored, who)) for who in STUDENTS}
        reads |= {f"contexts, {toy}": (_contexts, (seed, options.scored, toy)) for toy in TOYS}
        reads |= {f"targets, {name}": (_targets, (seed, name)) for name in TEACHERS}
        found += [Task(f"{name}, seed {seed}", work, words, after, phase=1) for name, (work, words) in reads.items()]
    return [*found, Task(TIMING, _time, (options.rounds,), after + str(options.rounds), phase=2)]


def train_one(settings: Settings, variants: dict[str, Variant], run: Run) -> None:
    """One training, or what is left of it; only the weights and checkpoints that are read later are kept."""
    train.run(runs.configuration(run, variants, settings))
    if run.method not in TEACHERS:
        shutil.rmtree(runs.run_dir(run, settings) / "checkpoints")
    if run[:2] != TRAINED_STUDENT:
        shutil.rmtree(runs.run_dir(run, settings) / "hf")


def _time(settings: Settings, variants: dict[str, Variant], rounds: int) -> dict[str, list[float]]:
    return step_seconds(settings, rounds)


def _score(settings: Settings, variants: dict[str, Variant], seed: int, items: int, who: str) -> dict[str, Any]:
    student = runs.run_dir(Run(*TRAINED_STUDENT, seed), settings) / "hf" if who == "trained" else None
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


def _targets(settings: Settings, variants: dict[str, Variant], seed: int, method: str) -> Targets:
    return target_changes(runs.run_dir(Run(CLEAN, method, seed), settings))


def write(settings: Settings, variants: dict[str, Variant], options: argparse.Namespace, tasks: Sequence[Task]) -> str:
    """Writes the page, and the same as JSON beside the runs; the page's text."""
    made = {task.name: json.loads(mark(settings, task).read_text()) for task in tasks}
    found: dict[str, dict[str, list]] = {}
    for run in runs.planned(settings.seeds):
        found.setdefault(run.variant, {}).setdefault(run.method, []).append(runs.read(run, settings))

    def of_seeds(name: str) -> list[Any]:
        return [made[f"{name}, seed {seed}"]["found"] for seed in settings.seeds]

    targets = {name: [Targets(*one) for one in of_seeds(f"targets, {name}")] for name in TEACHERS}
    gold = {
        toy: {source: [np.array(one[source]) for one in of_seeds(f"contexts, {toy}")] for source in SOURCES}
        for toy in TOYS
    }
    seconds = made[TIMING]["found"]
    claims = [
        *trained_claims(found),
        *cost_claims(found, seconds),
        smoothing_claim(found, targets),
        context_claim(gold),
    ]
    for who in STUDENTS:
        scored = [_scored(one) for one in of_seeds(f"weights, {who} student")]
        claims += reliability_claims(scored, f"completions of the {who} student")
    claims.sort(key=lambda claim: int(claim.number.partition(",")[0]))
    released = released_findings(found)
    facts = _facts(settings, options, found, {name: one["seconds"] for name, one in made.items()})
    text = page.write_page(claims, released, found, variants, seconds, facts)
    write_text_atomic(options.page, text)
    record = {"claims": [_plain(claim) | {"findings": list(map(_plain, claim.findings))} for claim in claims]}
    record |= {"released": list(map(_plain, released)), "seconds": seconds}
    write_json_atomic(settings.out / "claims.json", record | environment())
    return text


def _plain(found: Claim | Finding) -> dict[str, Any]:
    """As JSON; an end that is not known is null."""
    fields = found._asdict() | {"verdict": found.verdict}
    if isinstance(found, Finding):
        fields["interval"] = [end if np.isfinite(end) else None for end in found.interval]
    return fields


def _scored(found: dict[str, Any]) -> Scored:
    views = {name: np.array(logps, np.float32) for name, logps in found["views"].items()}
    arrays = {name: np.array(found[name]) for name in ("mask", "right", "wrong", "exact")}
    return Scored(views=views, **arrays)


def _facts(settings: Settings, options: argparse.Namespace, found, took: dict[str, float]) -> dict[str, Any]:
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
        "minutes": round((took.pop(TIMING) + sum(took.values()) / options.jobs) / 60),
        "jobs": options.jobs,
    }
