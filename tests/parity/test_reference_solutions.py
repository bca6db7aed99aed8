"""Every reference solution of MBPP and HumanEval passes its tests in the sandbox."""

import pytest
from task_rows import DATA

from unisd_jax.data.loading import load_items
from unisd_jax.data.sources import Place
from unisd_jax.data.tasks import humaneval, mbpp
from unisd_jax.sandbox import run_many

SPLITS = [(module, split) for module in (mbpp, humaneval) for split in module.SOURCE.sizes]
FOLDERS = {"full": "mbpp", "sanitized": "mbpp_sanitized", "test": "humaneval"}


def failures(module, split, step):
    """Id -> how its solution ended, of those that do not pass."""
    folder = DATA / FOLDERS[split.partition("/")[0]]
    if not list(folder.glob(f"{split.rpartition('/')[2]}.*")):
        pytest.skip(f"no benchmark data: {folder} does not hold this split, UNISD_DATA names the folder")
    items = load_items(module.TASK, "test", place=Place(path=DATA), split=split).items[::step]
    assert items
    outcomes = run_many([module.program(item.answer, item) for item in items], timeout=60.0)
    pairs = zip(items, outcomes, strict=True)
    return {item.id: outcome for item, outcome in pairs if outcome.kind != "pass"}


@pytest.mark.parametrize(("module", "split"), SPLITS, ids=lambda value: getattr(value, "__name__", value))
def test_every_tenth_solution_passes(module, split):
    assert failures(module, split, 10) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("module", "split"), SPLITS, ids=lambda value: getattr(value, "__name__", value))
def test_every_solution_passes(module, split):
    assert failures(module, split, 1) == {}
