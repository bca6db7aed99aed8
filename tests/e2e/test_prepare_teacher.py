"""What the teacher's views need, built before training by a command of its own, and then only read."""

import json
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "scripts"))
import prepare_teacher  # noqa: E402

STAR = [
    "--mode=unisd_star",
    "--objective.agreement.level=token",
    "--objective.contrast.contrastive_weight=0.1",
    "--objective.matching.final_layer_distill_weight=0.1",
    "--teacher.contexts.num_auxiliary_contexts=2",
    "--teacher.contexts.method=induction",
    "--teacher.contexts.induction_demonstrations=1",
    "--teacher.contexts.induction_instructions=10",
    "--teacher.contexts.induction_max_length=4",
    "--data.max_prompt_length=400",
    "--data.length_multiple=16",
    "--train.steps=1",
    "--evaluation.enabled=false",
    "--evaluation.drift_tokens=0",
]


@pytest.fixture
def options(workspace, tmp_path):
    return [*STAR, f"--teacher.cache_dir={tmp_path / 'cache'}"]


def test_training_reads_what_was_prepared(workspace, tmp_path, options, main, capfd):
    assert prepare_teacher.main(["--config", str(workspace.config), *options]) == 0
    said = capfd.readouterr().out
    assert "making negatives for jsonl: 0 of 20 are there" in said and "induction: 10/10" in said
    assert "ready: 20 training items with every view of mode unisd_star" in said
    manifests = sorted(path.parent.parent.name for path in (tmp_path / "cache").glob("*/*/manifest.json"))
    assert manifests == ["induction", "negatives"]

    outcome = main(tmp_path, *options)
    assert outcome.code == 0, outcome.err
    assert "making" not in outcome.out
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"agreement_weight", "contrast_active_share", "loss_matching", "teacher_motion"} <= record.keys()


def test_bad_input_is_one_line(workspace, options, capsys):
    assert prepare_teacher.main(["--config", str(workspace.config), *options, "--objective.alpha=2"]) == 2
    assert capsys.readouterr().err.startswith("error: objective.alpha must be between 0 and 1")
