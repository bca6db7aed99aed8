"""make_claims.py on a tiny model: what is trained and scored, stopped and gone on with, and the page of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from unisd_jax.claims import command, runs, timing, weights
from unisd_jax.claims.runs import Run, Settings
from unisd_jax.claims.teacher import target_changes
from unisd_jax.claims.variants import CLEAN, NOISES, write_variants
from unisd_jax.errors import UserError
from unisd_jax.testing import tiny_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = (
    "--train.steps=3", "--data.test_limit=4", "--data.max_prompt_length=1024", "--rollout.max_completion_length=32",
    "--evaluation.max_completion_length=8", "--evaluation.drift_tokens=4", "--model.lora.rank=2",
    "--optimizer.learning_rate=0.01", "--teacher.contexts.induction_max_length=8",
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("claims")]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims")
    tiny_checkpoint(folder / "tiny", max_position=2048)
    small = (*SMALL, f"--teacher.cache_dir={folder / 'cache'}", "--train.compilation_cache=null")
    return Settings(
        folder / "out", REPOSITORY / "configs" / "claims.yaml", REPOSITORY / "configs" / "modes", str(folder / "tiny"),
        (0, 1), small,
    )  # fmt: skip


@pytest.fixture(scope="module")
def variants(settings):
    return write_variants(settings.out / "data", rate=0.4)


@pytest.fixture(scope="module")
def ema(settings, variants):
    """A finished run whose teacher is an EMA."""
    run = Run(CLEAN, "ema", 0)
    command.train_one(settings, variants, run)
    return run


def test_a_run_is_trained_and_read(settings, ema):
    found = runs.read(ema, settings)
    assert len(found.grade("exact")) == len(found.grade("exact", at="before")) == 4
    assert len(found.metric("teacher_motion")) == 3
    targets = target_changes(runs.run_dir(ema, settings))
    assert len(targets.steps) == 3 and min(targets.steps) > 0
    assert max(targets.steps) < targets.net <= sum(targets.steps) * (1 + 1e-5)


def test_only_what_is_read_later_is_kept(settings, variants, ema, tmp_path):
    command.train_one(settings, variants, Run(CLEAN, "plain", 0))
    command.train_one(settings, variants, Run(CLEAN, "sft", 0))
    plain, sft, moved = (runs.run_dir(ema._replace(method=name), settings) for name in ("plain", "sft", "ema"))
    assert (plain / "hf").is_dir() and not (sft / "hf").exists() and not (moved / "hf").exists()
    assert (moved / "checkpoints").is_dir() and not (plain / "checkpoints").exists()
    damaged = shutil.copytree(moved, tmp_path / "ema-s0")
    shutil.rmtree(damaged / "checkpoints" / "2")
    with pytest.raises(UserError, match="has no checkpoint of step 2; it has .1, 3."):
        target_changes(damaged)


def test_updates_are_timed_in_turns(settings, monkeypatch):
    few = {name: runs.TIMED[name] for name in ("sft", "plain")}
    monkeypatch.setattr(timing, "TIMED", few)
    found = timing.step_seconds(settings, 2)
    assert set(found) == set(few) and all(len(seconds) == 2 and min(seconds) > 0 for seconds in found.values())


def test_views_are_scored_clean_and_spoilt(settings, variants):
    found = weights.score(settings, settings.out / "data", seed=0, items=5, student=None)
    assert found.mask.shape[0] == 5 and set(found.views) == {weights.CLEAN, *NOISES}
    for noise in NOISES:
        assert found.views[noise].shape == (3, *found.mask.shape)
        assert (np.abs(found.views[noise] - found.views[weights.CLEAN])[:, found.mask] > 0).mean() > 0.5
    assert (found.right != found.wrong)[found.mask].any() and (found.right[~found.mask] == 0).all()
    again = weights.score(settings, settings.out / "data", seed=0, items=5, student=None)
    assert np.array_equal(found.views[weights.CLEAN], again.views[weights.CLEAN])


@pytest.mark.parametrize("source", command.SOURCES)
def test_gold_replies_are_scored_under_each_source(settings, variants, source):
    found = weights.gold_logps(settings, seed=0, items=4, options=command.SOURCES[source])
    assert found.shape == (4,) and (found < 0).all()


@pytest.mark.timeout(1500)
def test_the_command_stops_goes_on_and_writes_the_page(settings, tmp_path):
    page = tmp_path / "page.md"
    words = [
        sys.executable, "scripts/make_claims.py", "--model", settings.model, "--out", str(tmp_path / "out"),
        "--page", str(page), "--seeds", "0,1", "--jobs", "2", "--scored", "4", "--rounds", "2", *settings.options[:-1],
        f"--train.compilation_cache={tmp_path / 'compiled'}",
    ]  # fmt: skip
    first = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    made = tmp_path / "out" / "made"
    deadline = time.monotonic() + 300
    while not (made.is_dir() and len(list(made.glob("*.json"))) >= 3):
        assert first.poll() is None and time.monotonic() < deadline, first.stdout.read()
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 130 and "the same command continues" in said, said
    kept = {path.name: path.read_bytes() for path in made.glob("*.json")}
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=840, env=os.environ)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(rf"^{len(kept)} of \d+ are there already", done.stdout), done.stdout[:500]
    assert all((made / name).read_bytes() == content for name, content in kept.items())
    text = page.read_text()
    numbers = {line.split("|")[1].strip() for line in text.splitlines() if re.match(r"\| \d", line)}
    assert {"1", "2", "3", "4", "5", "6", "9", "10", "13", "15"} <= numbers
    record = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert {claim["number"] for claim in record["claims"]} == numbers
    again = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and len(list(made.glob("*.json"))) == int(again.stdout.split()[0])
