"""A run that is killed, interrupted or damaged ends with the numbers of one that was left alone, bit for bit."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
import yaml
from run_checks import TRAIN_ONLY, error_line, numbers, read_metrics, write_items

from unisd_jax import train
from unisd_jax.metrics import MetricsWriter
from unisd_jax.testing import tiny_checkpoint

# --- kill -9 ---

# Python that ends its own process at an exact place: no sleeping, no race with a watcher.
SIGNALS = """
import os, signal
def kill(): os.kill(os.getpid(), signal.SIGKILL)
def interrupt(): os.kill(os.getpid(), signal.SIGINT)
"""
AFTER_LINE = """
from unisd_jax.metrics import MetricsWriter
log = MetricsWriter.log
def log_and_kill(self, step, values):
    log(self, step, values)
    if step == {step}: kill()
MetricsWriter.log = log_and_kill
"""
DURING_SAVE = """
from unisd_jax.checkpoint import Checkpoints
save = Checkpoints.save
def save_and_kill(self, state, **rest):
    save(self, state, **rest)
    if int(state.step) == {step}: kill()
Checkpoints.save = save_and_kill
"""
BEFORE_RESULT = """
from unisd_jax import train
train.write_samples = lambda *_: kill()
"""


def test_kill_9_anywhere_and_ctrl_c_change_nothing(finished, cli, tmp_path):
    """One run, killed four times and interrupted once; checkpoints are due at steps 2, 4 and 6."""
    run_dir = tmp_path / "run"
    killed, interrupted = -signal.SIGKILL, 130
    stops = [
        (AFTER_LINE.format(step=1), 1, killed),  # no checkpoint yet
        (DURING_SAVE.format(step=2), 2, killed),  # the first one is being written
        (AFTER_LINE.format(step=4), 4, killed),  # one is due, and not begun
        (AFTER_LINE.format(step=5).replace("kill()", "interrupt()"), 5, interrupted),
        (BEFORE_RESULT, 6, killed),  # trained and exported, but no result
    ]
    for place, steps, code in stops:
        outcome = cli(tmp_path, before=SIGNALS + place)
        assert outcome.code == code, outcome
        assert [line["step"] for line in read_metrics(run_dir)] == list(range(1, steps + 1))
        assert not (run_dir / "result.json").exists()
        if code == interrupted:
            assert outcome.err.strip().splitlines() == [
                "stopping after this step (once more to stop at once)",
                "interrupted: stopped after step 5, which is saved; the same command continues",
            ]
            assert (run_dir / "checkpoints" / "5").is_dir()
        else:
            assert outcome.err == ""
    last = cli(tmp_path)
    assert last.code == 0 and last.err == ""
    assert "continuing after step 6" in last.out
    assert numbers(run_dir) == numbers(finished[0])
    results = [json.loads((folder / "result.json").read_text()) for folder in (run_dir, finished[0])]
    assert [result["continued_after"] for result in results] == [6, 0]
    assert (run_dir / "checkpoints" / "6").is_dir()
    assert not list(run_dir.rglob("*tmp*")) + list(run_dir.rglob("*.partial"))


def test_a_metrics_line_that_was_cut_short_is_repaired(crashed, reference, main):
    with open(crashed / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert main(crashed.parent, *TRAIN_ONLY).code == 0
    assert numbers(crashed) == numbers(reference)


# --- Ctrl-C ---


@pytest.fixture
def signal_at(monkeypatch):
    """`signal_at(step, *signals)`: this process gets the signals right after the step is logged."""
    log = MetricsWriter.log

    def at(step, *numbers):
        def log_and_signal(self, logged, values):
            log(self, logged, values)
            if logged == step:
                for number in numbers:
                    os.kill(os.getpid(), number)

        monkeypatch.setattr(MetricsWriter, "log", log_and_signal)

    yield at
    monkeypatch.setattr(MetricsWriter, "log", log)


@pytest.mark.parametrize(("step", "number"), [(2, signal.SIGTERM), (3, signal.SIGINT), (6, signal.SIGINT)])
def test_a_signal_at_a_checkpoint_between_two_and_at_the_last_step(
    reference, main, signal_at, monkeypatch, tmp_path, step, number
):
    signal_at(step, number)
    outcome = main(tmp_path, *TRAIN_ONLY)
    assert outcome.code == 130 and f"stopped after step {step}" in outcome.err
    assert not (tmp_path / "run" / "result.json").exists()
    monkeypatch.undo()
    assert main(tmp_path, *TRAIN_ONLY).code == 0
    assert numbers(tmp_path / "run") == numbers(reference)


def test_ctrl_c_twice_stops_at_once_without_a_traceback(reference, main, signal_at, monkeypatch, tmp_path):
    signal_at(3, signal.SIGINT, signal.SIGINT)
    outcome = main(tmp_path, *TRAIN_ONLY)
    assert outcome.code == 130 and "Traceback" not in outcome.err
    assert outcome.err.splitlines()[-1] == "interrupted: the same command continues from the last checkpoint"
    monkeypatch.undo()
    assert main(tmp_path, *TRAIN_ONLY).code == 0
    assert numbers(tmp_path / "run") == numbers(reference)


@pytest.fixture
def python_s_own_handler():
    """A shell starts what it runs in the background with SIGINT ignored."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


