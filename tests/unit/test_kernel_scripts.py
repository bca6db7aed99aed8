"""The scripts that measure and compile the kernels: a tiny benchmark from end to end, and life without the wheels."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))  # bench_kernels imports its worker from there
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def aot(monkeypatch):
    return load("aot_kernels", monkeypatch)


@pytest.fixture
def bench(monkeypatch):
    return load("bench_kernels", monkeypatch)


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, SCRIPTS / script, *arguments], capture_output=True, text=True, timeout=120, cwd=SCRIPTS.parent
    )


# --- bench_kernels ---


@pytest.fixture(scope="module")
def tiny_benchmark(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "record.json"
    finished = run(
        "bench_kernels.py", "--tokens=16", "--hidden=8", "--vocab=40", "--dtype=bfloat16", "--valid-share=0.5",
        "--quantile=0.9", "--chunk-sizes", "4", "--reps=2", "--trained", f"--json={path}",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, json.loads(path.read_text())


def test_a_tiny_benchmark_prints_its_table(tiny_benchmark):
    table, _ = tiny_benchmark
    assert "custom: T 16, H 8, V 40, bfloat16, alpha 0.5, quantile 0.9, 50% of the tokens count, trained head" in table
    rows = {line[:34].strip(): line[34:].split() for line in table.splitlines()}
    for form in ("low memory", "per token", "loss", "loss, chunk 4", "naive"):
        assert len(rows[form]) == 8, form
    assert "there is no Pallas kernel for cpu" in " ".join(rows["pallas"])
    assert "not measured" in table


def test_a_tiny_benchmark_writes_its_record(tiny_benchmark):
    _, record = tiny_benchmark
    assert {"commit", "cpu", "date", "device", "goals", "python"} <= record.keys()
    (section,) = record["sections"]
    assert section["versions"].keys() == {"jax", "jaxlib"}
    assert all(rate > 0 for rate in section["rates"]["jax"].values())
    rows = {row["form"]: row for row in section["rows"] if "error" not in row}
    assert rows.keys() == {"low memory", "per token", "loss", "loss, chunk 4", "naive", "naive, float32"}
    for form in rows.keys() - {"naive, float32"}:
        assert len(rows[form]["cpu"]) == len(rows[form]["wall"]) == 2
        assert rows[form]["over_naive"] > 0 and rows[form]["over_floor"] > 0
        assert rows[form]["value_error"] < 1e-5 and rows[form]["gradient_error"] < 2e-2


def test_an_unknown_shape_or_option_is_refused():
    for arguments, message in (
        (("--shapes=s3",), "--shapes has s3; expected some of s1, s2, cpu"),
        (("--alpha=2",), "2 is not in [0, 1]"),
        (("--fast",), "unrecognized arguments: --fast"),
    ):
        finished = run("bench_kernels.py", *arguments)
        assert finished.returncode == 2 and message in finished.stderr


def test_an_engine_that_cannot_start_is_a_row_that_says_why(bench, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no torch here >&2\nexit 3\n")
    python.chmod(0o755)
    worker = bench.Worker("torch", str(python), {})
    bench.take_turns([worker], 1, tmp_path)
    worker.close()
    section = {"rows": []}
    bench.collect(section, worker)
    assert section["rows"][0]["error"] == "the process ended with status 3: no torch here"


def test_a_nan_is_an_error_of_its_row(bench, tmp_path):
    for form, gradient in (("naive", [1.0, 2.0]), ("loss", [1.0, np.nan])):
        np.savez(tmp_path / bench.file_name(form), value=np.array(1.0), gradient_0=np.array(gradient))
    rows = [{"form": form, "engine": "jax", "cpu": [1.0], "wall": [1.0]} for form in ("naive", "loss")]
    work = {"tokens": 1, "hidden": 1, "vocab": 1, "valid_share": 1.0, "head": "frozen"}
    section = {"work": work, "rows": rows, "rates": {}, "platform": "cpu"}
    bench.add_ratios(section, tmp_path)
    assert "error" not in rows[0] and rows[0]["gradient_error"] == 0
    assert "NaN" in rows[1]["error"]


def test_goals_compare_what_was_measured_on_an_accelerator(bench):
    def row(form, seconds, **more):
        return {"form": form, "engine": "jax", "seconds": seconds, "peak": 10, "value_error": 1e-6} | more

    work = {"shape": "s1", "alpha": 0.5, "head": "trained"}
    rows = [row("loss", 2.0, over_floor=1.5), row("pallas_gpu, loss", 1.0, over_floor=1.2), row("naive", 2.0)]
    rows += [row("torch, upstream", 4.0, peak=1000), row("torch, Liger chunked", 0.9, value_error=1e-3)]
    section = {"work": work, "rows": rows, "platform": "gpu", "arguments": 90}
    found = {goal["goal"].split(":")[0] + goal["goal"][-22:]: goal["met"] for goal in bench.goals([section])}
    assert list(found.values()) == [True, None, True, True, False, True, True]


# --- aot_kernels ---


@pytest.fixture
def no_wheels(aot, monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    return aot


def test_without_the_wheels_every_target_is_skipped(no_wheels, capsys):
    assert no_wheels.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["h200", "v5e", "v5p", "v6e"]
    assert lines[0].endswith("skipped, needs jax_cuda13_plugin or jax_cuda12_plugin: pip install 'jax[cuda13]'")
    assert lines[1].endswith("skipped, needs libtpu: pip install 'jax[tpu]'")


def test_required_targets_without_wheels_fail(no_wheels, capsys):
    assert no_wheels.main(["--targets=v5p", "--require"]) == 1
    assert "MISSED v5p was skipped" in capsys.readouterr().out


def test_an_unknown_target_is_refused(aot, capsys):
    with pytest.raises(SystemExit) as stopped:
        aot.main(["--targets=h200,v9"])
    assert stopped.value.code == 2
    assert "--targets has v9; expected some of h200, v5e, v5p, v6e" in capsys.readouterr().err


def row_of(aot, *case, **found):
    return aot.Case(*case)._asdict() | {"temp": 1, "output": 1, "mentions": 0, "kernel_calls": 0, "seconds": 1} | found


def test_gates_are_missed_for_what_they_ask(aot):
    naive = row_of(aot, "naive", "naive", temp=70, mentions=9)
    rows = [
        naive,
        row_of(aot, "per token", "token", temp=10),
        row_of(aot, "value and grad", "value_and_grad", temp=11),
        row_of(aot, "loss", "loss", temp=40, mentions=1),
        row_of(aot, "low memory", "token", "S1", 0.5, True, "chunked", 4608, temp=3),
        row_of(aot, "pallas_gpu, loss", "loss", "S1", 0.5, True, "pallas_gpu", temp=40),
        row_of(aot, "pallas_gpu, rows", "rows", "S1", 0.5, True, "pallas_gpu", kernel_calls=1),
        aot.Case("per token", "token", "S2")._asdict() | {"error": "no"},
        aot.Case("naive", "naive", "S2")._asdict() | {"error": "too large"},
    ]
    aot.add_ratios(rows)
    missed = [what.removeprefix("S1 alpha 0.5, trained head, ") for what, reached in aot.gates(rows) if not reached]
    assert missed == [
        "value and grad: 7 times less than naive",
        "loss: no [T, V] array",
        "low memory: 30 times less than naive",
        "pallas_gpu, loss: its kernel is in the program",
        "S2 alpha 0.5, trained head, per token compiles",
    ]


def test_collectives_are_read_from_a_program(aot):
    text = """
      %a = f32[8,4]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1}}
      %b = (f32[512]{0}, f32[512]{0}) all-reduce(%y, %z), replica_groups={{0,1}}
      %c = f32[8,4]{1,0} all-reduce-start(%x), channel_id=1
      %d = f32[8,4]{1,0} add(%a, %c)
    """
    assert aot.collectives(text) == {"all-reduce f32[8,4]": 2, "all-reduce f32[512] f32[512]": 1}


def test_quick_compiles_a_part_of_the_programs(aot):
    for target in aot.TARGETS.values():
        every, quick = aot.cases(target, False), aot.cases(target, True)
        assert set(quick) < set(every) and len(set(every)) == len(every)
        assert {case.alpha for case in every} == {0.0, 0.5, 1.0} and {case.shape for case in quick} == {"S1"}
        assert {case.implementation for case in quick} == {"reference", "chunked", *target.jsd, *target.logprob}
