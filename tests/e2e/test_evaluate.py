"""Measuring checkpoints: what is written, that nothing stale is ever read, that an interrupted evaluation goes on."""

import dataclasses
import functools
import importlib.util
import json
import math
import re
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import task_rows
from fake_vllm import FakeVllm
from run_checks import TASK_WITH_FORM, Outcome, error_line, read_metrics, read_result

from unisd_jax import evaluate
from unisd_jax.config import load_config
from unisd_jax.data.chat import load_chat
from unisd_jax.data.pipeline import Example
from unisd_jax.data.tasks import Item
from unisd_jax.errors import ConfigError
from unisd_jax.experiment import build
from unisd_jax.models import load_hf
from unisd_jax.rollout import JaxSampler
from unisd_jax.subject import adapted_and_base, item_hash, result_identity
from unisd_jax.testing import byte_tokenizer, tiny_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def measure(workspace, compiled_once, tmp_path, capfd):
    """`measure(*overrides)` runs the command inside the test process."""

    def run(*overrides):
        capfd.readouterr()
        words = ["--config", str(workspace.config), f"--output_dir={tmp_path / 'runs'}"]
        words += [f"--teacher.cache_dir={tmp_path / 'cache'}", *overrides]
        code = evaluate.main(words)
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture
def other(tmp_path):
    """A checkpoint with other weights than the workspace's."""
    return tiny_checkpoint(tmp_path / "other", seed=1)


def folders(tmp_path):
    return sorted((tmp_path / "runs" / "run" / "evaluation").iterdir())


def read(folder):
    """(summary, items) of a finished evaluation."""
    lines = (folder / "items.jsonl").read_text().splitlines()
    return json.loads((folder / "summary.json").read_text()), [json.loads(line) for line in lines]


def only(tmp_path):
    (folder,) = folders(tmp_path)
    return read(folder)


@pytest.fixture
def generated(monkeypatch):
    """The rows of every batch that a sampler was asked for; `limit` stops like Ctrl-C after so many batches."""
    generate = JaxSampler.generate

    class Asked(list):
        limit = None

    asked = Asked()

    def counted(self, prompt_ids, *args, **options):
        if asked.limit is not None and len(asked) >= asked.limit:
            raise KeyboardInterrupt
        asked.append(len(prompt_ids))
        return generate(self, prompt_ids, *args, **options)

    monkeypatch.setattr(JaxSampler, "generate", counted)
    return asked


# --- What is written ---


def test_an_evaluation_has_numbers_with_intervals_items_a_report_and_plots(measure, tmp_path):
    outcome = measure("--evaluation.batch_size=4")
    assert outcome.code == 0 and outcome.err == "", outcome.err
    assert "replying to 6 items of jsonl, greedily" in outcome.out and "no measure.base" in outcome.out
    assert re.search(r"exact +0\.\d+ +95% interval 0\.\d+ to 0\.\d+", outcome.out)
    (folder,) = folders(tmp_path)
    found, items = read(folder)
    assert {path.name for path in folder.iterdir()} == {"items.jsonl", "summary.json", "report.md", "plots"}
    assert [item["id"] for item in items] == [f"e{index}" for index in range(6)]
    exact = found["metrics"]["exact"]
    assert exact["mean"] == np.mean([item["grades"]["exact"] for item in items]) and exact["interval"] == "wilson"
    assert 0 <= exact["low"] <= exact["mean"] <= exact["high"] <= 1 and exact["high"] > 0.3
    assert found["ppl_fit"]["low"] <= found["ppl_fit"]["mean"] <= found["ppl_fit"]["high"]
    assert found["gain"] is found["retention"] is found["before"] is None
    assert 0 < found["minimum_detectable"] <= 1 and found["items"] == 6 and found["samples"] == 1
    phases = found["resources"]["phases"]
    assert phases["generation"]["completion_tokens"] == sum(item["replies"][0]["tokens"] for item in items)
    assert phases["scoring"]["completion_tokens"] > 0 and found["resources"]["energy_source"] == "estimate"
    report = (folder / "report.md").read_text()
    assert "estimate" in report and f"{100 * exact['low']:.1f}, {100 * exact['high']:.1f}" in report
    for name in re.findall(r"\((plots/\w+\.png)\)", report):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_ppl_fit_is_the_pooled_perplexity_of_the_gold_without_the_stop_token(measure, workspace, tmp_path):
    assert measure().code == 0
    logps = gold_logps(workspace, stop=False)
    assert only(tmp_path)[0]["ppl_fit"]["mean"] == pytest.approx(math.exp(-np.mean(np.concatenate(logps))), rel=1e-4)
    assert measure("--measure.score_stop=true").code == 0
    with_stop = math.exp(-np.mean(np.concatenate(gold_logps(workspace, stop=True))))
    values = [read(folder)[0]["ppl_fit"]["mean"] for folder in folders(tmp_path)]
    assert any(value == pytest.approx(with_stop, rel=1e-4) for value in values)


