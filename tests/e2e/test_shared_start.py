"""The evaluation of the starting point: made once for all runs that start from it, again where anything differs."""

import json

import pytest
from run_checks import TASK_WITH_FORM, read_result

from unisd_jax import progress

# Its gold reply has the form.
SOUND = TASK_WITH_FORM.replace('"a", "a"', '"c", "c"')
DRIFTLESS = "--evaluation.drift_tokens=0"


@pytest.fixture
def evaluated(monkeypatch):
    """How many times test items were answered by weights that no update has touched."""
    versions, real = [], progress.evaluate_test

    def counted(experiment, params, version, phase, **words):
        versions.append(version)
        return real(experiment, params, version, phase, **words)

    monkeypatch.setattr(progress, "evaluate_test", counted)
    return versions


@pytest.fixture
def run(main, tmp_path):
    """`run(name, *overrides)` trains a step in a folder of its own, with one cache for all."""

    def one(name, *overrides):
        words = (f"--teacher.cache_dir={tmp_path / 'cache'}", "--train.steps=1", DRIFTLESS, *overrides)
        outcome = main(tmp_path / name, *words)
        assert outcome.code == 0, outcome.err
        return tmp_path / name / "run"

    return one


def test_another_mode_and_seed_read_what_the_first_has_made(run, evaluated):
    first, second = run("a"), run("b", "--mode=plain", "--teacher.ema=false", "--seed=3")
    assert evaluated == [0]
    assert (first / "before.json").read_bytes() == (second / "before.json").read_bytes()
    assert read_result(first)["before_metrics"] == read_result(second)["before_metrics"]
    grades = json.loads((second / "after.json").read_text())["grades"]
    assert len(grades) == read_result(second)["items"]
    assert read_result(second)["after"] == pytest.approx(sum(grade["exact"] for grade in grades) / len(grades))


@pytest.mark.parametrize("change", ["--data.test_limit=5", "--rollout.stop=tokenizer"])
def test_whatever_changes_the_replies_is_evaluated_anew(run, evaluated, change):
    run("a")
    run("b", change)
    assert evaluated == [0, 0]


def test_another_grader_is_evaluated_anew(run, evaluated, tmp_path):
    graders = {"one": SOUND, "two": SOUND.replace("text[-1:]", "text[:1]")}
    assert graders["one"] != graders["two"]
    for name, text in graders.items():
        (tmp_path / f"{name}.py").write_text(text)
        run(name, f"--data.task={tmp_path / f'{name}.py'}")
    assert evaluated == [0, 0]


def test_what_was_stopped_in_the_middle_is_made_by_the_next(run, main, evaluated, monkeypatch):
    real = progress.evaluate_test

    def stopped(*words, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(progress, "evaluate_test", stopped)
    with pytest.raises(AssertionError):
        run("a")
    monkeypatch.setattr(progress, "evaluate_test", real)
    run("b")
    assert evaluated == [0]


def test_items_that_cannot_be_told_apart_are_evaluated_for_each_run(run, evaluated, tmp_path):
    text = SOUND.replace('"c", "c")', '"c", "c", details={"limit": object()})')
    assert text != SOUND
    (tmp_path / "mine.py").write_text(text)
    for name in ("a", "b"):
        run(name, f"--data.task={tmp_path / 'mine.py'}")
    assert evaluated == [0, 0]
