"""The command as two processes with two devices each: the numbers of one process, and no waiting for one that died."""

import hashlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fake_vllm import FakeVllm
from run_checks import TASK_WITH_FORM, TRAIN_ONLY, read_metrics

from unisd_jax.models import load_hf
from unisd_jax.testing import tiny_checkpoint

# One worker runs them all: they share what one process computes, and each is several processes already.
pytestmark = pytest.mark.xdist_group("processes")
DEVICES = "--xla_force_host_platform_device_count={}"
# Every mechanism but the clip; contexts and negatives by rule, which the first process makes for both.
STAR = {
    "teacher": {"contexts": {"method": "random"}, "negatives": {"per_item": 1, "min_coverage": 0.5}},
    "train": {"steps": 4},
    "checkpoint": {"every": 2},
}
TIME_LIMIT = 30  # seconds in which the others must end after one was killed; jax's own heartbeat takes 120
SIGNAL_AFTER_STEP = """
import os, signal
from unisd_jax import train
check, done = train.check_weights, []
def check_and_kill(state, step, *rest):
    if step == {step} and not done:
        done.append(step)
        os.kill(os.getpid(), signal.{signal})
    return check(state, step, *rest)
train.check_weights = check_and_kill
"""


@pytest.fixture(scope="module")
def star(workspace) -> Path:
    """A configuration of unisd_star with the workspace's model and data."""
    path = workspace.root / "star.yaml"
    repository = Path(__file__).resolve().parents[2]
    tree = yaml.safe_load(workspace.config.read_text()) | {"inherit": str(repository / "configs/modes/unisd_star.yaml")}
    for section, options in STAR.items():
        tree[section] = tree.get(section, {}) | options
    path.write_text(yaml.safe_dump(tree))
    return path


class Processes:
    """Starts the command `count` times, as a scheduler would."""

    def __init__(self, star, environment, cwd):
        self._star, self._environment, self._cwd = star, environment, cwd

    def start(self, output_dir, *overrides, count=2, devices=2, before="", victim=None, module="train"):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        running = []
        for index in range(count):
            environment = self._environment | {"XLA_FLAGS": DEVICES.format(devices)}
            if count > 1:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(index),
                }
            program = f"import sys; from unisd_jax import {module}; sys.exit({module}.main(sys.argv[1:]))"
            program = (before if index == victim else "") + "\n" + program
            command = [sys.executable, "-c", program, "--config", str(self._star), f"--output_dir={output_dir}"]
            running.append(
                subprocess.Popen(
                    [*command, *overrides], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                    env=environment, cwd=self._cwd,
                )
            )  # fmt: skip
        return running

    def run(self, output_dir, *overrides, **options):
        return finish(self.start(output_dir, *overrides, **options))


def said(text):
    """Lines of output without those of the CPU's collectives, which write past Python."""
    return [line for line in text.splitlines() if "peer ranks" not in line]