def gold_logps(workspace, *, stop):
    chat, (model, params) = load_chat(workspace.model), load_hf(workspace.model)
    found = []
    for line in workspace.test.read_text().splitlines():
        item = json.loads(line)
        messages = [{"role": "user", "content": item["prompt"]}]
        gold = chat.reply_ids(messages, item["completion"])
        found.append(all_logps(model, params, chat.prompt_ids(messages), gold if stop else gold[:-1])[1])
    return found


def all_logps(model, params, prompt, completion):
    """(log p of the whole vocabulary at each completion token, log p of the tokens), by the plainest way."""
    logits = whole_logits(model, params, [*prompt, *completion])
    logps = np.asarray(jax.nn.log_softmax(logits[len(prompt) - 1 : -1]))
    return logps, logps[np.arange(len(completion)), completion]


def whole_logits(model, params, ids):
    """[tokens, vocabulary], in one program for all lengths."""
    padded = np.zeros((1, 96), np.int32)
    padded[0, : len(ids)] = ids
    mask = np.arange(96)[None] < len(ids)
    return np.asarray(_logits(params, padded, mask, model=model))[0, : len(ids)]


@functools.partial(jax.jit, static_argnames="model")
def _logits(params, ids, mask, *, model):
    return model.logits(params, model.hidden(params, ids, mask)).astype(jnp.float32)


# --- Retention ---

# A grade at which two random models differ.
EVEN = """
from unisd_jax.data.tasks import Item, Task

def make(row, position, form):
    return Item(f"m{position}", row.text("prompt"), row.text("completion"), "a")

def grade(text, item):
    return {"exact": 0.0, "even": float(sum(map(ord, text)) % 2 == 0)}

TASK = Task("even", make, grade)
"""


