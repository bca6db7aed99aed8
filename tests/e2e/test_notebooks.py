"""The notebooks run from top to bottom, as a reader would run them, and are stored without what a run leaves behind."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
# How many figures each one draws.
FIGURES = {"01_losses": 11, "02_your_own_mechanism": 2, "03_train_and_inspect": 2}
IMPORTS = {"jax", "matplotlib", "numpy", "optax", "unisd_jax"}

# Runs every code cell of a notebook in one namespace, as a kernel does, and saves its figures to a folder. They are
# closed after each cell, as the inline backend does. Prints one line per cell: its index, and whether each of its
# figures shows data.
RUNNER = """
import json, linecache, sys, traceback
from pathlib import Path
import matplotlib.pyplot as plt

path, out = Path(sys.argv[1]), Path(sys.argv[2])
namespace = {"__name__": "__main__"}
for index, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
    if cell["cell_type"] != "code":
        continue
    source, name = "".join(cell["source"]), f"{path.name}, cell {index}"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    try:
        exec(compile(source, name, "exec"), namespace)
        figures = [plt.figure(number) for number in plt.get_fignums()]
        for number, figure in enumerate(figures):
            figure.savefig(out / f"{path.stem}_{index:02d}_{number}.png", dpi=80)
    except BaseException:
        traceback.print_exc()
        sys.exit(f"{name} ({cell['id']}) failed")
    shown = [bool(figure.axes) and all(axis.has_data() for axis in figure.axes) for figure in figures]
    print("CELL", json.dumps([index, shown]), flush=True)
    plt.close("all")
"""


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> dict[int, str]:
    """Index in the notebook -> source."""
    return {
        index: "".join(cell["source"]) for index, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "code"
    }


class Run(NamedTuple):
    """{cell index: for each of its figures whether it shows data} of the cells that ran, and what was said."""

    cells: dict[int, list[bool]]
    out: str
    error: str


def run_notebook(path: Path, folder: Path) -> Run:
    """Runs a notebook in a process of its own, with `folder` as its directory; `error` is empty if all went well."""
    environment = os.environ | {
        "MPLBACKEND": "Agg",
        "JAX_PLATFORMS": "cpu",
        # Most programs run once or a few times.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    # The other tests simulate eight devices; a reader has one.
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(path), str(folder)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    lines = [json.loads(line.removeprefix("CELL ")) for line in done.stdout.splitlines() if line.startswith("CELL ")]
    return Run(dict(lines), done.stdout, done.stderr if done.returncode else "")


def test_all_notebooks_are_there():
    assert {path.stem for path in NOTEBOOKS} == set(FIGURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_draws(path, tmp_path):
    run = run_notebook(path, tmp_path)
    assert not run.error, run.error
    assert list(run.cells) == list(code_cells(read(path)))
    figures = [shown for cell in run.cells.values() for shown in cell]
    assert all(figures), f"an empty axis: {run.cells}"
    assert len(figures) == FIGURES[path.stem]
    if path.stem == "02_your_own_mechanism":
        # What its text says of the outcome.
        right = {name: float(re.search(rf"{name}.*right code ([\d.]+)", run.out)[1]) for name in ("plain", "weighted")}
        assert 0.05 < right["plain"] < 0.4 and right["weighted"] > 0.7
    if path.stem == "03_train_and_inspect":
        assert float(re.search(r"-> ([\d.]+), gain", run.out)[1]) >= 0.75


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_clean(path):
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z][a-z0-9-]{0,63}", name) for name in ids)
    for index, cell in enumerate(notebook["cells"]):
        where = f"{path.name}, cell {index}"
        assert cell["metadata"] == {} and "".join(cell["source"]).strip(), where
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, f"{where}: clear the outputs"
    assert not re.search(r"/(home|root|Users|tmp|work)/|[A-Z]:\\\\", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_needs_only_what_the_package_needs(path):
    found = set()
    for source in code_cells(read(path)).values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
    assert found - set(sys.stdlib_module_names) <= IMPORTS


def test_a_failure_names_notebook_and_cell(tmp_path):
    cells = [("markdown", "# title"), ("code", "x = 1"), ("code", "y = 2\nassert x == y, 'they differ'"), ("code", "")]
    path = tmp_path / "broken.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": kind, "id": "a", "source": [text]} for kind, text in cells]}))
    run = run_notebook(path, tmp_path)
    assert list(run.cells) == [1]
    for part in ('"broken.ipynb, cell 2", line 2', "assert x == y", "they differ", "broken.ipynb, cell 2 (a) failed"):
        assert part in run.error
