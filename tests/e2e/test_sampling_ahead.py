"""Batches sampled ahead of the updates: the same run every time, whoever is faster and whatever interrupts it."""

import shutil
import signal

import pytest
from run_checks import TRAIN_ONLY, error_line, numbers, read_metrics

from unisd_jax.progress import Progress
from unisd_jax.rollout import JaxSampler, PendingRollout, RolloutFailed

AHEAD = ("--mode=custom", "--objective.importance.level=token", "--rollout.max_sampler_gap=10", *TRAIN_ONLY)
KILL = """
import os, signal
from unisd_jax.metrics import MetricsWriter
log = MetricsWriter.log
def log_and_kill(self, step, values):
    log(self, step, values)
    if step == {step}: os.kill(os.getpid(), signal.{signal})
MetricsWriter.log = log_and_kill
"""


@pytest.fixture(scope="module")
def runs(cli, tmp_path_factory):
    """The run directory for each staleness."""
    found = {}
    for staleness in (0, 1, 2):
        output_dir = tmp_path_factory.mktemp(f"ahead{staleness}")
        outcome = cli(output_dir, *AHEAD, f"--rollout.staleness={staleness}")
        assert outcome.code == 0, outcome.err
        found[staleness] = output_dir / "run"
    return found


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_every_batch_is_sampled_by_the_weights_of_so_many_updates_before(runs, staleness):
    versions = [line["policy_version"] for line in read_metrics(runs[staleness])]
    assert versions == [max(0, step - staleness) for step in range(6)]


def test_older_weights_are_another_policy_and_are_corrected(runs):
    for staleness, run_dir in runs.items():
        for line in read_metrics(run_dir):
            own = line["policy_version"] == line["step"] - 1
            assert (line["sampler_gap"] < 1e-5) == own, (staleness, line["step"])
            assert (abs(line["importance_weight"] - 1) < 1e-6) == own


def test_the_numbers_depend_on_the_staleness_alone(runs, cli, tmp_path):
    assert numbers(runs[0])[0] != numbers(runs[1])[0] != numbers(runs[2])[0]
    assert cli(tmp_path, *AHEAD, "--rollout.staleness=1").code == 0
    assert numbers(tmp_path / "run") == numbers(runs[1])


@pytest.mark.parametrize("staleness", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_and_interrupted_it_ends_in_the_same_numbers(runs, cli, tmp_path, staleness):
    """Checkpoints are due at steps 2, 4 and 6: batches that had been sampled by then are in them."""
    options = (*AHEAD, f"--rollout.staleness={staleness}")
    for step, name, code in ((3, "SIGKILL", -signal.SIGKILL), (4, "SIGINT", 130)):
        assert cli(tmp_path, *options, before=KILL.format(step=step, signal=name)).code == code
    outcome = cli(tmp_path, *options)
    assert outcome.code == 0 and "continuing after step 4" in outcome.out
    assert numbers(tmp_path / "run") == numbers(runs[staleness])


@pytest.mark.slow
def test_own_answers_are_sampled_ahead_too(main, cli, tmp_path):
    options = (*AHEAD, "--rollout.staleness=1", "--teacher.condition=self", "--teacher.self_min_agreement=0")
    assert cli(tmp_path, *options, before=KILL.format(step=3, signal="SIGKILL")).code == -signal.SIGKILL
    assert main(tmp_path, *options).code == 0
    assert main(tmp_path / "whole", *options).code == 0
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole" / "run")


def test_a_checkpoint_of_older_weights_than_the_run_allows_is_refused(main, tmp_path):
    options = (*AHEAD, "--train.steps=4", "--rollout.staleness=2")
    assert main(tmp_path, *options).code == 0
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("staleness: 2", "staleness: 1"))
    (tmp_path / "run" / "result.json").unlink()
    # The checkpoint of the last step holds no batch: the one before has them.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    line = error_line(main(tmp_path, *AHEAD, "--train.steps=4", "--rollout.staleness=1"))
    assert "the checkpoint holds completions for step 2 by weights of step 0; rollout.staleness is 1" in line


def test_a_gap_of_older_weights_is_said_to_be_that(main, tmp_path):
    line = error_line(main(tmp_path, *AHEAD, "--rollout.staleness=1", "--rollout.max_sampler_gap=1e-4"))
    assert "rollout.staleness" in line and "lower" in line


def test_an_engine_that_fails_loses_no_update(main, tmp_path, monkeypatch):
    generate = JaxSampler.generate

    def failing(self, *arguments, version, **rest):
        if version == 3:
            raise RolloutFailed("the engine is gone")
        return generate(self, *arguments, version=version, **rest)

    monkeypatch.setattr(JaxSampler, "generate", failing)
    line = error_line(main(tmp_path, *TRAIN_ONLY))
    assert line == "error: the engine is gone; step 3 is saved, the same command continues"
    monkeypatch.undo()
    again = main(tmp_path, *TRAIN_ONLY)
    assert again.code == 0 and "continuing after step 3" in again.out
    assert main(tmp_path / "whole", *TRAIN_ONLY).code == 0
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole" / "run")


def test_an_engine_that_fails_while_a_checkpoint_waits_for_it_loses_no_update(main, tmp_path, monkeypatch):
    """The batch ahead is asked for in step 2 and waited for by the checkpoint after it."""

    def failing(self, *arguments, version, **rest):
        def wait():
            raise RolloutFailed("the engine is gone")

        return PendingRollout(wait) if version == 1 else begin(self, *arguments, version=version, **rest)

    begin = JaxSampler.begin
    monkeypatch.setattr(JaxSampler, "begin", failing)
    line = error_line(main(tmp_path, *AHEAD, "--rollout.staleness=1"))
    assert line == "error: the engine is gone; step 2 is saved, the same command continues"
    monkeypatch.undo()
    again = main(tmp_path, *AHEAD, "--rollout.staleness=1")
    assert again.code == 0 and "continuing after step 2" in again.out
    # The third batch, which was to be older, is drawn anew.
    assert [line["policy_version"] for line in read_metrics(tmp_path / "run")] == [0, 0, 2, 2, 3, 4]


def test_an_engine_that_fails_in_an_evaluation_loses_no_update(main, tmp_path, monkeypatch):
    def failing(*_):
        raise RolloutFailed("the engine is gone")

    monkeypatch.setattr(Progress, "measure", failing)
    options = ("--evaluation.every=3", "--evaluation.every_items=2", "--evaluation.drift_tokens=0")
    line = error_line(main(tmp_path, *options))
    assert line == "error: the engine is gone; step 3 is saved, the same command continues"
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]
