"""The command make_claims.py: trains and scores what is not there yet, then writes the page."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from unisd_jax import train
from unisd_jax.claims import page, runs
from unisd_jax.claims.reliability import reliability_claims
from unisd_jax.claims.runs import Run, Settings
from unisd_jax.claims.teacher import target_changes
from unisd_jax.claims.variants import CLEAN, Variant, write_variants
from unisd_jax.claims.verdicts import Claim, Finding, context_claim, released_findings, smoothing_claim, trained_claims
from unisd_jax.claims.weights import Scored, gold_logps, score
from unisd_jax.claims.work import Task, mark, work_off
from unisd_jax.config import load_config
from unisd_jax.errors import ConfigError, UserError, report_error
from unisd_jax.interrupt import INTERRUPTED
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


def main(argv: Sequence[str], repository: Path) -> int:
    """The exit status: 0 the page is written, 1 something failed, 2 bad input, 130 interrupted."""
    try:
        options, settings = parse(argv, repository)
        local_checkpoint(settings.model)
        variants = write_variants(settings.out / "data", rate=SPOILT)
        for run in runs.planned(settings.seeds):
            runs.configuration(run, variants, settings)  # what is wrong with an option is said before anything starts
        tasks = [*trainings(settings), *scorings(settings, options.scored)]
        failed = work_off(tasks, settings, variants, options.jobs)
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
    return [Task(run.name, train_one, (run,), first=True) for run in runs.planned(settings.seeds)]


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


def train_one(settings: Settings, variants: dict[str, Variant], run: Run) -> None:
    """One training, or what is left of it."""
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
    made = {task.name: json.loads(mark(settings, task).read_text()) for task in tasks}
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
    record = {"claims": [_plain(claim) | {"findings": list(map(_plain, claim.findings))} for claim in claims]}
    record |= {"released": list(map(_plain, released))}
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
