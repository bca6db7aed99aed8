"""What a user gets wrong: exit status 2, one line on stderr that says what and where, and nothing half-written."""

import contextlib
import fcntl
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from run_checks import TRAIN_ONLY, error_line, numbers, read_metrics, write_items

from unisd_jax import experiment, train
from unisd_jax.metrics import MetricsWriter
from unisd_jax.programs import StepPrograms
from unisd_jax.rollout import JaxSampler
from unisd_jax.testing import tiny_checkpoint


@pytest.fixture
def refused(main, tmp_path):
    """`refused(*overrides)` is the error line of a command that must leave nothing behind."""

    def run(*overrides: str) -> str:
        line = error_line(main(tmp_path / "runs", *overrides))
        assert not (tmp_path / "runs").exists(), "something was written before the input was refused"
        return line

    return run


# --- Options ---


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--train.step=3",), 'unknown option "train.step"; did you mean "train.steps"?'),
        (("--optimiser.learning_rate=1",), 'did you mean "optimizer"'),
        (("--train.steps=many",), 'train.steps: expected an integer, found "many" (a string)'),
        (("--evaluation.enabled=3",), "evaluation.enabled: expected true or false"),
        (("--train.steps=0",), "train.steps must be at least 1, found 0"),
        (("--mode=sft",), "needs objective.loss"),
        (("--train.batch_size=4", "--train.micro_batches=3"), "must be divisible by train.micro_batches"),
        (("train.steps=3",), "expected --section.option=value"),
        (("--data.test_path=null",), "set data.test_path to the test file"),
        (("--mesh.data=4", "--mesh.fsdp=5", "--train.batch_size=20"), "4 x 5 x 1 = 20 devices, found 8"),
    ],
)
def test_options(refused, words, expected):
    assert expected in refused(*words)


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_missing_vllm_is_the_first_thing_said(refused, monkeypatch, dry):
    monkeypatch.setattr(experiment, "read_inputs", lambda *args, **options: pytest.fail("the data were read"))
    line = refused("--rollout.engine=vllm", "--rollout.vllm.python=nowhere/python", *dry)
    assert "rollout.vllm.python: nowhere/python is no program" in line


def test_the_command_itself_ends_with_status_2(cli, tmp_path):
    """As a process: nothing else on stderr, from whatever library."""
    line = error_line(cli(tmp_path / "runs", "--model.path=nowhere"))
    assert "model.path: nowhere is not a directory" in line
    assert not (tmp_path / "runs").exists()


def test_a_refused_command_does_not_stand_in_the_way_of_the_right_one(main, tmp_path):
    """The mistake of a first attempt must not be what the second is compared with."""
    for mistake in ("--model.path=nowhere", "--train.batch_size=21", "--data.train_path=nowhere.jsonl"):
        error_line(main(tmp_path, *TRAIN_ONLY, mistake))
    assert main(tmp_path, *TRAIN_ONLY).code == 0


@pytest.mark.parametrize("mistake", ["--model.path=nowhere", "--train.batch_size=21", "--data.max_prompt_length=600"])
def test_a_dry_run_finds_it_too(refused, mistake):
    assert refused("--dry-run", mistake).startswith("error: ")


# --- The checkpoint directory ---


@pytest.fixture
def model(workspace, tmp_path):
    """A copy of the checkpoint that a test may spoil."""
    return shutil.copytree(workspace.model, tmp_path / "model")


def test_missing_model_directory(refused, tmp_path):
    assert f"model.path: {tmp_path / 'nowhere'} is not a directory" in refused(f"--model.path={tmp_path / 'nowhere'}")


def test_a_directory_without_config_json(refused, model):
    (model / "config.json").unlink()
    assert f"model.path: {model} has no config.json" in refused(f"--model.path={model}")


def test_a_directory_of_something_else(refused, tmp_path):
    write_items(tmp_path / "notes.jsonl", "n", 1)
    assert "expected a Hugging Face checkpoint" in refused(f"--model.path={tmp_path}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not JSON"),
        ('{"model_type": "gpt2"}', "model_type is 'gpt2'"),
        ('{"model_type": "llama"}', "num_attention"),
    ],
)
def test_a_config_json_that_cannot_be_used(refused, model, content, expected):
    (model / "config.json").write_text(content)
    line = refused(f"--model.path={model}")
    assert expected in line and "config.json" in line


