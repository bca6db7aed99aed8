"""The command from end to end: what a run writes, that its numbers hang together, and every mode."""

import dataclasses
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
from run_checks import TRAIN_ONLY, numbers, read_metrics, read_result, weights
from transformers import AutoTokenizer

from unisd_jax import train
from unisd_jax.checkpoint import Checkpoints
from unisd_jax.config import config_hash, load_config, to_yaml
from unisd_jax.data.chat import load_chat
from unisd_jax.experiment import build, new_state, student_params
from unisd_jax.models import load_hf
from unisd_jax.models.lora import TARGETS

# --- What the command writes ---


def test_the_command_says_what_it_does_and_nothing_on_stderr(finished):
    run_dir, outcome = finished
    assert outcome.err == ""
    for heading in ("step", "loss", "divergence", "entropy", "length", "tokens/s", "ETA"):
        assert heading in outcome.out
    assert [f"{step}/6" for step in range(1, 7)] == re.findall(r"^ *(\d+/6) ", outcome.out, re.MULTILINE)
    assert f"report: {run_dir / 'report.md'}" in outcome.out
    assert re.search(r"exact match on 6 test items: .* -> .*, gain .* points \(95% interval .* to .*\)", outcome.out)


# What a step of an EMA run measures.
MEASURED = {
    "step", "loss", "divergence", "entropy", "completion_length", "truncated_share", "eos_rate", "gradient_norm",
    "learning_rate", "loss_divergence", "loss_share_divergence", "gradient_share_divergence", "teacher_distance",
    "teacher_motion", "ema_truncation", "sampler_gap", "sampler_gap_max", "tokens_per_second", "seconds_rollout",
    "seconds_update", "seconds_step", "peak_memory_gib", "policy_version", "prompts_dropped", "items_without_negative",
    "seconds_compiling", "programs_compiled", "seconds_waiting",
}  # fmt: skip


def test_metrics_are_the_documented_ones_and_finite(finished, pytestconfig):
    text = (pytestconfig.rootpath / "docs" / "metrics.md").read_text().split("## result.json")[0]
    rows = re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`([\w…]+)`", row)}
    families = tuple(name.removesuffix("…") for name in documented if name.endswith("…"))  # `loss_share_…`
    assert len(documented) > 10
    assert {name for name in MEASURED if not name.startswith(families)} <= documented | {"step"}
    lines = read_metrics(finished[0])
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert set(line) == MEASURED
        assert all(math.isfinite(value) for value in line.values())


def test_metrics_hang_together(finished):
    for line in read_metrics(finished[0]):
        assert line["loss"] == line["loss_divergence"] > 0
        assert line["loss"] == pytest.approx(line["divergence"], rel=1e-5)  # normalize=batch
        assert line["loss_share_divergence"] == line["gradient_share_divergence"] == 1
        assert 0 < line["entropy"] <= math.log(264) + 1e-4
        assert 1 <= line["completion_length"] <= 8
        assert line["eos_rate"] + line["truncated_share"] == 1
        assert 0 <= line["sampler_gap"] <= line["sampler_gap_max"] < 1e-4
        assert line["policy_version"] == line["step"] - 1
        assert line["prompts_dropped"] == 0
        assert line["seconds_step"] >= max(line["seconds_rollout"], line["seconds_update"]) > 0
        tokens = line["tokens_per_second"] * line["seconds_step"]
        assert tokens == pytest.approx(4 * line["completion_length"], rel=1e-3)


def test_the_teacher_follows_every_second_step(finished):
    """`teacher.ema_sync_steps` is 2: an update shows as a smaller distance, steps between as energy lost 0."""
    lines = read_metrics(finished[0])
    assert all(line["ema_truncation"] == 0 for line in lines if line["step"] % 2)
    assert lines[0]["teacher_distance"] == pytest.approx(1)  # the adapter's average is still zero
    assert all(lines[step]["teacher_distance"] < lines[step - 1]["teacher_distance"] for step in (1, 3, 5))


def test_learning_rate_follows_the_schedule(finished):
    rates = [line["learning_rate"] for line in read_metrics(finished[0])]
    expected = [1e-2 * 0.5 * (1 + math.cos(math.pi * max(step - 1, 0) / 5)) for step in range(6)]
    assert rates == pytest.approx(expected, rel=1e-5)


def test_the_result_has_all_its_numbers(finished):
    result = read_result(finished[0])
    assert result["mode"] == "ema" and result["steps"] == 6 and result["items"] == 6 and result["seed"] == 0
    assert 0 <= result["before"] <= 1 and 0 <= result["after"] <= 1
    assert result["gain"] == pytest.approx(result["after"] - result["before"])
    low, high = result["gain_interval"]
    assert low <= result["gain"] <= high
    assert result["before_metrics"]["exact"] == result["before"] and result["after_metrics"]["exact"] == result["after"]
    assert result["after_metrics"]["gold_logprob"] != result["before_metrics"]["gold_logprob"] < 0
    assert 0 < result["drift"] < math.log(2)
    assert {"setup", "training", "evaluation", "export", "total"} <= set(result["seconds"])
    assert result["seconds"]["total"] >= result["seconds"]["training"] > 0
    assert result["versions"]["jax"] == jax.__version__
    assert "cpu" in result["device"] and result["peak_memory_gib"] > 0


