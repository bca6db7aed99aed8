"""Every recipe of `configs/paper` under every mode and preset, held against what was published and launched."""

import functools
import importlib.util
import pickle
from pathlib import Path

import pytest

from unisd_jax import config_loading
from unisd_jax.config import load_config, to_dict, warnings
from unisd_jax.config_loading import flatten
from unisd_jax.config_modes import MODES as KNOWN_MODES
from unisd_jax.data.tasks import get_task
from unisd_jax.testing import tiny_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PAPER = CONFIGS / "paper"
PRESETS = ("none", "command", "launcher")

# The hub's name, and the launcher's batch for one device, halved for UniSD*; four such batches make a step.
MODELS = {
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B-Instruct", 16),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", 8),
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B-Instruct", 8),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", 4),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", 4),
    "gemma-3-4b": ("google/gemma-3-4b-it", 8),
    "internlm3-8b": ("internlm/internlm3-8b-instruct", 4),
}
# Splits, and steps of one epoch by examples per step.
TASKS = {
    "scienceqa": ("train", "test", {8: 813, 16: 406, 32: 203, 64: 101}),
    "cos_e": ("v1.11/train", "v1.11/validation", {8: 1217, 16: 608, 32: 304, 64: 152}),
    "mbpp": ("sanitized/train", "sanitized/test", {16: 7}),
    "tooluse": ("train", "test", {8: 505, 16: 252, 32: 126, 64: 63}),
    "medmcqa": ("train", "validation", {8: 22852, 16: 11426, 32: 5713, 64: 2856}),
    "gsm8k": ("main/train", "main/test", {8: 934, 16: 467, 32: 233, 64: 116}),
}
LAUNCHED_MBPP = ("full/train", "sanitized/test", {8: 46, 16: 23, 32: 11, 64: 5})

PUBLISHED = {
    "model.dtype": "bfloat16",
    "model.trainable": "lora",
    "model.lora.rank": 64,
    "model.lora.alpha": 128.0,
    "model.lora.dropout": 0.05,
    "model.lora.targets": ["q", "k", "v", "o", "gate", "up", "down"],
    "optimizer.learning_rate": 2e-5,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_ratio": 0.1,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.0,
    "optimizer.max_grad_norm": 1.0,
    "train.micro_batches": 4,
    "train.remat": "layer",
    "evaluation.max_completion_length": 1024,
    "measure.temperature": 0.0,
    "parity": "none",
}
# Prompt and completion.
LENGTHS = {"none": (3072, 1024), "command": (1024, 2048), "launcher": (3072, 1024)}

SHORT = {
    "K": "teacher.contexts.num_auxiliary_contexts",
    "contexts": "teacher.contexts.method",
    "induced from": "teacher.contexts.induction_demonstrations",
    "gamma": "objective.agreement.gamma_agreement",
    "level": "objective.agreement.level",
    "statistic": "objective.agreement.agreement_stat",
    "quantile": "objective.agreement.agreement_quantile",
    "cap": "objective.agreement.agreement_cap",
    "ema": "teacher.ema",
    "decay": "teacher.ema_decay",
    "sync": "teacher.ema_sync_steps",
    "contrast": "objective.contrast.contrastive_weight",
    "margin": "objective.contrast.contrastive_margin",
    "matching": "objective.matching.final_layer_distill_weight",
    "clip": "objective.clip.token_clip",
    "loss": "objective.loss",
    "alpha": "objective.alpha",
    "source": "rollout.source",
    "temperature": "rollout.temperature",
}
OFF = {"K": 0, "level": "none", "ema": False, "contrast": 0.0, "matching": 0.0, "clip": None}
USUAL = OFF | {"loss": "divergence", "alpha": 0.0, "source": "student", "temperature": 0.7}
EMA = {"ema": True, "decay": 0.9, "sync": 10}
CONTRAST = {"contrast": 0.1, "margin": 0.5}
# What the release's command has; our own defaults are the same where the paper says nothing.
BY_MODE = {
    **{
        f"agreement_{short}_{method}": {"K": 3, "level": level, "contexts": method, "gamma": 1.0}
        | {"statistic": "var", "quantile": 0.95, "cap": 10.0}
        for short, level in (("tok", "token"), ("seq", "sequence"))
        for method in ("random", "retrieval", "induction")
    },
    "ema": EMA,
    "contrastive": CONTRAST,
    "match_joint": {"matching": 0.1},
    "match_repr": {"matching": 1.0, "loss": "none"},
    "clip": {"clip": 10.0},
    "unisd_star": {"K": 3, "level": "token", "contexts": "retrieval", "gamma": 1.0, "matching": 0.1} | EMA | CONTRAST,
    "plain": {},
    "sft": {"loss": "nll", "source": "gold"},
    "ssd": {"loss": "nll", "source": "base", "temperature": 1.5},
    "sdft": {"ema": True, "decay": 0.99, "sync": 1, "temperature": 1.0},
    "gkd": {"alpha": 0.5, "temperature": 0.9},
    "opsd": {"temperature": 1.1},
}
# Where the release's launcher differs.
LAUNCHED = {mode: {"gamma": 0.01} for mode in BY_MODE if mode.startswith("agreement")} | {
    "unisd_star": {"gamma": 0.001, "decay": 0.98, "contrast": 0.01, "margin": 0.1, "matching": 0.01}
}