def test_gain_and_retention_against_the_base(measure, workspace, other, tmp_path):
    task = tmp_path / "even.py"
    task.write_text(EVEN)
    outcome = measure(
        f"--model.path={other}", f"--measure.base={workspace.model}", "--evaluation.batch_size=4",
        f"--data.task={task}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "gain over the base" in outcome.out and "drift" in outcome.out
    found, items = only(tmp_path)
    assert found["retention"]["paired"]["entropy_change"]["mean"] != 0
    gain, before = found["gain"], found["before"]["metrics"]
    assert before["even"]["mean"] != found["metrics"]["even"]["mean"], "or the sides could change places"
    assert gain["even"]["mean"] == pytest.approx(found["metrics"]["even"]["mean"] - before["even"]["mean"])
    own, others = ([len(item[side][0]["ids"]) for item in items] for side in ("replies", "base_replies"))
    assert found["retention"]["reply_tokens_change"]["mean"] == pytest.approx(np.mean(own) - np.mean(others))
    assert {"gained", "lost", "p_value"} == set(gain["even"]["mcnemar"])

    chat, (model, base) = load_chat(workspace.model), load_hf(workspace.model)
    adapted = load_hf(other)[1]
    sums = {side: naive_sums(model, adapted, base, chat, items, side) for side in ("replies", "base_replies")}
    for side, section in (("replies", "forward"), ("base_replies", "reverse")):
        section, tokens = found["retention"][section], sums[side]["tokens"]
        for name in ("jsd", "kl_from_base", "kl_to_base", "entropy_adapted", "entropy_base"):
            assert section[name]["mean"] == pytest.approx(sums[side][name] / tokens, rel=1e-3), (side, name)
            assert section[name]["low"] <= section[name]["mean"] <= section[name]["high"]
        for which in ("adapted", "base"):
            expected = math.exp(-sums[side][f"logp_{which}"] / tokens)
            assert section[f"ppl_{which}"]["mean"] == pytest.approx(expected, rel=1e-3)
        assert section["tokens"] == tokens
    assert found["retention"]["ppl_ret"] == found["retention"]["forward"]["ppl_base"]
    assert 0 < found["retention"]["jsd"]["mean"] < math.log(2)
    report = (folders(tmp_path)[0] / "report.md").read_text()
    assert "PPL_ret" in report and "drift_and_gain.png" in report


def naive_sums(model, adapted, base, chat, items, side):
    """`distance_sums` of all replies together, from whole logits; replies are generated again, token for token."""
    names = "tokens logp_adapted logp_base jsd kl_from_base kl_to_base entropy_adapted entropy_base"
    totals = dict.fromkeys(names.split(), 0.0)
    for item in items:
        prompt = chat.prompt_ids([{"role": "user", "content": item["prompt"]}])
        completion = greedy(chat, model, adapted if side == "replies" else base, prompt, item[side][0]["tokens"])
        if completion[-1] in chat.stop_ids:
            completion = completion[:-1]
        if not completion:
            continue
        (q, own), (p, others) = (all_logps(model, params, prompt, completion) for params in (adapted, base))
        mixture = np.logaddexp(p, q) - math.log(2)
        totals["tokens"] += len(completion)
        totals["logp_adapted"] += own.sum()
        totals["logp_base"] += others.sum()
        totals["jsd"] += 0.5 * (np.exp(p) * (p - mixture) + np.exp(q) * (q - mixture)).sum()
        totals["kl_from_base"] += (np.exp(p) * (p - q)).sum()
        totals["kl_to_base"] += (np.exp(q) * (q - p)).sum()
        totals["entropy_adapted"] -= (np.exp(q) * q).sum()
        totals["entropy_base"] -= (np.exp(p) * p).sum()
    return totals


def greedy(chat, model, params, prompt, length):
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(np.argmax(whole_logits(model, params, ids)[-1, : chat.vocab_size])))
    return ids[len(prompt) :]


def test_a_model_has_not_moved_from_itself(measure, workspace, tmp_path):
    assert measure(f"--measure.base={workspace.model}").code == 0
    found, _ = only(tmp_path)
    gain = found["gain"]["exact"]
    assert gain["low"] < gain["mean"] == 0 < gain["high"] and gain["mcnemar"]["p_value"] == 1
    retention = found["retention"]
    assert abs(retention["jsd"]["mean"]) < 1e-6 and abs(retention["forward"]["kl_to_base"]["mean"]) < 1e-6
    assert retention["forward"]["ppl_base"] == pytest.approx(retention["forward"]["ppl_adapted"])


def test_an_adapter_is_measured_against_the_model_below_it_and_equals_its_export(measure, finished, tmp_path):
    run_dir, _ = finished
    assert measure(f"--model.lora.start={run_dir / 'adapter'}").code == 0
    assert measure(f"--model.path={run_dir / 'hf'}").code == 0
    assert len(folders(tmp_path)) == 2
    found = [read(folder) for folder in folders(tmp_path)]
    texts = [[item["replies"][0]["text"] for item in items] for _, items in found]
    assert texts[0] == texts[1]
    (adapted,) = (summary for summary, _ in found if summary["retention"])
    assert adapted["retention"]["jsd"]["mean"] > 1e-4, "the adapter did something"
    result = read_result(run_dir)
    assert adapted["gain"]["exact"]["mean"] == pytest.approx(result["gain"])
    assert adapted["metrics"]["exact"]["mean"] == pytest.approx(result["after"])