def test_the_resolved_configuration_is_kept(finished, workspace):
    saved = load_config(finished[0] / "config.yaml")
    assert config_hash(saved) == read_result(finished[0])["config_hash"]
    assert saved.model.path == str(workspace.model)
    assert "b1: 0.9" in (finished[0] / "config.yaml").read_text(), "defaults are written out"


def test_samples_show_both_replies(finished):
    samples = [json.loads(line) for line in (finished[0] / "samples.jsonl").read_text().splitlines()]
    assert [sample["id"] for sample in samples] == [f"e{index}" for index in range(6)]
    assert samples[2]["prompt"] == "e 2?" and samples[2]["gold"] == "a2"
    assert any(sample["before"] != sample["after"] for sample in samples)


def test_the_report_and_its_plots(finished):
    text = (finished[0] / "report.md").read_text()
    for name in re.findall(r"\((plots/\w+\.png)\)", text):
        assert (finished[0] / name).read_bytes().startswith(b"\x89PNG")
    assert {path.stem for path in (finished[0] / "plots").glob("*.png")} >= {"loss", "completions", "sampler_gap"}
    assert "e 0?" in text and "Not in this report" not in text


def test_the_newest_checkpoints_are_kept_and_nothing_half_written(finished):
    assert sorted(path.name for path in (finished[0] / "checkpoints").iterdir()) == ["4", "6"]
    assert not list(finished[0].rglob("*.partial")) + list(finished[0].rglob("*tmp*"))


# --- The exported model ---


def test_the_export_is_the_base_plus_the_adapter(finished, workspace):
    run_dir, _ = finished
    config = load_config(workspace.config)
    experiment = build(config)
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=2)
    restored = checkpoints.restore(new_state(experiment))
    checkpoints.close()
    assert int(restored.state.step) == 6

    model, exported = load_hf(run_dir / "hf")
    assert model == experiment.model
    expected = student_params(experiment, restored.state)
    jax.tree.map(np.testing.assert_array_equal, exported, expected)
    adapter = restored.state.student
    for path in TARGETS.values():
        group, name = path.split("/")
        base, found = (tree["layers"][group][name]["kernel"] for tree in (experiment.base, exported))
        a, b = (np.asarray(factor) for factor in adapter.factors[path])
        np.testing.assert_allclose(found, np.asarray(base) + 8 / 4 * (a @ b), rtol=1e-5, atol=1e-6)
        assert np.abs(np.asarray(found) - np.asarray(base)).max() > 1e-3, f"{path} was not trained"


def test_the_export_carries_its_tokenizer(finished, workspace):
    messages = [{"role": "user", "content": "e 0?"}]
    tokenizer = AutoTokenizer.from_pretrained(finished[0] / "hf")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == load_chat(workspace.model).prompt_ids(messages) == load_chat(finished[0] / "hf").prompt_ids(messages)


# --- The same again, and not ---


def test_a_finished_run_is_reused(finished, tmp_path, main):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    outcome = main(tmp_path)
    assert outcome.code == 0 and outcome.err == ""
    assert "is complete" in outcome.out and "exact match on 6 test items" in outcome.out
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_run_that_died_before_its_report_gets_one(finished, tmp_path, main):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    (run_dir / "report.md").unlink()
    assert main(tmp_path).code == 0
    assert (run_dir / "report.md").read_text() == (finished[0] / "report.md").read_text()


def test_the_same_seed_gives_the_same_numbers(finished, cli, tmp_path):
    """In a process that sees one device and compiles everything itself, as a user's does."""
    assert cli(tmp_path, environment={"JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_FLAGS": ""}).code == 0
    found, expected = numbers(tmp_path / "run"), numbers(finished[0])
    assert found[2].pop("device") == expected[2].pop("device").replace("8 x", "1 x")
    assert found == expected


def test_the_seed_decides_the_numbers(finished, tmp_path, main):
    assert main(tmp_path, "--seed=1", *TRAIN_ONLY).code == 0
    assert weights(tmp_path / "run") != weights(finished[0])
    first, other = (read_metrics(run_dir)[0] for run_dir in (tmp_path / "run", finished[0]))
    assert first["loss"] != other["loss"] and first["entropy"] != other["entropy"]


# --- Asking without running ---


