"""The command run_experiments.py: what is asked for is checked and planned, then shown, written out or run."""

import sys
from collections.abc import Sequence
from pathlib import Path

from unisd_jax.data.tasks import get_task
from unisd_jax.errors import ConfigError, UserError, report_error
from unisd_jax.experiments.cluster import read_list, write_slurm
from unisd_jax.experiments.jobs import (
    ELSEWHERE,
    FINISHED,
    GOOD,
    WAITING,
    Job,
    first_states,
    is_begun,
    is_finished,
    layers,
    unfinished_needs,
)
from unisd_jax.experiments.options import Asked, parse
from unisd_jax.experiments.plan import completed, plan
from unisd_jax.experiments.pool import Pool
from unisd_jax.experiments.slots import HERE, Slot, parse_devices, require_gpus, total_gib
from unisd_jax.experiments.state import Manifest, is_locked
from unisd_jax.experiments.status import Screen, summary, tell
from unisd_jax.interrupt import INTERRUPTED

SOME_FAILED = 1
NAMED = 3  # needs that are named in a line


def main(argv: Sequence[str], program: Path) -> int:
    """The exit status: 0 all is finished, 1 a job failed or was not run, 2 bad input, 130 interrupted."""
    try:
        if argv[:1] == ["run-job"]:
            return run_job(argv[1:])
        return run(parse(argv), program)
    except (UserError, OSError) as error:
        return report_error(error)
    except KeyboardInterrupt:
        print("interrupted before anything was started", file=sys.stderr)
        return INTERRUPTED


def run(asked: Asked, program: Path) -> int:
    """Plans, and does with the plan what was asked for."""
    repository = program.parents[1]
    request = completed(asked.request, repository)
    check_inputs(request.models, request.tasks, download=not asked.dry_run)
    jobs = plan(request, repository)
    slots = [] if asked.cluster is not None else parse_devices(asked.devices)
    if asked.dry_run:
        print("\n".join(describe(jobs)))
        return 0
    if asked.cluster is not None:
        print("\n".join(write_slurm(asked.cluster, jobs, program)))
        return 0
    require_gpus(slots)
    total = total_gib()
    if asked.memory_gib is not None and total is not None and asked.memory_gib > total:
        raise ConfigError(f"--memory-gib is {asked.memory_gib:g}, more than the {total:.1f} GiB that there are in all")
    return run_pool(jobs, slots, Manifest(request.output_dir), memory_gib=asked.memory_gib)


def run_pool(jobs: Sequence[Job], slots: Sequence[Slot], manifest: Manifest, memory_gib: float | None = None) -> int:
    """Runs the jobs and says how it ended."""
    screen = Screen()
    pool = Pool(jobs, slots, manifest, screen, memory_gib=memory_gib)
    skipped = [state for state in pool.states.values() if state in GOOD]
    screen.say(f"{len(jobs)} jobs, {len(skipped)} finished or not needed, on {', '.join(slot.name for slot in slots)}")
    states = pool.run()
    tell("\n".join(summary(jobs, states, slots[0].environment)))
    if pool.was_stopped:
        tell("interrupted: the same command continues", sys.stderr)
        return INTERRUPTED
    return 0 if all(state in GOOD for state in states.values()) else SOME_FAILED


def run_job(words: Sequence[str]) -> int:
    """Runs one job of a list on whatever a scheduler has given to this process.

    Raises:
      UserError: no such list or job, or a job that it needs is not finished.
    """
    if len(words) != 2:
        raise ConfigError(f"run-job: expected JOBS.json INDEX, found {' '.join(words) or 'nothing'}")
    job, jobs = read_list(Path(words[0]), words[1])
    missing = unfinished_needs(job, jobs)
    if missing and job.kind != "report":
        raise UserError(f"{job.name} needs {missing[0]}, which is not finished; run that one first")
    if not is_finished(job) or job.kind == "report":
        for other in jobs.values():
            if other.kind == "report":  # a report is only as new as what it reports
                other.marker.unlink(missing_ok=True)
    status = run_pool([job], [HERE], Manifest(Path(job.folder).parents[1]))
    if missing:
        job.marker.unlink(missing_ok=True)
    return status


def check_inputs(models: Sequence[str], tasks: Sequence[str], *, download: bool) -> None:
    """Refuses before anything starts what every job would refuse; fetches models from the hub, once for all jobs.

    Raises:
      UserError: an unknown task, one that is never trained on, or a model that is not there.
    """
    for name in tasks:
        if get_task(name).train is None:
            raise ConfigError(f"task {name!r} is for evaluation only and never trained on: leave it out of --tasks")
    for name in models:
        if Path(name).is_dir():
            if not (Path(name) / "config.json").exists():
                raise ConfigError(f"model {name} has no config.json, expected a checkpoint in Hugging Face's format")
        elif download or name.count("/") != 1 or Path(name).exists():
            from unisd_jax.models import local_checkpoint  # which loads jax

            local_checkpoint(name)
        else:
            print(f"{name} is no folder here: it would be fetched from the Hugging Face Hub")


def describe(jobs: Sequence[Job]) -> list[str]:
    """Every job, layer by layer, with what would be done with it."""
    states, lines = first_states(jobs), []
    for number, layer in enumerate(layers(jobs)):
        lines.append(f"layer {number}: {len(layer)} jobs")
        for job in layer:
            lines.append(f"  {_intention(job, states[job.name]):<10} {job.kind} {job.name}")
            lines.append(f"             key {job.key}, for {', '.join(job.experiments)}")
            more = f" and {len(job.needs) - NAMED} more" if len(job.needs) > NAMED else ""
            lines.append(f"             needs {', '.join(job.needs[:NAMED]) or 'nothing'}{more}")
            lines.append(f"             {job.words()}")
            lines.append(f"             writes {', '.join(job.outputs or (str(job.marker),))}")
    counts = {state: list(states.values()).count(state) for state in dict.fromkeys(states.values())}
    return [*lines, ", ".join(f"{number} {state}" for state, number in counts.items()) + "; nothing was run"]


def _intention(job: Job, state: str) -> str:
    if state != WAITING:
        return "skip" if state == FINISHED else state
    if is_locked(job.lock):
        return ELSEWHERE
    return "resume" if is_begun(job) else "run"
