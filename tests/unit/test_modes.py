"""The modes: what each one sets under every preset, what wins over what, and which combinations are refused."""

import itertools
import re
from pathlib import Path

import pytest

from unisd_jax.config import difference, load_config, to_dict, warnings
from unisd_jax.config_loading import flatten
from unisd_jax.config_modes import MECHANISMS, MODES, UPSTREAM, mechanisms
from unisd_jax.errors import ConfigError
from unisd_jax.experiment import step_settings
from unisd_jax.losses import largest_divergence

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASE = CONFIGS / "base.yaml"
METHODS = ("random", "retrieval", "induction")
AGREEMENT = [f"agreement_{level}_{method}" for level in ("seq", "tok") for method in METHODS]
RELEASE = [*AGREEMENT, "ema", "contrastive", "match_joint", "match_repr", "clip", "unisd_star"]
BASELINES = ["sft", "ssd", "sdft", "gkd", "opsd"]
PRESETS = ["none", "command", "launcher"]


def load(mode, *overrides):
    return load_config(CONFIGS / "modes" / f"{mode}.yaml", ["--model.path=weights", *overrides])


def options(config):
    """{dotted name: value}."""
    return flatten(to_dict(config))


def refusal(path, *overrides):
    """The message with which a configuration is refused: always one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["--model.path=weights", *overrides])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused_mode(mode, *overrides):
    return refusal(CONFIGS / "modes" / f"{mode}.yaml", *overrides)


# --- The tables ---

# What a mode changes in the base configuration.
CHANGES = {
    "plain": {},
    **{
        f"agreement_{short}_{method}": {
            "teacher.contexts.num_auxiliary_contexts": 3,
            "teacher.contexts.method": method,
            "objective.agreement.level": level,
        }
        for short, level in (("seq", "sequence"), ("tok", "token"))
        for method in METHODS
    },
    "ema": {"teacher.ema": True},
    "contrastive": {"objective.contrast.contrastive_weight": 0.1},
    "match_joint": {"objective.matching.final_layer_distill_weight": 0.1},
    "match_repr": {"objective.loss": "none", "objective.matching.final_layer_distill_weight": 1.0},
    "clip": {"objective.clip.token_clip": 10.0},
    "unisd_star": {
        "teacher.ema": True,
        "teacher.contexts.num_auxiliary_contexts": 3,
        "teacher.contexts.method": "retrieval",
        "objective.agreement.level": "token",
        "objective.contrast.contrastive_weight": 0.1,
        "objective.matching.final_layer_distill_weight": 0.1,
    },
    "sft": {"objective.loss": "nll", "rollout.source": "gold"},
    "ssd": {
        "objective.loss": "nll",
        "rollout.source": "base",
        "rollout.temperature": 1.5,
        "rollout.top_k": 20,
        "rollout.top_p": 0.8,
        "rollout.min_completion_length": 3,
    },
    "sdft": {
        "teacher.ema": True,
        "teacher.ema_sync_steps": 1,
        "teacher.ema_decay": 0.99,
        "objective.normalize": "sequence",
        "objective.num_loss_tokens_to_skip": 3,
        "objective.importance.level": "sequence",
        "rollout.temperature": 1.0,
    },
    "gkd": {"objective.alpha": 0.5, "rollout.on_policy_share": 0.5, "rollout.temperature": 0.9},
    "opsd": {
        "objective.entry_ceiling": 1.0,
        "rollout.temperature": 1.1,
        "rollout.top_p": 0.95,
        "rollout.top_k": 20,
    },
}
# What the two presets give every mode.
PRESET = {
    "command": {
        "data.max_prompt_length": 1024,
        "rollout.max_completion_length": 2048,
        "train.batch_size": 16,
        "train.micro_batches": 4,
        "teacher.contexts.induction_demonstrations": 5,
        "objective.agreement.gamma_agreement": 1.0,
        "objective.contrast.contrastive_margin": 0.5,
    },
    "launcher": {
        "data.max_prompt_length": 3072,
        "rollout.max_completion_length": 1024,
        "train.batch_size": 16,
        "train.micro_batches": 4,
    },
}
GAMMA, WEIGHT, MARGIN = (
    "objective.agreement.gamma_agreement",
    "objective.contrast.contrastive_weight",
    "objective.contrast.contrastive_margin",
)
MATCHING, CLIP = "objective.matching.final_layer_distill_weight", "objective.clip.token_clip"
EMA = ("teacher.ema_sync_steps", "teacher.ema_decay")
# The hyper-parameters of the mechanisms, as the release's command and its launcher have them.
RELEASE_VALUES = {
    "command": {
        "plain": {},
        **{mode: {GAMMA: 1.0} for mode in AGREEMENT},
        "ema": {EMA[0]: 10, EMA[1]: 0.9},
        "contrastive": {WEIGHT: 0.1, MARGIN: 0.5},
        "match_joint": {MATCHING: 0.1},
        "match_repr": {MATCHING: 1.0},
        "clip": {CLIP: 10.0, "objective.alpha": 0.0},
        "unisd_star": {EMA[0]: 10, EMA[1]: 0.9, GAMMA: 1.0, WEIGHT: 0.1, MARGIN: 0.5, MATCHING: 0.1},
    },
    "launcher": {
        "plain": {},
        **{mode: {GAMMA: 0.01} for mode in AGREEMENT},
        "ema": {EMA[0]: 10, EMA[1]: 0.9},
        "contrastive": {WEIGHT: 0.1, MARGIN: 0.5},
        "match_joint": {MATCHING: 0.1},
        "match_repr": {MATCHING: 1.0},
        "clip": {CLIP: 10.0, "objective.alpha": 0.0},
        "unisd_star": {
            EMA[0]: 10,
            EMA[1]: 0.98,
            GAMMA: 0.001,
            WEIGHT: 0.01,
            MARGIN: 0.1,
            MATCHING: 0.01,
            "train.batch_size": 8,
        },
    },
}


def test_every_mode_has_a_file_and_a_row_in_each_table():
    files = {path.stem for path in (CONFIGS / "modes").glob("*.yaml")}
    assert files == set(MODES) - {"custom"} == set(CHANGES) == {"plain", *RELEASE, *BASELINES}
    assert len(RELEASE) == 12
    for preset in ("command", "launcher"):
        assert set(RELEASE_VALUES[preset]) == {"plain", *RELEASE}


@pytest.mark.parametrize("mode", CHANGES)
def test_what_a_mode_changes(mode):
    found, base = options(load(mode)), options(load_config(BASE, ["--model.path=weights"]))
    assert found == base | CHANGES[mode] | {"mode": mode}


@pytest.mark.parametrize("mode", CHANGES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_mode_loads_with_every_preset(mode, preset):
    config = load(mode, f"--preset={preset}")
    assert (config.mode, config.preset) == (mode, preset)
    values = options(config)
    on = {name for name, state in mechanisms(values).items() if state}
    assert set(MODES[mode].mechanisms) <= on <= {*MODES[mode].mechanisms, *MODES[mode].optional}
    hash(step_settings(config))
    if preset != "none":
        expected = PRESET[preset] | RELEASE_VALUES[preset].get(mode, {})
        assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize("mode", ["plain", *RELEASE])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_release_modes_load_with_the_releases_arithmetic(mode, preset):
    values = options(load(mode, "--parity=upstream", f"--preset={preset}"))
    expected = options(load(mode, f"--preset={preset}")) | {"parity": "upstream"}
    assert values == expected | UPSTREAM
    assert UPSTREAM == {
        "objective.normalize": "upstream",
        "teacher.ema_adapters": False,
        "teacher.ema_dtype": "bfloat16",
        "optimizer.zero_first_rate": True,
        "data.shuffle": False,
        "data.form.as_released": True,
        "data.form.hint": False,
        "teacher.contexts.as_released": True,
        "rollout.stop": "tokenizer",
    }


@pytest.mark.parametrize("preset", ["command", "launcher"])
@pytest.mark.parametrize("mode", ["plain", *RELEASE])
def test_a_preset_changes_nothing_but_the_tables(mode, preset):
    before, after = to_dict(load(mode)), to_dict(load(mode, f"--preset={preset}"))
    changed = {line.partition(":")[0] for line in difference(before, after)}
    assert changed <= {"preset", *PRESET[preset], *RELEASE_VALUES[preset][mode]}


# --- What wins over what ---


@pytest.fixture
def write(tmp_path):
    def write_file(name, text):
        path = tmp_path / name
        path.write_text(text.replace("MODES", str(CONFIGS / "modes")).replace("BASE", str(BASE)), encoding="utf-8")
        return path

    return write_file


def test_a_files_own_values_win_over_the_preset_of_a_file_it_inherits(write):
    path = write(
        "own.yaml",
        "inherit: MODES/unisd_star.yaml\npreset: launcher\nmodel: {path: a}\n"
        "teacher: {ema_decay: 0.5}\nobjective: {agreement: {gamma_agreement: 3.0}}\n",
    )
    values = options(load_config(path))
    assert (values["teacher.ema_decay"], values[GAMMA]) == (0.5, 3.0)
    # The rest is still the preset's.
    assert (values[WEIGHT], values["train.batch_size"], values["data.max_prompt_length"]) == (0.01, 8, 3072)


def test_the_preset_of_a_mode_wins_over_that_of_the_base(write):
    star, ema = load("unisd_star", "--preset=launcher"), load("ema", "--preset=launcher")
    assert (star.train.batch_size, ema.train.batch_size) == (8, 16)


def test_a_file_may_have_variants_of_its_own(write):
    path = write(
        "own.yaml",
        "inherit: MODES/ema.yaml\nmodel: {path: a}\nseed: 1\n"
        "variants: {preset.command: {seed: 2, train: {steps: 7}}}\n",
    )
    assert load_config(path).seed == 1
    chosen = load_config(path, ["--preset=command"])
    assert (chosen.seed, chosen.train.steps, chosen.train.micro_batches) == (2, 7, 4)
    assert load_config(path, ["--preset=launcher"]).seed == 1
    # Inherited once more, the chosen variant is that file's, and the heir wins.
    heir = write("heir.yaml", "inherit: own.yaml\npreset: command\nseed: 3\n")
    assert (load_config(heir).seed, load_config(heir).train.steps) == (3, 7)


def test_a_file_that_is_inherited_twice_counts_once(write):
    """Or its second reading would silently undo what the first heir set."""
    write("extra.yaml", "inherit: BASE\ntrain: {steps: 3}\n")
    config = load_config(write("own.yaml", "inherit: [MODES/ema.yaml, extra.yaml]\nmodel: {path: a}\n"))
    assert (config.mode, config.teacher.ema, config.train.steps) == ("ema", True, 3)


def test_the_command_line_wins_over_all(write):
    path = write("own.yaml", "inherit: MODES/unisd_star.yaml\npreset: launcher\nmodel: {path: a}\nseed: 1\n")
    config = load_config(path, ["--seed=5", f"--{GAMMA}=7", "--train.batch_size=4", "--preset=command"])
    values = options(config)
    assert (config.preset, config.seed, values[GAMMA], config.train.batch_size) == ("command", 5, 7.0, 4)
    assert values[MARGIN] == 0.5, "the preset of the command line, not the file's"
    other = load_config(path, ["--preset=none"])
    assert (other.train.batch_size, other.train.micro_batches) == (16, 1)


def test_the_quickstart_keeps_its_own_budget_under_any_preset():
    plain = load_config(CONFIGS / "quickstart.yaml")
    launcher = load_config(CONFIGS / "quickstart.yaml", ["--preset=launcher"])
    assert launcher.train == plain.train and launcher.rollout == plain.rollout and launcher.data == plain.data
    assert (launcher.teacher.ema_sync_steps, launcher.teacher.ema_decay) == (1, 0.95)
    assert launcher.objective.agreement.gamma_agreement == 0.001


@pytest.mark.parametrize("choice", ["preset.launcher", "preset.command", "parity.upstream"])
def test_a_chosen_variant_that_no_file_has_is_an_error(write, choice):
    path = write("alone.yaml", "seed: 1\n")
    key, _, name = choice.partition(".")
    message = refusal(path, f"--{key}={name}")
    assert f"variants: {choice}" in message and "alone.yaml" in message and "inherit base.yaml" in message
    assert load_config(path, ["--model.path=a", f"--{key}=none"]).seed == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("variants: 3\n", "variants: expected a mapping from names to options, found 3"),
        ("variants: [a]\n", "variants: expected a mapping"),
        ("variants: {preset.command: 3}\n", "variants: expected a mapping"),
        ("variants: {preset.comand: {seed: 1}}\n", 'found "preset.comand"; did you mean "preset.command"?'),
        ("inherit: BASE\npreset: command\nvariants: {preset.command: {trian: {steps: 1}}}\n", 'unknown option "trian"'),
        (
            "inherit: BASE\npreset: command\nvariants: {preset.command: {train: {steps: x}}}\n",
            "train.steps: expected an",
        ),
        ("inherit: BASE\npreset: comand\n", 'found "comand" (a string); did you mean "command"?'),
        ("inherit: BASE\nparity: upsteam\n", 'found "upsteam" (a string); did you mean "upstream"?'),
        ("inherit: BASE\nmode: agreement_tok_randon\n", 'did you mean "agreement_tok_random"?'),
        ("inherit: BASE\nmode: contrast\n", 'did you mean "contrastive"?'),
        ("inherit: BASE\npreset: [command]\n", "preset: expected one of none, command, launcher"),
        ("inherit: BASE\npreset: null\n", "preset: expected one of none, command, launcher, found null"),
        ("inherit: BASE\npresets: command\n", 'unknown option "presets"; did you mean "preset"?'),
    ],
)
def test_bad_variants_and_unknown_names(write, text, said):
    assert said in refusal(write("bad.yaml", text))


# --- Names and switches ---

SWITCHED_ON = {
    "ema": ("--teacher.ema=true",),
    "agreement": ("--objective.agreement.level=token", "--teacher.contexts.num_auxiliary_contexts=3"),
    "contrast": (f"--{WEIGHT}=0.1",),
    "matching": (f"--{MATCHING}=0.1",),
    "clip": (f"--{CLIP}=0.5",),
}
SWITCHED_OFF = {
    "ema": ("--teacher.ema=false",),
    "agreement": ("--objective.agreement.level=none",),
    "contrast": (f"--{WEIGHT}=0",),
    "matching": (f"--{MATCHING}=0",),
    "clip": (f"--{CLIP}=null",),
}
SUBSETS = [on for count in range(6) for on in itertools.combinations(MECHANISMS, count)]


@pytest.mark.parametrize("on", SUBSETS, ids="+".join)
def test_every_combination_of_mechanisms_loads_as_custom(on):
    config = load_config(
        BASE, ["--model.path=weights", "--mode=custom", *itertools.chain(*(SWITCHED_ON[name] for name in on))]
    )
    found = mechanisms(options(config))
    assert found == {name: name in on for name in MECHANISMS}
    assert warnings(config) == []
    settings = step_settings(config)
    assert (settings.ema_decay is not None) == ("ema" in on)
    chosen = settings.objective
    assert (chosen.agreement is not None, chosen.contrast_weight > 0, chosen.matching_weight > 0) == tuple(
        name in on for name in ("agreement", "contrast", "matching")
    )
    assert (chosen.clip_ceiling is not None) == ("clip" in on)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("mode", CHANGES)
def test_a_mode_with_a_missing_or_a_surplus_mechanism_is_refused(mode, mechanism):
    has, may = mechanism in MODES[mode].mechanisms, mechanism in MODES[mode].optional
    if may:
        assert load(mode, *SWITCHED_ON[mechanism]) and load(mode, *SWITCHED_OFF[mechanism])
        return
    message = refused_mode(mode, *(SWITCHED_OFF if has else SWITCHED_ON)[mechanism])
    verb, state = ("needs", "off") if has else ("has no", "on")
    if mode in AGREEMENT and mechanism == "agreement":  # The level is the mode's too, and says more.
        assert message.startswith(f'mode "{mode}" needs objective.agreement.level=')
        return
    assert f'mode "{mode}" {verb} {mechanism}, and it is switched {state} (' in message
    assert SWITCHED_ON[mechanism][0].partition("=")[0].removeprefix("--") in message
    assert "mode=custom" in message


@pytest.mark.parametrize("mode", CHANGES)
def test_a_mode_with_another_option_than_its_own_is_refused(mode):
    others = {
        "objective.loss": {"divergence": "nll", "nll": "divergence", "none": "divergence"},
        "rollout.source": {"student": "gold", "gold": "student", "base": "student"},
        "objective.agreement.level": {"token": "sequence", "sequence": "token"},
        "teacher.contexts.method": {"random": "induction", "retrieval": "random", "induction": "retrieval"},
    }
    assert MODES[mode].options.keys() >= {"objective.loss", "rollout.source"}
    for option, value in MODES[mode].options.items():
        message = refused_mode(mode, f"--{option}={others[option][value]}")
        assert message == f'mode "{mode}" needs {option}="{value}", found "{others[option][value]}"'


@pytest.mark.parametrize("option", UPSTREAM)
def test_parity_that_is_contradicted_is_refused(option):
    other = {
        "upstream": "batch",
        False: "true",
        True: "false",
        "bfloat16": "float32",
        "tokenizer": "all",
    }[UPSTREAM[option]]
    message = refused_mode("ema", "--parity=upstream", f"--{option}={other}")
    assert message.startswith(f'parity "upstream" needs {option}=')


# --- Combinations that make no sense ---

CUSTOM = "--mode=custom"
AGREE = SWITCHED_ON["agreement"]
VIEWS, PER_PASS = "teacher.contexts.num_auxiliary_contexts", "objective.agreement.views_per_pass"
BUDGET = "objective.agreement.budget"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--objective.alpha=-0.1"], "objective.alpha must be between 0 and 1, found -0.1"),
        (["--objective.alpha=1.5"], "objective.alpha must be between 0 and 1, found 1.5"),
        (
            [CUSTOM, "--objective.clip.token_clip=1", "--objective.clip.token_clip_quantile=0.9"],
            "objective.clip.token_clip (1.0) and objective.clip.token_clip_quantile (0.9) are both set",
        ),
        ([CUSTOM, *AGREE, f"--{VIEWS}=0"], f"{VIEWS} is 0: agreement compares auxiliary views, at least 2"),
        ([f"--{VIEWS}=3"], f"{VIEWS} is 3, but objective.agreement.level is none"),
        ([CUSTOM, *AGREE, f"--{PER_PASS}=2"], f"{PER_PASS} (2) must divide {VIEWS} (3)"),
        ([f"--{BUDGET}.share=0.5"], f"{BUDGET}.share is below 1, but objective.agreement.level is none"),
        (
            [CUSTOM, *AGREE, "--objective.agreement.level=sequence", f"--{BUDGET}.share=0.5", f"--{BUDGET}.unit=token"],
            f'{BUDGET}.unit "token" needs objective.agreement.level=token, found "sequence"',
        ),
        (
            [CUSTOM, *AGREE, f"--{VIEWS}=2", f"--{BUDGET}.share=0.5", f"--{BUDGET}.signal=spread"],
            f'{BUDGET}.signal "spread" scores two views everywhere',
        ),
        ([f"--{BUDGET}.share=0"], f"{BUDGET}.share must be above 0 and at most 1"),
        *(
            ([CUSTOM, "--objective.loss=nll", *SWITCHED_ON[name]], f'loss is "nll", which has no use for {name}')
            for name in ("ema", "agreement", "clip")
        ),
        *(
            (
                [CUSTOM, "--objective.loss=none", *SWITCHED_ON["matching"], *SWITCHED_ON[name]],
                f'objective.loss is "none", which has no use for {name}',
            )
            for name in ("agreement", "clip")
        ),
        *(
            ([CUSTOM, "--objective.loss=nll", *SWITCHED_ON[name]], "objective.loss=nll has no teacher: switch contrast")
            for name in ("contrast", "matching")
        ),
        ([CUSTOM, "--objective.loss=none"], "objective.loss=none leaves nothing to train on: switch contrast"),
        (
            [CUSTOM, "--objective.loss=none", *SWITCHED_ON["matching"], "--objective.entry_ceiling=1"],
            'objective.entry_ceiling caps the divergence, but objective.loss is "none"',
        ),
        (
            ["--rollout.source=gold", CUSTOM, "--rollout.on_policy_share=0.5"],
            'rollout.on_policy_share is 0.5, but rollout.source is "gold"; expected student',
        ),
        *(
            ([CUSTOM, "--objective.importance.level=token", more], "objective.importance compares student and sampler")
            for more in ("--rollout.source=gold", "--rollout.source=base", "--rollout.on_policy_share=0.5")
        ),
        ([CUSTOM, "--objective.loss=nll"], "objective.loss=nll raises the likelihood of given completions"),
        (
            [CUSTOM, "--objective.loss=nll", "--rollout.source=gold", "--teacher.condition=self"],
            "objective.loss=nll has no teacher that teacher.condition=self",
        ),
        (
            [CUSTOM, "--objective.loss=nll", "--rollout.source=gold", "--objective.alpha=0.5"],
            'objective.alpha acts on the divergence, but objective.loss is "nll"; set it to 0',
        ),
        *(
            (
                [CUSTOM, "--objective.loss=none", *SWITCHED_ON["matching"], f"--objective.{option}"],
                f'objective.{option.partition("=")[0]} acts on the divergence, but objective.loss is "none"',
            )
            for option in ("alpha=0.5", "top_entropy_quantile=0.5", "importance.level=token")
        ),
        (["--teacher.condition=none"], 'teacher.condition is "none" and there is no contrast'),
        (
            ["--rollout.max_completion_length=4", "--objective.num_loss_tokens_to_skip=4"],
            "objective.num_loss_tokens_to_skip (4) must be below rollout.max_completion_length (4)",
        ),
        (["--model.lora.dropout=1"], "model.lora.dropout must be at least 0 and below 1, found 1.0"),
        (["--teacher.self_samples=1"], "teacher.self_samples must be at least 2, found 1"),
        (["--objective.importance.cap=0"], "objective.importance.cap must be greater than 0"),
        (["--mode=matchjoint"], 'did you mean "match_joint"?'),
    ],
)  # fmt: skip
def test_combinations_that_make_no_sense(overrides, said):
    assert said in refusal(BASE, *overrides)


def test_what_the_rules_must_not_refuse():
    for overrides in (
        [CUSTOM, "--objective.loss=none", *SWITCHED_ON["contrast"], *SWITCHED_ON["ema"]],
        [CUSTOM, *AGREE, f"--{PER_PASS}=3"],
        [CUSTOM, *AGREE, f"--{BUDGET}.share=0.5", f"--{BUDGET}.unit=token", f"--{BUDGET}.signal=spread"],
        [CUSTOM, "--objective.loss=nll", "--rollout.source=base", "--teacher.condition=none"],
        ["--objective.importance.level=token"],
        [CUSTOM, "--teacher.condition=none", *SWITCHED_ON["contrast"]],
    ):
        load_config(BASE, ["--model.path=weights", *overrides])


# --- What is allowed but will hardly do what it says ---


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([CUSTOM, "--objective.alpha=0.5", f"--{CLIP}=10"], r"token_clip is 10\.0, and the JSD .* at most 0\.693 nats"),
        ([CUSTOM, *AGREE, f"--{GAMMA}=0"], r"gamma_agreement is 0: all agreement weights will be 1"),
        ([CUSTOM, *AGREE, f"--{VIEWS}=1"], r"num_auxiliary_contexts is 1: one view agrees with itself"),
        (
            [CUSTOM, *AGREE, "--objective.agreement.level=sequence", "--objective.normalize=upstream"],
            r"normalize=upstream divides each completion by its own weights: sequence-level agreement cancels",
        ),
        ([CUSTOM, *SWITCHED_ON["ema"], "--teacher.ema_decay=1"], r"ema_decay is 1: the teacher never moves"),
        (
            [CUSTOM, *SWITCHED_ON["ema"], "--teacher.ema_sync_steps=101"],
            r"ema_sync_steps is 101, more than train.steps \(100\): the teacher never moves",
        ),
        ([CUSTOM, *SWITCHED_ON["ema"], "--teacher.ema_adapters=false"], r"ema_adapters is false: under LoRA .* never"),
    ],
)
def test_likely_mistakes_give_one_warning_that_names_the_option(overrides, said):
    (line,) = warnings(load_config(BASE, ["--model.path=weights", *overrides]))
    assert re.search(said, line) and "\n" not in line
    assert re.match(r"(objective|teacher)\.\w+", line), "the option comes first"


@pytest.mark.parametrize(
    "overrides",
    [
        ["--objective.alpha=0.5", f"--{CLIP}=0.69"],
        ["--objective.alpha=0", f"--{CLIP}=10"],
        ["--objective.alpha=1", f"--{CLIP}=10"],
        ["--objective.alpha=0.5", "--objective.clip.token_clip_quantile=0.9"],
        ["--teacher.ema_adapters=false"],  # without EMA nothing reads it
        ["--teacher.ema_decay=1"],
        [f"--{GAMMA}=0"],
        [*SWITCHED_ON["ema"], "--teacher.ema_adapters=false", "--model.trainable=full"],
        [*AGREE, "--objective.normalize=upstream"],
    ],
)
def test_settings_that_do_what_they_say_give_no_warning(overrides):
    assert warnings(load_config(BASE, ["--model.path=weights", CUSTOM, *overrides])) == []


@pytest.mark.parametrize("mode", CHANGES)
def test_the_shipped_modes_give_no_warning(mode):
    for preset in PRESETS:
        assert warnings(load(mode, f"--preset={preset}")) == []


def test_the_releases_arithmetic_says_where_a_mechanism_is_lost():
    for mode in ("plain", *RELEASE):
        lines = warnings(load(mode, "--parity=upstream"))
        said = "cancels" if "_seq_" in mode else "never moves" if mode in ("ema", "unisd_star") else None
        assert (len(lines), said is None or said in lines[0]) == (said is not None, True), mode


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.7])
def test_the_ceiling_that_never_acts_is_the_largest_divergence(alpha):
    bound = float(largest_divergence(alpha=alpha))
    for factor, count in ((0.999, 0), (1.001, 1)):
        words = [CUSTOM, f"--objective.alpha={alpha}", f"--{CLIP}={factor * bound}"]
        assert len(warnings(load_config(BASE, ["--model.path=weights", *words]))) == count