def test_evaluations_in_one_table_and_one_record(measure, tmp_path, capfd):
    assert measure().code == 0
    listing = importlib.util.spec_from_file_location("listing", REPOSITORY / "scripts" / "list_evaluations.py")
    script = importlib.util.module_from_spec(listing)
    listing.loader.exec_module(script)
    capfd.readouterr()
    (folder,), (found, _) = folders(tmp_path), only(tmp_path)
    assert script.main([str(folder), "--json", str(tmp_path / "record.json")]) == 0
    out = capfd.readouterr().out.splitlines()
    assert len(out) == 3 and out[2].startswith("| `jsonl` | 6 | 0.0 [0.0, 39.0] | - | - |")
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["tasks"]["jsonl"]["metrics"] == found["metrics"] and record["versions"]["jax"] == jax.__version__
    assert script.main([str(folder), str(folder), "--json", str(tmp_path / "b")]) == 2
    assert "of the same task" in capfd.readouterr().err
    assert script.main([str(tmp_path)]) == 2 and "has no summary.json" in capfd.readouterr().err


# --- Nothing stale is read, nothing is overwritten ---


def test_a_finished_evaluation_is_read_back(measure, generated, tmp_path):
    assert measure().code == 0
    before = {path: path.stat().st_mtime_ns for path in folders(tmp_path)[0].rglob("*")}
    generated.limit = 0
    outcome = measure()
    assert outcome.code == 0 and "has this evaluation already; delete it to measure again" in outcome.out
    assert {path: path.stat().st_mtime_ns for path in folders(tmp_path)[0].rglob("*")} == before


def test_everything_that_numbers_depend_on_makes_another_evaluation(measure, other, workspace, tmp_path):
    assert measure().code == 0
    changed = tmp_path / "changed.jsonl"
    changed.write_text(workspace.test.read_text().replace("a3", "b3"))
    for number, words in enumerate(
        [
            [f"--model.path={other}"], [f"--data.test_path={changed}"], ["--evaluation.max_completion_length=5"],
            ["--measure.temperature=1.0"], ["--measure.temperature=1.0", "--seed=1"], ["--data.test_limit=5"],
        ],
        start=2,
    ):  # fmt: skip
        assert measure(*words).code == 0
        assert len(folders(tmp_path)) == number, words
    texts = {json.dumps([item["replies"][0]["text"] for item in read(folder)[1]]) for folder in folders(tmp_path)}
    assert len(texts) >= 5, "the replies are those of the options"


def test_replies_are_kept_when_only_the_grading_changes(measure, generated, tmp_path):
    task = tmp_path / "mine.py"
    task.write_text(
        "from unisd_jax.data.tasks import Item, Task\n\n"
        "def make(row, position, form):\n    return Item(f'm{position}', row.text('prompt'), 'a', 'a')\n\n"
        "def grade(text, item):\n    return {'exact': 0.0}\n\nTASK = Task('mine', make, grade)\n"
    )
    assert measure(f"--data.task={task}").code == 0
    task.write_text(task.read_text().replace("'exact': 0.0", "'exact': 1.0"))
    generated.limit = len(generated)
    assert measure(f"--data.task={task}").code == 0, "no reply was generated again"
    means = sorted(read(folder)[0]["metrics"]["exact"]["mean"] for folder in folders(tmp_path))
    assert means == [0, 1]


def test_an_interrupted_evaluation_goes_on(measure, generated, workspace, other, tmp_path):
    words = [f"--measure.base={workspace.model}", f"--model.path={other}", "--evaluation.batch_size=2"]
    generated.limit = 2
    outcome = measure(*words)
    assert outcome.code == 130 and "interrupted: the same command goes on from here" in outcome.err
    assert not (tmp_path / "runs" / "run" / "evaluation").exists()
    generated.limit = None
    assert measure(*words).code == 0
    assert len(generated) == 6, "three batches each, none of them twice"
    resumed = only(tmp_path)
    assert measure(*words, f"--teacher.cache_dir={tmp_path / 'afresh'}", "--name=again").code == 0
    (afresh,) = (tmp_path / "runs" / "again" / "evaluation").iterdir()
    assert read(afresh)[1] == resumed[1]
    assert read(afresh)[0]["retention"] == resumed[0]["retention"]


