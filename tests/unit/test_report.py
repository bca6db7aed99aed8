"""The report and the comparison of runs, from run directories that are whole, partial, or something else."""

import importlib.util
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from unisd_jax.errors import UserError
from unisd_jax.metrics import MetricsWriter
from unisd_jax.report import read_result, write_report

RESULT = {
    "before": 0.02,
    "after": 0.54,
    "gain": 0.52,
    "gain_interval": [0.45, 0.585],
    "before_metrics": {"exact": 0.02, "form": 0.02, "contains": 0.84, "gold_logprob": -1.92},
    "changes": {"contains": {"mean": -0.34, "low": -0.42, "high": -0.26}},
    "after_metrics": {"exact": 0.54, "form": 0.98, "contains": 0.5, "gold_logprob": -0.3},
    "drift": 0.0123,
    "items": 200,
    "steps": 4,
    "seconds": {"total": 612.0, "training": 400.0, "evaluation": 180.0},
    "versions": {"jax": "0.10.2", "flax": "0.12.8"},
    "seed": 7,
    "mode": "ema",
    "model": "models/tiny",
    "config_hash": "0123abcd",
    "device": "cpu",
    "commit": None,
}
SAMPLE = {
    "id": "city-3",
    "prompt": "Where is the tower?\nReply in JSON.",
    "gold": '{"answer": "Paris"}',
    "before": "It is in **Paris** | see:\n```json\n{}\n```\n# not a heading of the report",
    "after": '{"answer": "Paris"}',
    "exact_before": 0.0,
    "exact_after": 1.0,
}
CONFIG = "teacher:\n  condition: gold\n  placement: turns\ntrain:\n  batch_size: 8\n"