@pytest.fixture(autouse=True, scope="module")
def files_parsed_once():
    """Two thousand configurations share a few files."""
    patch = pytest.MonkeyPatch()
    parse = config_loading.parse_yaml
    parsed = functools.cache(lambda source, origin: pickle.dumps(parse(source, origin)))
    patch.setattr(config_loading, "parse_yaml", lambda source, origin: pickle.loads(parsed(source, origin)))
    yield
    patch.undo()


def load(mode, model, task, *overrides):
    files = [CONFIGS / "modes" / f"{mode}.yaml", PAPER / f"{model}.yaml", PAPER / f"{task}.yaml"]
    return load_config(files, overrides)


def expected(mode, model, task, preset):
    hub, rows = MODELS[model]
    launched = preset == "launcher"
    batch = 4 * rows // (2 if mode == "unisd_star" else 1) if launched else 16
    train, test, steps = LAUNCHED_MBPP if launched and task == "mbpp" else TASKS[task]
    prompt, completion = LENGTHS[preset]
    values = USUAL | BY_MODE[mode] | (LAUNCHED.get(mode, {}) if launched else {})
    values |= {"induced from": 5 if preset == "command" else 3}
    return (
        PUBLISHED
        | {"mode": mode, "preset": preset, "model.path": hub, "data.task": task}
        | {"data.train_split": train, "data.test_split": test}
        | {"train.batch_size": batch, "train.steps": steps[batch]}
        | {"data.max_prompt_length": prompt, "rollout.max_completion_length": completion}
        | {"rollout.mask_truncated_completions": launched and task == "tooluse"}
        | {SHORT[name]: value for name, value in values.items()}
    )


def test_the_tables_name_all_recipes_and_modes():
    assert {path.stem for path in PAPER.glob("*.yaml")} == {"common", *MODELS, *TASKS}
    assert set(BY_MODE) == set(KNOWN_MODES) - {"custom"}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mode", BY_MODE)
def test_every_recipe_has_the_numbers_of_the_tables(mode, preset):
    for model in MODELS:
        for task in TASKS:
            values = flatten(to_dict(load(mode, model, task, f"--preset={preset}")))
            table = expected(mode, model, task, preset)
            assert {name: values[name] for name in table} == table, (model, task)


@pytest.mark.parametrize("task", TASKS)
def test_splits_and_sizes_are_those_that_the_task_knows(task):
    known = get_task(task)
    config = load("plain", "qwen2.5-7b", task)
    for split, default in ((config.data.train_split, known.train), (config.data.test_split, known.test)):
        assert split in known.source.sizes and (split == default or split.startswith("sanitized"))
    items = known.source.sizes[config.data.train_split]
    if task != "scienceqa":  # published with the questions that have an image
        assert config.train.steps == items // 16


def test_the_ablation_of_unisd_star_keeps_its_batch_whatever_the_mode_becomes():
    config = load("unisd_star", "qwen2.5-0.5b", "cos_e", "--preset=launcher", "--mode=custom", "--teacher.ema=false")
    assert (config.train.batch_size, config.train.steps) == (32, 304)


def test_another_batch_gives_an_epoch_of_another_number_of_steps():
    config = load("ema", "qwen2.5-7b", "cos_e", "--train.batch_size=128")
    assert config.train.steps == 76  # 9741 / 128
    assert load("ema", "qwen2.5-7b", "cos_e", "--train.steps=5").train.steps == 5


