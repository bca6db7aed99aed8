"""Configuration: inheritance, overrides, errors a user can act on, and what names a run."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unisd_jax.config import (
    Config,
    config_hash,
    difference,
    load_config,
    parse_command_line,
    to_dict,
    to_yaml,
    validate,
)
from unisd_jax.config_loading import deep_merge, flatten, walk_options
from unisd_jax.config_options import (
    DataOptions,
    EvaluationOptions,
    LoraOptions,
    ModelOptions,
    ObjectiveOptions,
    RolloutOptions,
    TeacherOptions,
    TrainOptions,
)
from unisd_jax.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PROG = "python -m unisd_jax.train"
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines are shared
OPTIONS = {name: kind for name, kind, _ in walk_options(Config)}


@pytest.fixture
def write(tmp_path):
    """Writes a file below the test's folder and returns its path."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def minimal(write) -> Path:
    return write("minimal.yaml", "model: {path: weights}\n")


def refusal(path: Path, *overrides: str) -> str:
    """The message with which a configuration is refused: always one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    # However deep the temporary folder lies.
    assert "\n" not in message and len(message.replace(str(path.parent), "")) < 400
    assert caught.value.__cause__ is None and (caught.value.__context__ is None or caught.value.__suppress_context__)
    return message


# --- The files that are shipped ---


def test_base_yaml_states_every_option_and_the_dataclasses_defaults():
    text = (CONFIGS / "base.yaml").read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    assert tree.pop("variants").keys() == {"parity.upstream", "preset.command", "preset.launcher"}
    assert set(flatten(tree)) == set(OPTIONS) - {"model.path"}
    assert "# path:" in text
    assert load_config(CONFIGS / "base.yaml", ["--model.path=x"]) == Config(model=ModelOptions(path="x"))


def test_every_option_in_base_yaml_has_a_comment():
    options, variants, _ = (CONFIGS / "base.yaml").read_text(encoding="utf-8").partition("\nvariants:\n")
    assert variants
    for line in options.splitlines():
        assert not re.match(r"\s*\w+: \S", line) or "  # " in line, f"no comment: {line}"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    config = load_config(path, ["--model.path=weights"])
    if path.parent.name == "modes":
        # What each mode changes, option by option, is in test_modes.py.
        assert config.mode == path.stem


def test_quickstart_and_its_baseline_differ_only_in_what_is_compared():
    quickstart, sft = (load_config(CONFIGS / f"{name}.yaml") for name in ("quickstart", "quickstart_sft"))
    assert (quickstart.mode, quickstart.teacher.ema, quickstart.teacher.placement) == ("unisd_star", True, "turns")
    assert quickstart.model.trainable == "lora" and quickstart.model.dtype == "float32"
    assert difference(to_dict(quickstart), to_dict(sft)) == [
        'name: "quickstart" -> "quickstart-sft"',
        'mode: "unisd_star" -> "sft"',
        "teacher.ema: true -> false",
        "teacher.ema_sync_steps: 1 -> 10",
        "teacher.ema_decay: 0.95 -> 0.9",
        "teacher.contexts.num_auxiliary_contexts: 3 -> 0",
        'teacher.contexts.method: "retrieval" -> "random"',
        'objective.loss: "divergence" -> "nll"',
        'objective.agreement.level: "token" -> "none"',
        "objective.contrast.contrastive_weight: 0.1 -> 0.0",
        "objective.matching.final_layer_distill_weight: 0.1 -> 0.0",
        'rollout.source: "student" -> "gold"',
    ]


# --- Inheritance ---


def test_inheritance_merges_deeply_and_replaces_lists(write):
    write("base.yaml", "model: {path: a, lora: {rank: 4, targets: [q, k]}}\ntrain: {steps: 5, batch_size: 8}\n")
    path = write("sub/top.yaml", "inherit: ../base.yaml\nmodel: {lora: {targets: [v]}}\ntrain: {steps: 6}\n")
    config = load_config(path)
    assert config.model.path == "a"
    assert config.model.lora == LoraOptions(rank=4, targets=("v",))
    assert config.train == TrainOptions(steps=6, batch_size=8)


def test_later_parents_win_and_the_file_wins_over_all(write):
    write("a.yaml", "model: {path: a}\nseed: 1\ntrain: {steps: 1, batch_size: 2}\n")
    write("b.yaml", "model: {path: b}\nseed: 2\n")
    config = load_config(write("top.yaml", "inherit: [a.yaml, b.yaml]\nseed: 3\n"))
    assert (config.model.path, config.seed, config.train.steps) == ("b", 3, 1)


def test_a_file_may_be_inherited_twice(write):
    write("root.yaml", "model: {path: a}\n")
    write("left.yaml", "inherit: root.yaml\nseed: 1\n")
    write("right.yaml", "inherit: root.yaml\ntrain: {steps: 2}\n")
    config = load_config(write("top.yaml", "inherit: [left.yaml, right.yaml]\n"))
    assert (config.seed, config.train.steps) == (1, 2)


def test_a_cycle_names_the_chain(write):
    write("b.yaml", "inherit: sub/c.yaml\n")
    write("sub/c.yaml", "inherit: ../a.yaml\n")
    message = refusal(write("a.yaml", "inherit: b.yaml\n"))
    assert "circle" in message
    assert re.search(r"a\.yaml -> \S*b\.yaml -> \S*sub/c\.yaml -> \S*a\.yaml$", message)


def test_a_file_that_inherits_itself(write):
    assert re.search(r"circle: \S*a\.yaml -> \S*a\.yaml$", refusal(write("a.yaml", "inherit: a.yaml\n")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("inherit: missing.yaml\n", r"missing\.yaml.*inherited by .*bad\.yaml.*No such file"),
        ("inherit: .\n", "Is a directory"),
        ('inherit: "a\\0b"\n', "cannot read configuration file"),
        ("inherit: 3\n", "inherit: expected a path or a list of paths, found 3"),
        ("inherit: [3]\n", r"inherit: expected a path or a list of paths, found \[3\]"),
        ("inherit: null\n", "inherit: expected a path"),
        ("- 1\n", "expected a mapping of options"),
        ("seed: 1\nmodel: [1\n", r"bad\.yaml, line 3: not valid YAML"),
        ("seed: 1\nseed: 2\n", r"line 2: not valid YAML: the key 'seed' appears twice"),
        ("train:\n  steps: 1\n  steps: 2\n", "line 3: .*'steps' appears twice"),
        ("name: 2026-13-45\n", "not valid YAML: month"),
        ("? [a]\n: 1\n", "unhashable"),
        ("name: !!python/object:os.system x\n", "not valid YAML"),
        ("", "model.path is missing: set it to a string"),
        ("1: x\nmodel: {path: a}\n", 'unknown option "1"'),
        ("train: &a {steps: *a}\nmodel: {path: a}\n", "train.steps: expected an integer"),
        ("train:\nmodel: {path: a}\n", "train: expected a section of options, found null"),
        ("name: 2026-01-01\nmodel: {path: a}\n", r'name: expected a string, found "2026-01-01" \(a date\)'),
    ],
)  # fmt: skip
def test_bad_files(write, text, said):
    assert re.search(said, refusal(write("bad.yaml", text)))


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff\xfe\xfd\n")
    assert "bad.yaml: not valid YAML" in refusal(tmp_path / "bad.yaml")


def test_yaml_merge_keys_are_not_mistaken_for_keys_written_twice(write):
    text = "model: {path: a}\nevaluation: {<<: {batch_size: 8, drift_tokens: 3}, batch_size: 4}\n"
    assert load_config(write("a.yaml", text)).evaluation == EvaluationOptions(batch_size=4, drift_tokens=3)


def test_paths_stay_as_written(write):
    path = write("sub/a.yaml", "model: {path: models/x}\noutput_dir: out\n")
    config = load_config(path)
    assert (config.model.path, config.output_dir) == ("models/x", "out")


TREES = st.recursive(
    st.integers() | st.text(max_size=3) | st.none() | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
MAPPINGS = st.dictionaries(st.sampled_from("abc"), TREES, max_size=3)


@PATIENT
@given(MAPPINGS, MAPPINGS)
def test_deep_merge_law(base, top):
    before = copy.deepcopy((base, top))
    merged = deep_merge(base, top)
    assert (base, top) == before
    assert merged.keys() == base.keys() | top.keys()
    for key, value in merged.items():
        if key not in top:
            assert value == base[key]
        elif key in base and isinstance(top[key], dict) and isinstance(base[key], dict):
            assert value == deep_merge(base[key], top[key])
        else:
            assert value == top[key]
    assert deep_merge(base, {}) == base and deep_merge({}, top) == top and deep_merge(base, base) == base


@PATIENT
@given(MAPPINGS, MAPPINGS)
def test_deep_merge_keeps_every_leaf_of_the_top(base, top):
    merged = flatten(deep_merge(base, top))
    for key, value in flatten(top).items():
        assert value == {} or merged[key] == value


# --- Several files, and steps by items ---


def test_of_several_files_every_one_counts_and_later_ones_win(write):
    first = write("first.yaml", "model: {path: a}\nseed: 1\ntrain: {steps: 5, batch_size: 8}\n")
    second = write("sub/second.yaml", "seed: 2\ntrain: {steps: 6}\n")
    third = write("third.yaml", "seed: 3\n")
    config = load_config([first, second, third], ["--train.micro_batches=2"])
    assert (config.model.path, config.seed) == ("a", 3)
    assert config.train == TrainOptions(steps=6, batch_size=8, micro_batches=2)
    top = write("top.yaml", "inherit: [first.yaml, sub/second.yaml, third.yaml]\n")
    assert load_config(top, ["--train.micro_batches=2"]) == config
    assert load_config([first]) == load_config(first) == load_config(str(first))


def test_a_file_that_several_inherit_counts_once_where_it_is_met_first(write):
    write("base.yaml", "model: {path: a}\nseed: 1\ntrain: {steps: 5}\n")
    left, right = write("left.yaml", "inherit: base.yaml\nseed: 2\n"), write("right.yaml", "inherit: base.yaml\n")
    assert load_config([left, right]).seed == 2
    assert load_config([left, write("other.yaml", "train: {steps: 6}\n")]).train.steps == 6


def test_the_same_file_twice_is_refused_however_it_is_written(write, tmp_path):
    path = write("sub/a.yaml", "model: {path: a}\n")
    (tmp_path / "link.yaml").symlink_to(path)
    for other in (path, tmp_path / "sub" / ".." / "sub" / "a.yaml", tmp_path / "link.yaml"):
        with pytest.raises(ConfigError, match=r"a\.yaml|link\.yaml") as caught:
            load_config([path, other])
        assert "is given twice" in str(caught.value)


def test_variants_work_through_all_files_in_their_order(write):
    first = write("first.yaml", "model: {path: a}\nvariants:\n  preset.launcher: {seed: 5, train: {steps: 7}}\n")
    second = write("second.yaml", "seed: 2\nvariants:\n  preset.launcher: {train: {batch_size: 3}}\n")
    both = load_config([first, second], ["--preset=launcher"])
    assert (both.seed, both.train.steps, both.train.batch_size) == (2, 7, 3)
    assert load_config([second, first], ["--preset=launcher"]).seed == 5
    with pytest.raises(ConfigError, match="has variants: preset.command") as caught:
        load_config([first, second], ["--preset=command"])
    assert "first.yaml" in str(caught.value) and "second.yaml" in str(caught.value)


def test_a_variant_of_preset_and_mode_goes_by_the_mode_of_the_files(write):
    path = write(
        "a.yaml",
        "model: {path: a}\nvariants:\n"
        "  preset.launcher: {train: {batch_size: 8}}\n  preset.launcher+mode.unisd_star: {train: {batch_size: 4}}\n",
    )
    star = CONFIGS / "modes" / "unisd_star.yaml"
    custom = ["--mode=custom", "--teacher.ema=false", "--preset=launcher"]
    for files, words, batch in (
        ([star, path], ["--preset=launcher"], 4),
        ([star, path], custom, 4),
        ([star, path], [], 16),
        ([CONFIGS / "modes" / "ema.yaml", path], ["--preset=launcher"], 8),
    ):
        assert load_config(files, words).train.batch_size == batch


def test_steps_written_as_items_are_one_pass_in_whole_batches(write, minimal):
    path = write("a.yaml", "model: {path: a}\ntrain: {steps: 100 items, batch_size: 8}\n")
    config = load_config(path)
    assert config.train.steps == 12
    assert load_config(path, ["--train.batch_size=50"]).train.steps == 2
    assert load_config(path, ["--train.steps=3"]).train.steps == 3
    assert load_config(minimal, ["--train.steps=33 items"]).train.steps == 2, "the default is 16 examples"
    assert load_config(write("resolved.yaml", to_yaml(config))) == config
    assert "less than one batch of train.batch_size (101)" in refusal(path, "--train.batch_size=101")
    assert "train.batch_size: expected an integer" in refusal(path, "--train.batch_size=many")
    assert "train.batch_size must be" in refusal(path, "--train.batch_size=0")
    assert "train.steps: expected an integer" in refusal(path, "--train.steps=ten items")


# --- Overrides and types ---


def test_overrides_in_order_over_the_file(minimal):
    config = load_config(
        minimal,
        [
            "--train.steps=7", "--train.steps=9", "--model.lora.targets=[q, v]", "--model.lora={rank: 3}",
            "--optimizer.learning_rate=1e-4", "--optimizer.eps=1", "--data.train_limit=5",
            "--evaluation.enabled=false", "--data.overlong=error", "--teacher.condition=gold",
        ],
    )  # fmt: skip
    assert config.train.steps == 9
    assert config.model.lora == LoraOptions(rank=3, targets=("q", "v"))
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.eps == 1.0 and type(config.optimizer.eps) is float
    assert (config.data.train_limit, config.evaluation.enabled, config.data.overlong) == (5, False, "error")


@pytest.mark.parametrize("text", ["1e-4", "'1e-4'", "0.0001", "1.0e-4", "1E-4"])
def test_ways_to_write_a_float(write, text):
    path = write("a.yaml", f"model: {{path: a}}\noptimizer: {{learning_rate: {text}}}\n")
    assert load_config(path).optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("007", "007"),
        ("1e3", "1e3"),
        ("no", "no"),
        ("2026-01-01", "2026-01-01"),
        ("1:30", "1:30"),
        ("'a b'", "a b"),
    ],
)
def test_a_string_option_keeps_what_was_typed(minimal, raw, name):
    assert load_config(minimal, [f"--name={raw}"]).name == name


def test_null_is_null_even_for_a_string_option(minimal):
    overrides = ["--data.train_path=items.jsonl", "--data.train_path=null"]
    assert load_config(minimal, overrides).data.train_path is None
    assert load_config(minimal, overrides[:1]).data.train_path == "items.jsonl"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--train.stps=3", 'unknown option "train.stps"; did you mean "train.steps"?'),
        ("--model.lora.rnak=3", 'unknown option "model.lora.rnak"; did you mean "model.lora.rank"?'),
        ("--optimiser.learning_rate=3", 'unknown option "optimiser"; did you mean "optimizer"?'),
        ("--lora.rank=3", 'unknown option "lora.rank"; did you mean "model.lora.rank"?'),
        ("--learning_rate=3", 'unknown option "learning_rate"; did you mean "optimizer.learning_rate"?'),
        ("--batch_size=3", 'did you mean "train.batch_size" or "evaluation.batch_size"?'),
        ("--mesh.zzz=3", 'unknown option "mesh.zzz"; expected one of data, fsdp, tensor'),
        ("--inherit=a.yaml", 'unknown option "inherit"'),
        ("--train.steps=abc", 'train.steps: expected an integer, found "abc" (a string)'),
        ("--train.steps=1.5", "train.steps: expected an integer, found 1.5 (a number)"),
        ("--train.steps=true", "train.steps: expected an integer, found true (a boolean)"),
        ("--train.steps=null", "train.steps: expected an integer, found null"),
        ("--train.steps=", "train.steps: expected an integer, found null"),
        ("--train.steps.x=1", 'train.steps: expected an integer, found {"x": 1} (a mapping)'),
        ("--optimizer.b1=abc", 'optimizer.b1: expected a number, found "abc" (a string)'),
        ("--optimizer.b1=true", "optimizer.b1: expected a number, found true (a boolean)"),
        ("--optimizer.b1=[1]", "optimizer.b1: expected a number, found [1] (a list)"),
        ("--optimizer.eps=1" + "0" * 400, "optimizer.eps: expected a number, found 1000"),
        ("--evaluation.enabled=1", "evaluation.enabled: expected true or false, found 1 (an integer)"),
        ("--data.shuffle='true'", 'data.shuffle: expected true or false, found "true" (a string)'),
        ("--seed=" + "1" * 5000, "not valid YAML"),
        ("--name=null", "name: expected a string, found null"),
        ("--data.train_limit=x", 'data.train_limit: expected an integer or null, found "x" (a string)'),
        ("--model.lora.targets=q", 'model.lora.targets: expected a list of strings, found "q" (a string)'),
        ("--model.lora.targets=[1]", "model.lora.targets: expected a list of strings, found [1] (a list)"),
        ("--model=3", "model: expected a section of options, found 3 (an integer)"),
        ("--model.lora=null", "model.lora: expected a section of options, found null"),
        (
            "--data.overlong=dorp",
            'data.overlong: expected one of drop, error, found "dorp" (a string); did you mean "drop"?',
        ),
        ("--model.dtype=float16", 'did you mean "bfloat16"?'),
        ("--mode=zzz", "mode: expected one of plain, agreement_seq_random, agreement_seq_retrieval, "),
        ("--mode=unisd", 'found "unisd" (a string); did you mean "unisd_star"?'),
        ("--preset=lancher", 'found "lancher" (a string); did you mean "launcher"?'),
        ("--parity=zzz", 'parity: expected one of none, upstream, found "zzz" (a string)'),
        ("--teacher.condition=null", "teacher.condition: expected one of gold, other, self, none, found null"),
        ("--objective.clip.token_clip=x", 'objective.clip.token_clip: expected a number or null, found "x" (a string)'),
        ("--train.steps=[1", '"--train.steps=[1", line 1: not valid YAML'),
        ("--train.steps={a: 1, a: 2}", "appears twice"),
        ("train.steps=1", 'expected an override of the form --section.option=value, found "train.steps=1"'),
        ("--train.steps", 'expected an override of the form --section.option=value, found "--train.steps"'),
        ("--=1", "expected an override of the form"),
        ("--train..steps=1", "expected an override of the form"),
    ],
)  # fmt: skip
def test_bad_overrides(minimal, override, said):
    assert said in refusal(minimal, override)


def test_an_unknown_key_deep_in_a_file(write):
    path = write("a.yaml", "model:\n  path: a\n  lora:\n    alhpa: 3\n")
    assert refusal(path) == 'unknown option "model.lora.alhpa"; did you mean "model.lora.alpha"?'


# --- Ranges and combinations ---

_OUT_OF_RANGE = {
    "rollout.staleness": ["-1"],
    "rollout.vllm.port": ["0", "65536"],
    "rollout.vllm.max_sequences": ["0"],
    "rollout.vllm.max_length": ["0"],
    "rollout.vllm.attempts": ["0"],
    "rollout.vllm.cache_gib": ["0", "-1"],
    "rollout.vllm.start_timeout": ["0"],
    "rollout.vllm.request_timeout": ["0"],
    "rollout.vllm.max_probe_gap": ["0"],
    "rollout.vllm.python": ["''"],
    "rollout.vllm.host": ["''"],
    "rollout.vllm.devices": ["''"],
    "rollout.vllm.sync_dir": ["''"],
    "model.lora.rank": ["0", "-1"],
    "model.lora.alpha": ["0", "-1"],
    "model.lora.dropout": ["-0.1", "1"],
    "data.train_limit": ["0"],
    "data.test_limit": ["0"],
    "data.max_prompt_length": ["0"],
    "data.length_multiple": ["0"],
    "teacher.ema_sync_steps": ["0"],
    "teacher.ema_decay": ["-0.1", "1.1"],
    "teacher.self_samples": ["1", "0"],
    "teacher.self_min_agreement": ["-0.1", "1.1"],
    "teacher.cache_dir": ["''"],
    "teacher.contexts.num_auxiliary_contexts": ["-1"],
    "teacher.contexts.demonstrations": ["0"],
    "teacher.contexts.pool": ["1", "0"],
    "teacher.contexts.encoder_path": ["''"],
    "teacher.contexts.induction_demonstrations": ["0"],
    "teacher.contexts.induction_instructions": ["0"],
    "teacher.contexts.induction_temperature": ["0", "-1"],
    "teacher.contexts.induction_max_length": ["0"],
    "teacher.negatives.per_item": ["0"],
    "teacher.negatives.attempts": ["0"],
    "teacher.negatives.temperature": ["0"],
    "teacher.negatives.max_length": ["0"],
    "teacher.negatives.min_coverage": ["-0.1", "1.1"],
    "objective.alpha": ["-0.1", "1.1"],
    "objective.entry_ceiling": ["0", "-1"],
    "objective.num_loss_tokens_to_skip": ["-1"],
    "objective.top_entropy_quantile": ["0", "1.1"],
    "objective.clip.token_clip": ["0", "-1"],
    "objective.clip.token_clip_quantile": ["0", "1.1"],
    "objective.agreement.gamma_agreement": ["-1"],
    "objective.agreement.agreement_quantile": ["-0.1", "1.1"],
    "objective.agreement.agreement_cap": ["-1"],
    "objective.agreement.views_per_pass": ["0", "-1"],
    "objective.agreement.budget.share": ["0", "1.1"],
    "objective.agreement.budget.audit_steps": ["-1"],
    "objective.contrast.contrastive_weight": ["-1"],
    "objective.contrast.contrastive_margin": ["-1"],
    "objective.matching.final_layer_distill_weight": ["-1"],
    "objective.importance.cap": ["0", "-1"],
    "rollout.on_policy_share": ["-0.1", "1.1"],
    "rollout.min_completion_length": ["-1"],
    "rollout.max_completion_length": ["0"],
    "rollout.temperature": ["0", "-1"],
    "rollout.top_p": ["0", "1.1"],
    "rollout.top_k": ["-1"],
    "rollout.max_sampler_gap": ["0", "-1"],
    "rollout.min_p": ["-0.1", "1"],
    "optimizer.learning_rate": ["0", "-1"],
    "optimizer.warmup_ratio": ["-0.1", "1.1"],
    "optimizer.b1": ["-0.1", "1"],
    "optimizer.b2": ["-0.1", "1"],
    "optimizer.eps": ["0"],
    "optimizer.weight_decay": ["-0.1"],
    "optimizer.max_grad_norm": ["0"],
    "train.steps": ["0"],
    "train.batch_size": ["0"],
    "train.micro_batches": ["0", "-1"],
    "mesh.data": ["0", "-1"],
    "mesh.fsdp": ["0"],
    "mesh.tensor": ["0"],
    "distributed.coordinator": ["''"],
    "distributed.num_processes": ["0"],
    "distributed.process_id": ["-1"],
    "distributed.timeout": ["0"],
    "data.length_buckets": ["0"],
    "head.chunk_size": ["0"],
    "head.vocab_block": ["0"],
    "evaluation.batch_size": ["0"],
    "evaluation.max_completion_length": ["0"],
    "evaluation.drift_tokens": ["-1"],
    "evaluation.every": ["-1"],
    "evaluation.every_items": ["0"],
    "measure.samples": ["0"],
    "measure.temperature": ["-0.1"],
    "measure.top_p": ["0", "1.1"],
    "measure.top_k": ["-1"],
    "measure.min_p": ["-0.1", "1"],
    "measure.retries": ["-1"],
    "measure.retry_temperature": ["0"],
    "resources.device_watts": ["0", "-1"],
    "resources.utilization": ["0", "1.1"],
    "resources.pue": ["0.9"],
    "resources.carbon_g_per_kwh": ["-1"],
    "checkpoint.every": ["0"],
    "checkpoint.keep": ["0"],
    "logging.samples": ["-1"],
    "logging.inert_after": ["0"],
    "seed": ["-1", "4294967296"],
    "data.form.option_seed": ["-1", "4294967296"],
    "name": ["''", "a/b", "..", ".hidden", "' '", '"a\\\\b"'],
    "output_dir": ["''"],
    "model.path": ["''"],
    "logging.wandb_project": ["''"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in _OUT_OF_RANGE.items() for value in values]
)
def test_out_of_range(minimal, name, value):
    assert refusal(minimal, f"--{name}={value}").startswith(f"{name} must be ")


def test_every_number_has_a_range_and_a_test_for_it():
    numbers = {name for name, kind in OPTIONS.items() if kind in (int, float, int | None, float | None)}
    assert numbers - set(_OUT_OF_RANGE) == set()


@pytest.mark.parametrize("name", [name for name, kind in OPTIONS.items() if kind in (float, float | None)])
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan", "1e999"])
def test_numbers_are_finite(minimal, name, value):
    assert refusal(minimal, f"--{name}={value}").startswith(f"{name} must be a finite number, found ")


@pytest.mark.parametrize(
    "overrides",
    [
        ["--objective.alpha=0"], ["--objective.alpha=1"], ["--teacher.ema_decay=0"],
        ["--teacher.ema_decay=1"], ["--rollout.top_p=1"], ["--rollout.min_p=0"],
        ["--model.lora.rank=1"], ["--checkpoint.keep=1"],
        ["--evaluation.drift_tokens=0"], ["--evaluation.every=1"], ["--logging.samples=0"],
        ["--measure.samples=5", "--measure.temperature=0.7", "--measure.top_p=0.9"], ["--resources.utilization=1"],
        ["--seed=4294967295"],
        ["--optimizer.warmup_ratio=1"], ["--optimizer.warmup_ratio=0"], ["--train.micro_batches=16"],
        ["--mesh.data=4", "--mesh.fsdp=2", "--mesh.tensor=3", "--train.micro_batches=2"],
        ["--mode=contrastive", "--objective.contrast.contrastive_weight=1", "--teacher.condition=none"],
        ["--data.task=jsonl", "--data.train_path=a", "--data.test_path=b"],
        ["--model.lora.dropout=0"], ["--objective.top_entropy_quantile=1"], ["--teacher.self_samples=2"],
        ["--mode=clip", "--objective.clip.token_clip_quantile=1"],
        ["--teacher.negatives.min_coverage=0"], ["--teacher.negatives.min_coverage=1"],
        ["--rollout.on_policy_share=0"],
        ["--rollout.max_completion_length=4", "--objective.num_loss_tokens_to_skip=3"],
    ],
)  # fmt: skip
def test_the_edges_of_the_ranges_are_allowed(minimal, overrides):
    load_config(minimal, overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--train.micro_batches=3"], "train.batch_size (16) must be divisible by train.micro_batches (3)"),
        (["--evaluation.every=5", "--evaluation.enabled=false"], "evaluation.every is 5, but evaluation.enabled is"),
        (["--measure.samples=2"], "measure.samples is 2, but measure.temperature is 0"),
        (["--measure.top_p=0.9"], "measure.top_p narrows what is sampled, but measure.temperature is 0"),
        (
            ["--train.micro_batches=4", "--mesh.data=2", "--mesh.fsdp=4"],
            "train.batch_size / train.micro_batches (4) must be divisible by mesh.data * mesh.fsdp (8)",
        ),
        (["--model.lora.targets=[]"], "model.lora.targets must name at least one of q, k"),
        (["--model.lora.targets=[q, gat]"], 'found "gat"; did you mean "gate"?'),
        (["--model.lora.targets=[q, v, q]"], "model.lora.targets must name each projection once"),
        (["--mode=ema"], 'mode "ema" needs ema, and it is switched off (teacher.ema)'),
        (["--teacher.ema=true"], 'mode "plain" has no ema, and it is switched on (teacher.ema)'),
        (["--mode=sft"], 'mode "sft" needs objective.loss="nll", found "divergence"'),
        (["--mode=sft", "--objective.loss=nll"], 'mode "sft" needs rollout.source="gold", found "student"'),
        (
            ["--mode=sft", "--objective.loss=nll", "--rollout.source=gold", "--teacher.ema=true"],
            'mode "sft" has no ema, and it is switched on (teacher.ema)',
        ),
        (["--objective.loss=nll"], 'mode "plain" needs objective.loss="divergence", found "nll"'),
        (["--mode=ema", "--teacher.ema=true", "--objective.loss=nll"], 'mode "ema" needs objective.loss'),
        (["--teacher.condition=none"], "teacher would equal the student at the start"),
        (["--rollout.staleness=1"], "completions of older weights need importance weights; set objective.importance"),
        (
            ["--mode=sft", "--objective.loss=nll", "--rollout.source=gold", "--rollout.staleness=1"],
            "rollout.staleness is 1: completions are sampled ahead from the student, it needs rollout.source=student",
        ),
        (["--rollout.vllm.addresses=[10.0.0.7]"], 'must be like http://10.0.0.7:8000, found "10.0.0.7"'),
        (["--rollout.vllm.sync=adapter", "--model.trainable=full"], "it needs model.trainable=lora"),
    ],
)
def test_contradictions(minimal, overrides, said):
    assert said in refusal(minimal, *overrides)


def test_a_configuration_built_in_python_is_checked_too():
    model = ModelOptions(path="a")
    validate(Config(model=model))
    with pytest.raises(ConfigError, match="train.steps must be at least 1"):
        validate(Config(model=model, train=TrainOptions(steps=0)))
    with pytest.raises(ConfigError, match="train.steps: expected an integer"):
        validate(Config(model=model, train=TrainOptions(steps="10")))


def test_configurations_cannot_be_changed(minimal):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(minimal).train.steps = 3


# --- Round trips, hash, difference ---

_FRACTION = st.floats(0, 1)
_POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
_COUNT = st.integers(1, 10**9)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
CONFIGURATIONS = st.builds(
    Config,
    name=_TEXT.filter(lambda text: not text.startswith(".") and not set(text) & set("/\\\0")),
    output_dir=_TEXT,
    seed=st.integers(0, 2**32 - 1),
    model=st.builds(
        ModelOptions,
        path=_TEXT
        | st.sampled_from(["null", "1e-4", "yes", "~", "2026-01-01", "0x1f", "1:30", "# a", "a: b", "a\x85"]),
        dtype=st.sampled_from(["float32", "bfloat16"]),
        lora=st.builds(
            LoraOptions,
            rank=_COUNT,
            alpha=_POSITIVE,
            dropout=st.floats(0, 1, exclude_max=True),
            targets=st.lists(st.sampled_from(["q", "k", "v", "gate"]), min_size=1, unique=True).map(tuple),
        ),
    ),
    data=st.builds(DataOptions, train_path=st.none() | _TEXT, train_limit=st.none() | _COUNT, shuffle=st.booleans()),
    teacher=st.builds(TeacherOptions, ema_decay=_FRACTION),
    objective=st.builds(
        ObjectiveOptions,
        alpha=_FRACTION,
        entry_ceiling=st.none() | _POSITIVE,
        normalize=st.sampled_from(["batch", "sequence", "upstream"]),
        num_loss_tokens_to_skip=st.integers(0, 1023),
    ),
    rollout=st.builds(RolloutOptions, temperature=_POSITIVE, top_k=st.integers(0, 10**6)),
)


@PATIENT
@given(CONFIGURATIONS)
def test_to_yaml_reads_back_as_the_same_configuration(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    again = load_config(path)
    assert again == config
    assert to_dict(again) == to_dict(config)
    assert config_hash(again) == config_hash(config)
    assert difference(to_dict(again), to_dict(config)) == []


@PATIENT
@given(CONFIGURATIONS)
def test_every_option_goes_through_an_override(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "empty.yaml"
    path.write_text("{}", encoding="utf-8")

    def word(value) -> str:
        style = '"' if isinstance(value, str) else None
        text = yaml.safe_dump(value, default_style=style, default_flow_style=True, width=10**9)
        return text.removesuffix("\n").removesuffix("\n...")

    overrides = [f"--{name}={word(value)}" for name, value in flatten(to_dict(config)).items()]
    assert load_config(path, overrides) == config


def test_to_dict_holds_every_option_in_plain_types(minimal):
    tree = to_dict(load_config(minimal))
    assert list(flatten(tree)) == list(OPTIONS)
    assert tree["model"]["lora"]["targets"] == ["q", "k", "v", "o", "gate", "up", "down"]


def test_the_hash_names_the_numbers_only(write):
    """Every option changed alone, in a run that has so much switched on that each of them may be."""
    everything = write(
        "everything.yaml",
        "mode: custom\nmodel: {path: weights}\nteacher: {ema: true, contexts: {num_auxiliary_contexts: 4}}\n"
        "objective: {agreement: {level: token}, contrast: {contrastive_weight: 0.1},"
        " matching: {final_layer_distill_weight: 0.1}}\n",
    )
    values = {
        bool: "true", int: "7", float: "0.125", str: "other",
        str | None: "other", int | None: "7", float | None: "0.125",
    }  # fmt: skip
    special = {
        "preset": None, "parity": None, "objective.loss": None,  # not alone; see below
        "data.source": "hub", "data.form.answer": "json", "data.form.reasoning": "false",
        "data.form.lecture": "false", "data.form.hint": "false",
        "mode": "unisd_star", "teacher.ema": "false", "teacher.condition": "none",
        "model.dtype": "float32", "model.trainable": "full", "model.lora.targets": "[q]",
        "data.shuffle": "false", "data.overlong": "error", "teacher.placement": "turns",
        "teacher.other_method": "retrieval", "teacher.ema_adapters": "false", "teacher.ema_dtype": "bfloat16",
        "teacher.contexts.method": "induction", "teacher.contexts.encoder": "minilm",
        "teacher.negatives.source": "model", "objective.normalize": "upstream",
        "objective.agreement.level": "sequence", "objective.agreement.agreement_stat": "range",
        "objective.agreement.views_per_pass": "2", "objective.agreement.budget.unit": "token",
        "objective.agreement.budget.signal": "spread", "objective.importance.level": "token",
        "rollout.source": "base", "rollout.stop": "tokenizer",
        "rollout.engine": "vllm", "rollout.staleness": "7 --objective.importance.level=token",
        "rollout.vllm.addresses": "[http://a:1]", "rollout.vllm.arguments": "[--a]", "rollout.vllm.dtype": "float32",
        "rollout.vllm.sync": "adapter", "rollout.vllm.take_over": "true",
        "optimizer.schedule": "constant", "evaluation.enabled": "false",
        "head.implementation": "chunked", "model.attention": "xla", "train.remat": "layer",
        "train.micro_batches": "2", "mesh.data": "2", "mesh.fsdp": "2", "resources.pue": "1.125",
        "measure.samples": "7 --measure.temperature=0.7", "measure.top_p": "0.5 --measure.temperature=0.7",
        "measure.top_k": "7 --measure.temperature=0.7", "measure.min_p": "0.5 --measure.temperature=0.7",
    }  # fmt: skip
    original = config_hash(load_config(everything))
    assert re.fullmatch("[0-9a-f]{12}", original)
    for name, kind in OPTIONS.items():
        value = special.get(name, values.get(kind, ""))
        if value is None:
            continue
        config = load_config(everything, f"--{name}={value}".split(" "))
        assert config != load_config(everything), f"{name} was not changed"
        free = name in (
            "teacher.cache_dir", "train.compilation_cache", "evaluation.every", "evaluation.every_items",
        )  # fmt: skip
        free |= name.startswith("rollout.vllm.") and name not in (
            "rollout.vllm.dtype", "rollout.vllm.sync", "rollout.vllm.arguments",
        )  # fmt: skip
        free |= name.split(".")[0] in (
            "name", "output_dir", "logging", "checkpoint", "distributed", "measure", "resources",
        )  # fmt: skip
        assert (config_hash(config) == original) is free, name
    base = CONFIGS / "base.yaml"
    nll = ["--mode=custom", "--objective.loss=nll", "--rollout.source=gold"]
    words = ([], ["--mode=custom"], nll, ["--parity=upstream"], ["--preset=command"], ["--preset=launcher"])
    assert len({config_hash(load_config(base, ["--model.path=weights", *more])) for more in words}) == len(words)


def test_a_preset_is_not_hashed_but_what_it_sets_is():
    same = ["--data.max_prompt_length=9", "--rollout.max_completion_length=9", "--train.micro_batches=1"]
    same.append("--teacher.contexts.induction_demonstrations=3")
    configs = [
        load_config(CONFIGS / "base.yaml", ["--model.path=weights", f"--preset={preset}", *same])
        for preset in ("none", "command", "launcher")
    ]
    assert [config.preset for config in configs] == ["none", "command", "launcher"]
    assert len({config_hash(config) for config in configs}) == 1


def test_the_hash_does_not_depend_on_how_a_number_is_written(minimal):
    integer = Config(model=ModelOptions(path="weights"), objective=ObjectiveOptions(alpha=0))
    assert config_hash(integer) == config_hash(load_config(minimal))


def test_difference():
    old = {"train": {"steps": 10, "batch_size": 4}, "mode": "ema", "gone": {"a": None}, "same": [1]}
    new = {"train": {"steps": 20, "batch_size": 4}, "mode": "ema", "same": [1], "new": True}
    assert difference(old, new) == [
        "train.steps: 10 -> 20",
        "gone.a: null -> (absent)",
        "new: (absent) -> true",
    ]


# --- The command line ---


def test_command_line(minimal):
    line = parse_command_line(["--train.steps=3", "--config", str(minimal), "--dry-run"], PROG)
    assert (line.config.train.steps, line.dry_run, line.print_config) == (3, True, False)
    line = parse_command_line([f"--config={minimal}", "--print-config"], PROG)
    assert (line.dry_run, line.print_config) == (False, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--config FILE is missing"),
        (["--config"], "--config needs a file"),
        (["--config="], "--config needs a file"),
        (["--config", "--dry-run"], "--config needs a file"),
        (["--config", "FILE", "--config", "FILE"], "is given twice, or inherited by one before it"),
        (["--config", "FILE", "--config"], "--config needs a file"),
        (["--config", "FILE", "--config", "nowhere.yaml"], 'cannot read configuration file "nowhere.yaml"'),
        (["--config", "FILE", "--train.steps", "3"], "--train.steps needs its value after an equals sign"),
        (["--config", "FILE", "extra"], 'expected --section.option=value, found "extra"'),
        (["--config", "FILE", "train.steps=3"], 'expected --section.option=value, found "train.steps=3"'),
        (["--config", "FILE", "-v"], 'found "-v"'),
        (["--config", "FILE", "--dryrun"], 'did you mean "--dry-run"?'),
        (["--config", "FILE", "--dry-run=true"], "--dry-run takes no value"),
        (["--config", "FILE", "--train.stps=3"], 'did you mean "train.steps"?'),
        (["--config", "nowhere.yaml"], 'cannot read configuration file "nowhere.yaml": No such file'),
    ],
)
def test_bad_command_lines(minimal, words, said):
    with pytest.raises(ConfigError) as caught:
        parse_command_line([str(minimal) if word == "FILE" else word for word in words], PROG)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--config", "nowhere.yaml", "--help"]])
def test_help_lists_every_option_and_exits_with_zero(capsys, words):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(words, PROG)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {PROG} --config FILE")
    assert all(f"--{name}=" in text for name in OPTIONS)
    assert "--dry-run" in text and "one of plain, agreement_seq_random, " in text


@pytest.mark.parametrize("option", ["parity=upstream", "preset=launcher"])
def test_the_resolved_configuration_of_a_variant_is_read_back(tmp_path, option):
    config = load_config(CONFIGS / "base.yaml", ["--model.path=weights", f"--{option}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
