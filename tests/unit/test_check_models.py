"""scripts/check_models.py: numbers that agree, numbers that do not, and folders without any."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
import toys

from unisd_jax.models import save_hf
from unisd_jax.rollout import JaxSampler, Sampling


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[2] / "scripts" / "check_models.py"
    spec = importlib.util.spec_from_file_location("check_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    """(a folder with one model and its own numbers, those numbers)."""
    model, params = toys.random_model()
    save_hf(tmp_path / "toy", model, params)
    prompts = toys.left_padded(np.random.default_rng(0), 3, 6)
    hidden = jax.jit(model.hidden)(params, *prompts)
    sampler = JaxSampler(model)
    sampler.publish(params, 0)
    rollout = sampler.generate(*prompts, Sampling(4, (), 0, temperature=0.0), key=jax.random.key(0), version=0)
    numbers = dict(
        input_ids=prompts.ids, attention_mask=prompts.mask.astype(np.int64), last_hidden=np.asarray(hidden),
        logits=np.asarray(model.logits(params, hidden)), greedy=np.asarray(rollout.ids),
    )  # fmt: skip
    np.savez(tmp_path / "toy.npz", **numbers)
    return tmp_path, numbers


@pytest.mark.parametrize("devices", [1, 4])
def test_numbers_that_agree(script, folder, capsys, devices):
    assert script.main([str(folder[0]), "--devices", str(devices)]) == 0
    printed = capsys.readouterr().out
    assert "toy" in printed and "MISSED" not in printed
    assert f"tensor {min(devices, 2)}" in printed


@pytest.mark.parametrize(("array", "wrong"), [("logits", 1e-3), ("last_hidden", np.nan), ("greedy", 1)])
def test_numbers_that_do_not(script, folder, capsys, array, wrong):
    path, numbers = folder
    changed = numbers[array].copy()
    # The last place of every row is a token, not padding.
    changed[-1, -1] += wrong
    np.savez(path / "toy.npz", **numbers | {array: changed})
    assert script.main([str(path)]) == 1
    assert "MISSED" in capsys.readouterr().out


def test_bad_input_is_one_line(script, folder, tmp_path, capsys):
    path, numbers = folder
    (tmp_path / "empty").mkdir()
    assert script.main([str(tmp_path / "empty")]) == 2
    assert "no folder NAME with a config.json and a NAME.npz beside it" in capsys.readouterr().err
    np.savez(path / "toy.npz", logits=numbers["logits"])
    assert script.main([str(path)]) == 2
    assert "toy.npz has no array input_ids" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("devices", "sizes"), [(1, (1, 1, 1)), (2, (1, 1, 2)), (4, (1, 2, 2)), (8, (2, 2, 2)), (6, (1, 3, 2))]
)
def test_the_mesh(script, devices, sizes):
    assert tuple(script.mesh_shape(devices).values()) == sizes
