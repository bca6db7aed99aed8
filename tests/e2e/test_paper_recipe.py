"""A recipe of the paper's setting from end to end: three files, a preset, a tiny checkpoint, a few rows."""

import json
from pathlib import Path

from run_checks import TRAIN_ONLY, read_metrics, read_result
from toys import quick_compile as quick_compile

from unisd_jax import train
from unisd_jax.config import load_config
from unisd_jax.testing import tiny_checkpoint

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPE = [
    CONFIGS / "modes" / "unisd_star.yaml",
    CONFIGS / "paper" / "qwen2.5-7b.yaml",
    CONFIGS / "paper" / "cos_e.yaml",
]


def write_rows(path, prefix, count):
    animals = ("fish", "bird", "horse", "mole", "bee", "crab", "wolf", "seal", "moth", "toad", "swan", "goat")
    rows = (
        {
            "id": f"{prefix}{number}",
            "question": f"Where does a {animals[number]} of kind {prefix} live?",
            "choices": ["air", "sea", "soil", "wood", "ice"],
            "answer": ("air", "sea", "soil", "wood", "ice")[number % 5],
            "abstractive_explanation": "It does.",
            "extractive_explanation": "live",
        }
        for number in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_recipe_trains(tmp_path, capfd):
    folder = tmp_path / "rows" / "cos_e"
    folder.mkdir(parents=True)
    write_rows(folder / "train.jsonl", "t", 12)
    write_rows(folder / "validation.jsonl", "e", 2)
    # Every matrix has room for adapters of rank 64.
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    tiny_checkpoint(tmp_path / "tiny", max_position=4096, **sizes)
    # What makes it small; all else is the recipe's.
    words = ["--preset=launcher", f"--model.path={tmp_path / 'tiny'}", f"--data.path={tmp_path / 'rows'}"]
    words += [f"--output_dir={tmp_path}", f"--teacher.cache_dir={tmp_path / 'cache'}", "--train.compilation_cache=null"]
    words += ["--train.steps=2", "--data.length_buckets=1", "--rollout.max_completion_length=8", *TRAIN_ONLY]
    code = train.main([*(word for file in RECIPE for word in ("--config", str(file))), *words])
    said = capfd.readouterr()
    assert code == 0, said.err
    assert "train: 12 items of cos_e v1.11/train" in said.out
    run = tmp_path / "run"
    metrics = read_metrics(run)
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2]
    assert {"loss_divergence", "loss_contrast", "loss_matching"} <= metrics[0].keys()
    assert read_result(run)
    config = load_config(run / "config.yaml")
    assert (config.train.batch_size, config.train.micro_batches, config.model.lora.rank) == (8, 4, 64)
    assert config.objective.agreement.gamma_agreement == 0.001 and config.data.max_prompt_length == 3072
