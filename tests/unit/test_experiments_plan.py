"""Which jobs an experiment takes: the graph, what a job is kept by, the command line, and what is refused at once."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from unisd_jax.config import load_config
from unisd_jax.config_modes import MODES
from unisd_jax.experiments import command, jobs, options
from unisd_jax.experiments.plan import completed, plan

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = REPOSITORY / "scripts" / "run_experiments.py"


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a checkpoint."""
    folder = tmp_path / "Tiny-Model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def planned(model, tmp_path):
    """`planned(*words)` is the plan of a command line, without the report, by name."""

    def make(*words, report=False):
        models = [] if any(word.startswith("--models=") for word in words) else [f"--models={model}"]
        words = [*models, f"--output-dir={tmp_path / 'out'}", *words]
        found = plan(completed(options.parse(words).request, REPOSITORY), REPOSITORY)
        return {job.name: job for job in found if report or job.kind != "report"}

    return make


@pytest.fixture
def main(model, tmp_path, capsys):
    """`main(*words)` is (status, stdout, stderr) of the command."""

    def run(*words):
        code = command.main([*words], PROGRAM)
        return (code, *capsys.readouterr())

    return run


def of_kind(plan, kind):
    return [job for job in plan.values() if job.kind == kind]


# --- The graph ---


def test_a_mode_with_a_cache_is_made_trained_measured_and_cross_measured(planned):
    found = planned("induction", "--tasks=scienceqa")
    contexts, train, own, cross = found.values()
    assert [job.kind for job in found.values()] == ["cache", "train", "evaluate", "evaluate"]
    assert contexts.command[1] == str(REPOSITORY / "scripts" / "prepare_contexts.py")
    assert train.command[1:3] == ("-m", "unisd_jax.train") and own.command[1:3] == ("-m", "unisd_jax.evaluate")
    assert (train.needs, own.needs, cross.needs) == ((contexts.name,), (train.name,), (train.name,))
    assert (own.about["task"], cross.about["task"]) == ("scienceqa", "gpqa")
    assert [len(layer) for layer in jobs.layers(found.values())] == [1, 1, 2]


def test_the_report_comes_last_and_needs_all_results(planned):
    found = planned("ema", "clip", report=True)
    report = of_kind(found, "report")[0]
    assert list(found.values())[-1] is report and len(report.needs) == 4 and not report.device


def test_what_is_evaluated_is_the_trained_model_against_the_one_it_was_trained_from(planned, model, tmp_path):
    train, _, cross = planned("ema", "--tasks=mbpp", "--data.train_split=full/train").values()
    path = tmp_path / "config.yaml"
    path.write_text(cross.config)
    measured = load_config(path)
    run_dir = tmp_path / "out" / train.name
    assert measured.model.path == str(run_dir / "hf") and measured.measure.base == str(model)
    assert (measured.output_dir, measured.name) == (str(tmp_path / "out"), train.name)
    assert measured.data.task == "humaneval" and measured.data.train_split is None
    assert train.outputs == (str(run_dir / "result.json"),)
    assert cross.outputs == (str(run_dir / "evaluation" / "humaneval-*/summary.json"),)


def test_every_subcommand_is_what_it_says(planned):
    def modes(*words):
        return [job.about["mode"] for job in of_kind(planned(*words, "--no-evaluate"), "train")]

    assert modes("agreement") == [mode for mode in MODES if mode.startswith("agreement_")]
    assert modes("induction") == ["agreement_seq_induction"]
    for mode in ("ema", "contrastive", "match_joint", "match_repr", "clip", "unisd_star", "plain"):
        assert modes(mode) == [mode]
    for mode in ("sft", "sdft", "gkd", "opsd", "ssd"):
        assert modes(mode) == [mode]
    assert len(modes("sensitivity")) == 30 and len(modes("sensitivity", "--views=2,4", "--gammas", "0.5")) == 4
    assert set(modes("all")) == set(MODES)


def test_the_ablation_switches_off_one_mechanism_each_and_all_but_one(planned):
    found = of_kind(planned("ablation"), "train")
    assert [job.about["label"] for job in found] == [
        "unisd_star-k3-g1",
        "agreement_contrast_matching-k3-g1",
        "ema_contrast_matching",
        "ema_agreement_matching-k3-g1",
        "ema_agreement_contrast-k3-g1",
        "ema",
        "agreement_tok_retrieval-k3-g1",
        "contrastive",
        "match_joint",
        "plain",
    ]


