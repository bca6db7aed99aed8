"""Mechanisms that do nothing: one warning after so many steps in a row, with the option that may be at fault."""

import math

import pytest

from unisd_jax.config_loading import walk_options
from unisd_jax.config_options import Config
from unisd_jax.inert import SMALL_SHARE, InertMechanisms

AFTER = 3
OPTIONS = {name for name, _, _ in walk_options(Config)}

# For each mechanism: metrics of a step in which it did nothing, of one in which it acted, and the options it names.
RULES = {
    "divergence": ({"divergence": 1e-8}, {"divergence": 1e-3}, ["teacher.condition"]),
    "ema": (
        {"teacher_motion": 0.0},
        {"teacher_motion": 1e-9},
        ["teacher.ema_adapters", "teacher.ema_decay", "teacher.ema_sync_steps"],
    ),
    "agreement": (
        {"agreement_above_99": 1.0},
        {"agreement_above_99": 0.999},
        ["objective.agreement.gamma_agreement"],
    ),
    "importance": (
        {"importance_weight": 1.0},
        {"importance_weight": 1.01},
        ["objective.importance.level"],
    ),
    "entry_ceiling": ({"entry_capped_share": 0.0}, {"entry_capped_share": 0.01}, ["objective.entry_ceiling"]),
    "clip": ({"clip_share": 0.0}, {"clip_share": 1e-3}, ["objective.clip.token_clip"]),
    "contrast": (
        {"contrast_active_share": 0.0, "gradient_share_contrast": 0.5},
        {"contrast_active_share": 0.1, "gradient_share_contrast": 2 * SMALL_SHARE},
        ["objective.contrast.contrastive_margin"],
    ),
    "matching": (
        {"loss_matching": 1.0, "gradient_share_matching": SMALL_SHARE / 2},
        {"loss_matching": 1.0, "gradient_share_matching": 2 * SMALL_SHARE},
        ["objective.matching.final_layer_distill_weight"],
    ),
    "teacher.condition=self": ({"self_accepted": 0.0}, {"self_accepted": 0.1}, ["teacher.self_min_agreement"]),
}


def said(steps, after=AFTER):
    """[(step, warning)] of the metrics of some steps, numbered from 1."""
    inert = InertMechanisms(after)
    return [(step, line) for step, metrics in enumerate(steps, start=1) for line in inert.see(metrics)]


@pytest.mark.parametrize("name", RULES)
def test_a_mechanism_that_does_nothing_is_named_once_with_the_option_at_fault(name):
    idle, _, options = RULES[name]
    ((step, line),) = said([idle] * (4 * AFTER))
    assert step == AFTER and line.startswith(f"{name} did nothing for {AFTER} steps: ") and "\n" not in line
    for option in options:
        assert option in line and option in OPTIONS


def test_weights_that_are_all_the_same_do_nothing_however_small():
    uniform = {"agreement_above_99": 0.0, "agreement_effective_share": 1.0}
    ((step, line),) = said([uniform] * (2 * AFTER))
    assert step == AFTER and line.startswith("agreement did nothing")
    assert said([uniform | {"agreement_effective_share": 0.97}] * (2 * AFTER)) == []


def test_a_teacher_between_two_of_its_updates_is_not_inert():
    inert, warnings = InertMechanisms(AFTER, ema_sync_steps=10), []
    for step in range(1, 31):
        warnings += inert.see({"teacher_motion": 0.1 if step % 10 == 0 else 0.0})
    assert warnings == []
    for _ in range(11):
        warnings += inert.see({"teacher_motion": 0.0})
    assert [line.split(":")[0] for line in warnings] == ["ema did nothing for 11 steps"]


@pytest.mark.parametrize("name", RULES)
def test_a_step_in_which_it_acts_starts_the_count_anew(name):
    idle, live, _ = RULES[name]
    assert said([live] * (4 * AFTER)) == []
    assert said(([idle] * (AFTER - 1) + [live]) * 4) == []
    ((step, _),) = said([*([idle] * (AFTER - 1)), live, *([idle] * AFTER)])
    assert step == 2 * AFTER


@pytest.mark.parametrize("name", RULES)
def test_a_mechanism_is_named_once_in_a_run_even_if_it_acts_in_between(name):
    idle, live, _ = RULES[name]
    assert [step for step, _ in said([*([idle] * AFTER), live, *([idle] * (3 * AFTER))])] == [AFTER]


def test_the_contrast_also_does_nothing_without_a_gradient_to_speak_of():
    ((step, line),) = said([{"contrast_active_share": 1.0, "gradient_share_contrast": SMALL_SHARE / 2}] * AFTER)
    assert step == AFTER and line.startswith("contrast did nothing")


def test_metrics_that_are_absent_never_warn():
    assert said([{}] * (4 * AFTER)) == []
    assert said([{"loss": 0.0, "entropy": 0.0}] * (4 * AFTER)) == []


def test_metrics_that_are_not_finite_neither_count_nor_reset():
    idle = {"clip_share": 0.0}
    steps = [idle, {"clip_share": math.nan}, idle, {}, idle]
    assert [step for step, _ in said(steps)] == [5]


def test_several_mechanisms_are_counted_apart():
    idle = {name: idle for name, (idle, _, _) in RULES.items()}
    everything = {key: value for metrics in idle.values() for key, value in metrics.items()}
    lines = said([{**everything, "clip_share": 0.5}, *([everything] * AFTER)])
    assert {line.partition(" did nothing")[0] for step, line in lines if step == AFTER} == set(RULES) - {"clip"}
    assert [line.partition(" did nothing")[0] for step, line in lines if step == AFTER + 1] == ["clip"]


def test_one_idle_step_is_enough_where_that_is_asked():
    assert [step for step, _ in said([{"clip_share": 0.0}] * 3, after=1)] == [1]