def test_missing_weights(refused, model):
    (model / "model.safetensors").unlink()
    assert f"{model} has no *.safetensors file" in refused(f"--model.path={model}")


def test_truncated_weights(refused, model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "not a readable safetensors file" in refused(f"--model.path={model}")


def test_nan_weights(refused, model):
    path = model / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 3] = np.nan
    safetensors.numpy.save_file(tensors, path)
    assert f"tensor {name} holds NaN or infinity" in refused(f"--model.path={model}")


def test_missing_tokenizer(refused, model):
    (model / "tokenizer_config.json").unlink()
    assert "no tokenizer_config.json" in refused(f"--model.path={model}")


def test_a_tokenizer_without_a_chat_template(refused, model):
    (model / "chat_template.jinja").unlink()
    assert "no chat template" in refused(f"--model.path={model}")


def test_more_positions_than_the_model_has(refused):
    line = refused("--data.max_prompt_length=510", "--rollout.max_completion_length=4")
    assert "data.max_prompt_length + max_completion_length is 518" in line and "at most 512" in line


def test_weights_that_overflow_are_named_before_training(main, tmp_path):
    """Finite weights whose log-probs are not: found by the evaluation of the starting point."""
    model = tiny_checkpoint(tmp_path / "model")
    path = model / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["lm_head.weight"] = np.sign(tensors["lm_head.weight"]) * np.float32(1e38)
    safetensors.numpy.save_file(tensors, path)
    line = error_line(main(tmp_path / "runs", f"--model.path={model}"))
    assert "model.path: gold_logprob of the test items is nan" in line


# --- Data ---

LINE = '{"prompt": "p", "completion": "c"}\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no items"),
        ("\n\n", "holds no items"),
        (f"{LINE}{LINE}{{'prompt': 'p'}}\n", "line 3: not valid JSON"),
        (f'{LINE}["p", "c"]\n', "line 2: found a JSON list"),
        (f'{LINE}{{"prompt": "p"}}\n', "line 2: field 'reference' is missing"),
        (f'{LINE}{{"prompt": "p", "completion": 3}}\n', "line 2: field 'completion' is a int"),
        (f'{LINE}{{"prompt": " ", "completion": "c"}}\n', "line 2: field 'prompt' is empty"),
        ('{"prompt": "p", "completion": "c<|im_end|>d"}\n', "'c<|im_end|>d' holds a token that ends the turn"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_data_files(refused, tmp_path, split, content, expected):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    line = refused(f"--data.{split}_path={path}")
    assert expected in line and (str(path) in line or "im_end" in line)


def test_a_missing_data_file(refused, tmp_path):
    assert f"{tmp_path / 'none.jsonl'} does not exist" in refused(f"--data.train_path={tmp_path / 'none.jsonl'}")


def test_a_batch_larger_than_the_data(refused):
    line = refused("--train.batch_size=21")
    assert "train.batch_size is 21, but there are only 20 training items" in line


@pytest.fixture
def with_long_items(workspace, tmp_path):
    """The training items and two more, `long0` and `long1`, whose prompts are over the limit."""
    path = write_items(tmp_path / "long.jsonl", "long", 2, prompt="x" * 300)
    path.write_text(path.read_text() + workspace.train.read_text())
    return path


def test_long_prompts_are_an_error_when_asked_for(refused, with_long_items):
    line = refused(f"--data.train_path={with_long_items}", "--data.overlong=error")
    assert "item long0: the student's prompt has" in line and "data.max_prompt_length is 200" in line


def test_long_prompts_are_dropped_whole_and_counted(finished, main, tmp_path, with_long_items):
    """What is left is trained on as if the long ones had never been there."""
    outcome = main(tmp_path / "runs", f"--data.train_path={with_long_items}")
    assert outcome.code == 0 and outcome.err == ""
    found, expected = numbers(tmp_path / "runs" / "run"), numbers(finished[0])
    assert [line.pop("prompts_dropped") for line in found[1]] == [2] * 6
    assert [line.pop("prompts_dropped") for line in expected[1]] == [0] * 6
    assert (found[0], found[1], found[3]) == (expected[0], expected[1], expected[3])
    assert "2 dropped" in main(tmp_path / "runs", f"--data.train_path={with_long_items}", "--dry-run").out


def test_only_long_prompts(refused, tmp_path):
    path = write_items(tmp_path / "long.jsonl", "long", 5, prompt="x" * 300)
    assert "all 5 items are too long" in refused(f"--data.train_path={path}")


def test_a_long_test_item_is_never_dropped(refused, tmp_path):
    """Leaving it out would change what is measured."""
    path = write_items(tmp_path / "long.jsonl", "long", 1, prompt="x" * 300)
    assert "item long0" in refused(f"--data.test_path={path}", "--data.overlong=drop")


# --- Where to write ---


def test_an_output_directory_that_is_a_file(main, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output_dir in (tmp_path / "file", tmp_path / "file" / "deeper"):
        assert f"output_dir: {tmp_path / 'file'} is not a directory" in error_line(main(output_dir))
    (tmp_path / "run").write_text("mine")
    assert f"{tmp_path / 'run'} is not a directory" in error_line(main(tmp_path))
    assert (tmp_path / "run").read_text() == "mine"


def test_an_output_directory_that_cannot_be_written(main, tmp_path, monkeypatch):
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and allowed(path, mode))  # root may anything
    assert f"output_dir: {tmp_path} is not writable" in error_line(main(tmp_path))


def test_a_full_disk_is_one_line(main, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "run" / "metrics.jsonl"))

    monkeypatch.setattr(MetricsWriter, "log", full)
    line = error_line(main(tmp_path, *TRAIN_ONLY))
    assert "metrics.jsonl: No space left on device" in line