def make_run(folder: Path, *, leave_out=(), **changes) -> Path:
    """A finished run directory, without the files in `leave_out`, with `changes` to its result."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {"step": step, "loss": 1.0 / step, "divergence": 0.5 / step, "entropy": 2.0, "completion_length": 9.5}
        | {"sampler_gap": 1e-6 * step, "sampler_gap_max": 1e-5 * step}
        for step in range(1, 5)
    ]
    files = {
        "metrics.jsonl": "".join(json.dumps(record) + "\n" for record in records),
        "result.json": json.dumps(RESULT | changes),
        "samples.jsonl": json.dumps(SAMPLE) + "\n",
        "config.yaml": CONFIG,
    }
    for name, text in files.items():
        if name not in leave_out:
            (folder / name).write_text(text)
    return folder


def section(report: str, heading: str) -> str:
    return report.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


# --- write_report ---


def test_whole_run(tmp_path):
    run_dir = make_run(tmp_path / "quick")
    path = write_report(run_dir)
    report = path.read_text()
    assert path == run_dir / "report.md"
    assert report.startswith("# quick\n\nExact match on 200 test items: **2.0%** before, **54.0%** after")
    assert "**+52.0 [+45.0, +58.5]** points" in report and "0.0123 nats" in report
    assert "| teacher.placement | turns |" in section(report, "What was run")
    assert "| seed | 7 |" in section(report, "What was run")
    assert "| contains | 0.84 | 0.5 | -0.34 [-0.42, -0.26] |" in section(report, "Before and after")
    assert "| gold_logprob | -1.92 | -0.3 | - |" in section(report, "Before and after"), (
        "no difference without interval"
    )
    assert "| metric | step 1 | step 4 | mean of the last 4 |" in section(report, "Training")
    assert "| loss | 1 | 0.25 | 0.5208 |" in section(report, "Training")
    assert "| jax | 0.10.2 |" in section(report, "Time and versions")
    assert "Not in this report" not in report


def test_plots_are_images_that_show_something_and_are_linked(tmp_path):
    run_dir = make_run(tmp_path / "quick")
    report = write_report(run_dir).read_text()
    plots = sorted(path.name for path in (run_dir / "plots").iterdir())
    assert plots == ["completions.png", "evaluation.png", "loss.png", "sampler_gap.png"]
    for name in plots:
        data = (run_dir / "plots" / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 5_000
        width, height = struct.unpack(">II", data[16:24])
        assert width > 400 and height > 300
        pixels = imread(io.BytesIO(data))[..., :3].reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 50
        assert f"(plots/{name})" in report


def test_the_bars_follow_the_result(tmp_path):
    images = []
    for number, changes in enumerate([{}, {"after": 0.9, "gain": 0.88}, {"gain_interval": [0.2, 0.8]}]):
        write_report(make_run(tmp_path / str(number), **changes))
        images.append((tmp_path / str(number) / "plots" / "evaluation.png").read_bytes())
    assert len(set(images)) == 3


def test_what_a_model_wrote_cannot_leave_its_block(tmp_path):
    report = write_report(make_run(tmp_path / "quick")).read_text()
    assert f"````text\n{SAMPLE['before']}\n````" in report
    assert "after (exact match 1):" in report and "before (exact match 0):" in report


def test_a_run_that_has_not_finished(tmp_path):
    run_dir = make_run(tmp_path / "quick", leave_out=("result.json", "samples.jsonl", "config.yaml"))
    report = write_report(run_dir).read_text()
    missing = section(report, "Not in this report")
    assert all(name in missing for name in ("result.json", "samples.jsonl", "config.yaml"))
    assert "drift" not in missing
    assert not (run_dir / "plots" / "evaluation.png").exists() and (run_dir / "plots" / "loss.png").exists()


@pytest.mark.parametrize("absent", [True, False], ids=["keys absent", "keys null"])
def test_a_run_without_evaluation(tmp_path, absent):
    run_dir = make_run(tmp_path / "quick", leave_out=("samples.jsonl",))
    keys = ("before", "after", "gain", "gain_interval", "before_metrics", "after_metrics", "drift", "items")
    result = {key: value for key, value in RESULT.items() if key not in keys}
    (run_dir / "result.json").write_text(json.dumps(result if absent else result | dict.fromkeys(keys)))
    report = write_report(run_dir).read_text()
    assert "evaluation.enabled=false" in section(report, "Not in this report")
    assert "Not measured." in section(report, "Before and after")
    assert "evaluation.png" not in report


def test_a_run_without_metrics_drift_or_interval(tmp_path):
    run_dir = make_run(tmp_path / "quick", leave_out=("metrics.jsonl",), drift=None, gain_interval=None)
    report = write_report(run_dir).read_text()
    missing = section(report, "Not in this report")
    assert "no step was logged" in missing and "evaluation.drift_tokens=0" in missing
    assert "**+52.0** points" in report
    assert [path.name for path in (run_dir / "plots").iterdir()] == ["evaluation.png"]


def test_metrics_that_were_not_logged_or_not_finite_are_named(tmp_path):
    run_dir = make_run(tmp_path / "quick", leave_out=("metrics.jsonl",))
    with MetricsWriter(run_dir, total_steps=2, name="quick") as writer:
        writer.log(1, {"loss": float("nan"), "entropy": 1.0, "gradient_norm": float("inf")})
        writer.log(2, {"loss": 0.5, "entropy": 1.0, "gradient_norm": float("inf")})
    report = write_report(run_dir).read_text()
    assert "the curve of sampler_gap: not logged" in section(report, "Not in this report")
    training = section(report, "Training")
    assert "| loss | - | 0.5 | 0.5 |" in training and "| gradient_norm | - | - | - |" in training
    assert "loss, gradient_norm at step 1; gradient_norm at step 2" in training
    assert sorted(path.name for path in (run_dir / "plots").iterdir()) == [
        "completions.png",
        "evaluation.png",
        "loss.png",
    ]


def test_only_some_samples_are_shown_and_their_number_is_said(tmp_path):
    run_dir = make_run(tmp_path / "quick")
    lines = [json.dumps(SAMPLE | {"id": f"item-{i}", "before": None, "exact_before": None}) for i in range(20)]
    (run_dir / "samples.jsonl").write_text("\n".join(lines))
    samples = section(write_report(run_dir).read_text(), "Samples")
    assert "8 of the 20" in samples and samples.count("### item-") == 8
    assert "before:\n\n```text\n(none)\n```" in samples


def test_the_same_run_gives_the_same_report(tmp_path):
    run_dir = make_run(tmp_path / "quick")
    first = write_report(run_dir).read_bytes(), (run_dir / "plots" / "loss.png").read_bytes()
    assert (write_report(run_dir).read_bytes(), (run_dir / "plots" / "loss.png").read_bytes()) == first


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("samples.jsonl", json.dumps(SAMPLE) + "\n{oops\n", r"samples\.jsonl, line 2"),
        ("samples.jsonl", '{"id": 1}\n', r"samples\.jsonl, line 1"),
        ("config.yaml", "a: [1", r"config\.yaml is not a YAML mapping"),
        ("config.yaml", "text", r"config\.yaml is not a YAML mapping"),
        ("metrics.jsonl", '{"step": 1}\n{\n{"step": 3}\n', r"metrics\.jsonl, line 2"),
        ("result.json", "{", r"result\.json is not JSON"),
        ("result.json", "[]", r"result\.json has no valid mode, steps, seconds"),
        ("result.json", '{"mode": "ema", "steps": 3, "seconds": 12}', r"result\.json has no valid seconds"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, text, message):
    run_dir = make_run(tmp_path / "quick")
    (run_dir / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        write_report(run_dir)
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"has neither metrics\.jsonl nor result\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="is not a directory"):
        read_result(tmp_path / "absent")


# --- scripts/compare_runs.py ---


@pytest.fixture(scope="module")
def compare_runs():
    path = Path(__file__).resolve().parents[2] / "scripts" / "compare_runs.py"
    spec = importlib.util.spec_from_file_location("compare_runs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_runs_stand_side_by_side(tmp_path, capsys, compare_runs):
    quick = make_run(tmp_path / "quickstart")
    sft = make_run(tmp_path / "quickstart-sft", mode="sft", drift=0.2, gain=0.1, gain_interval=[-0.01, 0.2])
    assert compare_runs.main([str(quick), str(sft)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    rows = {line[:19].strip(): line[19:].split("  ") for line in lines}
    cells = {label: [cell.strip() for cell in row if cell.strip()] for label, row in rows.items()}
    assert cells == {
        "run": ["quickstart", "quickstart-sft"],
        "mode": ["ema", "sft"],
        "steps": ["4", "4"],
        "exact before": ["2.0%", "2.0%"],
        "exact after": ["54.0%", "54.0%"],
        "gain (points)": ["+52.0 [+45.0, +58.5]", "+10.0 [-1.0, +20.0]"],
        "form after": ["98.0%", "98.0%"],
        "contains after": ["50.0%", "50.0%"],
        "gold log-prob after": ["-0.300", "-0.300"],
        "drift (nats)": ["0.0123", "0.2000"],
        "minutes training": ["6.7", "6.7"],
    }


def test_runs_of_the_same_name_are_told_apart(tmp_path, capsys, compare_runs):
    runs = [str(make_run(tmp_path / seed / "quickstart")) for seed in ("a", "b")]
    assert compare_runs.main(runs) == 0
    heading = capsys.readouterr().out.splitlines()[0]
    assert all(run in heading for run in runs)


def test_a_run_without_evaluation_has_dashes(tmp_path, capsys, compare_runs):
    nothing = dict.fromkeys(("before", "after", "gain", "gain_interval", "after_metrics", "drift"))
    run = make_run(tmp_path / "quick", **nothing)
    assert compare_runs.main([str(run)]) == 0
    assert capsys.readouterr().out.count(" -\n") == 7
    assert compare_runs.main([str(run), "--require-gain", "0.1"]) == 1
    assert "quick has no gain" in capsys.readouterr().err


@pytest.mark.parametrize(("required", "status"), [("0.30", 0), ("0.52", 0), ("0.53", 1)])
def test_required_gain_is_the_first_run_s(tmp_path, capsys, compare_runs, required, status):
    runs = [make_run(tmp_path / "quick"), make_run(tmp_path / "sft", gain=-0.9)]
    assert compare_runs.main([*map(str, runs), "--require-gain", required]) == status
    out, err = capsys.readouterr()
    assert "gain (points)" in out
    assert err == ("" if status == 0 else "compare_runs: quick gained +0.520 exact match; +0.530 is required\n")


def test_directories_that_are_no_finished_run_end_with_2_and_one_line(tmp_path, capsys, compare_runs):
    quick = make_run(tmp_path / "quick")
    unfinished = make_run(tmp_path / "unfinished", leave_out=("result.json",))
    foreign = make_run(tmp_path / "foreign")
    (foreign / "result.json").write_text('{"accuracy": 1}')
    for run_dir, message in [
        (tmp_path / "absent", "is not a directory"),
        (unfinished, "result.json is not there"),
        (foreign, "has no valid mode"),
    ]:
        assert compare_runs.main([str(quick), str(run_dir)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and message in err and str(run_dir) in err


@pytest.mark.parametrize("text", ["30", "thirty", "nan"])
def test_a_required_gain_that_is_no_fraction_is_refused(tmp_path, capsys, compare_runs, text):
    with pytest.raises(SystemExit) as caught:
        compare_runs.main([str(make_run(tmp_path / "quick")), "--require-gain", text])
    assert caught.value.code == 2
    assert "--require-gain" in capsys.readouterr().err
