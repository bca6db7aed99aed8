"""The claims in miniature: faults of known rate, statistics on cases with a known answer, verdicts that can fail."""

import json
import types
from pathlib import Path

import numpy as np
import pytest

from unisd_jax.claims import command, findings, page, reliability, runs, variants, verdicts, weights, work
from unisd_jax.claims.findings import FAILS, HOLDS, UNDECIDED, Claim, Finding
from unisd_jax.claims.runs import METHODS, TRAINED, Finished, Settings
from unisd_jax.claims.teacher import Targets
from unisd_jax.claims.variants import CLEAN, FREE, NOISY, WRONG, write_variants
from unisd_jax.data.tasks import get_task
from unisd_jax.eval.statistics import Interval
from unisd_jax.teacher.contexts import nearest_donors
from unisd_jax.teacher.retrieval import bm25_ranking

REPOSITORY = Path(__file__).resolve().parents[2]


# --- Data ---


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims")
    write_variants(folder, rate=0.4)
    return folder


def test_answers_are_wrong_at_the_rate_asked_for_and_of_the_same_kind(folder):
    rows, wrong = variants.embedded_rows(), read(folder, "wrong")
    spoilt = [row["spoilt"] for row in wrong]
    assert sum(spoilt) == round(0.4 * len(rows))
    families = {row["answer"]: row["family"] for row in rows}
    for before, after in zip(rows, wrong, strict=True):
        assert (before["answer"] != after["answer"]) == after["spoilt"], before["id"]
        assert families[after["answer"]] is not None and after["question"] == before["question"]
    same = {row["family"] for row in rows if row["answer"] in {after["answer"] for after in wrong}}
    assert same == {row["family"] for row in rows}
    assert all(row["spoilt"] for row in read(folder, "all-wrong"))


def test_the_same_call_spoils_the_same_rows(folder, tmp_path):
    write_variants(tmp_path, rate=0.4)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_noisy_rows_keep_their_own_answer_and_lend_another(folder):
    rows, noisy = variants.embedded_rows(), read(folder, "noisy")
    for before, after in zip(rows, noisy, strict=True):
        assert after["answer"] == before["answer"] and ("example" in after) == after["spoilt"]
    for noise in variants.NOISES:
        assert all("example" in row for row in read(folder, noise))
    content, form = (read(folder, noise)[0] for noise in ("content", "form"))
    assert json.loads(content["example"])["answer"] != content["answer"] and form["answer"] in form["example"]


def test_the_nearest_of_a_paraphrase_is_its_other_wording(folder):
    rows = read(folder, "paraphrased")
    questions = [row["question"] for row in rows]
    donors = nearest_donors(questions, views=1, per_view=1, rank=bm25_ranking(questions))
    found = [rows[views[0][0]]["answer"] == row["answer"] for row, views in zip(rows, donors, strict=True)]
    assert np.mean(found) > 0.95 and len({row["id"] for row in rows}) == len(rows)


def test_the_free_form_asks_for_none_and_takes_any_words():
    task = get_task(variants.free_answers.__file__)
    row = types.SimpleNamespace(
        text=lambda name: {"question": "What is the opposite of hot?", "answer": "cold"}[name],
        fields={}, number=1, optional_text=lambda name: "",
    )  # fmt: skip
    item = task.make(row, 0, None)
    assert "JSON" not in item.prompt and item.completion == "It is cold."
    assert task.grade("The word would be COLD, I think.", item) == {"exact": 1.0, "gold": 0.0}
    assert task.grade("coldness", item)["exact"] == 0.0 and task.grade("It is cold.", item)["gold"] == 1.0