def test_the_bases_replies_serve_every_checkpoint(measure, generated, workspace, other, tmp_path):
    assert measure(f"--model.path={other}", f"--measure.base={workspace.model}").code == 0
    generated.limit = len(generated) + 1
    third = tiny_checkpoint(tmp_path / "third", seed=2)
    assert measure(f"--model.path={third}", f"--measure.base={workspace.model}").code == 0


# --- Several samples, retries, options ---


def test_several_samples_give_pass_at_k(measure, tmp_path):
    assert measure("--measure.samples=3", "--measure.temperature=1.0").code == 0
    found, items = only(tmp_path)
    assert set(found["pass_at_k"]) == {"1", "2", "3"} and all(len(item["replies"]) == 3 for item in items)
    values = [found["pass_at_k"][k]["mean"] for k in "123"]
    assert values == sorted(values) and values[0] == pytest.approx(found["metrics"]["exact"]["mean"])
    assert len({reply["text"] for item in items for reply in item["replies"]}) > 6, "samples differ"


def test_retries_are_a_number_of_their_own(measure, tmp_path):
    task = tmp_path / "mine.py"
    task.write_text(TASK_WITH_FORM)
    assert measure(f"--data.task={task}", "--measure.retries=3", "--measure.retry_temperature=1.5").code == 0
    assert measure(f"--data.task={task}").code == 0
    (again,) = (read(folder) for folder in folders(tmp_path) if read(folder)[0]["retries"])
    (plain,) = (read(folder) for folder in folders(tmp_path) if not read(folder)[0]["retries"])
    assert again[0]["metrics"] == plain[0]["metrics"], "the headline is the first pass"
    retries = again[0]["retries"]
    failed = sum(item["grades"]["form"] == 0 for item in again[1])
    assert retries["failed_first_pass"] == failed == retries["recovered"] + retries["still_failed"] > 0
    recovered = [
        item for item in again[1] if item["replies"][0].get("retried", {"grades": {"form": 0}})["grades"]["form"]
    ]
    assert len(recovered) == retries["recovered"] > 0
    first_pass = plain[0]["metrics"]["exact"]["mean"]
    assert retries["metrics"]["exact"]["mean"] == pytest.approx(first_pass + len(recovered) / 6)
    assert sum(again[0]["counts"]["last"].values()) == 6, "categories are counted"


def test_multiple_choice_has_the_releases_scorer_and_the_likelihood_of_the_options(measure, tmp_path):
    changes = ({"pid": str(index), "answer": index, "subject": f"s{index % 2}"} for index in range(4))
    rows = [task_rows.SCIENCEQA | change for change in changes]
    path = task_rows.write(tmp_path / "rows.jsonl", *rows)
    words = ["--data.task=scienceqa", f"--data.test_path={path}", "--measure.option_likelihood=true"]
    outcome = measure(*words, "--data.max_prompt_length=480", "--data.form.answer=letter")
    assert outcome.code == 0, outcome.err
    found, items = only(tmp_path)
    assert set(found["released"]["metrics"]) >= {"exact", "form"} and "rule" in found["counts"]
    assert {name: group["items"] for name, group in found["subjects"].items()} == {"s0": 2, "s1": 2}
    options = found["option_likelihood"]
    assert 0 < options["probability_of_right"]["mean"] < 1
    for name in ("option_exact", "option_probability_of_right", "released_exact"):
        assert all(0 <= item["grades"][name] <= 1 for item in items), "so that two checkpoints can be compared by it"
    assert options["exact"]["mean"] == np.mean([item["grades"]["option_exact"] for item in items])


# --- Bad input, before anything is generated ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--measure.option_likelihood=true"], "measure.option_likelihood compares the options of multiple choice"),
        (["--measure.samples=4"], "measure.samples is 4, but measure.temperature is 0"),
        (["--measure.base=nowhere/at/all"], "nowhere/at/all"),
        (["--measure.base=nowhere/at/all", "--dry-run"], "nowhere/at/all"),
        (["--measure.retries=1"], "data.task=jsonl does not grade a 'form'"),
    ],
)
def test_bad_input_is_refused_first(measure, generated, words, message):
    generated.limit = 0
    assert message in error_line(measure(*words))


