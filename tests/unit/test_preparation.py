"""What the views show: donors and negatives that give nothing away, made once, kept, and resumed where they stopped."""

import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from task_rows import load as load_file

from unisd_jax.config import load_config
from unisd_jax.data.chat import load_chat
from unisd_jax.data.loading import load_items
from unisd_jax.data.tasks import get_task
from unisd_jax.data.tasks.base import Item
from unisd_jax.errors import UserError
from unisd_jax.made_once import NotPrepared, induced_instructions, item_negatives
from unisd_jax.preparation import context_messages, primary_messages, require_negatives_in_data, training_views
from unisd_jax.rollout import Rollout
from unisd_jax.teacher import student_messages
from unisd_jax.testing import tiny_checkpoint

BASE = Path(__file__).resolve().parents[2] / "configs" / "base.yaml"
TASK = get_task("short_answers")
COUNT = 20


class Scripted:
    """A sampler whose reply depends on the prompt's text alone; it can stop at a given call, as a killed run does."""

    def __init__(self, chat, reply, *, stop_at=None, max_position=10_000):
        self.model = types.SimpleNamespace(config=types.SimpleNamespace(max_position=max_position))
        self.chat, self.reply, self.stop_at, self.calls, self.asked = chat, reply, stop_at, 0, []

    def publish(self, params, version):
        raise AssertionError("the initial weights are already published")

    def generate(self, prompt_ids, prompt_mask, sampling, *, key, version):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        ids = np.full((len(prompt_ids), sampling.max_completion_length), sampling.pad_id, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, (prompt, kept) in enumerate(zip(prompt_ids, prompt_mask, strict=True)):
            self.asked.append(self.chat.text(list(prompt[kept])))
            text = self.reply(self.asked[-1])
            tokens = [*self.chat.tokenizer(text, add_special_tokens=False)["input_ids"], self.chat.stop_ids[0]]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        return Rollout(ids, mask, np.zeros(ids.shape, np.float32), np.ones(len(ids), bool), version)


def digest(text):
    return f"{zlib.crc32(text.encode()):08x}"


def instruction(prompt):
    return f"rule {digest(prompt)}"


def wrong_answer(prompt):
    return f'{{"answer": "wrong {digest(prompt)}"}}'


def never():
    raise AssertionError("the weights were loaded")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preparation")
    return [tiny_checkpoint(folder / str(seed), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def chat(checkpoints):
    return load_chat(checkpoints[0])


@pytest.fixture
def configure(checkpoints, tmp_path):
    """A configuration with every check of `mode` off; `model` 0 or 1 chooses the checkpoint."""

    def load(*overrides, model=0):
        words = ["mode=custom", f"model.path={checkpoints[model]}", f"teacher.cache_dir={tmp_path / 'cache'}"]
        return load_config(BASE, [f"--{word}" for word in (*words, *overrides)])

    return load


@pytest.fixture(scope="module")
def items():
    return load_items(TASK, "train", limit=COUNT).items


def written(messages):
    return "\n".join(message["content"] for message in messages)


def agreement(method, views=3):
    return (
        "objective.agreement.level=token",
        f"teacher.contexts.num_auxiliary_contexts={views}",
        f"teacher.contexts.method={method}",
    )


CONTRAST = "objective.contrast.contrastive_weight=0.1"
INDUCTION = (*agreement("induction"), "teacher.contexts.induction_demonstrations=2")


# --- The primary view ---


@pytest.mark.parametrize("placement", ["inline", "turns"])
def test_what_the_teacher_is_shown(configure, items, placement):
    def shown(condition):
        words = (f"teacher.condition={condition}", f"teacher.placement={placement}", CONTRAST)
        return primary_messages(configure(*words), items)

    for item, gold, none, own, other in zip(items, *map(shown, ("gold", "none", "self", "other")), strict=True):
        assert item.prompt in written(gold) and item.completion in written(gold)
        assert len(gold) == (3 if placement == "turns" else 1)
        assert none == student_messages(item.prompt)
        assert own is None, "made from the student's own samples at every step"
        assert item.prompt in written(other) and item.completion not in written(other)
        asked = "prompt" if placement == "turns" else "question"
        donors = [donor for donor in items if getattr(donor, asked) in written(other) and donor is not item]
        assert len(donors) == 1 and donors[0].completion in written(other)


@pytest.mark.parametrize("method", ["random", "retrieval"])
def test_the_other_item_is_another_for_another_seed_only_if_it_is_drawn(configure, items, method):
    words = ("teacher.condition=other", f"teacher.other_method={method}")
    first, again, other = (primary_messages(configure(*words, f"seed={seed}"), items) for seed in (0, 0, 1))
    assert first == again and (first == other) is (method == "retrieval")


# --- The auxiliary views ---


@pytest.mark.parametrize("method", ["random", "retrieval"])
@pytest.mark.parametrize("demonstrations", [1, 2])
def test_contexts_never_hold_the_items_own_solution(configure, chat, items, method, demonstrations):
    config = configure(*agreement(method), f"teacher.contexts.demonstrations={demonstrations}")
    found = context_messages(config, TASK, items, chat, never)
    for item, contexts in zip(items, found, strict=True):
        assert len(contexts) == 3
        for context in contexts:
            text = written(context)
            assert item.prompt in text and item.completion not in text
            assert sum(donor.completion in text for donor in items) == demonstrations
        assert len({written(context) for context in contexts}) == 3


def test_an_example_is_lent_in_place_of_the_completion_and_never_shown_to_its_own_teacher(configure, chat, items):
    lending = [item._replace(example=f"lent by {item.id}") for item in items]
    config = configure(*agreement("random"))
    for item, contexts in zip(lending, context_messages(config, TASK, lending, chat, never), strict=True):
        for context in contexts:
            text = written(context)
            assert text.count("lent by") == 1 and f"lent by {item.id}" not in text
            assert not any(donor.completion in text for donor in items)
    assert primary_messages(config, lending) == primary_messages(config, items)


def test_induced_contexts_hold_an_instruction_and_no_solution(configure, chat, items):
    sampler = Scripted(chat, instruction)
    config = configure(*INDUCTION)
    instructions = induced_instructions(config, items, chat, lambda: sampler)
    assert len(set(instructions)) == COUNT // 2
    for item, contexts in zip(items, context_messages(config, TASK, items, chat, never), strict=True):
        used = [[text for text in instructions if text in written(context)] for context in contexts]
        assert all(len(found) == 1 for found in used) and len({found[0] for found in used}) == 3
        assert all(item.prompt in written(context) for context in contexts)
        assert not any(donor.completion in written(context) for context in contexts for donor in items)


def test_without_auxiliary_views_there_are_none(configure, chat, items):
    assert context_messages(configure(), TASK, items, chat, never) == [[]] * COUNT


# --- Negatives ---


def test_negatives_by_rule_are_wrong_and_need_no_model(configure, chat, items):
    found = item_negatives(configure(CONTRAST), TASK, items, chat, never)
    assert all(TASK.grade(reply, item)["exact"] == 0 for reply, item in zip(found, items, strict=True))
    assert all(TASK.grade(reply, item)["form"] == 1 for reply, item in zip(found, items, strict=True))
    assert found == item_negatives(configure(CONTRAST), TASK, items, chat, never)
    assert found != item_negatives(configure(CONTRAST, "seed=1"), TASK, items, chat, never)


def test_negatives_by_the_model_are_checked_by_the_task(configure, chat, items):
    right = {item.prompt: item.completion for item in items[:1]}

    def reply(prompt):
        asked = prompt[prompt.rindex("user\n") :]
        known = [completion for question, completion in right.items() if question in asked]
        return known[0] if known else wrong_answer(prompt)

    words = (CONTRAST, "teacher.negatives.source=model", "teacher.negatives.per_item=2")
    sampler = Scripted(chat, reply)
    found = item_negatives(configure(*words), TASK, items, chat, lambda: sampler)
    assert found[0] is None, "asked for a wrong reply, it gave the right one"
    assert all("wrong" in text and TASK.grade(text, item)["exact"] == 0 for text, item in zip(found[1:], items[1:]))  # noqa: B905


def test_negatives_of_the_data_are_taken_as_they_are(configure, chat, items):
    own = [item._replace(negative=f"no {item.id}") for item in items]
    config = configure(CONTRAST, "teacher.negatives.source=data")
    require_negatives_in_data(config, own)
    assert item_negatives(config, TASK, own, chat, never) == [item.negative for item in own]


def test_a_right_reply_is_no_negative_even_if_the_data_say_so(configure, chat, items):
    own = [item._replace(negative=item.completion if index == 0 else "no") for index, item in enumerate(items)]
    config = configure(CONTRAST, "teacher.negatives.source=data", "teacher.negatives.min_coverage=0.5")
    assert item_negatives(config, TASK, own, chat, never) == [None, *["no"] * (len(items) - 1)]


def test_a_dry_run_makes_nothing_and_says_what_is_missing(configure, chat, items, tmp_path):
    config = configure(CONTRAST)
    with pytest.raises(NotPrepared, match=rf"negatives for short_answers are still to be made \({COUNT} records in "):
        training_views(config, TASK, items, chat, never, read_only=True)
    assert not (tmp_path / "cache").exists()
    training_views(config, TASK, items, chat, never)
    kept, *_ = training_views(config, TASK, items, chat, never, read_only=True)
    assert len(kept) == COUNT


def test_negatives_of_a_jsonl_file_are_read(configure, chat, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"prompt": "2+2?", "completion": "4", "negative": "5"}\n')
    items = load_file("jsonl", path)
    assert item_negatives(configure(CONTRAST, "teacher.negatives.source=data"), TASK, items, chat, never) == ["5"]


def test_data_without_negatives_is_refused_by_name(configure, items):
    config = configure(CONTRAST, "teacher.negatives.source=data")
    with pytest.raises(UserError) as error:
        require_negatives_in_data(config, items)
    message = str(error.value)
    assert "teacher.negatives.source" in message and f"{COUNT} of {COUNT}" in message and items[0].id in message
    assert "\n" not in message
    require_negatives_in_data(configure("teacher.negatives.source=data"), items)  # no contrast: nobody reads them
    require_negatives_in_data(configure(CONTRAST), items)


@pytest.mark.parametrize("source", ["corruption", "data"])
def test_too_few_negatives_are_refused_before_the_weights_are_loaded(configure, chat, items, source):
    lenient = TASK._replace(grade=lambda text, item: {"exact": 1.0})
    config = configure(CONTRAST, f"teacher.negatives.source={source}")
    with pytest.raises(UserError, match=rf"0 of {COUNT} items have a wrong reply .*teacher\.negatives\.min_coverage"):
        training_views(config, lenient, items, chat, never)


def test_items_without_a_negative_are_left_out_where_coverage_allows(configure, chat, items):
    own = [item._replace(negative=None if index in (3, 7) else "no") for index, item in enumerate(items)]
    config = configure(CONTRAST, "teacher.negatives.source=data")
    kept, views, _ = training_views(config, TASK, own, chat, never)
    assert kept == [item for index, item in enumerate(own) if index not in (3, 7)]
    for item, view in zip(kept, views, strict=True):
        # The same layout for the right and the wrong solution.
        assert written(view.negative) == written(view.teacher).replace(item.completion, "no")
    with pytest.raises(UserError, match="18 of 20"):
        training_views(configure(CONTRAST, "teacher.negatives.source=data", "teacher.negatives.min_coverage=0.95"),
                       TASK, own, chat, never)  # fmt: skip


def test_only_the_views_that_are_asked_for_are_made(configure, chat, items):
    for words, teacher, contexts, negative in (
        ((), True, 0, False),
        (agreement("random", 2), True, 2, False),
        ((CONTRAST,), True, 0, True),
        (("objective.loss=nll", "rollout.source=gold"), False, 0, False),
    ):
        kept, views, _ = training_views(configure(*words), TASK, items, chat, never)
        assert kept == items
        for item, view in zip(items, views, strict=True):
            assert view.student == student_messages(item.prompt)
            assert (view.teacher is not None, len(view.contexts), view.negative is not None) == (
                teacher,
                contexts,
                negative,
            )


# --- Caches ---


def induced(config, items, chat, sampler):
    return induced_instructions(config, items, chat, lambda: sampler)


def negatives(config, items, chat, sampler):
    return item_negatives(config, TASK, items, chat, lambda: sampler)


KINDS = {
    "induction": (induced, (*INDUCTION,), instruction),
    "negatives": (
        negatives,
        (CONTRAST, "teacher.negatives.source=model", "teacher.negatives.per_item=2"),
        wrong_answer,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_made_is_read_the_second_time(configure, chat, items, capsys, kind):
    make, words, reply = KINDS[kind]
    sampler, config = Scripted(chat, reply), configure(*words)
    first = make(config, items, chat, sampler)
    assert sampler.calls > 1
    assert f"making {kind}" in capsys.readouterr().out
    idle = Scripted(chat, reply, stop_at=1)
    assert make(config, items, chat, idle) == first and idle.calls == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_cache_goes_on_to_the_same_result(configure, chat, items, tmp_path, capsys, kind):
    make, words, reply = KINDS[kind]
    undisturbed = Scripted(chat, reply)
    expected = make(configure(*words, f"teacher.cache_dir={tmp_path / 'other'}"), items, chat, undisturbed)
    config, broken = configure(*words), Scripted(chat, reply, stop_at=undisturbed.calls)
    with pytest.raises(KeyboardInterrupt):
        make(config, items, chat, broken)
    capsys.readouterr()
    resumed = Scripted(chat, reply)
    assert make(config, items, chat, resumed) == expected
    assert 0 < resumed.calls < undisturbed.calls, "what was there is not asked for again"
    said = capsys.readouterr().out
    assert f"making {kind}" in said and ": 0 of" not in said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("more", "model", "why"), [(("seed=1",), 0, "seed: 0 -> 1"), ((), 1, "model: ")])
def test_another_seed_or_model_builds_anew_and_says_why(configure, chat, items, capsys, kind, more, model, why):
    make, words, reply = KINDS[kind]
    make(configure(*words), items, chat, Scripted(chat, reply))
    capsys.readouterr()
    anew = Scripted(chat, reply)
    make(configure(*words, *more, model=model), items, chat, anew)
    assert anew.calls > 1
    assert f"another cache is there, but {why}" in capsys.readouterr().out


def test_other_items_build_anew(configure, chat, items):
    make, words, reply = KINDS["induction"]
    make(configure(*words), items, chat, Scripted(chat, reply))
    changed = [items[0]._replace(completion="changed"), *items[1:]]
    anew = Scripted(chat, reply)
    make(configure(*words), changed, chat, anew)
    assert anew.calls > 1


def test_options_that_a_cache_does_not_depend_on_leave_it_alone(configure, chat, items):
    make, words, reply = KINDS["negatives"]
    first = make(configure(*words), items, chat, Scripted(chat, reply))
    same = configure(
        *words, "train.steps=3", "optimizer.learning_rate=1", "teacher.placement=turns", "objective.alpha=1"
    )
    assert make(same, items, chat, Scripted(chat, reply, stop_at=1)) == first


def test_a_prompt_that_the_model_cannot_read_is_refused_by_name(configure, chat, items):
    short = Scripted(chat, instruction, max_position=100)
    with pytest.raises(UserError, match=r"the model reads at most 100; lower teacher\.contexts\.induction_demo"):
        induced(configure(*INDUCTION), items, chat, short)
    assert short.calls == 0


def test_items_are_plain(items):
    assert all(isinstance(item, Item) and item.negative is None for item in items)
    assert len({item.completion for item in items}) == COUNT, "each solution can be told from the others"