def test_a_checkpoint_that_cannot_be_written_is_one_line(cli, tmp_path):
    """A limit on the size of files, so that the disk is full for whoever writes, threads of libraries included."""
    limit = (
        "import resource\nfrom unisd_jax.checkpoint import Checkpoints\nsave = Checkpoints.save\n"
        "def limited(self, state, **rest):\n"
        "    self.wait()\n"
        "    if int(state.step) == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))\n"
        "    save(self, state, **rest)\n"
        "Checkpoints.save = limited\n"
    )
    outcome = cli(tmp_path, *TRAIN_ONLY, before=limit)
    # Threads of the libraries may still say something of their own about the other files of that checkpoint.
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.code == 2 and len(errors) == 1 and "a checkpoint could not be written" in errors[0], outcome.err
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


# --- Numbers that are not numbers ---


@contextlib.contextmanager
def loss_becomes(value: float, step: int, name: str = "loss"):
    """The compiled step reports `value` for one metric of step `step`."""
    run = StepPrograms.run

    def changed(programs, state, views):
        state, metrics = run(programs, state, views)
        return state, metrics | ({name: jnp.float32(value)} if int(state.step) == step else {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepPrograms, "run", changed)
        yield


@pytest.mark.parametrize(("name", "value"), [("loss", float("nan")), ("gradient_norm", float("inf"))])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    finished, main, tmp_path, name, value
):
    run_dir = tmp_path / "run"
    with loss_becomes(value, step=4, name=name):
        line = error_line(main(tmp_path))
    assert f"step 4: {name} is {value}; last good checkpoint: step 2" in line
    named = line.split("look at the batch: ")[1].split(", ")
    assert len(set(named)) == 4 and all(item in {f"t{index}" for index in range(20)} for item in named)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["2"], "no newer checkpoint"
    assert [entry["step"] for entry in read_metrics(run_dir)] == [1, 2, 3]
    assert not (run_dir / "hf").exists() and not (run_dir / "result.json").exists()

    # The checkpoint that was kept is good: once the cause is gone, the run ends as if nothing had happened.
    again = main(tmp_path)
    assert again.code == 0 and "continuing after step 2" in again.out
    assert numbers(run_dir) == numbers(finished[0])


