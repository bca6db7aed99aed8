"""Training with rollouts by a server, the stand-in of one: the same run whatever happens to it, or a clear stop."""

import errno
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from fake_vllm import FakeVllm
from run_checks import TRAIN_ONLY, error_line, numbers, read_metrics

from unisd_jax import evaluate
from unisd_jax.config import load_config
from unisd_jax.rollout import weights
from unisd_jax.rollout.engines import owner_of

REPOSITORY = Path(__file__).resolve().parents[2]
# A run that is killed before its first checkpoint is on disk begins anew, without the evaluation of its start.
SYNC = {"sync_gib", "seconds_sync_convert", "seconds_sync_write", "seconds_sync_load", "server_repairs"}
SHORT = ("--train.steps=4", "--evaluation.drift_tokens=0")
# The process group of the run's server is ended after a step, or the run itself.
HOOK = """
import os, signal
from unisd_jax.metrics import MetricsWriter
from unisd_jax.rollout import vllm_server
servers, log, init = [], MetricsWriter.log, vllm_server.OwnServer.__init__
def started(self, *arguments, **named):
    init(self, *arguments, **named)
    servers.append(self._process.pid)
    open("{pids}", "a").write(str(self._process.pid) + "\\n")
def log_and_kill(self, step, values):
    log(self, step, values)
    if step == {step}: {action}
vllm_server.OwnServer.__init__ = started
MetricsWriter.log = log_and_kill
"""


@pytest.fixture(scope="module")
def running(workspace):
    with FakeVllm(workspace.model) as fake:
        yield fake


@pytest.fixture
def fake(running):
    running.reset()
    return running


@pytest.fixture
def python(tmp_path, cli_environment):
    """An interpreter with the stand-in as its vLLM; all who share the compiled programs know their limit."""
    path = tmp_path / "python"
    given = {name: cli_environment[name] for name in cli_environment if name.startswith(("PYTHONPATH", "JAX_"))}
    environment = " ".join(f"{name}={shlex.quote(value)}" for name, value in given.items())
    program = shlex.join([sys.executable, str(REPOSITORY / "tests/fake_vllm.py")])
    path.write_text(f'#!/bin/sh\n{environment} exec {program} "$@"\n')
    path.chmod(0o755)
    return path


def at(fake, *more):
    options = ("--rollout.engine=vllm", f"--rollout.vllm.addresses=[{fake.address}]", "--rollout.vllm.start_timeout=5")
    return (*options, *SHORT, *more)


def own(python):
    return ("--rollout.engine=vllm", f"--rollout.vllm.python={python}", *SHORT)


def computed(run_dir):
    """`numbers` without what a server's repair changes."""
    found = numbers(run_dir)
    lines = [{name: value for name, value in line.items() if name not in SYNC} for line in found[1]]
    return found[0], lines, found[3]


def shared_memory(output_dir):
    """What the runs of a folder have left there."""
    config = load_config(output_dir / "run" / "config.yaml")
    return list(Path("/dev/shm").glob(f"unisd-{owner_of(config)}-*"))


