"""Comparing evaluations: what is printed and written for invented ones, and which are refused."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from unisd_jax.eval.statistics import (
    mcnemar,
    mean_interval,
    minimum_detectable_difference,
    paired_bootstrap,
    paired_seeds_interval,
    seeds_interval,
    wilson_interval,
)

RANDOM = np.random.default_rng(0)
BEFORE = RANDOM.binomial(1, 0.3, 60)
AFTER = np.where(RANDOM.random(60) < 0.4, 1, BEFORE)


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[2] / "scripts" / "compare_evaluations.py"
    spec = importlib.util.spec_from_file_location("compare_evaluations", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(folder: Path, exact, *, order=None, hashes=None, grades=None, **summary) -> Path:
    """A finished evaluation of items with these scores."""
    folder.mkdir(parents=True)
    lines = [
        {"id": f"q{n}", "item": f"hash{n}", "reply": "x", "grades": {"exact": float(score), "letter": "B"}}
        for n, score in enumerate(exact)
    ]
    for number, change in (hashes or {}).items():
        lines[number]["item"] = change
    for number, change in (grades or {}).items():
        lines[number]["grades"] = change
    lines = [lines[n] for n in order] if order is not None else lines
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    details = {"task": "gsm8k", "model": "m", "name": folder.name, "items": len(lines), "samples": 1, "retention": None}
    (folder / "summary.json").write_text(json.dumps(details | summary))
    return folder


def compare(script, capsys, *arguments) -> str:
    status = script.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return out


def refused(script, capsys, *arguments) -> str:
    status = script.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and err.count("\n") == 1 and err.startswith("error: ")
    return err


def result(script, capsys, tmp_path, *arguments) -> dict:
    compare(script, capsys, *arguments, "--json", tmp_path / "out" / "result.json")
    return json.loads((tmp_path / "out" / "result.json").read_text())


def row(out: str, name: str) -> str:
    (line,) = [line for line in out.splitlines() if line.startswith(name)]
    return " ".join(line.split())


def test_one_seed_of_right_and_wrong(tmp_path, capsys, script):
    before, after = make(tmp_path / "base", BEFORE), make(tmp_path / "ema", AFTER, retention={"jsd": 0.01234})
    out = compare(script, capsys, before, after)
    alone, difference, test = wilson_interval(BEFORE.sum(), 60), paired_bootstrap(BEFORE, AFTER), mcnemar(BEFORE, AFTER)
    mean, low, high = (100 * value for value in alone)
    assert out.startswith("gsm8k, 60 items\n")
    assert row(out, "base") == f"base {mean:.1f} [{low:.1f}, {high:.1f}] wilson -"
    assert row(out, "ema   ").endswith("wilson 0.0123")
    mean, low, high = (100 * value for value in difference)
    detectable = 100 * minimum_detectable_difference(60, float(np.mean(BEFORE != AFTER)))
    assert test.p_value < 0.001 and test.lost == 0 and low > 0
    assert row(out, "ema - base") == (
        f"ema - base {mean:+.1f} [{low:+.1f}, {high:+.1f}] {test.gained} 0 <0.001 {detectable:.1f}"
    )
    assert "detectable: the smallest difference" in out and "note:" not in out


def test_json_has_the_numbers(tmp_path, capsys, script):
    folders = make(tmp_path / "base", BEFORE), make(tmp_path / "ema", AFTER)
    found = result(script, capsys, tmp_path, *folders)
    assert found["sides"][1] == {
        "name": "ema", "folders": [str(folders[1])], "seeds": 1, "samples": [1], "interval": "wilson", "drift": None,
        **wilson_interval(AFTER.sum(), 60)._asdict(),
    }  # fmt: skip
    assert found["comparisons"] == [
        {
            "before": "base", "after": "ema", **paired_bootstrap(BEFORE, AFTER)._asdict(),
            "interval": "bootstrap", "mcnemar": mcnemar(BEFORE, AFTER)._asdict(),
            "minimum_detectable": minimum_detectable_difference(60, float(np.mean(BEFORE != AFTER))),
        }
    ]  # fmt: skip
    assert (found["task"], found["metric"], found["items"], found["shares"]) == ("gsm8k", "exact", 60, True)


def test_items_are_matched_by_id_whatever_their_order(tmp_path, capsys, script):
    before, after = make(tmp_path / "base", BEFORE), make(tmp_path / "ema", AFTER)
    shuffled = make(tmp_path / "shuffled" / "ema", AFTER, order=RANDOM.permutation(60))
    assert compare(script, capsys, before, after) == compare(script, capsys, before, shuffled)


def test_shares_of_several_replies_have_no_mcnemar(tmp_path, capsys, script):
    shares = RANDOM.integers(0, 5, 60) / 4
    before, after = make(tmp_path / "base", BEFORE), make(tmp_path / "ema", shares, samples=4)
    found = result(script, capsys, tmp_path, before, after)
    assert found["sides"][1]["interval"] == "bootstrap"
    assert found["sides"][1]["low"] == mean_interval(shares).low
    assert found["comparisons"][0]["mcnemar"] is found["comparisons"][0]["minimum_detectable"] is None
    assert found["comparisons"][0]["high"] == paired_bootstrap(BEFORE, shares).high
    out = compare(script, capsys, before, after)
    assert row(out, "ema - base").endswith("] - - - -") and "detectable:" not in out
    assert "note: replies per item differ (base: 1, ema: 4); a score is the mean of an item's replies" in out


def test_several_seeds_are_drawn_as_well(tmp_path, capsys, script):
    tables = RANDOM.binomial(1, 0.3, (2, 60)), RANDOM.binomial(1, 0.6, (3, 60))
    sides = [
        [make(tmp_path / f"{name}{n}", scores, name=name, retention={"jsd": {"mean": n, "low": 0.0, "high": 9.0}})
         for n, scores in enumerate(table)]
        for name, table in zip(("base", "ema"), tables, strict=True)
    ]  # fmt: skip
    arguments = [",".join(map(str, side)) for side in sides]
    found = result(script, capsys, tmp_path, *arguments)
    before, after = found["sides"]
    assert (before["name"], after["name"]) == ("base (2 seeds)", "ema (3 seeds)")
    assert (before["drift"], after["drift"]) == (0.5, 1.0)
    assert [after[key] for key in ("mean", "low", "high")] == list(seeds_interval(tables[1]))
    (difference,) = found["comparisons"]
    assert [difference[key] for key in ("mean", "low", "high")] == list(paired_seeds_interval(*tables))
    assert difference["mcnemar"] is difference["minimum_detectable"] is None
    assert found["notes"] == ["so few seeds say little about others: intervals over them are too narrow"]
    one = result(script, capsys, tmp_path, sides[0][0], arguments[1])["comparisons"][0]
    assert (one["low"], one["high"]) == paired_seeds_interval(tables[0][:1], tables[1])[1:]
    one = result(script, capsys, tmp_path, arguments[0], sides[1][0])["comparisons"][0]
    assert (one["low"], one["high"]) == paired_seeds_interval(tables[0], tables[1][:1])[1:]


def test_a_seed_without_drift_leaves_none(tmp_path, capsys, script):
    seeds = [make(tmp_path / "a", AFTER, retention={"jsd": 0.1}), make(tmp_path / "b", AFTER)]
    found = result(script, capsys, tmp_path, make(tmp_path / "base", BEFORE), f"{seeds[0]},{seeds[1]}")
    assert found["sides"][1]["drift"] is None


def test_each_further_one_is_compared_with_the_first(tmp_path, capsys, script):
    folders = [make(tmp_path / name, scores) for name, scores in (("a", BEFORE), ("b", AFTER), ("c", 1 - BEFORE))]
    found = result(script, capsys, tmp_path, *folders)
    assert [(x["before"], x["after"]) for x in found["comparisons"]] == [("a", "b"), ("a", "c")]
    assert found["comparisons"][1]["mcnemar"] == mcnemar(BEFORE, 1 - BEFORE)._asdict()
    assert found["notes"] == ["2 comparisons: neither p nor intervals are corrected for their number"]


def test_configurations_of_one_name_are_told_apart_by_their_folders(tmp_path, capsys, script):
    folders = make(tmp_path / "one", BEFORE, name="ema"), make(tmp_path / "two", AFTER, name="ema")
    assert [side["name"] for side in result(script, capsys, tmp_path, *folders)["sides"]] == [*map(str, folders)]


def test_another_metric_that_is_no_share_is_not_printed_as_percent(tmp_path, capsys, script):
    numbers = {n: {"exact": 1.0, "tokens": 100.0 + n} for n in range(60)}
    before = make(tmp_path / "base", BEFORE, grades=numbers)
    after = make(tmp_path / "ema", AFTER, grades={n: {"tokens": 102.5 + n} for n in range(60)})
    out = compare(script, capsys, before, after, "--metric", "tokens")
    assert row(out, "base").startswith("base 129.5 [") and "(%)" not in out and "points," not in out
    assert row(out, "ema - base") == "ema - base +2.5 [+2.5, +2.5] - - - -"


def test_markdown(tmp_path, capsys, script):
    out = compare(script, capsys, make(tmp_path / "base", BEFORE), make(tmp_path / "ema", AFTER), "--markdown")
    assert (
        "| evaluation | exact (%), 95% interval | interval by | drift (nats) |\n| --- | --- | --- | --- |\n| base | "
        in out
    )
    assert "| difference | points, 95% interval | gained | lost | McNemar p | detectable (points) |\n" in out


# --- what is refused ---


def test_folders_without_a_finished_evaluation(tmp_path, capsys, script):
    base, other = make(tmp_path / "base", BEFORE), make(tmp_path / "ema", AFTER)
    assert "missing is not a directory" in refused(script, capsys, base, tmp_path / "missing")
    (other / "summary.json").unlink()
    assert "summary.json is not there: it comes at the end" in refused(script, capsys, base, other)
    (other / "summary.json").write_text("[]")
    assert "summary.json: expected a JSON object" in refused(script, capsys, base, other)
    (other / "summary.json").write_text('{"task": "gsm8k", "items": "60"}')
    assert "has no valid items, samples" in refused(script, capsys, base, other)
    (other / "summary.json").write_text('{"task": "gsm8k", "items": 61, "samples": 1}')
    assert "items.jsonl has 60 items, and summary.json says 61" in refused(script, capsys, base, other)
    (other / "items.jsonl").unlink()
    assert "items.jsonl: No such file or directory" in refused(script, capsys, base, other)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 61: expected a JSON object"),
        ('{"id": "q60", "item": "h"}', "line 61: expected an object with id, item and grades"),
        ('{"id": "q3", "item": "h", "grades": {}}', "line 61: the item 'q3' is there twice"),
    ],
)
def test_broken_items(tmp_path, capsys, script, line, message):
    base, other = make(tmp_path / "base", BEFORE), make(tmp_path / "ema", AFTER)
    with open(other / "items.jsonl", "a") as file:
        file.write(line)
    assert message in refused(script, capsys, base, other)


def test_other_items_are_counted(tmp_path, capsys, script):
    base = make(tmp_path / "base", BEFORE)
    changed = make(tmp_path / "changed", AFTER, hashes={3: "x", 5: "y"})
    assert "changed has other items than" in refused(script, capsys, base, changed)
    assert ": 2 of 60 ids" in refused(script, capsys, base, changed)
    fewer = make(tmp_path / "fewer", AFTER[:50], hashes={3: "x"})
    assert ": 11 of 60 ids" in refused(script, capsys, base, fewer)
    assert ": 11 of 60 ids" in refused(script, capsys, fewer, base)
    assert ": 2 of 60 ids" in refused(script, capsys, base, f"{base},{changed}")  # among the seeds of one side as well


def test_another_task(tmp_path, capsys, script):
    folders = make(tmp_path / "base", BEFORE), make(tmp_path / "ema", AFTER, task="mbpp")
    assert "is of the task mbpp and" in refused(script, capsys, *folders)


@pytest.mark.parametrize("value", [None, "yes", float("nan")])
def test_a_metric_that_not_all_items_have(tmp_path, capsys, script, value):
    base = make(tmp_path / "base", BEFORE)
    holes = make(tmp_path / "ema", AFTER, grades={7: {"exact": value}, 8: {"exact": 1.0, "form": 1.0}})
    assert "ema: 1 of its 60 items have no number for --metric exact; all have none" in refused(
        script, capsys, base, holes
    )
    assert "base: 60 of its 60 items have no number for --metric form; all have exact" in refused(
        script, capsys, base, holes, "--metric", "form"
    )


@pytest.mark.parametrize("side", ["", "a,,b", "a,a", "a,./a"])
def test_sides_that_name_a_folder_twice_or_none(capsys, script, side):
    with pytest.raises(SystemExit) as stopped:
        script.main(["base", side])
    assert stopped.value.code == 2 and "joined by commas" in capsys.readouterr().err


def test_what_was_measured_differently_is_said(tmp_path, capsys, script):
    def identity(weights="a", length=8, seed=0, base="b"):
        sampling = {"max_completion_length": length}
        generation = {"weights": weights, "sampling": sampling, "seed": seed}
        return {"generation": generation, "scores": {"base": {"weights": base}}, "graders": "g"}

    first = make(tmp_path / "a", BEFORE, identity=identity())
    seeds = [make(tmp_path / str(seed), AFTER, identity=identity("c", seed=seed)) for seed in (1, 2)]
    assert "not measured alike" not in compare(script, capsys, first, ",".join(map(str, seeds)))
    alone = make(tmp_path / "alone", AFTER, identity=identity("c") | {"scores": None})
    assert "not measured alike" not in compare(script, capsys, first, alone), "the drift says that it has no base"
    longer = make(tmp_path / "longer", AFTER, identity=identity("c", length=9, base="d"))
    out = compare(script, capsys, first, longer)
    assert (
        "note: not measured alike, these differ: generation.sampling.max_completion_length, scores.base.weights" in out
    )


def test_no_change_has_an_interval_with_a_width(tmp_path, capsys, script):
    found = result(script, capsys, tmp_path, make(tmp_path / "a", BEFORE), make(tmp_path / "b", BEFORE))
    (comparison,) = found["comparisons"]
    assert comparison["low"] < comparison["mean"] == 0 < comparison["high"] and comparison["interval"] == "newcombe"
