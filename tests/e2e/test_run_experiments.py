"""A small sweep for real: caches, training, evaluation, report; killed, repeated, and nothing is made twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from run_checks import Outcome, error_line, read_result

from unisd_jax.experiments.state import is_locked

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = REPOSITORY / "scripts" / "run_experiments.py"


@pytest.fixture
def sweep(workspace, cli_environment, tmp_path):
    """`sweep(*words)` starts the command on the tiny model, in a folder of its own."""
    tree = yaml.safe_load(workspace.config.read_text())
    del tree["inherit"], tree["name"], tree["model"]["path"]
    tree["teacher"]["cache_dir"] = str(tmp_path / "cache")
    (tmp_path / "common.yaml").write_text(yaml.safe_dump(tree))
    words = [
        "--config",
        str(tmp_path / "common.yaml"),
        f"--models={workspace.model}",
        f"--output-dir={tmp_path / 'out'}",
    ]

    def start(*more):
        return subprocess.Popen(
            [sys.executable, str(PROGRAM), *words, "--devices=cpu:2", "--memory-gib=2", *more], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=cli_environment,
        )  # fmt: skip

    return start


def states(out):
    return {name: record["state"] for name, record in json.loads((out / "jobs.json").read_text())["jobs"].items()}


def results(out):
    return list(out.glob("*/result.json"))


def wait_for(condition, process):
    until = time.monotonic() + 240
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.1)


@pytest.mark.slow
def test_a_sweep_is_killed_and_stopped_and_repeated_and_nothing_is_made_twice(sweep, tmp_path):
    words, out = ("ema", "contrastive", "--seeds=0,1", "--no-evaluate"), tmp_path / "out"
    # Killed at once, with what it runs, as soon as a training has saved a step.
    first = sweep(*words)
    wait_for(lambda: list(out.glob("*/checkpoints/2")), first)
    first.kill()
    first.communicate()
    for folder in (out / "jobs").iterdir():
        if is_locked(folder / "lock"):
            kill_by_command(str(folder / "options.yaml"))
    begun = {path.parents[1] for path in out.glob("*/checkpoints/2")} - {path.parent for path in results(out)}

    # Stopped by Ctrl-C once something is finished.
    second = sweep(*words)
    wait_for(lambda: results(out), second)
    second.send_signal(signal.SIGINT)
    said, err = second.communicate(timeout=120)
    assert second.returncode == 130 and "the same command continues" in err, said + err
    finished = {path: path.stat().st_mtime_ns for path in results(out)}
    assert 0 < len(finished) <= 4

    # And to the end, now with evaluation.
    third = sweep(*words[:-1])
    said, err = third.communicate(timeout=400)
    assert third.returncode == 0, said + err
    assert set(states(out).values()) <= {"finished", "not needed"}
    runs = {path.parent for path in results(out)}
    assert len(runs) == 4 and {read_result(run)["seed"] for run in runs} == {0, 1}
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert begun and all("continuing after step" in (out / "jobs" / run.name / "log.txt").read_text() for run in begun)
    summaries = list(out.glob("*/evaluation/jsonl-*/summary.json"))
    assert len(summaries) == 4 and all(json.loads(path.read_text())["gain"] for path in summaries)
    assert "4 runs: " in (out / "jobs" / "report" / "log.txt").read_text(), "no job is taken for a run"

    # Once more: nothing is left to do.
    logs = {path: path.stat().st_size for path in out.glob("jobs/*/log.txt")}
    fourth = sweep(*words[:-1])
    said, err = fourth.communicate(timeout=60)
    assert fourth.returncode == 0, said + err
    assert {path: path.stat().st_size for path in out.glob("jobs/*/log.txt")} == logs and "  start " not in said


def kill_by_command(argument):
    """Ends the process that was started with this argument, as a loss of power would."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if argument.encode() in words:
            os.kill(int(path.parent.name), signal.SIGKILL)


def test_a_training_that_fails_is_told_with_its_message_and_the_others_go_on(sweep, workspace, tmp_path):
    process = sweep("ema", "--no-evaluate", f"--data.test_path={tmp_path / 'none.jsonl'}")
    said, err = process.communicate(timeout=120)
    assert process.returncode == 1, said + err
    assert "error: " in said and "none.jsonl" in said and "again: JAX_PLATFORMS=cpu" in said


def test_bad_input_is_one_line(sweep, tmp_path):
    process = sweep("ema", "--tasks=nonsense")
    said, err = process.communicate(timeout=60)
    assert "unknown task 'nonsense'" in error_line(Outcome(process.returncode, said, err))
    assert not (tmp_path / "out").exists()