def gone(process):
    for _ in range(200):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        if "\nState:\tZ" in Path(f"/proc/{process}/status").read_text():
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def undisturbed(running, cli, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("undisturbed")
    running.restart()
    outcome = cli(output_dir, *at(running))
    assert outcome.code == 0, outcome.err
    return output_dir / "run"


def test_a_run_is_that_of_the_sampler_in_this_process_but_for_its_draws(undisturbed, finished):
    mine, other = (run_dir / "before.json" for run_dir in (undisturbed, finished[0]))
    assert mine.read_text() == other.read_text()
    lines = read_metrics(undisturbed)
    assert [line["policy_version"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert line["sampler_gap"] < 1e-5 and line["server_repairs"] == 0
    for line in lines[1:]:
        assert 0 <= line["probe_gap"] <= line["probe_gap_max"] < 1e-4 and line["sync_gib"] > 0
        assert all(line[f"seconds_sync_{part}"] > 0 for part in ("convert", "write", "load"))
    assert not list(undisturbed.glob("sync/*")) and not shared_memory(undisturbed.parent)


def test_a_server_that_fails_and_dies_changes_nothing(undisturbed, fake, main, tmp_path):
    fake.fault("drop", after=25)
    fake.fault("reload500", after=2)
    fake.fault(lambda reply: fake.restart(), after=40)
    outcome = main(tmp_path, *at(fake))
    assert outcome.code == 0, outcome.err
    assert computed(tmp_path / "run") == computed(undisturbed)
    assert read_metrics(tmp_path / "run")[-1]["server_repairs"] >= 3
    assert fake.label == "left"


def test_weights_that_do_not_arrive_stop_the_run_and_the_same_command_continues_it(undisturbed, fake, main, tmp_path):
    fake.fault("swap_layers:0,1", after=2)
    fake.fault("ignore_reload", after=3)
    line = error_line(main(tmp_path, *at(fake, "--checkpoint.every=4")))
    assert "layers 0 and 1 exchanged; step 2 is saved, the same command continues" in line
    assert fake.label == "left" and not shared_memory(tmp_path)
    line = error_line(main(tmp_path, *at(fake, "--checkpoint.every=4")))
    assert "nats from the trainer's" in line and "step 2 is saved" in line
    outcome = main(tmp_path, *at(fake, "--checkpoint.every=4"))
    assert outcome.code == 0 and "continuing after step 2" in outcome.out, outcome.err
    assert computed(tmp_path / "run")[:2] == computed(undisturbed)[:2]


def test_a_full_disk_stops_the_run_after_saving(fake, main, tmp_path, monkeypatch):
    shards, calls = weights.write_shards, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return shards(*arguments)

    monkeypatch.setattr(weights, "write_shards", full)
    line = error_line(main(tmp_path, *at(fake, *TRAIN_ONLY)))
    assert "no room for a version of the weights" in line and "step 2 is saved" in line
    assert not shared_memory(tmp_path)


def test_batches_ahead_and_evaluations_between_them(fake, main, tmp_path):
    fake.fault("slow:0.02", times=None)
    options = ("--mode=custom", "--objective.importance.level=token", "--rollout.max_sampler_gap=10")
    outcome = main(tmp_path, *at(fake, *options, "--rollout.staleness=1", "--evaluation.every=2"))
    assert outcome.code == 0, outcome.err
    lines = read_metrics(tmp_path / "run")
    assert [line["policy_version"] for line in lines] == [0, 0, 1, 2]
    labels = [body["new_version"] for _, path, body in fake.log if path == "/update_weight_version"]
    assert labels.pop() == "left"
    pushed = [int(label.split("/")[1]) for label in labels]
    assert pushed == sorted(pushed) and set(pushed) == {0, 1, 2, 4}


def test_its_own_server_is_started_again_and_ends_with_the_run(undisturbed, cli, python, tmp_path):
    pids = tmp_path / "pids"
    kill = HOOK.format(pids=pids, step=2, action="os.killpg(servers[-1], signal.SIGKILL)")
    outcome = cli(tmp_path / "out", *own(python), before=kill)
    assert outcome.code == 0, outcome.err
    assert computed(tmp_path / "out/run") == computed(undisturbed)
    started = list(map(int, pids.read_text().split()))
    assert len(started) == 2 and all(map(gone, started)) and not shared_memory(tmp_path / "out")
    assert read_metrics(tmp_path / "out/run")[-1]["server_repairs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_the_server_ends_with_a_trainer_that_is_killed(undisturbed, cli, python, tmp_path, name):
    pids = tmp_path / "pids"
    kill = HOOK.format(pids=pids, step=3, action=f"os.kill(os.getpid(), signal.{name})")
    outcome = cli(tmp_path / "out", *own(python), before=kill)
    assert outcome.code == (-signal.SIGKILL if name == "SIGKILL" else 130)
    assert all(map(gone, map(int, pids.read_text().split())))
    left = shared_memory(tmp_path / "out")
    assert len(left) == (name == "SIGKILL")
    assert cli(tmp_path / "out", *own(python)).code == 0
    assert computed(tmp_path / "out/run")[:2] == computed(undisturbed)[:2]
    assert not shared_memory(tmp_path / "out")


@pytest.mark.slow
def test_after_an_evaluation_with_its_own_server_the_name_is_free_for_a_training(workspace, main, python, tmp_path):
    words = ["--config", str(workspace.config), f"--output_dir={tmp_path}", *own(python), "--data.test_limit=2"]
    assert evaluate.main([*words, f"--teacher.cache_dir={tmp_path / 'cache'}"]) == 0
    assert (tmp_path / "run" / "evaluation" / "vllm.log").is_file()
    assert main(tmp_path, *TRAIN_ONLY, "--train.steps=1").code == 0