def test_dry_run_builds_everything_and_writes_nothing(tmp_path, main, workspace):
    before = sorted(workspace.root.rglob("*"))
    outcome = main(tmp_path / "runs", "--dry-run")
    assert outcome.code == 0 and outcome.err == ""
    assert "20 training items (0 dropped as too long)" in outcome.out and "nothing was run" in outcome.out
    # Rank 4 on every projection of two layers: r · (in + out).
    adapter = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert f"ema on {workspace.model}: {adapter:,} trainable of " in outcome.out
    assert not (tmp_path / "runs").exists()
    assert sorted(workspace.root.rglob("*")) == before


def test_print_config_is_a_configuration(tmp_path, main):
    printed = main(tmp_path / "runs", "--print-config", "--objective.alpha=0.25", "--name=again")
    assert printed.code == 0 and printed.err == ""
    path = tmp_path / "printed.yaml"
    path.write_text(printed.out)
    config = load_config(path)
    assert (config.objective.alpha, config.name, config.output_dir) == (0.25, "again", str(tmp_path / "runs"))
    assert to_yaml(config) == printed.out
    assert not (tmp_path / "runs").exists()


# --- Modes and options ---

PLAIN = ("--mode=plain", "--teacher.ema=false")
SFT = ("--mode=sft", "--teacher.ema=false", "--objective.loss=nll", "--rollout.source=gold")
ALPHAS = ("objective.alpha=0", "objective.alpha=0.5", "objective.alpha=1")
INLINE = "teacher.placement=inline"


@pytest.mark.slow
def test_alpha_and_placement_change_what_a_plain_run_learns_from(main, tmp_path):
    lines = {}
    for option in (*ALPHAS, INLINE):
        options = ("--train.steps=16", "--optimizer.learning_rate=0.02", f"--{option}", f"--name={option}")
        outcome = main(tmp_path, *PLAIN, *options, *TRAIN_ONLY)
        assert outcome.code == 0 and outcome.err == ""
        lines[option] = read_metrics(tmp_path / option)
        losses = [line["loss"] for line in lines[option]]
        assert min(losses) > 0
        assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:2]), "the student is pulled to the teacher"
        assert not any({"teacher_distance", "ema_truncation"} & set(line) for line in lines[option])

    first = {option: lines[option][0] for option in lines}
    assert len({round(line["entropy"], 4) for line in first.values()}) == 1, "the student's first samples are the same"
    forward, middle, reverse = (first[option]["loss"] for option in ALPHAS)
    assert middle < min(forward, reverse)  # JSD at 1/2 is about a quarter of either KL for near distributions
    assert forward != reverse
    assert first[INLINE]["loss"] != forward, "the teacher reads another prompt"


def test_sft_learns_the_gold_completions(tmp_path, main):
    outcome = main(tmp_path, *SFT, "--train.steps=12", "--optimizer.learning_rate=0.05", *TRAIN_ONLY)
    assert outcome.code == 0 and outcome.err == ""
    lines = read_metrics(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(264), abs=0.2)  # a random model
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    not_here = {"divergence", "teacher_distance", "ema_truncation", "sampler_gap", "sampler_gap_max"}
    assert not any(not_here & set(line) for line in lines)
    # "a7" or "a17" and the stop token.
    assert all(3 <= line["completion_length"] <= 4 and line["eos_rate"] == 1 for line in lines)


@pytest.mark.slow
def test_full_training_in_bfloat16_without_evaluation(tmp_path, main, workspace):
    options = ("--model.trainable=full", "--model.dtype=bfloat16", "--rollout.max_sampler_gap=0.1", "--train.steps=3")
    outcome = main(tmp_path, *PLAIN, *options, *TRAIN_ONLY)
    assert outcome.code == 0 and outcome.err == ""
    assert all(line["gradient_norm"] > 0 for line in read_metrics(tmp_path / "run"))

    _, base = load_hf(workspace.model, dtype="bfloat16")
    _, trained = load_hf(tmp_path / "run" / "hf", dtype="bfloat16")
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), base, trained)
    assert moved["layers"]["attention"]["q"]["kernel"] and moved["embed"]["weight"] and moved["head"]["weight"]
    assert json.loads((tmp_path / "run" / "hf" / "config.json").read_text())["dtype"] == "bfloat16"

    result = read_result(tmp_path / "run")
    assert result["before"] is result["after"] is result["gain"] is result["gain_interval"] is result["drift"] is None
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    assert (tmp_path / "run" / "report.md").exists()


def test_run_can_be_called_from_python(tmp_path, workspace, compiled_once):
    config = load_config(workspace.config, [f"--output_dir={tmp_path}"])
    result = train.run(config)
    assert result.run_dir == tmp_path / "run"
    assert result.gain == result.after - result.before
    assert result.details["steps"] == 6
    assert train.run(dataclasses.replace(config)) == result, "the second call reads the first one's result"
