"""The claims in miniature: faults of known rate, statistics on cases with a known answer, verdicts that can fail."""

import json
import types
from pathlib import Path

import numpy as np
import pytest

from unisd_jax.claims import command, page, reliability, runs, variants, verdicts, weights, work
from unisd_jax.claims.runs import METHODS, TRAINED, Finished, Run, Settings
from unisd_jax.claims.variants import CLEAN, FREE, NOISY, WRONG, write_variants
from unisd_jax.claims.verdicts import FAILS, HOLDS, UNDECIDED, Claim, Finding
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
    assert sum(not METHODS[run.method].evaluated for run in planned) == 1


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
    clustered = verdicts.resampled(lambda places: values[places].mean(), np.repeat(np.arange(50), 20))
    apart = verdicts.resampled(lambda places: values[places].mean(), np.arange(1000))
    assert clustered.mean == pytest.approx(values.mean()) == pytest.approx(apart.mean)
    assert clustered.high - clustered.low > 3 * (apart.high - apart.low)


def test_student_s_interval_over_seeds():
    found = verdicts.student_interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high - found.mean == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4)
    assert np.isnan(verdicts.student_interval([1.0]).low)


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


def finished(method, seed, *, exact, drift, fit, seconds):
    random = np.random.default_rng([seed, len(method)])
    history = [
        {
            "seconds_compiling": 1.0 if step < 2 else 0.0,
            "seconds_step": seconds * np.exp(0.02 * random.standard_normal()),
        }
        | {"clip_share": 0.1, "teacher_motion": 0.01}
        for step in range(8)
    ]
    details = {"drift": drift + 1e-4 * seed, "items": 60, "device": "a device", "commit": "abc", "versions": {}}
    grades = [{"exact": float(random.random() < exact), "gold": 0.0} for _ in range(60)]
    before = {"grades": [{"exact": 0.0, "gold": 0.0}] * 60, "means": {"gold_logprob": -2.0}}
    after = {"grades": grades, "means": {"gold_logprob": -fit - 1e-3 * seed}}
    return Finished(types.SimpleNamespace(history=history, details=details), before, after)


def invented(**changes):
    """As the paper has it, but for `changes` of a method in the clean variant."""
    usual = {
        "sft": dict(exact=0.3, drift=0.06, fit=0.5, seconds=1.0),
        "match_joint": dict(exact=0.7, drift=0.05, fit=0.6, seconds=2.2),
        "match_repr": dict(exact=0.6, drift=0.05, fit=0.9, seconds=2.2),
        "clip": dict(exact=0.5, drift=0.02, fit=1.0, seconds=1.9),
        "ema": dict(exact=0.8, drift=0.05, fit=0.7, seconds=2.2),
        "agreement_tok": dict(exact=0.7, drift=0.04, fit=0.7, seconds=4.0),
        "unisd_star": dict(exact=0.8, drift=0.04, fit=0.7, seconds=6.0),
        "agreement_tok, K = 6": dict(exact=0.8, drift=0.04, fit=0.7, seconds=7.0),
    }
    rest = dict(exact=0.7, drift=0.04, fit=0.7, seconds=2.0)
    found = {}
    for variant, methods in TRAINED.items():
        found[variant] = {}
        for method in methods:
            values = usual.get(method, rest) | (changes.get(method, {}) if variant == CLEAN else {})
            if variant == FREE and method == "sft":
                values |= {"exact": 0.0}
            found[variant][method] = [finished(method, seed, **values) for seed in range(3)]
    for run in found[FREE]["sft"] + found[FREE]["plain"]:
        for grade in run.before["grades"]:
            grade["exact"] = 1.0
    return found


def by_number(found):
    return {claim.number: claim.verdict for claim in verdicts.trained_claims(found)}


def test_the_paper_s_world_has_the_paper_s_verdicts():
    found = by_number(invented())
    assert {number: found[number] for number in "1234569"} == dict.fromkeys("1234569", HOLDS)


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        ("1", {"sft": {"exact": 1.0}}), ("3", {"sft": {"drift": 0.001}}), ("4", {"ema": {"fit": 2.5}}),
        ("5", {"match_joint": {"fit": 1.5}}), ("6", {"clip": {"drift": 0.2}}), ("9", {"unisd_star": {"seconds": 1.0}}),
    ],
)  # fmt: skip
def test_another_world_has_another_verdict(number, changes):
    assert by_number(invented(**changes))[number] == FAILS


def test_smoothing_is_a_ratio_of_the_targets_changes():
    changes = {"ema": [np.full(8, 0.1 + 0.001 * seed) for seed in range(3)], "live teacher": [np.full(8, 1.0)] * 3}
    claim = verdicts.smoothing_claim(invented(), changes)
    assert claim.verdict == HOLDS and claim.findings[0].interval.mean == pytest.approx(0.1, rel=0.02)
    turned = {"ema": changes["live teacher"], "live teacher": changes["ema"]}
    assert verdicts.smoothing_claim(invented(), turned).verdict == FAILS


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
    assert not verdicts.differs([Finding("x", Interval(1, -1, 3), "points"), Finding("y", Interval(1, 1, 1), "share")])
    assert verdicts.differs([Finding("x", Interval(2, 1, 3), "points")])


# --- The page and the command ---


def test_the_page_has_every_claim_with_its_numbers():
    found = invented()
    claims = verdicts.trained_claims(found)
    facts = dict(
        model="m", steps=8, batch=8, items=60, seeds="0, 1, 2", count=3, device="a device", versions="jax 1",
        commit="abc", date="2026-01-01", minutes=50, jobs=2,
    )  # fmt: skip
    text = page.write_page(claims, verdicts.released_findings(found), found, write_nothing(), facts)
    for claim in claims:
        assert f"| {claim.number} | {claim.text} | **{claim.verdict}** |" in text
        assert all(page.show(finding.interval, finding.unit) in text for finding in claim.findings)
    assert "nan" not in text and "{" not in text and "No difference can be seen." in text
    assert "| clean | sft | 3 | 0.0 |" in text


def write_nothing():
    return {CLEAN: variants.Variant((), "as it is")}


def test_an_interval_is_shown_in_its_unit():
    assert page.show(Interval(3.21, -1.0, 7.44), "points") == "+3.2 [-1.0, +7.4] points"
    assert page.show(Interval(1.5, 1.25, float("nan")), "ratio") == "1.500 [1.250, ?] ×"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "0"], "at least two different"), (["--jobs", "0"], "--jobs 0"), (["train"], "not understood"),
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


def test_what_is_made_is_named_by_what_it_depends_on(tmp_path):
    settings = Settings(tmp_path, REPOSITORY / "configs" / "claims.yaml", tmp_path, "m", (0, 1))
    task = command.trainings(settings)[0]
    assert task.arguments == (Run(CLEAN, "sft", 0),)
    other = settings._replace(options=("--train.steps=4",))
    assert work.mark(settings, task) == work.mark(settings, task) != work.mark(other, task)
    few, many = (command.scorings(settings, items)[0] for items in (6, 40))
    assert work.mark(settings, few) != work.mark(settings, many)