def test_every_run_has_a_configuration_of_its_own(tmp_path):
    settings = Settings(
        tmp_path, REPOSITORY / "configs" / "claims.yaml", REPOSITORY / "configs" / "modes", "models/x", (0, 1)
    )
    found = write_variants(tmp_path / "data", rate=0.4)
    planned = runs.planned(settings.seeds)
    made = [runs.configuration(run, found, settings) for run in planned]
    assert len({(config.output_dir, config.name) for config in made}) == len(planned)
    for run, config in zip(planned, made, strict=True):
        assert runs.run_dir(run, settings) == Path(config.output_dir) / config.name
        assert (run.variant in (WRONG, NOISY)) == (config.data.train_path is not None)
    by_method = {run.method: config for run, config in zip(planned, made, strict=True) if run.variant == CLEAN}
    ours, theirs = by_method["unisd_star"], by_method["unisd_star, released"]
    assert ours.objective.agreement.level == theirs.objective.agreement.level == "sequence"
    assert (ours.objective.normalize, theirs.objective.normalize) == ("batch", "upstream")
    assert ours.teacher.ema_adapters and not theirs.teacher.ema_adapters
    assert by_method["live teacher"].teacher.ema_decay == 0 and by_method["ema"].teacher.ema_decay == 0.9
    cancelled = by_method["unisd_star, weights cancelled"]
    assert cancelled.teacher.ema_adapters and cancelled.objective == theirs.objective


# --- Statistics ---


def test_auc_of_known_cases():
    values, spoilt = np.array([0.1, 0.2, 0.8, 0.9]), np.array([True, True, False, False])
    assert weights.auc(values, spoilt) == 1.0 and weights.auc(values, ~spoilt) == 0.0
    assert weights.auc(np.ones(4), spoilt) == 0.5 and np.isnan(weights.auc(values, np.zeros(4, bool)))
    assert weights.auc(np.array([0.1, 0.5, 0.5, 0.9]), np.array([True, True, False, False])) == pytest.approx(3.5 / 4)


def test_rank_correlation_of_known_cases():
    assert weights.rank_correlation(np.arange(5), -(np.arange(5) ** 3)) == pytest.approx(-1)
    assert np.isnan(weights.rank_correlation(np.ones(3), np.arange(3)))


def scored(seed, *, shift, items=40, tokens=6):
    """Spoilt views are off by `shift` nats, by a random sign each; a wrong demonstration moves the first two tokens."""
    random = np.random.default_rng(seed)
    clean = -random.random((weights.VIEWS, items, tokens)).astype(np.float32)
    signs = random.choice([-1, 1], (weights.VIEWS, items, 1))
    views = {weights.CLEAN: clean} | {noise: clean + shift * signs for noise in variants.NOISES}
    mask = np.ones((items, tokens), bool)
    mask[::3, -2:] = False
    right = clean[0]
    return weights.Scored(mask, views, right, right - 2 * (np.arange(tokens) < 2), np.arange(items) % 2 == 0)


def test_spoilt_views_are_drawn_at_their_rate_and_weigh_less():
    one = scored(0, shift=3.0, items=400)
    drawn = weights.draw(one, "form", rate=1 / 3, seed=0)
    assert drawn.spoilt_views.mean() / weights.VIEWS == pytest.approx(1 / 3, abs=0.03)
    assert weights.auc(drawn.sequence, drawn.spoilt_views > 0) > 0.9
    assert weights.auc(drawn.tokens, drawn.spoilt_views[drawn.rows] > 0) > 0.9
    assert weights.rank_correlation(drawn.token_means, drawn.spoilt_views) < -0.3
    none = weights.draw(one, "form", rate=0.0, seed=0)
    assert none.spoilt_views.sum() == 0 and len(none.tokens) == one.mask.sum()


def test_reliability_holds_where_noise_shows_and_not_where_it_does_not():
    loud = reliability.reliability_claims([scored(seed, shift=3.0) for seed in range(3)], "any")
    assert [claim.verdict for claim in loud[:2]] == [HOLDS, HOLDS]
    silent = reliability.reliability_claims([scored(seed, shift=0.0) for seed in range(3)], "any")
    assert all(abs(finding.interval.mean - finding.null) < 0.2 for claim in silent[:2] for finding in claim.findings)
    assert all(claim.verdict != HOLDS for claim in silent[:2])
    # Which tokens a wrong demonstration moves has nothing to do with these views.
    assert all(abs(finding.interval.mean - finding.null) < 0.15 for finding in loud[2].findings)
    assert "60 of 120" in loud[2].note


