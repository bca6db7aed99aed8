"""Every mode on every mesh of eight devices: the loss and the update of one device, to rounding."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import toys
from steps import all_views, two_steps

from unisd_jax.config import load_config
from unisd_jax.experiment import step_settings
from unisd_jax.parallel.mesh import build_mesh

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "modes"
SHAPES = [(d, f, 8 // (d * f)) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]
# Those that make test runs: together they have every mechanism, the weights of whole sequences and no teacher at all.
QUICK = ("unisd_star", "agreement_seq_induction", "clip", "sft")
OPTIONS = ("--model.path=none", "--teacher.ema_sync_steps=1", "--model.lora.dropout=0.25", "--train.micro_batches=1")


def settings_of(mode):
    config = load_config(CONFIGS / f"{mode}.yaml", [*OPTIONS, "--train.batch_size=8"])
    return step_settings(config)


def distinct_modes():
    """One mode of those that make the same step: they differ in what the views show."""
    found = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        found.setdefault(settings_of(path.stem), path.stem)
    return sorted(found.values())


@functools.cache
def reference(mode, kind):
    """What one device computes."""
    state, metrics = two_steps(kind, build_mesh(), settings_of(mode), all_views())
    return jax.device_get(state), jax.device_get(metrics)


def compare(mode, kind, shape):
    expected, expected_metrics = reference(mode, kind)
    state, metrics = two_steps(kind, build_mesh(*shape), settings_of(mode), all_views())
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=3e-4, abs=2e-6), name
    assert np.isfinite(float(metrics["loss"])) and float(metrics["gradient_norm"]) > 1e-4
    found = jax.device_get(state)
    toys.assert_trees_close((found.student, found.optimizer), (expected.student, expected.optimizer), atol=5e-5)


def test_the_modes_make_at_least_ten_different_steps():
    assert len(distinct_modes()) >= 10 and set(QUICK) <= set(distinct_modes())
    assert (8, 1, 1) in SHAPES and (1, 8, 1) in SHAPES and (1, 1, 8) in SHAPES and len(SHAPES) == 10


@pytest.mark.parametrize("mode", [mode for mode in distinct_modes() if mode in QUICK])
def test_a_mode_on_a_mesh_with_all_three_axes(mode):
    compare(mode, "lora", (2, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("mode", "kind"), [(mode, "lora") for mode in distinct_modes()] + [(mode, "full") for mode in QUICK]
)
def test_every_mode_on_every_mesh(mode, kind, shape):
    compare(mode, kind, shape)