def test_without_agreement_its_budget_is_gone_too(planned):
    found = of_kind(planned("ablation", "--no-evaluate", "--objective.agreement.budget.share=0.5"), "train")
    trees = {job.about["label"]: yaml.safe_load(job.config)["objective"]["agreement"] for job in found}
    assert {tree["budget"]["share"] for tree in trees.values() if tree["level"] == "none"} == {1.0}
    assert {tree["budget"]["share"] for tree in trees.values() if tree["level"] != "none"} == {0.5}


def test_a_clip_that_is_asked_for_is_ablated_too(planned):
    labels = [job.about["label"] for job in of_kind(planned("ablation", "--objective.clip.token_clip=2"), "train")]
    assert "clip" in labels and "ema_agreement_contrast_matching-k3-g1" in labels and len(labels) == 12


def test_equal_jobs_of_several_experiments_are_one(planned):
    alone = {name for word in ("ema", "contrastive", "match_joint", "plain") for name in planned(word)}
    both = planned("ablation", "ema", "contrastive", "match_joint", "plain")
    assert alone <= set(planned("ablation")) and set(both) == set(planned("ablation"))
    shared = next(job for job in both.values() if job.about["mode"] == "ema" and job.kind == "train")
    assert shared.experiments == ("ablation", "ema")
    with_preset = planned("ablation", "ema", "--preset=launcher", "--no-evaluate")
    assert len(of_kind(with_preset, "train")) == 11, "UniSD*'s EMA decays otherwise than that of the mode"