def test_resampling_whole_items_is_wider_than_token_by_token():
    random = np.random.default_rng(0)
    values = np.repeat(random.standard_normal(50), 20)
    clustered = findings.resampled(lambda places: values[places].mean(), np.repeat(np.arange(50), 20))
    apart = findings.resampled(lambda places: values[places].mean(), np.arange(1000))
    assert clustered.mean == pytest.approx(values.mean()) == pytest.approx(apart.mean)
    assert clustered.high - clustered.low > 3 * (apart.high - apart.low)


@pytest.mark.parametrize(
    ("interval", "predicted", "verdict"),
    [
        ((2, 1, 3), "+", HOLDS), ((2, 1, 3), "-", FAILS), ((-2, -3, -1), "-", HOLDS), ((-2, -3, -1), "+", FAILS),
        ((0, -1, 1), "+", UNDECIDED), ((0, -1, 1), "-", UNDECIDED), ((2, 1, 3), "", ""),
        ((1, float("nan"), float("nan")), "+", UNDECIDED), ((1, 0, 2), "+", UNDECIDED),
    ],
)  # fmt: skip
def test_a_verdict_is_the_side_of_the_whole_interval(interval, predicted, verdict):
    assert Finding("x", Interval(*interval), "nats", predicted).verdict == verdict


def test_a_claim_holds_only_with_all_its_parts():
    good, bad, open_ = (Finding("x", Interval(0, *ends), "nats", "+") for ends in ((1, 2), (-2, -1), (-1, 1)))
    told = Finding("x", Interval(0, -2, -1), "nats")
    assert Claim("1", "", [good, told]).verdict == HOLDS and Claim("1", "", [good, open_]).verdict == UNDECIDED
    assert Claim("1", "", [good, open_, bad]).verdict == FAILS and Claim("1", "", [told]).verdict == UNDECIDED


# --- Verdicts on invented runs ---


def finished(method, seed, *, exact, drift, fit):
    random = np.random.default_rng([seed, len(method)])
    history = [{"clip_share": 0.1, "teacher_motion": 0.01, "agreement_effective_share": 0.9}] * 6
    details = {"drift": drift + 1e-4 * seed}
    grades = [{"exact": float(random.random() < exact), "gold": 0.0} for _ in range(60)]
    before = {"grades": [{"exact": 0.0, "gold": 0.0}] * 60, "means": {"gold_logprob": -2.0, "truncated_share": 0.4}}
    after = {"grades": grades, "means": {"gold_logprob": -fit - 1e-3 * seed, "truncated_share": 0.0}}
    return Finished(types.SimpleNamespace(history=history, details=details), before, after)


def invented(variant=CLEAN, **changes):
    """As the paper has it, but for `changes` of a method in one variant."""
    usual = {
        "sft": dict(exact=0.3, drift=0.06, fit=0.5),
        "match_joint": dict(exact=0.7, drift=0.05, fit=0.6),
        "match_repr": dict(exact=0.6, drift=0.05, fit=0.9),
        "clip": dict(exact=0.5, drift=0.02, fit=1.0),
        "ema": dict(exact=0.8, drift=0.05, fit=0.7),
    }
    rest = dict(exact=0.7, drift=0.04, fit=0.7)
    found = {}
    for name, methods in TRAINED.items():
        found[name] = {}
        for method in methods:
            values = usual.get(method, rest) | (changes.get(method, {}) if name == variant else {})
            if name == FREE and method == "sft":
                values |= {"exact": 0.0}
            found[name][method] = [finished(method, seed, **values) for seed in range(3)]
    for run in found[FREE]["sft"] + found[FREE]["plain"]:
        run.before["grades"] = [{"exact": 1.0, "gold": 0.0}] * 60
    return found


def took(**changes):
    """Seconds of an update in four rounds, of which the third is twice as slow for all methods."""
    usual = {"sft": 1.0, "plain": 2.0, "ema": 2.2, "clip": 1.9, "match_repr": 2.1, "match_joint": 2.3}
    usual |= {"agreement_tok": 4.0, "unisd_star": 6.0, runs.MORE_VIEWS: 7.0} | changes
    slow = np.array([1.0, 1.01, 2.0, 0.99])
    random = np.random.default_rng(0)
    return {name: seconds * slow * np.exp(0.01 * random.standard_normal(4)) for name, seconds in usual.items()}


