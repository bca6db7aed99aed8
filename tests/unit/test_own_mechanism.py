"""docs/own_mechanism.md: its program is true, and its edit makes an option that trains."""

import ast
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest

from unisd_jax.testing import tiny_checkpoint

PAGE = "docs/own_mechanism.md"
OPTIONS = (
    "--config=configs/modes/plain.yaml",
    "--model.path=tiny",
    "--model.dtype=float32",
    "--model.lora.dropout=0",
    "--model.lora.rank=4",
    "--train.steps=1",
    "--train.batch_size=2",
    "--train.micro_batches=2",
    "--train.compilation_cache=null",
    "--rollout.max_completion_length=6",
    "--rollout.max_sampler_gap=0.01",
    "--data.max_prompt_length=480",
    "--data.train_limit=4",
    "--data.test_limit=2",
    "--evaluation.enabled=false",
    "--evaluation.max_completion_length=6",
    "--evaluation.drift_tokens=0",
)


def test_the_program_scales_the_gradient_of_each_token(capsys):
    (program,) = pages.blocks(PAGE, "python")
    names = {}
    exec(compile(program, PAGE, "exec"), names)
    assert capsys.readouterr().out.startswith("loss ")
    student, focus_weights = names["student"], names["focus_weights"]
    logps = jnp.log(jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(focus_weights(logps, 2.0), [1.0, 0.25, 0.0])
    assert float(jax.grad(lambda x: jnp.sum(focus_weights(x, 2.0)))(logps[1:]).sum()) == 0.0
    assert float(names["loss"](student, 2.0)) < float(names["loss"](student, 0.0))


@pytest.fixture
def edited(tmp_path):
    """A copy of the package with the page's edit made; which files it is in, the page says."""
    (diff,) = pages.blocks(PAGE, "diff")
    files = pages.apply_diff(diff, pages.copied_package(tmp_path))
    assert len(files) == 7 and all(f"`{name}`" in pages.prose(PAGE) for name in files - {"configs/base.yaml"})
    for name in files - {"configs/base.yaml"}:
        ast.parse((tmp_path / name).read_text(encoding="utf-8"))
    return tmp_path


def test_the_edit_can_be_made(edited):
    assert "focus" in (edited / "configs/base.yaml").read_text()


@pytest.mark.slow
def test_the_edit_makes_an_option_that_trains(edited):
    """In a process of its own, in two micro-batches, whose weights are those of the whole batch."""
    tiny_checkpoint(edited / "tiny")
    environment = os.environ | {"PYTHONPATH": str(edited), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": ""}

    def train(focus):
        return subprocess.run(
            [sys.executable, "-m", "unisd_jax.train", *OPTIONS, f"--objective.focus={focus}"],
            cwd=edited, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    refused = train(-1)
    assert (refused.returncode, refused.stderr) == (2, "error: objective.focus must be 0 or more, found -1.0\n")
    done = train(2)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((edited / "runs/run/metrics.jsonl").read_text())
    # The mode plain: without the weight its loss is the divergence.
    assert 0.0 < metrics["focus_weight"] < 1.0 and 0.0 < metrics["loss"] < metrics["divergence"]


def test_the_places_are_there():
    """Every `name` in `file` of the page's tables is defined in that file."""
    for name in (PAGE, "docs/own_model.md"):
        rows = [line for line in pages.page(name).splitlines() if line.startswith("| ") and ".py`" in line]
        named = 0
        for row in rows:
            for words, path in re.findall(r"((?:`\w+`(?:, | and )?)+) in `(\S+\.py)`", row):
                source = (pages.REPOSITORY / path).read_text(encoding="utf-8")
                defined = {getattr(node, "name", getattr(node, "id", "")) for node in ast.walk(ast.parse(source))}
                for word in re.findall(r"`(\w+)`", words):
                    assert word in defined, f"{name}: {path} has no {word}"
                    named += 1
        assert named >= 8, name
