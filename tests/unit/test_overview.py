"""The report on many runs: what it averages and what not, from run directories that the test makes."""

import fcntl
import functools
import importlib.util
import json
import os
import re
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from unisd_jax.config import load_config, to_dict
from unisd_jax.errors import UserError
from unisd_jax.eval.statistics import paired_bootstrap, paired_seeds_interval, seeds_interval, wilson_interval
from unisd_jax.experiments.recipes import OFF
from unisd_jax.experiments.state import Manifest
from unisd_jax.overview import charts, details, tables
from unisd_jax.overview.blocks import Cell, Charts, Table
from unisd_jax.overview.groups import Study, group
from unisd_jax.overview.page import make_report, report
from unisd_jax.overview.reading import read_all
from unisd_jax.overview.svg import ticks

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = "models/tiny"
N = 80
BASE = np.random.default_rng(1).binomial(1, 0.2, N)
RESOURCES = {
    "phases": {
        "setup": {"seconds": 4.0, "prompt_tokens": 0, "completion_tokens": 0},
        "rollout": {"seconds": 90.0, "prompt_tokens": 20_000, "completion_tokens": 5_000},
        "update": {"seconds": 90.0, "prompt_tokens": 60_000, "completion_tokens": 15_000},
    },
    "seconds": 200.0,
    "devices": 2,
    "device": "cpu",
    "peak_memory_gib": 4.25,
    "peak_device_memory_gib": None,
    "energy_kwh": 0.0021,
    "energy_source": "estimate",
    "kwh_per_million_tokens": 0.02,
}
ATTACK = (
    '</dd></dl><script>alert("x")</script><img src="https://example.org/x.png" onerror=alert(1)>&amp;\x1b[31m\ud800'
)


# --- Run directories ---


@functools.cache
def config_text(mode: str, overrides: tuple[str, ...]) -> str:
    fixed = (f"--model.path={MODEL}", "--train.steps=20")
    tree = to_dict(load_config(REPOSITORY / "configs" / "modes" / f"{mode}.yaml", (*fixed, *overrides)))
    return yaml.safe_dump(tree, sort_keys=False)


def make_run(
    folder: Path, mode="ema", seed=0, *, overrides=(), leave_out=(), steps=20, after=0.5, graded=None, **changes
) -> Path:
    """A finished run directory, without the files in `leave_out`, with `changes` to its result.

    Where `graded` has the grades after training, it keeps these and those before, which are BASE.
    """
    if graded is not None:
        after, changes = float(np.mean(graded)), {"before": float(BASE.mean())} | changes
    random = np.random.default_rng((seed, *mode.encode()))
    folder.mkdir(parents=True)
    decay = (0.2 + random.random()) * np.exp(-np.arange(1, steps + 1) / (steps / 3)) + random.normal(0, 0.03, steps)
    records = [
        {"step": step, "loss": 0.4 + value, "divergence": 0.3 + value, "entropy": 1 + value, "completion_length": 9.0}
        for step, value in enumerate(decay.tolist(), start=1)
    ]
    for record in records[4::5]:
        record |= {"eval_exact": 0.1 + record["step"] / steps / 2, "eval_exact_low": 0.05, "eval_exact_high": 0.7}
    result = {
        "name": folder.name, "mode": mode, "model": MODEL, "seed": seed, "steps": steps, "items": N, "before": 0.2,
        "after": after, "gain": after - 0.2, "gain_interval": [after - 0.3, after - 0.1], "drift": 0.02 + seed / 1000,
        "seconds": {"total": 204.0}, "resources": RESOURCES, "versions": {"python": "3.11", "jax": "0.10.2"},
        "device": "1 x cpu (cpu), 2 CPU cores", "commit": "0123456789abcdef",
    } | changes  # fmt: skip
    sample = {"id": "q0", "prompt": "2+2?", "gold": "4", "before": "Let me think", "after": "4"}
    sample |= {"exact_before": 0.0, "exact_after": 1.0}
    files = {
        "config.yaml": config_text(mode, tuple(overrides)).replace("seed: 0\n", f"seed: {seed}\n", 1),
        "metrics.jsonl": "".join(json.dumps(record) + "\n" for record in records),
        "result.json": json.dumps(result),
        "samples.jsonl": json.dumps(sample) + "\n",
    }
    if graded is not None:
        files |= {"before.json": evaluation(BASE), "after.json": evaluation(graded)}
    for name, text in files.items():
        if name not in leave_out:
            (folder / name).write_text(text)
    return folder


def evaluation(own) -> str:
    """What before.json and after.json hold of these grades."""
    found = {"replies": ["?"] * len(own), "grades": [{"exact": float(right), "form": 1.0} for right in own]}
    return json.dumps(found | {"means": {"exact": float(np.mean(own))}, "reply_tokens": [1] * len(own)})


def grades(seed: int, share: float, items: int = N) -> np.ndarray:
    """What a trained model has right: what the base had and more of the rest."""
    return np.where(np.random.default_rng((seed, items)).random(items) < share, 1, np.resize(BASE, items))


def make_evaluation(
    folder: Path, own, base=None, /, *, model=None, task="short_answers", released=None, **changes
) -> Path:
    """A finished evaluation below a run, of its checkpoint unless `model` says otherwise."""
    place = folder / "evaluation" / f"{task}-{len(list(folder.glob('evaluation/*')))}"
    place.mkdir(parents=True)
    lines = []
    for number, right in enumerate(np.asarray(own, float)):
        line = {"id": f"q{number}", "item": f"hash{number}", "grades": {"exact": right}}
        line["grades"] |= {} if released is None else {"released_exact": float(released[number])}
        if base is not None:
            line["base_replies"] = [{"grades": {"exact": float(base[number])}, "released": None}]
        lines.append(json.dumps(line) + "\n")
    (place / "items.jsonl").write_text("".join(lines))
    summary = {"task": task, "items": len(own), "samples": 1, "model": model or f"somewhere/{folder.name}/hf"}
    summary |= {"adapter": None, "metrics": {"exact": ends(own)}, "identity": {"items": f"{task} {len(own)}"}}
    summary["ppl_fit"] = {"mean": 3.1, "low": 2.9, "high": 3.4}
    if released is not None:
        summary["released"] = {"metrics": {"exact": ends(released)}}
    if base is not None:
        gain = paired_bootstrap(base, own)._asdict()
        summary |= {"before": {"metrics": {"exact": ends(base)}}, "gain": {"exact": gain}}
        summary["retention"] = {"jsd": {"mean": 0.03, "low": 0.028, "high": 0.033}, "ppl_ret": {"mean": 1.2}}
    (place / "summary.json").write_text(json.dumps(summary | changes))
    return place