def finish(running, timeout=300):
    """[(exit status, stdout, stderr)] of the processes; none is left behind."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(running, outputs, strict=True)]


@pytest.fixture(scope="module")
def processes(star, cli_environment, workspace):
    return Processes(star, cli_environment, workspace.root)


@pytest.fixture(scope="module")
def alone(processes, tmp_path_factory):
    """The run of one process with four devices, and its numbers."""
    output_dir = tmp_path_factory.mktemp("alone")
    ((code, _, err),) = processes.run(output_dir, "--mesh.fsdp=4", count=1, devices=4)
    assert code == 0, err
    return output_dir / "run"


def assert_same_run(found: Path, expected: Path):
    """Metrics, evaluation and exported weights to rounding: collectives between processes sum in another order."""
    records, others = read_metrics(found), read_metrics(expected)
    assert [record["step"] for record in records] == [record["step"] for record in others]
    skipped = re.compile("seconds|tokens_per_second|memory|ema_truncation|compil")
    for record, other in zip(records, others, strict=True):
        assert record.keys() == other.keys()
        for name, value in other.items():
            if not skipped.search(name):
                assert record[name] == pytest.approx(value, rel=2e-3, abs=2e-6), (record["step"], name)
    assert (found / "result.json").exists()
    _, weights = load_hf(found / "hf")
    _, others = load_hf(expected / "hf")
    for module in ("q", "o"):
        pair = [tree["layers"]["attention"][module]["kernel"] for tree in (weights, others)]
        assert abs(pair[0] - pair[1]).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [("--mesh.fsdp=4",), ("--mesh.tensor=4",)])
def test_two_processes_compute_what_one_does(processes, alone, tmp_path, mesh):
    main, other = processes.run(tmp_path, *mesh)
    assert (main[0], other[0]) == (0, 0), main[2] + other[2]
    assert "4/4" in main[1] and said(other[1]) == [], "the main process prints, the other is silent"
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_stops_the_other_and_a_restart_of_both_resumes(processes, alone, tmp_path, victim):
    before = SIGNAL_AFTER_STEP.format(step=4, signal="SIGKILL")
    running = processes.start(tmp_path, "--mesh.fsdp=4", *TRAIN_ONLY, before=before, victim=victim)
    running[victim].wait(timeout=300)
    died = time.monotonic()
    survivor = running[1 - victim]
    survivor.wait(timeout=TIME_LIMIT)
    assert time.monotonic() - died < TIME_LIMIT
    ends = finish(running)
    assert ends[victim][0] == -signal.SIGKILL
    assert ends[1 - victim][0] not in (0, 1)
    assert f"error: process {victim} of this run has stopped" in ends[1 - victim][2]
    assert "Traceback" not in ends[1 - victim][2]
    assert not (tmp_path / "run" / "result.json").exists()
    ends = processes.run(tmp_path, "--mesh.fsdp=4", *TRAIN_ONLY)
    assert [end[0] for end in ends] == [0, 0], ends[0][2] + ends[1][2]
    assert "continuing after step 2" in ends[0][1]
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(processes, tmp_path):
    before = SIGNAL_AFTER_STEP.format(step=2, signal="SIGTERM")
    ends = processes.run(tmp_path, "--mesh.fsdp=4", *TRAIN_ONLY, before=before, victim=1)
    assert [end[0] for end in ends] == [130, 130], ends
    (saved,) = {re.search(r"stopped after step (\d)", end[2])[1] for end in ends}
    assert (tmp_path / "run" / "checkpoints" / saved).is_dir()


def test_processes_with_different_options_refuse_to_run(processes, tmp_path):
    before = "import sys; sys.argv.append('--optimizer.learning_rate=0.5')"
    ends = processes.run(tmp_path, "--mesh.fsdp=4", before=before, victim=1)
    assert [end[0] for end in ends] == [2, 2], ends
    assert all("the processes of this run have different options" in end[2] for end in ends)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_coordinator_that_nobody_is_at(processes, tmp_path):
    overrides = ("--distributed.coordinator=127.0.0.1:1", "--distributed.num_processes=2", "--distributed.process_id=1")
    ((code, _, err),) = processes.run(tmp_path, *overrides, "--distributed.timeout=3", count=1)
    assert code != 0 and not list(tmp_path.iterdir())
    assert "joining the other processes at 127.0.0.1:1, for at most 3 s" in err


@pytest.mark.slow
def test_two_processes_measure_what_one_does(processes, tmp_path):
    """Also going on after an interruption: what is kept is written by one process and read by both."""
    base, cache = tiny_checkpoint(tmp_path / "base", seed=1), f"--teacher.cache_dir={tmp_path / 'cache'}"
    task = tmp_path / "mine.py"
    task.write_text(TASK_WITH_FORM)
    words = [f"--measure.base={base}", "--mesh.fsdp=4", "--measure.retries=1", "--evaluation.batch_size=4"]
    words += [f"--data.task={task}", "--measure.retry_temperature=1.5"]
    ((code, _, err),) = processes.run(tmp_path / "alone", *words, count=1, devices=4, module="evaluate")
    assert code == 0, err
    for code, _, err in processes.run(tmp_path / "two", *words, cache, module="evaluate"):
        assert code == 0, err
    found, expected = (
        json.loads(next((tmp_path / name / "run" / "evaluation").glob("*/summary.json")).read_text())
        for name in ("two", "alone")
    )
    assert found["metrics"] == expected["metrics"] and found["gain"] == expected["gain"]
    assert found["retries"]["failed_first_pass"] == expected["retries"]["failed_first_pass"] > 0
    assert found["retention"]["jsd"]["mean"] == pytest.approx(expected["retention"]["jsd"]["mean"], rel=1e-3)
    for folder in (tmp_path / "cache" / "distances").glob("*/"):
        lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
        (folder / "records.jsonl").write_text("".join(lines[:4]))
        (folder / "manifest.json").unlink()
    for code, _, err in processes.run(tmp_path / "again", *words, cache, module="evaluate"):
        assert code == 0, err
    again = json.loads(next((tmp_path / "again" / "run" / "evaluation").glob("*/summary.json")).read_text())
    assert again["retention"] == found["retention"]


@pytest.mark.slow
def test_each_process_samples_from_its_own_server(processes, workspace, tmp_path):
    """Weights are gathered and loaded into both; each is asked for its process' rows, evaluations are shared out."""
    with FakeVllm(workspace.model) as one, FakeVllm(workspace.model) as two:
        options = ("--mesh.fsdp=4", "--rollout.engine=vllm", f"--rollout.vllm.addresses=[{one.address},{two.address}]")
        ends = processes.run(tmp_path, *options, "--rollout.max_sampler_gap=1e-3")
        assert [end[0] for end in ends] == [0, 0], ends[0][2] + ends[1][2]
        # Greedy requests, which are those of evaluations and of the probe, all have the seed 0.
        drawn, greedy = (
            [{key for key in x.samples if bool(key[2]) == own} for x in (one, two)] for own in (True, False)
        )
    assert sum(map(len, drawn)) == 4 * 4 and min(map(len, drawn)) > 0 and not drawn[0] & drawn[1]
    assert min(map(len, greedy)) > 3
    lines = read_metrics(tmp_path / "run")
    assert [line["policy_version"] for line in lines] == [0, 1, 2, 3]
    assert all(line["sampler_gap_max"] < 1e-4 and line["probe_gap_max"] < 1e-4 for line in lines)
    owner = f"run-{hashlib.sha256(str(tmp_path / 'run').encode()).hexdigest()[:8]}"
    assert one.label == two.label == "left" and not list(Path("/dev/shm").glob(f"unisd-{owner}-*"))


@pytest.mark.slow
def test_a_server_with_wrong_weights_stops_both_processes(processes, workspace, tmp_path):
    with FakeVllm(workspace.model) as one, FakeVllm(workspace.model) as two:
        two.fault("ignore_reload", times=None)
        options = ("--mesh.fsdp=4", "--rollout.engine=vllm", f"--rollout.vllm.addresses=[{one.address},{two.address}]")
        started = time.monotonic()
        ends = processes.run(tmp_path, *options, *TRAIN_ONLY)
    assert all(end[0] not in (0, 1) for end in ends) and time.monotonic() - started < 200
    assert f"error: {two.address}: " in ends[1][2] and "rollout.vllm.max_probe_gap" in ends[1][2]
    assert "Traceback" not in ends[0][2] + ends[1][2]
