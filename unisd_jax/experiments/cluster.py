"""Jobs for a scheduler that is not ours: a plain list as JSON, and SLURM scripts that run one of its jobs by number."""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from unisd_jax.errors import UserError
from unisd_jax.experiments.jobs import WAITING, Job, first_states, layers, read_job, write_config
from unisd_jax.io import write_json_atomic, write_text_atomic

LARGEST_ARRAY = 1000  # SLURM's usual MaxArraySize is 1001
SUBMIT = """#!/bin/bash
# Submits all layers, each after the one before; what is given is passed on to every sbatch.
# DEPENDENCY=afterany lets a layer start even if jobs before it failed; those that need these refuse to run.
set -euo pipefail
cd {folder}
dependency="${{DEPENDENCY:-afterok}}" after="" ids=""

submit() {{
    local kind="$1" script="$2" id
    shift 2
    id="$(sbatch --parsable ${{after:+"--dependency=$kind$after" --kill-on-invalid-dep=yes}} "$@" "$script")"
    ids="$ids:${{id%%;*}}"
    echo "$script: ${{id%%;*}}"
}}
"""
WARNING_SECONDS = 120  # from SIGINT to the end of a job's time, for saving


def write_slurm(folder: Path, jobs: Sequence[Job], program: Path) -> list[str]:
    """Writes jobs.json, a script per layer and submit.sh of what is not finished; returns what to say.

    `program` is run_experiments.py as the cluster sees it.

    Raises:
      UserError: the folder holds other jobs, which may be queued by their numbers.
    """
    arrays = _arrays(_unfinished(jobs))
    if not arrays:
        return ["all jobs are finished; nothing was written"]
    ordered = [(layer, job) for layer, part in arrays for job in part]
    records = [job.record() | {"index": place, "layer": layer} for place, (layer, job) in enumerate(ordered)]
    tree, listed = {"jobs": records}, folder / "jobs.json"
    if listed.exists() and json.loads(listed.read_text(encoding="utf-8")) != json.loads(json.dumps(tree)):
        raise UserError(
            f"{listed} holds other jobs, which may be queued by number; give --cluster slurm another folder"
        )
    for _, job in ordered:
        write_config(job)
    write_json_atomic(listed, tree)
    first, scripts = 0, []
    for number, (layer, part) in enumerate(arrays):
        kinds = "-".join(dict.fromkeys(job.kind for job in part))
        scripts.append((layer, f"{number:02}-{kinds}.sbatch", kinds))
        write_text_atomic(folder / scripts[-1][1], _script(folder, kinds, first, len(part), program))
        first += len(part)
    write_text_atomic(folder / "submit.sh", _submit(folder, scripts))
    one = shlex.join([sys.executable, str(program), "run-job", str(listed)])
    return [
        f"{len(ordered)} jobs in {len(scripts)} arrays: {listed}",
        f"submit them: bash {folder / 'submit.sh'} [options of sbatch: --partition=NAME --gres=gpu:1 --time=8:00:00]",
        f"one of them: {one} INDEX",
    ]


def _unfinished(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that are left to run, which need only one another."""
    states = first_states(jobs)
    left = [job for job in jobs if states[job.name] == WAITING]
    names = {job.name for job in left}
    return [dataclasses.replace(job, needs=tuple(name for name in job.needs if name in names)) for job in left]


def read_list(path: Path, index: str) -> tuple[Job, dict[str, Job]]:
    """The job with this number in a list, and all of them by name.

    Raises:
      UserError: there is no such list or no such job.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["jobs"]
        jobs = [read_job(record) for record in records]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a list of jobs; expected one that run_experiments.py --cluster wrote") from None
    if not index.isdecimal() or int(index) >= len(jobs):
        raise UserError(f"run-job: INDEX is {index!r}, expected 0 to {len(jobs) - 1}, the jobs in {path}")
    return jobs[int(index)], {job.name: job for job in jobs}


def _arrays(jobs: Sequence[Job]) -> list[tuple[int, list[Job]]]:
    """(layer, jobs) of each array; a large layer takes several."""
    return [
        (number, layer[start : start + LARGEST_ARRAY])
        for number, layer in enumerate(layers(jobs))
        for start in range(0, len(layer), LARGEST_ARRAY)
    ]


def _script(folder: Path, name: str, first: int, count: int, program: Path) -> str:
    listed = (folder / "jobs.json").absolute()
    command = shlex.join([sys.executable, str(program), "run-job", str(listed)])
    logs = str(folder.absolute()).replace("%", "%%") + "/slurm-%A_%a.log"
    return f"""#!/bin/bash
#SBATCH --job-name=unisd-{name}
#SBATCH --array=0-{count - 1}
#SBATCH --chdir={shlex.quote(os.getcwd())}
#SBATCH --output={shlex.quote(logs)}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:INT@{WARNING_SECONDS}
# exec: the signal above goes to this process, and what runs saves.
exec {command} "$((SLURM_ARRAY_TASK_ID + {first}))"
"""


def _submit(folder: Path, scripts: Sequence[tuple[int, str, str]]) -> str:
    """The script that submits all (layer, file, kinds of jobs) in order."""
    lines = [SUBMIT.format(folder=shlex.quote(str(folder.absolute())))]
    for place, (layer, name, kinds) in enumerate(scripts):
        if place and layer != scripts[place - 1][0]:
            lines.append('after="$ids" ids=""')
        kind = "afterany" if kinds == "report" else "$dependency"
        lines.append(f'submit "{kind}" {shlex.quote(name)} "$@"')
    return "\n".join(lines) + "\n"