def ends(scores) -> dict:
    return wilson_interval(int(np.sum(scores)), len(scores))._asdict()


def study_of(*folders: Path) -> Study:
    return group(read_all(folders))


def table_of(blocks, caption: str) -> Table:
    (found,) = [block for block in blocks if isinstance(block, Table) and caption in block.caption]
    return found


def cells(found: Table) -> dict[str, list[Cell]]:
    """The rows by the text of their first cell, notes of that in parentheses."""
    as_cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in found.rows]
    return {" ".join([row[0].text, *(f"({note})" for note in row[0].notes)]): row[1:] for row in as_cells}


def shown(mean: float, low: float, high: float) -> tuple[str, str]:
    return f"{100 * mean:.1f}", f"[{100 * low:.1f}, {100 * high:.1f}]"


def warned(study: Study) -> str:
    return " | ".join(f"{problem.where}: {problem.what}" for problem in study.problems)


# --- A demonstration with everything in it, also what a browser is shown ---


def demonstration(root: Path, seeds: int = 3, items: int = N) -> Path:
    """Six modes and a sweep, seeds of each, evaluations on two tasks; runs that stopped, files that are damaged."""
    shares = {"sft": 0.35, "sdft": 0.4, "plain": 0.42, "agreement_tok_retrieval": 0.5, "ema": 0.52, "unisd_star": 0.75}
    base = np.resize(BASE, items)
    for mode, share in shares.items():
        for seed in range(seeds):
            folder = make_run(root / "runs" / f"{mode}-{seed}", mode, seed, steps=20, after=0.2 + share / 2)
            for task in ("gsm8k", "scienceqa"):
                own = grades(seed * 7 + len(mode) + len(task), share, items)
                jsd = {"mean": 0.05 * share + 0.004 * seed, "low": 0.05 * share, "high": 0.05 * share + 0.012}
                retention = {"jsd": jsd, "ppl_ret": {"mean": 1.2, "low": 1.1, "high": 1.3}}
                released = np.maximum(own, grades(99, 0.2, items)) if task == "scienceqa" else None
                make_evaluation(folder, own, base, task=task, released=released, retention=retention)
    for k in (3, 5, 7):
        for gamma in (0.01, 0.1, 1.0):
            options = (
                f"--teacher.contexts.num_auxiliary_contexts={k}",
                f"--objective.agreement.gamma_agreement={gamma}",
            )
            for seed in range(seeds):
                name = root / "sweep" / f"k{k}-gamma{gamma}-{seed}"
                after = round(N * (0.4 + 0.03 * k - 0.05 * gamma + 0.01 * seed)) / N
                make_run(name, "agreement_seq_random", seed, overrides=options, after=after)
    make_run(root / "broken" / "stopped", "clip", 0, leave_out=("result.json", "samples.jsonl"), steps=12)
    damaged = make_run(root / "broken" / "damaged", "match_joint", 0)
    (damaged / "result.json").write_text('{"mode": "match_')
    (damaged / "samples.jsonl").write_bytes(b"\xff\xfe\n")
    attack = {"id": ATTACK, "prompt": ATTACK, "gold": "```\n# no heading", "before": ATTACK, "after": "שלום ‮ abc"}
    (root / "runs" / "sft-0" / "samples.jsonl").write_text(json.dumps(attack) + "\n")
    return root


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The report of the demonstration; its folder."""
    root = demonstration(tmp_path_factory.mktemp("demo"))
    make_report([root], root / "out" / "report.html")
    return root


# --- Averages and intervals ---


def test_seeds_and_items_are_resampled_together_where_grades_are_there(tmp_path):
    own = np.stack([grades(seed, 0.4) for seed in range(3)])
    for seed in range(3):
        make_evaluation(make_run(tmp_path / f"ema-{seed}", seed=seed), own[seed], BASE)
    study = study_of(tmp_path)
    row = cells(table_of(tables.results(study), "Exact match"))["ema"]
    order = sorted(range(N), key=str)  # that of the items' ids, in which they are resampled
    mean, interval = shown(*seeds_interval(own[:, order]))
    assert (row[0].text, row[0].notes) == (mean, (interval, f"3 × {N}, s+i"))
    row = cells(table_of(tables.gains(study), "Before and after"))["ema"]
    mean, low, high = (100 * value for value in paired_seeds_interval(BASE[None, order], own[:, order]))
    assert [cell.text for cell in row[:2]] == ["short_answers", f"{100 * BASE.mean():.1f}"]
    assert row[3] == Cell(f"{mean:+.1f}", (f"[{low:+.1f}, {high:+.1f}]", f"3 × {N}, s+i"))


def graded_runs(folder: Path, mode="ema", share=0.4, seeds=3, **options) -> list[Path]:
    """Trainings that have kept the grades of their test items."""
    makes = ((seed, grades(seed, share)) for seed in range(seeds))
    return [make_run(folder / f"{mode}-{seed}", mode, seed, graded=own, **options) for seed, own in makes]


def test_seeds_and_items_of_trainings_are_resampled_together(tmp_path):
    graded_runs(tmp_path)
    own, study = np.stack([grades(seed, 0.4) for seed in range(3)]), study_of(tmp_path)
    rows = cells(table_of(tables.results(study), "Exact match"))
    mean, interval = shown(*seeds_interval(own))
    assert (rows["ema"][0].text, rows["ema"][0].notes) == (mean, (interval, f"3 × {N}, s+i"))
    assert rows["base model"][0].notes == (shown(*wilson_interval(int(BASE.sum()), N))[1], f"1 × {N}, i")
    gain = cells(table_of(tables.gains(study), "Before and after"))["ema"][3]
    mean, low, high = (100 * value for value in paired_seeds_interval(BASE[None], own))
    assert gain == Cell(f"{mean:+.1f}", (f"[{low:+.1f}, {high:+.1f}]", f"3 × {N}, s+i"))
    assert warned(study) == ""


def test_one_training_without_grades_leaves_an_interval_over_seeds(tmp_path):
    (graded_runs(tmp_path)[1] / "after.json").unlink()
    study = study_of(tmp_path)
    assert cells(table_of(tables.results(study), "Exact match"))["ema"][0].notes[1] == f"3 × {N}, s"
    assert warned(study) == ""  # an earlier version, no damage


def test_grades_that_are_all_alike_have_no_interval(tmp_path):
    for seed in range(3):
        make_run(tmp_path / f"ema-{seed}", seed=seed, graded=np.zeros(N))
    row = cells(table_of(tables.results(study_of(tmp_path)), "Exact match"))["ema"]
    assert row[0] == Cell("0.0", (f"3 × {N}, no interval",))


DAMAGED_GRADES = {
    b"": "not JSON",
    b"[1, 2]": "a JSON list, expected an object",
    b'{"grades": 3}': f"0 graded items of 0, expected {N}",
    evaluation(BASE[1:]).encode(): f"{N - 1} graded items of {N - 1}, expected {N}",
    evaluation(BASE).replace("0.0", "NaN", 1).encode(): f"{N - 1} graded items of {N}, expected {N}",
    evaluation(BASE).replace('{"exact": 0.0, "form": 1.0}', "[]", 1).encode(): f"{N - 1} graded items of {N}",
    evaluation(1 - BASE).encode(): f"a mean of {1 - BASE.mean():.4f}, but the result says",
}


@pytest.mark.parametrize("name", ["before.json", "after.json"])
@pytest.mark.parametrize("content", DAMAGED_GRADES)
def test_damaged_grades_are_named_and_not_used(tmp_path, name, content):
    damaged = graded_runs(tmp_path)[1] / name
    damaged.write_bytes(content)
    study = study_of(tmp_path)
    row = cells(table_of(tables.results(study), "Exact match"))["ema"]
    assert row[0].notes[1] == f"3 × {N}, s"
    assert f"{damaged}: {DAMAGED_GRADES[content]}" in warned(study) and len(study.problems) == 1


def test_grades_after_training_need_those_before(tmp_path):
    (graded_runs(tmp_path)[1] / "before.json").unlink()
    study = study_of(tmp_path)
    assert cells(table_of(tables.results(study), "Exact match"))["ema"][0].notes[1] == f"3 × {N}, s"
    assert f"before.json: 0 graded items of 0, expected {N}" in warned(study)


def test_without_grades_the_interval_is_over_seeds_and_says_so(tmp_path):
    for seed, after in enumerate((0.5, 0.55, 0.6)):
        make_run(tmp_path / f"ema-{seed}", seed=seed, after=after)
    row = cells(table_of(tables.results(study_of(tmp_path)), "Exact match"))["ema"]
    arm = 4.302652729696142 * 0.05 / np.sqrt(3)  # Student's t with two degrees of freedom
    assert (row[0].text, row[0].notes) == ("55.0", (shown(0, 0.55 - arm, 0.55 + arm)[1], f"3 × {N}, s"))


def test_seeds_that_all_came_to_the_same_have_no_interval(tmp_path):
    for seed in range(3):
        make_run(tmp_path / f"ema-{seed}", seed=seed)
    row = cells(table_of(tables.results(study_of(tmp_path)), "Exact match"))["ema"]
    assert row[0] == Cell("50.0", (f"3 × {N}, no interval",))


def test_one_seed_has_the_interval_over_items(tmp_path):
    make_run(tmp_path / "ema")
    rows = cells(table_of(tables.results(study_of(tmp_path)), "Exact match"))
    for name, share in (("base model", 0.2), ("ema", 0.5)):
        mean, interval = shown(*wilson_interval(round(share * N), N))
        assert rows[name][0] == Cell(mean, (interval, f"1 × {N}, i"))


def test_damaged_items_leave_an_interval_over_seeds(tmp_path):
    for seed in range(3):
        place = make_evaluation(make_run(tmp_path / f"ema-{seed}", seed=seed), grades(seed, 0.4), BASE)
    (place / "items.jsonl").write_text("{")
    study = study_of(tmp_path)
    row = cells(table_of(tables.results(study), "Exact match"))["ema"]
    assert row[0].notes[1] == f"3 × {N}, s"
    assert "0 readable items, expected 80: intervals are over seeds only" in warned(study)


def test_the_base_has_a_row_of_its_own_evaluation(tmp_path):
    folder = make_run(tmp_path / "ema")
    own = grades(0, 0.4)
    make_evaluation(folder, own)
    make_evaluation(folder, BASE, model=MODEL)
    study = study_of(tmp_path)
    rows = cells(table_of(tables.results(study), "Exact match"))
    assert rows["base model"][0].text == f"{100 * BASE.mean():.1f}"
    gain = cells(table_of(tables.gains(study), "Before and after"))["ema"][3]
    assert gain.text == f"{100 * (own.mean() - BASE.mean()):+.1f}" and gain.notes[1] == f"1 × {N}, i"


def test_both_scorers_stand_side_by_side(tmp_path):
    released = np.maximum(grades(0, 0.4), grades(1, 0.3))
    make_evaluation(make_run(tmp_path / "ema"), grades(0, 0.4), BASE, released=released)
    row = cells(table_of(tables.scorers(study_of(tmp_path)), "both scorers"))["ema"]
    assert [cell.text for cell in row] == [f"{100 * scores.mean():.1f}" for scores in (grades(0, 0.4), released)]


def test_a_gain_over_another_model_stays_apart(tmp_path):
    """`measure.base` of one run is not the model that the others began with."""
    other = np.where(np.arange(N) % 10 < 6, 1, 0)
    for mode, base, path in (("sft", BASE, MODEL), ("ema", other, "models/another")):
        make_evaluation(make_run(tmp_path / mode, mode), grades(1, 0.5), base, base=path)
    study = study_of(tmp_path)
    rows = cells(table_of(tables.gains(study), "Before and after"))
    told = {mode: [cell.text for cell in row[:2]] for mode, row in rows.items()}
    assert told == {
        "sft": ["short_answers", f"{100 * BASE.mean():.1f}"],
        "ema": ["short_answers compared with another", "60.0"],
    }
    results = cells(table_of(tables.results(study), "Exact match"))
    assert [cell.text for cell in results["base model"]] == [f"{100 * BASE.mean():.1f}"]


def test_the_model_before_training_may_be_compared_with_by_another_path(tmp_path):
    makes = (("sft", f"./{MODEL}/", "w1"), ("ema", "/elsewhere/models/tiny", "w1"), ("clip", "/elsewhere/tiny", "w2"))
    for mode, path, weights in makes:
        identity = {"items": "same", "scores": {"base": {"weights": weights}}}
        make_evaluation(make_run(tmp_path / mode, mode), grades(1, 0.5), BASE, base=path, identity=identity)
    assert [column.base for column in study_of(tmp_path).columns] == ["", "/elsewhere/tiny"]


def test_before_a_training_that_goes_on_from_an_adapter_is_not_the_model(tmp_path):
    make_run(tmp_path / "a", "ema", before=0.4, overrides=("--model.trainable=lora", "--model.lora.start=sft/adapter"))
    make_run(tmp_path / "b", "sft", before=0.2)
    study = study_of(tmp_path)
    assert [ends.values["exact"].mean for ends in study.bases[MODEL].values()] == [0.2]
    rows = cells(table_of(tables.gains(study), "Before and after"))
    assert [rows[mode][1].text for mode in ("ema", "sft")] == ["40.0", "20.0"]


def test_scores_are_compared_whatever_their_gains_are_over(tmp_path):
    """Also where a run was compared with several models: it is one seed all the same."""
    sft, ema = make_run(tmp_path / "sft", "sft"), make_run(tmp_path / "ema", "ema")
    make_evaluation(sft, grades(1, 0.2), BASE)
    make_evaluation(sft, grades(1, 0.2), BASE, name="short-2", base="runs/warm-a/hf")
    make_evaluation(ema, grades(1, 0.9), BASE, base="runs/warm-b/hf")
    study = study_of(tmp_path)
    results = cells(table_of(tables.results(study), "Exact match"))
    assert [len(row) for row in results.values()] == [1, 1, 1] and results["ema"][0].best
    assert results["sft"][0].notes[1].startswith(f"1 × {N}")
    rows = table_of(tables.gains(study), "Before and after").rows
    assert [row[1].text if isinstance(row[1], Cell) else row[1] for row in rows][-3:] == [
        "short_answers", "short_answers compared with warm-a/hf", "short_answers compared with warm-b/hf"
    ]  # fmt: skip


def test_the_model_before_training_has_one_path_however_it_is_written(tmp_path):
    make_evaluation(make_run(tmp_path / "ema", "ema"), grades(1, 0.5), BASE, base=str(Path(MODEL).absolute()))
    assert [column.base for column in study_of(tmp_path).columns] == [""]


# --- The best of a column ---


def best(study: Study) -> list[str]:
    return [name for name, row in cells(table_of(tables.results(study), "Exact match")).items() if row[0].best]


@pytest.mark.parametrize(("share", "found"), [(0.9, ["ema"]), (0.42, [])])
def test_best_is_marked_only_above_chance(tmp_path, share, found):
    for seed in range(3):
        make_evaluation(make_run(tmp_path / f"ema-{seed}", seed=seed), grades(seed, share), BASE)
        make_evaluation(make_run(tmp_path / f"sft-{seed}", "sft", seed), grades(10 + seed, 0.4), BASE)
    assert best(study_of(tmp_path)) == found


def test_best_without_grades_needs_seeds_on_both_sides(tmp_path):
    for seed, after in enumerate((0.7, 0.71, 0.72)):
        make_run(tmp_path / f"ema-{seed}", seed=seed, after=after)
    make_run(tmp_path / "sft-0", "sft", 0, after=0.3)
    assert best(study_of(tmp_path)) == []
    make_run(tmp_path / "sft-1", "sft", 1, after=0.31)
    assert best(study_of(tmp_path)) == ["ema"]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, ["ema"]),
        ({"overrides": ("--data.train_limit=5", "--data.shuffle=false")}, ["ema"]),
        ({"overrides": ("--data.source=hub",)}, []),  # may be other items
    ],
)
def test_trainings_of_one_seed_are_compared_by_items_where_these_are_the_same(tmp_path, options, found):
    graded_runs(tmp_path, "ema", 0.9, seeds=1)
    graded_runs(tmp_path, "sft", 0.4, seeds=1, **options)
    study = study_of(tmp_path)
    assert len(study.columns) == 1 and best(study) == found


def test_trainings_of_unknown_settings_are_not_compared_by_items(tmp_path):
    graded_runs(tmp_path, "ema", 0.9, seeds=1, leave_out=("config.yaml",))
    graded_runs(tmp_path, "sft", 0.4, seeds=1, leave_out=("config.yaml",))
    study = study_of(tmp_path)
    assert len(study.columns) == 1 and best(study) == []


# --- What is not averaged ---


def test_other_settings_are_shown_apart_and_said(tmp_path):
    make_run(tmp_path / "a", seed=0, after=0.4)
    make_run(tmp_path / "b", seed=1, after=0.6, overrides=("--optimizer.learning_rate=0.001",))
    blocks = list(tables.results(study_of(tmp_path)))
    rows = cells(table_of(blocks, "Exact match"))
    assert rows["ema (learning_rate=2e-05)"][0].text == "40.0" and rows["ema (learning_rate=0.001)"][0].text == "60.0"
    assert "Runs of `ema` differ in more than the seed. They are not averaged together" in blocks[-1].text


def test_a_mode_trained_for_each_task_has_one_row(tmp_path):
    make_run(tmp_path / "a", after=0.4)
    make_run(tmp_path / "b", after=0.6, overrides=("--data.task=gsm8k", "--train.batch_size=8"))
    rows = cells(table_of(tables.results(study_of(tmp_path)), "Exact match"))
    assert [cell.text for cell in rows["ema"]] == ["60.0", "40.0"]  # gsm8k, short_answers


def test_trainings_on_one_task_with_other_data_have_rows_of_their_own(tmp_path):
    other = {"short_answers": 40, "gsm8k": 50}
    for task, items in other.items():
        for name, limit, size, after in (("few", 100, items, 0.3), ("many", 5000, N, 0.5)):
            options = (f"--data.task={task}", f"--data.train_limit={limit}", f"--train.steps={limit}")
            options += (f"--data.test_limit={size}",)
            make_run(tmp_path / f"{name}-{task}", overrides=options, after=after, items=size)
    rows = cells(table_of(tables.results(study_of(tmp_path)), "Exact match"))
    assert [[cell.text for cell in row] for row in list(rows.values())[1:]] == [
        ["30.0", "not measured", "30.0", "not measured"], ["not measured", "50.0", "not measured", "50.0"],
    ]  # fmt: skip
    few, many = list(rows)[1:]
    assert all(f"task={task}, train_limit=100" in few and f"task={task}, train_limit=5000" in many for task in other)


def test_custom_modes_are_named_and_drawn_by_what_is_on(tmp_path):
    for part in ("contrast", "matching"):
        options = [f"--{name}={json.dumps(value)}" for name, value in OFF[part].items()]
        folder = make_run(tmp_path / part, "unisd_star")
        (folder / "config.yaml").write_text(config_text("unisd_star", ("--mode=custom", *options)))
    study = study_of(tmp_path)
    names = ["custom ema_agreement_contrast", "custom ema_agreement_matching"]
    assert list(cells(table_of(tables.results(study), "Exact match")))[1:] == names
    styles = charts.mode_styles(study)
    assert len({styles[name] for name in names}) == 2


def test_notes_are_as_long_as_it_takes_to_tell_configurations_apart(tmp_path):
    options = ("--data.train_limit=9", "--data.test_limit=9", "--data.shuffle=false"), ("--optimizer.weight_decay=0.1",)
    for place, chosen in enumerate(((), options[0], options[1], (*options[0], "--rollout.temperature=0.5"))):
        make_run(tmp_path / str(place), overrides=chosen)
    notes = [one.note for one in study_of(tmp_path).groups]
    assert len(set(notes)) == 4 and all(note.count("=") == 5 for note in notes)


def test_runs_of_unknown_settings_have_names_of_their_own(tmp_path):
    for name in ("a", "b"):
        make_run(tmp_path / name, leave_out=("config.yaml",))
    rows = cells(table_of(tables.results(study_of(tmp_path)), "Exact match"))
    assert list(rows)[1:] == ["ema (settings of a unknown)", "ema (settings of b unknown)"]


def test_the_same_seed_twice_counts_once(tmp_path):
    make_run(tmp_path / "a", after=0.4)
    make_run(tmp_path / "copy", after=0.4)
    study = study_of(tmp_path)
    row = cells(table_of(tables.results(study), "Exact match"))["ema"]
    assert row[0].notes[1].startswith("1 ×") and "copy: the same configuration and seed as a" in warned(study)


def test_a_start_that_was_given_up_hides_no_result(tmp_path):
    make_run(tmp_path / "a", leave_out=("result.json", "samples.jsonl"), steps=3)
    make_evaluation(make_run(tmp_path / "b", leave_out=("result.json",)), grades(0, 0.4), BASE)
    assert [run.label for one in study_of(tmp_path).groups for run in one.runs] == ["b"]
    make_run(tmp_path / "c", after=0.4)
    study = study_of(tmp_path)
    assert cells(table_of(tables.results(study), "Exact match"))["ema"][0].text == "40.0"
    assert all(f"{name}: the same configuration and seed as c" in warned(study) for name in ("a", "b"))


def test_what_changes_no_number_keeps_no_runs_apart(tmp_path):
    make_run(tmp_path / "a", seed=0, after=0.4)
    make_run(tmp_path / "b", seed=1, after=0.6, overrides=("--logging.samples=2", "--checkpoint.every=7"))
    row = cells(table_of(tables.results(study_of(tmp_path)), "Exact match"))["ema"]
    assert row[0].text == "50.0" and row[0].notes[-1].startswith("2 ×")


def test_tests_of_other_items_are_columns_of_their_own(tmp_path):
    make_evaluation(make_run(tmp_path / "ema"), grades(0, 0.4), BASE)
    make_evaluation(make_run(tmp_path / "sft", "sft"), grades(0, 0.4)[:40], BASE[:40])
    found = table_of(tables.results(study_of(tmp_path)), "Exact match")
    assert found.headings[1:3] == ["short_answers, 40 items", "short_answers, 80 items"]
    assert cells(found)["ema"][0] == tables.MISSING and cells(found)["sft"][1] == tables.MISSING


def test_an_evaluation_of_something_else_is_left_out_and_named(tmp_path):
    folder = make_run(tmp_path / "ema")
    place = make_evaluation(folder, grades(0, 0.4), model="models/another")
    study = study_of(tmp_path)
    assert f"{place}: measures models/another, which is of no run in this report" in warned(study)
    assert [column.task for column in study.columns] == ["short_answers"]


# --- The other sections ---


def test_heat_maps_are_of_runs_that_differ_in_k_and_gamma_alone(demo):
    found = table_of(tables.sensitivity(study_of(demo)), "over K and gamma")
    assert found.headings == ["", "gamma = 0.01", "gamma = 0.1", "gamma = 1.0"]
    rows = cells(found)
    assert list(rows) == ["K = 3", "K = 5", "K = 7"]
    heats = [cell.heat for row in rows.values() for cell in row]
    assert max(heats) == rows["K = 7"][0].heat == 1 and min(heats) == rows["K = 3"][2].heat == 0


def test_cost_is_by_device_hour_with_the_source_of_the_energy(tmp_path):
    for seed in range(2):
        make_run(tmp_path / f"ema-{seed}", seed=seed)
    found = table_of(details.costs(study_of(tmp_path)), "Cost")
    row = {heading: cell for heading, cell in zip(found.headings[1:], cells(found)["ema"], strict=True)}
    # 100,000 tokens in 180 seconds on two devices
    assert row["tokens per device-hour (thousands)"].text == "1,000" and row["n"].text == "2"
    assert row["source"].text == "estimate" and row["export (s)"] == row["of a device (GiB)"] == tables.MISSING


def test_a_resumed_run_is_in_no_mean_of_seconds_and_energy(tmp_path):
    phases = {"setup": {"seconds": 9.0}, "rollout": {"seconds": 5.0}, "update": {"seconds": 5.0}}
    rest = RESOURCES | {"phases": phases, "seconds": 30.0, "energy_kwh": 0.0001, "peak_memory_gib": 6.25}
    for seed, resources in enumerate((RESOURCES, rest)):
        make_run(tmp_path / f"ema-{seed}", seed=seed, resources=resources, seconds={"training": 180.3, "total": 204.0})
    found = table_of(details.costs(study_of(tmp_path)), "Cost")
    row = {heading: cell for heading, cell in zip(found.headings[1:], cells(found)["ema"], strict=True)}
    assert row["n"] == Cell("2", ("1 resumed",))
    told = {"setup (s)": "4.0", "rollout (s)": "90.0", "update (s)": "90.0", "whole run (s)": "200.0"}
    for heading, text in (told | {"energy (kWh)": "0.0021", "kWh per million tokens": "0.02"}).items():
        assert row[heading] == Cell(text, ("of 1 only",)), heading
    assert row["peak memory (GiB)"] == Cell("5.25")


@pytest.mark.parametrize(("after", "found"), [(0, ()), (3, ("1 resumed",))])
def test_a_result_that_says_where_it_went_on_is_believed(tmp_path, after, found):
    """Whatever the seconds: reading the counters of many GPUs takes time between the phases."""
    make_run(tmp_path / "ema", seconds={"training": 500.0 * (after == 0), "total": 600.0}, continued_after=after)
    table = table_of(details.costs(study_of(tmp_path)), "Cost")
    row = dict(zip(table.headings[1:], cells(table)["ema"], strict=True))
    assert row["n"] == Cell("1", found)


def test_only_options_that_differ_are_listed(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", overrides=("--optimizer.learning_rate=0.001",))
    rows = cells(table_of(details.configurations(study_of(tmp_path)), "Options that differ"))
    assert {name: [cell.text for cell in row] for name, row in rows.items()} == {
        "seeds": ["0", "0"], "optimizer.learning_rate": ["`2e-05`", "`0.001`"],
    }  # fmt: skip


def test_runs_by_other_commits_are_told(tmp_path):
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=1, commit="f" * 40)
    warning, found = list(details.environments(study_of(tmp_path)))[1:]
    assert warning.warning and [row[2] for row in found.rows] == ["0123456789ab", "f" * 12]


def test_unfinished_runs_are_listed_with_what_they_lack(demo):
    rows = cells(table_of(details.directories(study_of(demo)), "Every run directory"))
    told = {name: (rows[name][3].text, rows[name][4].text) for name in ("stopped", "damaged", "ema-0")}
    assert told["stopped"] == ("unfinished: 12 of 20 steps", "result, samples")
    assert told["damaged"] == ("result.json is damaged", "result, samples")
    assert told["ema-0"] == ("finished", "nothing")


LOG = "failed, see `{folder}/jobs/ema/log.txt`"
STOPPED = "stopped, no process here holds its lock"


@pytest.mark.parametrize(
    ("recorded", "files", "told"),
    [
        ("failed", ("log.txt",), LOG),
        ("failed", (), "failed"),
        ("running", (), "running"),
        ("running", ("lock",), STOPPED),
        ("runs elsewhere", ("lock",), STOPPED),
        ("interrupted", ("lock",), "stopped"),
        ("waiting", (), "waiting"),
        ("not run", (), "not run"),
    ],
)
def test_an_unfinished_run_of_a_sweep_is_told_with_its_state(tmp_path, recorded, files, told):
    make_run(tmp_path / "ema", leave_out=("result.json",), steps=12)
    (tmp_path / "jobs" / "ema").mkdir(parents=True)
    for name in files:
        (tmp_path / "jobs" / "ema" / name).touch()
    Manifest(tmp_path).update("ema", state=recorded)
    study = study_of(tmp_path)
    row = cells(table_of(details.directories(study), "Every run directory"))["ema"]
    assert row[3].text == f"unfinished: 12 of 20 steps; {told.format(folder=tmp_path)}"
    (warning,) = [block.text for block in report(study) if getattr(block, "warning", False)]
    assert warning.startswith(f"Unfinished runs: 1{', 1 of them failed' * (recorded == 'failed')}.")


def test_a_run_whose_lock_is_held_is_running(tmp_path, monkeypatch):
    make_run(tmp_path / "ema", leave_out=("result.json",), steps=12)
    (tmp_path / "jobs" / "ema").mkdir(parents=True)
    Manifest(tmp_path).update("ema", state="running")
    monkeypatch.chdir(tmp_path / "ema")  # without a name, its sweep is found as well
    with open(tmp_path / "jobs" / "ema" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (run,) = study_of(Path()).runs
    assert details.state(run) == "unfinished: 12 of 20 steps; running"
    assert [run.job for run in study_of(Path()).runs] == [STOPPED]


def test_a_finished_run_is_finished_whatever_its_sweep_says(tmp_path):
    folder = make_run(tmp_path / "ema")
    Manifest(tmp_path).update("ema", state="failed")
    assert [(details.state(run), run.job) for run in study_of(folder).runs] == [("finished", "")]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff{", b"[" * 100_000, b"[]", b'{"jobs": [{"name": "ema", "state": "failed"}]}',
        b'{"jobs": {"ema": "failed"}}', b'{"jobs": {"ema": {"state": ["failed"]}}}', b'{"jobs": {"sft": {"state": 1}}}',
        b'{"jobs": {"ema": {"state": "finished"}}}',
    ],
)  # fmt: skip
def test_a_damaged_list_of_jobs_changes_nothing(tmp_path, content):
    make_run(tmp_path / "runs" / "ema", leave_out=("result.json",))
    make_report([tmp_path / "runs"], tmp_path / "without.html")
    (tmp_path / "runs" / "jobs.json").write_bytes(content)
    make_report([tmp_path / "runs"], tmp_path / "with.html")
    assert (tmp_path / "with.md").read_text() == (tmp_path / "without.md").read_text()


def test_a_metric_that_was_not_finite_is_told_and_breaks_the_line(tmp_path):
    folder = make_run(tmp_path / "ema")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[9] = '{"step": 10, "loss": null, "nonfinite": ["loss"]}'
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    study = study_of(tmp_path)
    rows = cells(table_of(details.directories(study), "Every run directory"))
    assert rows["ema"][4].text == "finite metrics at step 10"
    (curves,) = [block for block in report(study) if isinstance(block, Charts) and len(block.charts) > 1]
    assert re.search(r'fill="none" d="([^"]*)"', curves.charts[0].svg).group(1).count("M") == 2


ALL_FILES = ["config.yaml", "result.json", "metrics.jsonl", "samples.jsonl", "before.json", "after.json"]


@pytest.mark.parametrize("name", ALL_FILES)
@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff{", b"[1, 2]", b"[" * 100_000, b'{"gain": {}, "resources": 3, "step": 1}']
)
def test_a_damaged_file_never_stops_the_report(tmp_path, name, content):
    make_run(tmp_path / "runs" / "whole", seed=1, graded=grades(1, 0.4))
    (make_run(tmp_path / "runs" / "broken", graded=grades(0, 0.4)) / name).write_bytes(content)
    make_report([tmp_path / "runs"], tmp_path / "report.html")
    assert "whole" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("content", [b"", b'{"task": "gsm8k"}', b'{"task": 3, "metrics": {"exact": {"mean": NaN}}}'])
def test_a_damaged_evaluation_is_named(tmp_path, content):
    place = make_evaluation(make_run(tmp_path / "ema"), grades(0, 0.4), BASE)
    (place / "summary.json").write_bytes(content)
    assert str(place / "summary.json") in warned(study_of(tmp_path))


# --- The files ---


class Page(HTMLParser):
    """What a browser would find: tags, attributes, ids, and whether all that was opened is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.stack = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in ("meta", "path", "wbr"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(demo):
    page = Page((demo / "out" / "report.html").read_text(encoding="utf-8"))
    assert page.stack == [] and not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    links = [value for _, name, value in page.attributes if name in ("href", "src")]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert {link.removeprefix("#") for link in links} == set(ids) and len(set(ids)) == len(ids)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_every_chart_has_words(demo):
    text = (demo / "out" / "report.html").read_text(encoding="utf-8")
    charts = re.findall(r'<svg class="chart"[^>]*>(?:<title>.*?</title>)?', text)
    assert len(charts) > 8
    assert all(re.search(r'role="img" aria-label="[^"]+"><title>[^<]+</title>', chart) for chart in charts)


def test_what_a_model_said_stays_text(demo):
    page = (demo / "out" / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(" in page and "<script" not in page and "\x1b" not in page
    markdown = (demo / "out" / "report.md").read_text(encoding="utf-8")
    assert "````text\n```\n# no heading\n````" in markdown


def test_the_markdown_has_the_same_sections_and_numbers(demo):
    markdown = (demo / "out" / "report.md").read_text(encoding="utf-8")
    page = (demo / "out" / "report.html").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.*)$", markdown, flags=re.MULTILINE)
    assert sections == [re.sub("<.*", "", title).strip() for title in re.findall(r"<h2[^>]*>(.*?)</h2>", page)]
    intervals = re.findall(r"\[[+-]?\d+\.\d+, [+-]?\d+\.\d+\]", markdown)
    assert len(intervals) > 100 and all(interval in page for interval in intervals)


def test_a_report_on_nothing_measured_says_so_everywhere(tmp_path):
    make_run(tmp_path / "runs" / "young", leave_out=("result.json", "metrics.jsonl", "samples.jsonl"))
    make_report([tmp_path / "runs"], tmp_path / "report.html")
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.count("Not measured") >= 5 and "unfinished: 0 of 20 steps" in markdown


def test_evaluations_without_a_run_are_of_models(tmp_path):
    make_evaluation(tmp_path / "smollm2", BASE, model="models/tiny")
    rows = cells(table_of(tables.results(study_of(tmp_path)), "Exact match (%) of models/tiny"))
    assert rows["base model"][0].text == f"{100 * BASE.mean():.1f}"


# --- The command ---


@pytest.fixture(scope="module")
def script():
    path = REPOSITORY / "scripts" / "make_report.py"
    spec = importlib.util.spec_from_file_location("make_report", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_takes_runs_and_folders_of_runs(tmp_path, capsys, script):
    make_run(tmp_path / "some" / "deep" / "ema")
    one = make_run(tmp_path / "sft", "sft")
    out = tmp_path / "new" / "all.html"
    assert script.main([str(tmp_path / "some"), str(one), str(one), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"2 runs: {out}, {out.with_suffix('.md')}\n"
    assert out.exists() and out.with_suffix(".md").exists()


def test_a_folder_of_runs_holds_its_report_and_folders_of_jobs_hold_no_run(tmp_path, capsys, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/ema"))
    make_run(Path("runs/jobs/ema"), leave_out=("metrics.jsonl", "result.json", "samples.jsonl"))
    assert script.main(["runs"]) == 0 and script.main(["runs/ema"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert (first, second) == ("1 runs: runs/report.html, runs/report.md", "1 runs: report.html, report.md")


@pytest.mark.parametrize("name", ["config.yaml", "result.json", "metrics.jsonl", "summary.json", "items.jsonl"])
def test_the_report_of_a_run_or_an_evaluation_stays(tmp_path, capsys, monkeypatch, script, name):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/ema/evaluation/mbpp-1a2b")
    folder.mkdir(parents=True)
    (folder / name).write_text("{}")
    (folder / "report.md").write_text("its own")
    assert script.main([str(folder), "--out", str(folder / "report.html")]) == 2
    told = f"--out {folder}/report.html: {folder} is a run directory or an evaluation (it has {name})"
    assert told in capsys.readouterr().err
    assert script.main([str(folder)]) == 0 and Path("report.html").exists()
    assert (folder / "report.md").read_text() == "its own"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a directory: expected a run"),
        (["empty"], "no run in empty: expected directories with config.yaml"),
        (
            ["ema", "--out", "ema/report.html"],
            "ema is a run directory or an evaluation (it has config.yaml) with a report.md of its own",
        ),
        (["ema", "--out", "report.md"], "expected a name that ends with .html"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, script, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "ema")
    assert script.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "report.html").exists()


def test_names_that_are_not_enough_become_paths(tmp_path):
    for place in ("a", "b"):
        make_run(tmp_path / place / "ema", seed=ord(place))
    assert [run.label for run in read_all([tmp_path]).runs] == ["a/ema", "b/ema"]


def test_no_folder_is_an_error():
    with pytest.raises(UserError, match="is not a directory"):
        read_all([Path("nowhere")])


@pytest.mark.slow
def test_a_hundred_runs_take_less_than_twenty_seconds(tmp_path):
    for mode in ("sft", "plain", "ema", "clip", "unisd_star"):
        for seed in range(20):
            folder = make_run(tmp_path / "runs" / f"{mode}-{seed}", mode, seed, steps=500)
            for task in ("gsm8k", "scienceqa"):
                make_evaluation(folder, grades(seed, 0.4, 500), np.resize(BASE, 500), task=task)
    begun = time.process_time()  # others may use the machine as well
    make_report([tmp_path / "runs"], tmp_path / "report.html")
    assert time.process_time() - begun < 20


# --- The drawing ---


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.2, 0.2), (0, 0), (-0.013, 0.4), (1e-9, 2e-9), (3, 12345), (-5, -4), (0.19, np.nextafter(0.19, 1))],
)
def test_ticks_hold_the_values_and_are_few(low, high):
    found = ticks(low, high, 5)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and 2 <= len(set(found)) <= 8


def test_a_curve_that_stays_where_it_is_can_be_drawn(tmp_path):
    """The mean of three seeds' 0.19 is not 0.19 in the last bit."""
    records = "".join(f'{{"step": {step}, "eval_exact": 0.19}}\n' for step in (10, 20))
    for seed in range(3):
        (make_run(tmp_path / f"ema-{seed}", seed=seed) / "metrics.jsonl").write_text(records)
    (found,) = [block for block in charts.curves(study_of(tmp_path)) if isinstance(block, Charts)]
    assert [chart.numbers.rows[0][2:] for chart in found.charts] == [["0.19"] * 4]


def luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_colours_can_be_read_on_both_backgrounds():
    """WCAG's contrast: 4.5 for text, 3 for lines and points."""
    style = (REPOSITORY / "unisd_jax" / "overview" / "style.css").read_text()
    schemes = re.findall(r":root \{([^}]*)\}", style)
    assert len(schemes) == 2
    for scheme in schemes:
        found = dict(re.findall(r"--([\w-]+): (#\w+);", scheme))
        page = luminance({"#fff": "#ffffff"}.get(found["page"], found["page"]))
        for name, needed in {"ink": 4.5, "soft": 4.5, "link": 4.5, **{f"c{place}": 3 for place in range(8)}}.items():
            light, dark = max(page, luminance(found[name])), min(page, luminance(found[name]))
            assert (light + 0.05) / (dark + 0.05) >= needed, name


# --- A real browser ---

BROWSER = """
import json, os, sys

page, width, height, dark = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "dark"
os.environ["QT_QPA_PLATFORM"] = "offscreen"
flags = "--no-sandbox --disable-gpu" + (" --blink-settings=preferredColorScheme=0" if dark else "")
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = flags
try:
    from PyQt6 import QtCore, QtWidgets, QtWebEngineCore, QtWebEngineWidgets
except ImportError:
    from PySide6 import QtCore, QtWidgets, QtWebEngineCore, QtWebEngineWidgets

application = QtWidgets.QApplication(sys.argv[:1])
asked, view = [], QtWebEngineWidgets.QWebEngineView()


class Watch(QtWebEngineCore.QWebEngineUrlRequestInterceptor):
    def interceptRequest(self, info):
        asked.append(info.requestUrl().toString())


watch = Watch()
view.page().profile().setUrlRequestInterceptor(watch)
# Without this, a local page could not ask for anything, and that it does not would be no finding.
remote = QtWebEngineCore.QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls
view.settings().setAttribute(remote, True)
view.resize(width, height)
view.show()
PROGRAM = '''
document.querySelectorAll("details").forEach(found => found.open = true);
const overlaps = [];
for (const chart of document.querySelectorAll("svg.chart")) {
  const texts = [...chart.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
  texts.forEach(([a, one], place) => texts.slice(place + 1).forEach(([b, two]) => {
    const x = Math.min(one.right, two.right) - Math.max(one.left, two.left);
    const y = Math.min(one.bottom, two.bottom) - Math.max(one.top, two.top);
    if (x > 0.5 && y > 3) overlaps.push([a, b, x, y]);
  }));
}
const texts = [...document.querySelectorAll("svg.chart text")];
({overlaps, width: document.documentElement.clientWidth, needed: document.documentElement.scrollWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches, background: getComputedStyle(document.body).backgroundColor,
  smallest: Math.min(...texts.map(text => text.getBoundingClientRect().height))})
'''


def report(found):
    print(json.dumps(found | {"asked": asked}), flush=True)
    if len(sys.argv) > 5:
        view.grab().save(sys.argv[5])
    application.quit()


view.loadFinished.connect(lambda _: view.page().runJavaScript(PROGRAM, report))
view.load(QtCore.QUrl.fromLocalFile(page))
QtCore.QTimer.singleShot(60_000, application.quit)
application.exec()
"""


@pytest.fixture(scope="session")
def browser_python() -> str:
    """An interpreter with Qt's Chromium (`pip install PyQt6-WebEngine`); the test is skipped without."""
    found = os.environ.get("UNISD_BROWSER_PYTHON")
    if found is None:
        pytest.skip("no browser: set UNISD_BROWSER_PYTHON to an interpreter that has PyQt6-WebEngine")
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_in_a_browser_nothing_overlaps_or_overflows(demo, browser_python, width, height, scheme):
    page = str(demo / "out" / "report.html")
    command = [browser_python, "-c", BROWSER, page, str(width), str(height), scheme]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["overlaps"] == []
    assert found["needed"] <= found["width"]  # wide tables scroll in their own box, the page does not
    assert found["dark"] == (scheme == "dark") and found["smallest"] >= 9
    assert [url for url in found["asked"] if not url.endswith("report.html")] == []
    assert (found["background"] == "rgb(255, 255, 255)") == (scheme == "light")
