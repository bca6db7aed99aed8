"""What the teacher's views need, made before training by two commands, a part at a time, and then only read."""

import json
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "scripts"))
import prepare_contexts  # noqa: E402
import prepare_negatives  # noqa: E402
import preparing  # noqa: E402

STAR = [
    "--mode=unisd_star",
    "--objective.agreement.level=token",
    "--objective.contrast.contrastive_weight=0.1",
    "--objective.matching.final_layer_distill_weight=0.1",
    "--teacher.contexts.num_auxiliary_contexts=2",
    "--teacher.contexts.method=induction",
    "--teacher.contexts.induction_demonstrations=1",
    "--teacher.contexts.induction_instructions=20",
    "--teacher.contexts.induction_max_length=4",
    "--data.max_prompt_length=400",
    "--data.length_multiple=16",
    "--train.steps=1",
    "--evaluation.enabled=false",
    "--evaluation.drift_tokens=0",
]


@pytest.fixture
def prepare(workspace, tmp_path, capfd):
    """Runs one of the two commands; returns (exit status, output, errors)."""

    def run(script, *words):
        options = [*STAR, f"--teacher.cache_dir={tmp_path / 'cache'}"]
        code = preparing.run(["--config", str(workspace.config), *options, *words], "prog", script.make)
        return code, *capfd.readouterr()

    return run


def test_training_reads_what_was_prepared(tmp_path, prepare, main):
    for script, kind, first in ((prepare_contexts, "induction", 8), (prepare_negatives, "negatives", 20)):
        code, out, _ = prepare(script, "--dry-run")
        assert code == 0 and f"{kind} for jsonl are still to be made (20 records in " in out
        assert not (tmp_path / "cache" / kind).exists()
        code, out, _ = prepare(script, "--limit", "1")
        assert code == 0 and f"making {kind} for jsonl: 0 of 20 are there" in out and f"{kind}: {first}/20" in out
        if first < 20:  # a call of several is made whole
            assert f"{kind}: {first} of 20 are there; the same command goes on" in out
        code, out, _ = prepare(script)
        assert code == 0 and "ready: 20 " in out
    manifests = sorted(path.parent.parent.name for path in (tmp_path / "cache").glob("*/*/manifest.json"))
    assert manifests == ["induction", "negatives"]

    outcome = main(tmp_path, *STAR, f"--teacher.cache_dir={tmp_path / 'cache'}")
    assert outcome.code == 0, outcome.err
    assert "making" not in outcome.out
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"agreement_weight", "contrast_active_share", "loss_matching", "teacher_motion"} <= record.keys()


def test_training_goes_on_where_a_limit_stopped(tmp_path, prepare, main):
    assert prepare(prepare_contexts, "--limit=1")[0] == 0
    outcome = main(tmp_path, *STAR, f"--teacher.cache_dir={tmp_path / 'cache'}")
    assert outcome.code == 0, outcome.err
    assert "making induction for jsonl: 8 of 20 are there" in outcome.out


def test_contexts_of_other_items_need_no_preparation(tmp_path, prepare):
    code, out, _ = prepare(prepare_contexts, "--teacher.contexts.method=random")
    assert code == 0 and "ready: 20 items with 2 contexts by random, made anew at every start" in out
    assert not (tmp_path / "cache" / "induction").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--objective.alpha=2"], "error: objective.alpha must be between 0 and 1"),
        (["--limit"], "error: --limit is '', expected how many new records"),
        (["--limit", "many"], "error: --limit is 'many'"),
        (["--limit=0"], "error: --limit is '0'"),
    ],
)
def test_bad_input_is_one_line(prepare, words, said):
    for script in (prepare_contexts, prepare_negatives):
        code, _, err = prepare(script, *words)
        assert code == 2 and err.startswith(said) and err.count("\n") == 1