def by_number(found, **seconds):
    claims = [*verdicts.trained_claims(found), *verdicts.cost_claims(found, took(**seconds))]
    return {claim.number: claim.verdict for claim in claims}


def test_the_paper_s_world_has_the_paper_s_verdicts():
    found = by_number(invented())
    assert {number: found[number] for number in "1234569"} == dict.fromkeys("1234569", HOLDS)


@pytest.mark.parametrize(
    ("number", "changes", "seconds"),
    [
        ("1", {"sft": {"exact": 1.0}}, {}), ("2", {"sft": {"exact": 0.0}}, {}), ("3", {"sft": {"drift": 0.001}}, {}),
        ("4", {"ema": {"fit": 2.5}}, {}), ("5", {"match_joint": {"fit": 1.5}}, {}), ("6", {"clip": {"drift": 0.2}}, {}),
        ("6", {}, {"clip": 3.0}), ("9", {}, {"unisd_star": 3.0}), ("9", {}, {runs.MORE_VIEWS: 3.9}),
    ],
)  # fmt: skip
def test_another_world_has_another_verdict(number, changes, seconds):
    assert by_number(invented(**changes), **seconds)[number] == (UNDECIDED if number == "2" else FAILS)


def test_a_slow_round_is_slow_for_all():
    found = findings.time_ratio(took()["agreement_tok"], took()["plain"])
    assert found.mean == pytest.approx(2, rel=0.05) and 1.9 < found.low < found.high < 2.1


def test_protection_is_more_help_with_wrong_demonstrations_than_with_right_ones():
    """Help that is the same in both is no protection."""
    everywhere = invented(agreement_tok={"exact": 1.0}) | {WRONG: invented(WRONG, agreement_tok={"exact": 1.0})[WRONG]}
    only_there = invented() | {WRONG: invented(WRONG, agreement_tok={"exact": 1.0})[WRONG]}

    def first(found):
        return next(claim for claim in verdicts.trained_claims(found) if claim.number[:2] == "15").findings[0]

    assert first(only_there).verdict == HOLDS and first(only_there).interval.mean > 20
    assert abs(first(everywhere).interval.mean) < 15 and first(everywhere).verdict != HOLDS


def test_smoothing_is_the_targets_path_by_how_far_they_got():
    winding, straight = Targets([1.0] * 6, 1.0), Targets([0.1] * 6, 0.6)
    targets = {"ema": [straight._replace(net=0.6 - 0.001 * seed) for seed in range(3)], "live teacher": [winding] * 3}
    claim = verdicts.smoothing_claim(invented(), targets)
    assert claim.verdict == HOLDS and claim.findings[0].interval.mean == pytest.approx(1 / 6, rel=0.02)
    turned = {"ema": targets["live teacher"], "live teacher": targets["ema"]}
    assert verdicts.smoothing_claim(invented(), turned).verdict == FAILS
    # Smaller steps alone, from lag, are not smoothness.
    lag = {"ema": [Targets([0.1] * 6, 0.1 + 1e-5 * seed) for seed in range(3)], "live teacher": [winding] * 3}
    assert verdicts.smoothing_claim(invented(), lag).verdict == UNDECIDED


def test_contexts_are_compared_item_by_item():
    random = np.random.default_rng(0)
    items = [random.standard_normal(30) for _ in range(3)]
    better, worse = [one + 0.5 for one in items], [one - 0.5 for one in items]
    gold = {
        "paraphrased": {"random": items, "retrieval": better, "induction": items},
        "embedded": {"random": items, "retrieval": items, "induction": worse},
    }
    claim = verdicts.context_claim(gold)
    assert [finding.verdict for finding in claim.findings] == [HOLDS, FAILS, "", ""]
    assert claim.findings[0].interval.mean == pytest.approx(0.5)


def test_two_arithmetics_differ_only_where_an_interval_says_so():
    same, other = Finding("x", Interval(1, -1, 3), "points"), Finding("z", Interval(2, 1, 3), "nats")
    assert verdicts.different([same, Finding("y", Interval(1, 1, 1), "share")]) == []
    assert verdicts.different([same, other]) == ["z"]