def test_model_and_task_may_stand_in_any_order_and_one_file_may_be_missing():
    files = [PAPER / "gemma-3-4b.yaml", PAPER / "gsm8k.yaml"]
    for mode in ([CONFIGS / "modes" / "clip.yaml"], []):
        found = [load_config([*mode, *order], ["--preset=launcher"]) for order in (files, files[::-1])]
        assert found[0] == found[1] and found[0].train.batch_size == 32


def test_a_published_epoch_of_mbpp_is_too_short_for_the_ema_and_that_is_said():
    assert any("teacher.ema_sync_steps is 10" in line for line in warnings(load("ema", "qwen2.5-7b", "mbpp")))
    assert not warnings(load("ema", "qwen2.5-7b", "mbpp", "--preset=launcher"))


# --- scripts/estimate_paper.py ---


@pytest.fixture(scope="module")
def estimate():
    scripts = CONFIGS.parent / "scripts"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(scripts))  # it takes the models' sizes from aot_step
        spec = importlib.util.spec_from_file_location("estimate_paper", scripts / "estimate_paper.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


# One layer of 4 * ((2 * 2 + 2 * 1) * 2 + 3 * 3) = 84 weights, and 10 * 4 in each embedding.
SIZES = tiny_config(
    vocab_size=10, hidden_size=4, intermediate_size=3, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=2
)


def test_the_work_of_a_step_is_counted_by_hand(estimate):
    work = estimate.Work(2, prompt=3, teacher_prompt=5, completion=2, decoded=2, views=2, passes=2, recomputed=1)
    # Two rows: 168 a token for products, 16 for each pair of a token and one that it sees.
    read, student, view = (2 * (168 * length + 16 * pairs) for length, pairs in ((3, 6), (5, 15), (7, 28)))
    assert (read, student, view) == (1200, 2160, 3248)
    head = 2 * 4 * 10 * 4
    assert estimate.step_flops(SIZES, work) == read + 2 * (view + head) + 2 * (student + head) + student == 15456
    assert estimate.step_flops(SIZES, work._replace(decoded=0, views=0, recomputed=0)) == 2 * (student + head)


def test_sampling_reads_weights_and_cache_and_fetches_what_is_divided(estimate):
    work = estimate.Work(2, prompt=3, teacher_prompt=5, completion=2, decoded=2, views=2, passes=2, recomputed=1)
    machine = estimate.Machine("H200", devices=2, memory=100.0, link=50.0, divided=True)
    # (248 bytes of weights + 4 tokens of 8 bytes) at 50 bytes/s; the other half of the weights at 25 bytes/s.
    assert estimate.token_seconds(SIZES, work, machine, 0.5) == pytest.approx(280 / 50 + 124 / 25)
    copies = machine._replace(divided=False)
    assert estimate.token_seconds(SIZES, work, copies, 0.5) == pytest.approx(280 / 50)
    # The layer's 168 bytes, and a row of 5 tokens each.
    assert estimate.sampling_gib(SIZES, machine, 2, 5) == pytest.approx((84 / 2**30, 40 / 2**30))
    assert estimate.sampling_gib(SIZES, copies, 3, 5) == pytest.approx((168 / 2**30, 80 / 2**30))
    sampling, rest = estimate.step_seconds(SIZES, work, machine, (0.25, 0.5))
    assert sampling == pytest.approx(2 * (280 / 50 + 124 / 25)) and rest == pytest.approx(15456 / (2 * 989e12 * 0.25))


@pytest.mark.parametrize(
    ("mode", "views", "passes", "decoded"),
    [
        ("unisd_star", 5, 3, 9),
        ("agreement_tok_random", 4, 3, 9),
        ("plain", 1, 3, 9),
        ("sft", 0, 2, 0),
        ("ssd", 0, 2, 9),
    ],
)
def test_what_a_mode_computes(estimate, mode, views, passes, decoded):
    config = load(mode, "llama-3.1-8b", "cos_e")
    work = estimate.work_of(config, prompt=1, teacher_prompt=2, decoded=9)
    assert work == (16, 1, 2, 1024, decoded, views, passes, 1)


def test_the_estimate_says_that_it_is_one(estimate, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["estimate_paper.py", "--machines", "h200", "--modes", "sft,plain"])
    assert estimate.main() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("ESTIMATE, not measured") and "25% to 45% of the peak" in said[1] and len(said) == 5
    monkeypatch.setattr("sys.argv", ["estimate_paper.py", "--tasks", "mnist"])
    assert estimate.main() == 2 and "mnist.yaml" in capsys.readouterr().err