def test_a_base_with_another_tokenizer_is_refused(measure, generated, tmp_path):
    generated.limit = 0
    base = tiny_checkpoint(tmp_path / "base")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "model")
    tokenizer.save_pretrained(base)
    line = error_line(measure(f"--measure.base={base}"))
    assert line.startswith("error: measure.base: ") and "another vocabulary, tokenizer or chat template" in line


def test_a_dry_run_says_what_would_be_measured_and_writes_nothing(measure, tmp_path):
    outcome = measure("--dry-run", "--measure.samples=2", "--measure.temperature=1")
    assert outcome.code == 0 and "12 replies to 6 test items" in outcome.out
    assert not (tmp_path / "runs").exists()


def test_what_would_fail_at_the_end_is_refused_first(measure, generated, tmp_path, workspace):
    generated.limit = 0
    (tmp_path / "file").write_text("")
    assert "output_dir: " in error_line(measure(f"--output_dir={tmp_path / 'file'}"))
    longer = tmp_path / "longer.jsonl"
    longer.write_text(json.dumps({"id": "long", "prompt": "p", "completion": "c" * 600}) + "\n")
    line = error_line(measure(f"--data.test_path={longer}"))
    assert "long: its prompt and gold reply have 6" in line and "at most 512" in line


@pytest.mark.parametrize("with_base", [False, True])
def test_weights_that_overflow_are_named(measure, workspace, tmp_path, with_base):
    model = tiny_checkpoint(tmp_path / "model")
    path = model / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["lm_head.weight"] = np.sign(tensors["lm_head.weight"]) * np.float32(1e38)
    safetensors.numpy.save_file(tensors, path)
    base = [f"--measure.base={workspace.model}"] if with_base else []
    line = error_line(measure(f"--model.path={model}", *base))
    assert "model.path: the log-prob of the gold replies is nan" in line
    assert not (tmp_path / "runs").exists()


def test_a_model_that_is_far_off_has_an_infinite_perplexity_and_a_report(measure, tmp_path):
    model = tiny_checkpoint(tmp_path / "model")
    path = model / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * np.float32(1e5)
    safetensors.numpy.save_file(tensors, path)
    assert measure(f"--model.path={model}").code == 0
    assert only(tmp_path)[0]["ppl_fit"]["mean"] is None
    assert "| ppl_fit | inf [" in (folders(tmp_path)[0] / "report.md").read_text()


def test_details_have_one_hash_in_every_process(workspace):
    def of(details):
        return item_hash(Example(Item("i", "p", "c", "a", details=details), [1], None, [2]))

    assert of({"a": {"x", "b", "c"}}) == of({"a": ["b", "c", "x"]}) == of({"a": frozenset("xcb")})
    assert of({"a": MappingProxyType({"b": 1})}) == of({"a": {"b": 1}}) != of({"a": {"b": 2}})
    with pytest.raises(ConfigError, match="i: its details cannot be told from others"):
        of({"a": object()})


def test_only_what_is_generated_now_counts_as_cost(measure, tmp_path):
    assert measure().code == 0
    assert measure("--name=again", "--measure.score_stop=true").code == 0
    (again,) = (tmp_path / "runs" / "again" / "evaluation").iterdir()
    tokens = [
        found["resources"]["phases"]["generation"]["completion_tokens"] for found, _ in (only(tmp_path), read(again))
    ]
    assert tokens[0] > 0 == tokens[1], "the second read the replies of the first"


