"""docs/own_model.md: its program runs, and its edit makes a family that computes what Llama computes."""

import json
import os
import subprocess
import sys

import pages
import pytest

from unisd_jax.testing import tiny_checkpoint

PAGE = "docs/own_model.md"
# The same weights as two families, in a copy of the package that knows both; exported, and refused with a window.
BOTH = """
import json, sys
from pathlib import Path
import jax, numpy as np
from unisd_jax.errors import UserError
from unisd_jax.models import load_hf, save_hf

logits = {}
ids, mask = np.arange(12, dtype=np.int32)[None], np.ones((1, 12), bool)
for name in ("llama", "mistral"):
    model, params = load_hf(name)
    logits[name] = np.asarray(model.logits(params, model.hidden(params, ids, mask)))
assert model.config.family == "mistral"
np.testing.assert_array_equal(logits["llama"], logits["mistral"])
save_hf("exported", model, params)
assert json.loads(Path("exported/config.json").read_text())["architectures"] == ["MistralForCausalLM"]
again, loaded = load_hf("exported")
assert again.config == model.config and jax.tree.all(jax.tree.map(np.array_equal, params, loaded))
fields = json.loads(Path("mistral/config.json").read_text())
del fields["sliding_window"]
Path("mistral/config.json").write_text(json.dumps(fields))
try:
    load_hf("mistral")
except UserError as error:
    print(error)
"""


def test_the_program_scores_samples_and_exports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (program,) = pages.blocks(PAGE, "python")
    names = {}
    exec(compile(program, PAGE, "exec"), names)
    assert len(names["reply"]) == len("Carbon dioxide") + 1 and float(names["scores"].logp.max()) < 0
    assert "log-prob of the reply: -" in capsys.readouterr().out
    assert (tmp_path / "exported" / "chat_template.jinja").exists()


def test_the_edit_makes_a_family(tmp_path):
    (diff,) = pages.blocks(PAGE, "diff")
    assert pages.apply_diff(diff, pages.copied_package(tmp_path)) == {"unisd_jax/models/config.py"}
    for family in ("llama", "mistral"):
        fields = json.loads((tiny_checkpoint(tmp_path / family) / "config.json").read_text())
        fields |= {"model_type": family, "sliding_window": None}
        (tmp_path / family / "config.json").write_text(json.dumps(fields))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", BOTH], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "config.json: sliding_window is 4096; supported: null" in done.stdout


def test_the_recording_of_numbers_names_every_array_that_is_compared():
    """It needs torch, which the tests have not: its form is checked, and its arrays against scripts/check_models.py."""
    (program,) = [text for text in pages.blocks(PAGE, "") if "torch" in text]
    compile(program, PAGE, "exec")
    if str(pages.REPOSITORY / "scripts") not in sys.path:
        sys.path.insert(0, str(pages.REPOSITORY / "scripts"))
    check_models = pytest.importorskip("check_models")
    assert all(f"{name}=" in program for name in check_models.ARRAYS)