def test_ctrl_c_before_the_first_step(main, monkeypatch, tmp_path, python_s_own_handler):
    monkeypatch.setattr(train, "evaluate_before", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    outcome = main(tmp_path, *TRAIN_ONLY)
    assert outcome.code == 130 and outcome.err.startswith("interrupted: ")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- Damage ---


@pytest.fixture(scope="module")
def reference(workspace, compiled_once, tmp_path_factory) -> Path:
    """A run in this process that nothing disturbed."""
    output_dir = tmp_path_factory.mktemp("reference")
    arguments = ["--config", str(workspace.config), f"--output_dir={output_dir}", *TRAIN_ONLY]
    assert train.main(arguments) == 0
    return output_dir / "run"


class Crash(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def crash(workspace, compiled_once):
    """`crash(output_dir)`: the same run, ended right after step 5, with the checkpoints of steps 2 and 4."""

    def run(output_dir: Path, *overrides: str) -> Path:
        log = MetricsWriter.log

        def log_and_crash(self, step, values):
            log(self, step, values)
            if step == 5:
                raise Crash

        arguments = ["--config", str(workspace.config), f"--output_dir={output_dir}", *TRAIN_ONLY, *overrides]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
            patch.setattr(MetricsWriter, "log", log_and_crash)
            train.main(arguments)
        assert sorted(path.name for path in (output_dir / "run" / "checkpoints").iterdir()) == ["2", "4"]
        return output_dir / "run"

    return run


@pytest.fixture(scope="module")
def crashed_once(crash, tmp_path_factory) -> Path:
    return crash(tmp_path_factory.mktemp("crashed"))


@pytest.fixture
def crashed(crashed_once, tmp_path) -> Path:
    """A copy of the crashed run's directory; its parent is the output_dir."""
    return shutil.copytree(crashed_once, tmp_path / "run")


def largest_file(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 3]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_falls_back_to_the_one_before(crashed, reference, main, damage):
    damage(largest_file(crashed / "checkpoints" / "4" / "state"))
    outcome = main(crashed.parent, *TRAIN_ONLY)
    assert outcome.code == 0 and outcome.err == ""
    said = [line for line in outcome.out.splitlines() if line.startswith("checkpoint of step 4 cannot be read")]
    assert len(said) == 1 and "trying the one before" in said[0]
    assert "continuing after step 2" in outcome.out
    assert numbers(crashed) == numbers(reference)


def test_all_damaged_is_one_error_that_stays(crashed, main):
    for step in ("2", "4"):
        (crashed / "checkpoints" / step / "meta" / "metadata").write_bytes(b"")
    before = read_metrics(crashed)
    for expected in ("none of the checkpoints", "every checkpoint of this run was damaged"):
        line = error_line(main(crashed.parent, *TRAIN_ONLY))
        assert expected in line and f"delete {crashed} to start afresh" in line
    assert read_metrics(crashed) == before, "nothing was started over"


# --- Another run's directory ---


def test_a_directory_of_other_files_is_refused(tmp_path, main):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    line = error_line(main(tmp_path, *TRAIN_ONLY))
    assert "thesis.tex" in line and "choose another name or output_dir" in line
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_an_earlier_evaluation_is_no_obstacle(tmp_path, main):
    (tmp_path / "run" / "evaluation").mkdir(parents=True)
    (tmp_path / "run" / "evaluation" / "evaluation.json").write_text("{}")
    assert main(tmp_path, *TRAIN_ONLY).code == 0


def test_other_files_among_the_checkpoints_are_refused(crashed, main):
    shutil.rmtree(crashed / "checkpoints")
    (crashed / "checkpoints").mkdir()
    write_items(crashed / "checkpoints" / "notes.jsonl", "n", 1)
    assert "holds files but no checkpoint of this program" in error_line(main(crashed.parent, *TRAIN_ONLY))
    assert (crashed / "checkpoints" / "notes.jsonl").exists()


def test_a_foreign_orbax_checkpoint_is_refused(crashed, main):
    shutil.rmtree(crashed / "checkpoints")
    with ocp.CheckpointManager(crashed / "checkpoints") as manager:
        manager.save(4, args=ocp.args.StandardSave({"weights": jnp.ones((3, 3))}))
    assert "checkpoints" in error_line(main(crashed.parent, *TRAIN_ONLY))


def test_a_checkpoint_of_another_model_is_refused(crash, main, tmp_path):
    model = tiny_checkpoint(tmp_path / "model")
    crash(tmp_path / "runs", f"--model.path={model}")
    shutil.rmtree(model)
    tiny_checkpoint(model, hidden_size=48)
    line = error_line(main(tmp_path / "runs", f"--model.path={model}", *TRAIN_ONLY))
    assert "[2, 32, 4]" in line and "[2, 48, 4]" in line and "belongs to another model" in line
    assert sorted(path.name for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir()) == ["2", "4"]


def test_a_config_file_that_is_not_ours_is_refused(crashed, main):
    for content in ("just text", "- 3", "a: [", ""):
        (crashed / "config.yaml").write_text(content)
        assert "is not a resolved configuration" in error_line(main(crashed.parent, *TRAIN_ONLY))


# --- Options on resume ---


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--optimizer.learning_rate=1e-3", "optimizer.learning_rate: 0.01 -> 0.001"),
        ("--train.steps=8", "train.steps: 6 -> 8"),
        ("--seed=1", "seed: 0 -> 1"),
        ("--model.lora.targets=[q]", "model.lora.targets"),
    ],
)
def test_a_changed_option_is_refused_by_name(crashed, main, override, expected):
    before = (crashed / "config.yaml").read_text()
    assert expected in error_line(main(crashed.parent, *TRAIN_ONLY, override))
    assert (crashed / "config.yaml").read_text() == before


def test_options_of_checkpoints_and_logging_may_change(crashed, reference, main):
    changed = ("--checkpoint.every=5", "--checkpoint.keep=1", "--logging.samples=2")
    assert main(crashed.parent, *TRAIN_ONLY, *changed).code == 0
    assert numbers(crashed) == numbers(reference)
    assert yaml.safe_load((crashed / "config.yaml").read_text())["checkpoint"]["keep"] == 1
    assert sorted(path.name for path in (crashed / "checkpoints").iterdir()) == ["6"]


# --- Other kinds of state ---


@pytest.mark.slow
def test_full_training_on_a_mesh_resumes_exactly_too(crash, main, tmp_path):
    options = ("--model.trainable=full", "--optimizer.learning_rate=1e-3")
    options += ("--mesh.fsdp=2", "--mesh.tensor=2")
    run_dir = crash(tmp_path / "crashed", *options)
    outcome = main(tmp_path / "crashed", *TRAIN_ONLY, *options)
    assert outcome.code == 0 and "continuing after step 4" in outcome.out
    assert main(tmp_path / "whole", *TRAIN_ONLY, *options).code == 0
    assert numbers(run_dir) == numbers(tmp_path / "whole" / "run")