def test_before_the_first_checkpoint_there_is_none_to_keep(main, tmp_path):
    with loss_becomes(float("nan"), step=1):
        assert "step 1: loss is nan; last good checkpoint: none" in error_line(main(tmp_path, *TRAIN_ONLY))


def test_the_named_items_are_those_of_the_batch(main, tmp_path, monkeypatch):
    seen, finish = [], train.finish_batch

    def remember(experiment, batch, phase):
        seen.append([example.item.id for example in batch.examples])
        return finish(experiment, batch, phase)

    monkeypatch.setattr(train, "finish_batch", remember)
    with loss_becomes(float("nan"), step=3):
        line = error_line(main(tmp_path, *TRAIN_ONLY))
    assert line.endswith(", ".join(seen[2])) and seen[2] != seen[1]


def test_a_learning_rate_that_destroys_the_weights(main, tmp_path):
    """The loss of a step is that of the weights before its update, so the weights themselves are looked at."""
    options = ("--optimizer.learning_rate=1e38", "--train.steps=2", "--checkpoint.every=1", *TRAIN_ONLY)
    line = error_line(main(tmp_path, *options))
    assert "lower optimizer.learning_rate" in line and "last good checkpoint: " in line
    assert not (tmp_path / "run" / "hf").exists() and not (tmp_path / "run" / "result.json").exists()


def test_weights_that_are_not_finite_are_never_saved(main, tmp_path, monkeypatch):
    run = StepPrograms.run

    def spoiled(programs, state, views):
        state, metrics = run(programs, state, views)
        if int(state.step) == 4:
            path, factors = next(iter(state.student.factors.items()))
            state.student.factors[path] = factors._replace(b=factors.b.at[0, 0, 0].set(jnp.nan))
        return state, metrics

    monkeypatch.setattr(StepPrograms, "run", spoiled)
    line = error_line(main(tmp_path, *TRAIN_ONLY))
    assert "step 4: weights not finite after the update; last good checkpoint: step 2" in line
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]


# --- Rollouts of another policy ---


def test_a_sampler_that_keeps_old_weights_is_stopped(main, tmp_path, monkeypatch):
    publish = JaxSampler.publish

    def stale(self, params, version, lora=None):
        publish(self, self.params or params, version, None if self.params else lora)

    monkeypatch.setattr(JaxSampler, "publish", stale)
    line = error_line(main(tmp_path, *TRAIN_ONLY))
    assert "sampler and trainer differ by" in line and "rollout.max_sampler_gap is 0.0001" in line
    assert "the rollouts are not the policy's own; last good checkpoint: " in line
    steps = [entry["step"] for entry in read_metrics(tmp_path / "run")]
    assert steps and len(steps) < 6
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["sampler_gap"] <= 1e-4


def test_a_sampler_that_was_not_told_of_new_weights_is_stopped(main, tmp_path, monkeypatch):
    publish = JaxSampler.publish
    monkeypatch.setattr(
        JaxSampler,
        "publish",
        lambda self, params, version, lora=None: version == 0 and publish(self, params, version, lora),
    )
    assert "holds policy version 0, asked for 1" in error_line(main(tmp_path, *TRAIN_ONLY))


def test_a_run_that_another_process_is_at_is_left_alone(main, tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "run: another process is at this run" in error_line(main(tmp_path, *TRAIN_ONLY))
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert main(tmp_path, *TRAIN_ONLY, "--train.steps=1").code == 0


def test_a_run_that_another_process_has_finished_meanwhile_is_not_made_again(main, tmp_path, monkeypatch):
    assert main(tmp_path, *TRAIN_ONLY, "--train.steps=1").code == 0
    path, build = tmp_path / "run" / "result.json", train.build
    result = path.read_text()
    path.unlink()

    def finished_meanwhile(config):
        path.write_text(result)
        return build(config)

    monkeypatch.setattr(train, "build", finished_meanwhile)
    again = main(tmp_path, *TRAIN_ONLY, "--train.steps=1")
    assert again.code == 0 and "is complete" in again.out
    assert path.read_text() == result