def test_every_part_of_the_release_s_arithmetic_is_told_apart():
    found = verdicts.released_findings(invented(**{"unisd_star, weights cancelled": {"drift": 0.09}}))
    apart = verdicts.different(found)
    assert "drift, the weights' part, ours - cancelled" in apart and "drift, ours - the release's" not in apart


# --- The page and the command ---


def test_the_page_has_every_claim_with_its_numbers():
    found = invented()
    claims = [*verdicts.trained_claims(found), *verdicts.cost_claims(found, took())]
    facts = dict(
        model="m", steps=8, batch=8, items=60, seeds="0, 1, 2", count=3, device="a device", versions="jax 1",
        commit="abc", date="2026-01-01", minutes=50, jobs=2,
    )  # fmt: skip
    about = {CLEAN: variants.Variant((), "as it is")}
    text = page.write_page(claims, verdicts.released_findings(found), found, about, took(), facts)
    for claim in claims:
        assert f"| {claim.number} | {claim.text} | **{claim.verdict}** |" in text
        assert all(page.show(finding.interval, finding.unit) in text for finding in claim.findings)
    assert "nan" not in text and "{" not in text and "Every interval of a difference has zero in it." in text
    assert "| clean | sft | 0.0 |" in text and "| agreement_tok | 4.04 | 2.01 |" in text


def test_an_interval_is_shown_in_its_unit():
    assert page.show(Interval(3.21, -1.0, 7.44), "points") == "+3.2 [-1.0, +7.4] points"
    assert page.show(Interval(1.5, 1.25, float("nan")), "ratio") == "1.500 [1.250, ?] ×"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "0"], "at least two"), (["--seeds", "1,1"], "all different"), (["--seeds", "a"], "--seeds"),
        (["--jobs", "0"], "--jobs is 0"), (["train"], "not understood"), (["--scored", "1000"], "at most"),
        (["--train.steps"], "not understood"), (["--model", "nowhere/at-all/x"], "model.path"),
        (["--model", "MODEL", "--train.stepz=1"], "train.stepz"),
    ],
)  # fmt: skip
def test_bad_words_are_one_line(words, said, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    words = [str(tmp_path / "model") if word == "MODEL" else word for word in words]
    assert command.main([*words, "--out", str(tmp_path / "out")], REPOSITORY) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0], lines


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """`plan(*words)` is {name: mark} of all that would be made, for a model whose weights have the hash `weights`."""
    monkeypatch.setattr(command, "weights_hash", lambda checkpoint, cache: plan.weights)
    plan.weights = "one"

    def planned(*words):
        options, settings = command.parse([*words, "--out", str(tmp_path), "--model", "m"], REPOSITORY)
        found = write_variants(tmp_path / "data", rate=0.4)
        tasks = command.planned_tasks(settings, found, options, tmp_path)
        return {task.name: work.mark(settings, task) for task in tasks}

    planned.parts = plan
    return planned


def test_what_is_made_is_named_by_what_it_depends_on(plan, monkeypatch):
    usual = plan()
    assert usual == plan() and len(set(usual.values())) == len(usual)
    steps, scored = plan("--train.steps=4"), plan("--scored", "6")
    assert not set(usual.values()) & set(steps.values())
    assert {name for name in usual if usual[name] != scored[name]} == {name for name in usual if "seed" not in name} | {
        name for name in usual if name.split(",")[0] in ("weights", "contexts", "targets")
    }
    monkeypatch.setitem(METHODS, "clip", METHODS["clip"]._replace(options=("--objective.clip.token_clip=3.0",)))
    clip = plan()
    assert {name for name in usual if usual[name] != clip[name]} == {f"clean, clip, seed {n}" for n in range(3)}
    plan.parts.weights = "two"
    assert not set(usual.values()) & set(plan().values())


def test_a_run_without_its_result_is_made_again(tmp_path):
    settings = Settings(tmp_path, tmp_path, tmp_path, "m", (0, 1))
    task = work.Task("x", None, (), "", output=tmp_path / "result.json")
    work.mark(settings, task).parent.mkdir()
    work.mark(settings, task).touch()
    assert not work.is_made(settings, task)
    task.output.touch()
    assert work.is_made(settings, task)