def test_every_option_that_changes_a_number_changes_the_key(workspace, tmp_path):
    """Of one loaded experiment: options are changed without anything being measured."""
    words = [f"--teacher.cache_dir={tmp_path}", "--evaluation.max_completion_length=8"]
    config = load_config(workspace.config, words)
    experiment = build(config, training=False)
    subject, _ = adapted_and_base(experiment)

    def key(changed=subject, base=None, items=None, **options):
        measured = dataclasses.replace(config.measure, **options.pop("measure", {}))
        other = dataclasses.replace(config, measure=measured, **options)
        given = dataclasses.replace(experiment, config=other, test=items or experiment.test)
        return json.dumps(result_identity(given, changed, base), sort_keys=True)

    def item(**changes):
        first = experiment.test[0]
        return [first._replace(item=first.item._replace(**changes)), *experiment.test[1:]]

    other = dataclasses.replace(subject, identity={"weights": "other"})
    keys = [
        key(),
        key(other),
        key(base=other),
        key(base=subject),
        key(items=item(details={"test": "assert hidden"})),
        key(items=item(answer="other")),
        key(items=item(completion="other")),
        key(items=experiment.test[:5]),
        key(model=dataclasses.replace(config.model, dtype="bfloat16")),
        key(head=dataclasses.replace(config.head, chunk_size=256)),
        key(data=dataclasses.replace(config.data, form=dataclasses.replace(config.data.form, answer="json"))),
        key(data=dataclasses.replace(config.data, length_multiple=32)),
        key(evaluation=dataclasses.replace(config.evaluation, max_completion_length=9)),
        key(evaluation=dataclasses.replace(config.evaluation, batch_size=3)),
        key(seed=5),
        *(
            key(measure=options)
            for options in (
                {"samples": 2, "temperature": 1.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5},
                {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0, "min_p": 0.5}, {"retries": 1},
                {"retry_temperature": 1.0}, {"option_likelihood": True}, {"score_stop": True},
            )
        ),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)


# --- During training ---


def test_gain_and_drift_are_measured_while_training(main, tmp_path, finished):
    outcome = main(tmp_path, "--evaluation.every=2", "--evaluation.every_items=6")
    assert outcome.code == 0, outcome.err
    lines, result = read_metrics(tmp_path / "run"), read_result(tmp_path / "run")
    assert [line["step"] for line in lines if "eval_exact" in line] == [2, 4, 6]
    last = lines[-1]
    assert last["eval_exact"] == result["after"] and last["eval_drift"] == pytest.approx(result["drift"], rel=1e-5)
    assert last["eval_gain"] == pytest.approx(result["gain"])
    assert last["eval_gain_low"] <= last["eval_gain"] <= last["eval_gain_high"]
    assert last["eval_gold_logprob"] == pytest.approx(result["after_metrics"]["gold_logprob"], rel=1e-5)
    assert re.search(r"step .* exact +drift +ETA", outcome.out)
    report = (tmp_path / "run" / "report.md").read_text()
    for name in ("progress", "drift_and_gain"):
        assert f"(plots/{name}.png)" in report and (tmp_path / "run" / "plots" / f"{name}.png").exists()
    undisturbed = read_metrics(finished[0])
    assert [line["loss"] for line in lines] == [line["loss"] for line in undisturbed], "training is the same"


# --- Other engines ---


def test_a_vllm_server_replies_for_both_checkpoints(measure, workspace, other, tmp_path):
    """Greedy replies are those of our sampler; neither engine's are taken for the other's."""
    options = (f"--model.path={other}", f"--measure.base={workspace.model}", "--evaluation.max_completion_length=16")
    assert measure(*options).code == 0
    with FakeVllm(other) as server:
        through = measure(*options, "--rollout.engine=vllm", f"--rollout.vllm.addresses=[{server.address}]")
        assert through.code == 0, through.err
        assert server.samples and server.label == "left"
    by_engine = {read(folder)[0]["settings"]["rollout"]["engine"]: folder for folder in folders(tmp_path)}
    ours, theirs = read(by_engine["jax"]), read(by_engine["vllm"])
    assert [item["replies"] for item in theirs[1]] == [item["replies"] for item in ours[1]]
    assert theirs[0]["retention"]["jsd"] == pytest.approx(ours[0]["retention"]["jsd"])
    # All replies are kept: nobody is asked again, nor is a server needed.
    (by_engine["vllm"] / "summary.json").unlink()
    assert measure(*options, "--rollout.engine=vllm", "--rollout.vllm.addresses=[http://127.0.0.1:9]").code == 0
