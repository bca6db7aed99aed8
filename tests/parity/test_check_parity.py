"""The whole objective, case by case, beside what the release's own trainer computed; through the script that users run.

`data/llama_loss` holds one family; the other needs the folder of golden numbers.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from toys import quick_compile  # noqa: F401

from unisd_jax.errors import UserError
from unisd_jax.parallel.mesh import build_mesh

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(__file__).parent / "data" / "llama_loss"
CASES = json.loads((DATA / "llama.json").read_text())["cases"]
# One of every mechanism, for the costlier combinations of micro-batches and devices.
FEW = (
    "unisd_star_jsd_clip",
    "clip_quantile",
    "entropy_mask",
    "importance_sampling",
    "agreement_seq_range",
    "match_repr",
)

sys.path.insert(0, str(REPOSITORY / "scripts"))
import check_parity  # noqa: E402


def test_every_case_is_there():
    assert len(CASES) == 21


@pytest.mark.parametrize("case", CASES)
def test_one_device(case):
    result = check_parity.run_case(DATA, "llama", case)
    assert len(result.gradient_errors) == 3
    assert result.passed, result


@pytest.mark.parametrize("case", FEW)
def test_eight_devices_and_micro_batches(case):
    result = check_parity.run_case(DATA, "llama", case, micro_batches=3, mesh=build_mesh(1, 2, 4))
    assert result.passed, result


@pytest.mark.parametrize("case", ("unisd_star", "contrastive_strong"))
def test_the_other_family(golden_dir, case):
    result = check_parity.run_case(golden_dir / "loss", "qwen2", case)
    assert result.passed, result


def test_sequence_agreement_cancels_under_the_release_and_not_by_default():
    """The release divides each completion by its own weights (D-02)."""
    import dataclasses

    import jax

    from unisd_jax.step import StepSettings, loss_and_gradients
    from unisd_jax.teacher.scoring import Network

    description, arrays, model, student, teacher = check_parity.read_family(DATA, "llama")
    options = check_parity.objective_of(description["cases"]["agreement_seq_range"]["config"])
    views = check_parity.batch_views(arrays, options, 3)

    @jax.jit
    def losses(student):
        found = {}
        for normalize in ("upstream", "batch", "sequence"):
            for agreement in (options.agreement, None):
                settings = StepSettings(dataclasses.replace(options, normalize=normalize, agreement=agreement))
                _, metrics = loss_and_gradients(
                    student, Network(model, teacher, None), student, views, settings=settings
                )
                found[normalize, agreement is not None] = metrics["loss"]
        return found

    found = losses(student)
    assert float(found["upstream", True]) == pytest.approx(float(found["upstream", False]), rel=1e-6)
    for normalize in ("batch", "sequence"):
        assert abs(float(found[normalize, True]) / float(found[normalize, False]) - 1) > 1e-3


def test_the_table_and_the_exit_status(tmp_path, capsys):
    folder = tmp_path / "numbers"
    shutil.copytree(DATA, folder)
    description = json.loads((folder / "llama.json").read_text())
    description["cases"]["match_repr"]["loss"] *= 1 + 2e-5
    (folder / "llama.json").write_text(json.dumps(description))
    assert check_parity.main([str(folder), "--cases", "match_repr", "skip_tokens"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED" in lines[1] and "llama/match_repr" in lines[1]
    assert "FAILED" not in lines[2] and "llama/skip_tokens" in lines[2]
    assert lines[3].startswith("1 of 2 within")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "llama.json").unlink(), "holds no FAMILY.json"),
        (lambda folder: (folder / "llama.npz").write_bytes(b"PK"), "not in the format"),
        (lambda folder: (folder / "llama.json").write_text("[]"), "not in the format"),
    ],
)
def test_a_folder_in_another_format(tmp_path, capsys, break_it, message):
    folder = tmp_path / "numbers"
    shutil.copytree(DATA, folder)
    break_it(folder)
    assert check_parity.main([str(folder)]) == 2
    assert message in capsys.readouterr().err


def test_a_case_without_what_it_does_not_need(tmp_path):
    """No auxiliary and no negative prompts, in a case that asks for neither."""
    folder = tmp_path / "numbers"
    shutil.copytree(DATA, folder)
    description = json.loads((folder / "llama.json").read_text())
    description["cases"] = {"skip_tokens": description["cases"]["skip_tokens"]}
    description["cases"]["skip_tokens"]["config"]["num_contexts"] = 0
    (folder / "llama.json").write_text(json.dumps(description))
    with np.load(folder / "llama.npz") as file:
        kept = {name: file[name] for name in file.files if "fewshot" not in name and "bad_teacher" not in name}
    np.savez(folder / "llama.npz", **kept)
    assert check_parity.run_case(folder, "llama", "skip_tokens").passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cases", "nope"], "has no 'nope'; it has ema_forward_kl"),
        (["--cases", "skip_tokens", "--micro-batches", "0"], "--micro-batches is 0; expected a divisor of the 3 rows"),
    ],
)
def test_options_that_cannot_be(capsys, options, message):
    assert check_parity.main([str(DATA), *options]) == 2
    assert message in capsys.readouterr().err


def test_micro_batches_that_do_not_divide():
    with pytest.raises(UserError, match="--micro-batches is 2; expected a divisor of the 3 rows"):
        check_parity.run_case(DATA, "llama", "skip_tokens", micro_batches=2)