def test_caches_are_shared_by_all_that_need_the_same(planned, model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    words = "unisd_star", "contrastive", "induction", "agreement", "--no-evaluate", "--seeds=0,1"
    found = planned(*words, f"--models={model},{other}")
    names = [job.name for job in of_kind(found, "cache")]
    assert sum(name.startswith("negatives") for name in names) == 2, "by rule: one for each seed, whatever the model"
    assert sum(name.startswith("contexts") for name in names) == 4
    written = planned("contrastive", "--no-evaluate", f"--models={model},{other}", "--teacher.negatives.source=model")
    assert len(of_kind(written, "cache")) == 2
    assert not of_kind(planned("contrastive", "--teacher.negatives.source=data"), "cache")


# --- Keys ---


def test_what_changes_numbers_makes_another_job_and_what_does_not_makes_none(planned):
    same = set(planned("ema"))
    assert same == set(planned("ema", "--logging.samples=3", "--checkpoint.every=7", "--evaluation.every=5"))
    assert same.isdisjoint(planned("ema", "--optimizer.learning_rate=1e-3"))
    assert same.isdisjoint(planned("ema", "--seeds=1"))
    train, measured = planned("ema")
    assert set(planned("ema", "--measure.samples=2", "--measure.temperature=1")) & same == {train}


def test_names_say_what_a_run_is(planned):
    found = list(planned("sensitivity", "--views=4", "--gammas=0.5", "--no-evaluate", "--seeds=3").values())
    assert found[0].name == f"agreement_tok_retrieval-k4-g0.5-short_answers-tiny_model-s3-{found[0].key}"
    assert found[1].name == f"agreement_seq_retrieval-k4-g0.5-short_answers-tiny_model-s3-{found[1].key}"


def test_the_configuration_of_a_job_is_read_back_as_it_was_planned(planned, tmp_path):
    for words in (["--preset=launcher"], ["--parity=upstream", "--preset=command"], []):
        job = of_kind(planned("unisd_star", *words), "train")[0]
        path = tmp_path / "config.yaml"
        path.write_text(job.config)
        config = load_config(path)
        assert job.name.endswith(job.key) and config.name == job.name
        assert config.preset == (words[-1].partition("=")[2] if words else "none")


def test_a_job_survives_json(planned):
    for job in planned("unisd_star", report=True).values():
        assert jobs.read_job(json.loads(json.dumps(job.record()))) == dataclasses.replace(job, config="")


# --- The command line ---


def test_options_mean_the_same_before_and_after_the_subcommand(model):
    settings = ["--models", str(model), "--seeds", "0,1", "--devices", "cpu:1", "--dry-run", "--train.steps=3"]
    settings += ["--output-dir", "x", "--no-evaluate", "--preset", "launcher", "--memory-gib", "2"]
    before, after = options.parse([*settings, "ema", "clip"]), options.parse(["ema", "clip", *settings])
    assert before == after == options.parse(["ema", *settings, "clip"])
    assert before.dry_run and before.devices == "cpu:1" and before.request.seeds == (0, 1)


def test_models_tasks_and_seeds_come_from_the_configuration_where_they_are_not_named(tmp_path, model):
    base = tmp_path / "base.yaml"
    base.write_text(f"model: {{path: {model}}}\ndata: {{task: cos_e}}\nseed: 4\n")
    request = completed(options.parse(["clip", "--config", str(base)]).request, REPOSITORY)
    assert (request.models, request.tasks, request.seeds) == ((str(model),), ("cos_e",), (4,))
    request = completed(options.parse(["clip", f"--model.path={model}", "--data.task=gsm8k"]).request, REPOSITORY)
    assert (request.models, request.tasks, request.seeds) == ((str(model),), ("gsm8k",), (0,))


def test_of_several_common_configurations_every_one_counts_and_later_ones_win(planned, tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("data: {task: cos_e}\ntrain: {steps: 5, batch_size: 8}\n")
    second.write_text("train: {steps: 6}\nvariants:\n  preset.launcher: {train: {batch_size: 32}}\n")
    words = "ema", "--no-evaluate", f"--config={first}", "--config", str(second)
    for more, batch in (([], 8), (["--preset=launcher"], 32)):
        (train,) = of_kind(planned(*words, *more), "train")
        (tmp_path / "config.yaml").write_text(train.config)
        config = load_config(tmp_path / "config.yaml")
        assert (config.data.task, config.train.steps, config.train.batch_size) == ("cos_e", 6, batch)
    assert options.parse([*words]) == options.parse([*words[2:], *words[:2]])


def test_an_ablation_in_the_paper_s_setting_has_unisd_star_s_batch_everywhere(planned):
    paper = REPOSITORY / "configs" / "paper"
    words = f"--config={paper / 'qwen2.5-0.5b.yaml'}", f"--config={paper / 'cos_e.yaml'}", "--no-evaluate"
    found = of_kind(planned("ablation", *words, "--preset=launcher"), "train")
    assert len(found) == 10 and {job.about["steps"] for job in found} == {304}  # 9741 / 32
    assert {job.about["task"] for job in found} == {"cos_e"}
    assert {job.about["steps"] for job in of_kind(planned("ema", *words, "--preset=launcher"), "train")} == {152}


def test_a_dry_run_shows_every_job_and_writes_nothing(main, model, tmp_path):
    out = tmp_path / "out"
    words = "unisd_star", f"--models={model}", f"--output-dir={out}", "--seeds=0,1", "--dry-run"
    code, said, err = main(*words)
    assert code == 0 and err == "" and not out.exists()
    assert said.count("  run        cache negatives-") == 2 and said.count("  run        train unisd_star-") == 2
    assert "layer 0: 2 jobs" in said and "layer 1: 2 jobs" in said and "nothing was run" in said
    assert f"{sys.executable} -m unisd_jax.train --config {out}/jobs/unisd_star-" in said and "result.json" in said
    assert "needs negatives-short_answers-s0-" in said


def test_a_dry_run_says_what_would_be_skipped_and_what_would_go_on(main, model, tmp_path, planned):
    words = "contrastive", "ema", f"--models={model}", f"--output-dir={tmp_path / 'out'}", "--dry-run"
    plan = planned("contrastive", "ema")
    finish(*(job for job in plan.values() if job.about["mode"] == "contrastive" and job.kind != "cache"))
    begun = next(job for job in of_kind(plan, "train") if job.about["mode"] == "ema")
    begun.log.parent.mkdir(parents=True)
    begun.log.write_text("step 1\n")
    said = main(*words)[1]
    assert "  not needed cache negatives-" in said and "  skip       train contrastive-" in said
    assert "  skip       evaluate evaluate-contrastive-" in said and "  resume     train ema-" in said
    assert "  run        evaluate evaluate-ema-" in said


def finish(*done):
    """Puts there what finished jobs leave."""
    for job in done:
        for pattern in job.outputs:
            path = Path(pattern.replace("*", "x"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        job.marker.parent.mkdir(parents=True, exist_ok=True)
        job.marker.write_text(job.key)


def test_a_result_that_was_deleted_is_made_again(planned):
    plan = planned("ema", report=True)
    finish(*plan.values())
    assert set(jobs.first_states(list(plan.values())).values()) == {jobs.FINISHED}
    train, measured = of_kind(plan, "train")[0], of_kind(plan, "evaluate")[0]
    Path(measured.outputs[0].replace("*", "x")).unlink()
    states = jobs.first_states(list(plan.values()))
    assert states[train.name] == jobs.FINISHED and states[measured.name] == jobs.WAITING
    assert all(states[job.name] == jobs.WAITING for job in of_kind(plan, "report")), "it would be out of date"
    larger = planned("ema", "clip", report=True)
    assert jobs.first_states(list(larger.values()))["report"] == jobs.WAITING


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["emma"], "invalid choice: 'emma'"),
        (["ema", "--fast"], "unrecognized arguments: --fast"),
        (["ema", "--trian.steps=3"], 'unknown option "trian"'),
        (["ema", "--train.steps"], "--train.steps needs its value"),
        (["ema", "--train.steps=3", "--train.steps=4"], "--train.steps is given twice, as 3 and as 4"),
        (["ema", "--seeds=0", "--seeds=1"], "--seeds is given twice"),
        (["ema", "--tasks=mbpp", "--tasks", "gsm8k"], "--tasks is given twice"),
        (["ema", "--output-dir=runs/experiments"], "--output-dir is given twice"),
        (["ema", "--views=3,5"], "--views is for the experiment sensitivity"),
        (["ema", "ablation", "--gammas=0.1"], "--gammas is for the experiment sensitivity"),
        (["ema", "--devices=nonsense:0", "--dry-run"], "expected ids of GPUs"),
        (["ema", "--devices=0", "--cluster", "slurm", "x"], "--devices and --memory-gib are for this machine"),
        (["ema", "--seed=1", "--seeds=2"], "--seeds and --seed are both given"),
        (["ema", "--data.task=mbpp", "--tasks=mbpp"], "--tasks and --data.task are both given"),
        (["ema", "--mode=clip"], "--mode is set for every run"),
        (["ema", "--tasks=gsm8"], "unknown task 'gsm8', did you mean 'gsm8k'"),
        (["ema", "--tasks=gpqa"], "for evaluation only"),
        (["ema", "--tasks=mbpp,cos_e", "--data.train_path=x"], "data.train_path is x, the rows of one task"),
        (["ema", "--seeds=a"], "not a list of whole numbers"),
        (["ema", "--seeds=0,,1"], "not a list of whole numbers"),
        (["ema", "--seeds=-1"], "seed must be"),
        (["ema", "--devices=cpu:0"], "--devices is 'cpu:0'"),
        (["ema", "--devices="], "names no device"),
        (["ema", "--devices=0,0"], "names a device twice"),
        (["ema", "--devices=gpu:0"], "expected ids of GPUs"),
        (["ema", "--devices=tpu:0+1+2"], "3 chips of a TPU together"),
        (["ema", "--devices=7"], "names GPU 7, but this machine shows"),
        (["ema", "--config=missing.yaml"], "--config missing.yaml is not a file"),
        (["ema", f"--config={PROGRAM}", "--config=missing.yaml"], "--config missing.yaml is not a file"),
        (
            ["ema", *[f"--config={REPOSITORY / 'configs' / 'base.yaml'}"] * 2],
            "is given twice, or inherited by one before it",
        ),
        (["ema", "--teacher.ema=false"], 'ema: mode "ema" needs ema'),
        (["sensitivity", "--objective.agreement.gamma_agreement=1"], "sensitivity sets objective.agreement.gamma"),
        (["ema", "--memory-gib=0"], "--memory-gib is 0.0"),
        (["ema", "--memory-gib=1e9"], "--memory-gib is 1e+09, more than"),
        (["ema", "--cluster", "pbs", "x"], "--cluster pbs: expected slurm DIR"),
        (["run-job", "jobs.json"], "expected JOBS.json INDEX"),
        (["run-job", "missing.json", "0"], "missing.json: No such file"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(main, model, tmp_path, words, message, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.chdir(tmp_path)
    common = [] if words[0] == "run-job" else [f"--models={model}", "--output-dir=out"]
    code, out, err = main(*words, *common)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and message in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("no-such-folder", "nor a Hugging Face Hub id"), ("empty", "has no config.json"), (None, "model.path is missing")],
)
def test_a_missing_model_is_one_line_before_anything_starts(main, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, out, err = main("ema", "--output-dir=out", "--devices=cpu:1", *([f"--models={name}"] if name else []))
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and message in err, err
    assert not (tmp_path / "out").exists()


def test_a_common_configuration_with_mechanisms_of_its_own_is_named(main, tmp_path):
    code, _, err = main("clip", "--config", str(REPOSITORY / "configs" / "quickstart.yaml"), "--dry-run")
    assert code == 2 and "clip with --config" in err and len(err.splitlines()) == 1


def test_planning_loads_no_jax():
    program = (
        "import sys; from pathlib import Path; from unisd_jax.experiments import command\n"
        f"command.main(['ema', '--models=a/b', '--dry-run'], Path({str(PROGRAM)!r}))\n"
        "print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
