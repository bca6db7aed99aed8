"""From a batch of examples to its views: who samples, what the teacher is shown, and what is masked."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from unisd_jax.collection import begin_batch, finish_batch, majority, own_answers
from unisd_jax.config import load_config
from unisd_jax.data.buckets import length_buckets
from unisd_jax.data.pipeline import tokenize
from unisd_jax.experiment import build, new_state, student_params
from unisd_jax.models import merge
from unisd_jax.preparation import training_views
from unisd_jax.rollout import Rollout, RolloutEngine
from unisd_jax.rollout.protocol import require_version
from unisd_jax.teacher import student_messages, teacher_messages
from unisd_jax.testing import tiny_checkpoint

BASE = Path(__file__).resolve().parents[2] / "configs" / "base.yaml"
LENGTH, BATCH = 12, 4

# Of the completions as they are, in every step.
LENGTHS = {"completion_length", "eos_rate", "truncated_share", "seconds_waiting", "policy_version"}


class Scripted(RolloutEngine):
    """A sampler that replies with the given texts in turn; one that ends in "…" is cut at the limit instead."""

    def __init__(self, model, chat, texts):
        self.model, self.chat, self.texts = model, chat, texts
        self.published, self.keys, self.prompts, self.version = [], [], [], None

    def publish(self, params, version, lora=None):
        self.published.append(merge(params, lora))
        self.version = version

    def generate(self, prompt_ids, prompt_mask, sampling, *, key, version):
        require_version(self.version, version)
        self.keys.append(jax.random.key_data(key).tolist())
        self.prompts += [list(row[kept]) for row, kept in zip(prompt_ids, prompt_mask, strict=True)]
        ids = np.full((len(prompt_ids), sampling.max_completion_length), sampling.pad_id, np.int32)
        mask, stopped = np.zeros(ids.shape, bool), np.ones(len(ids), bool)
        for row in range(len(ids)):
            text = self.texts[row % len(self.texts)]
            tokens = self.chat.tokenizer(text.rstrip("…"), add_special_tokens=False)["input_ids"]
            if text.endswith("…"):
                tokens, stopped[row] = (tokens * LENGTH)[:LENGTH], False
            else:
                tokens = [*tokens, self.chat.stop_ids[0]]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        return Rollout(ids, mask, np.where(mask, np.float32(-1.5), 0), stopped, version)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An experiment with an adapter, eight training items and everything small."""
    folder = tmp_path_factory.mktemp("collection")
    for split, count in (("train", 8), ("test", 2)):
        rows = [{"id": f"{split}{n}", "prompt": f"{split} {n}?", "completion": f"a{n}"} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        f"model.path={tiny_checkpoint(folder / 'tiny')}", "model.dtype=float32", "model.lora.rank=2", "mode=custom",
        "data.task=jsonl", f"data.train_path={folder / 'train.jsonl'}", f"data.test_path={folder / 'test.jsonl'}",
        "data.max_prompt_length=400", "data.length_multiple=8", f"train.batch_size={BATCH}",
        f"rollout.max_completion_length={LENGTH}", f"evaluation.max_completion_length={LENGTH}",
        "rollout.temperature=1.0", f"teacher.cache_dir={folder / 'cache'}",
    )  # fmt: skip
    words = [f"--{word}" for word in words]
    return build(load_config(BASE, words)), words


@pytest.fixture
def prepare(built):
    """(experiment with these options and a scripted sampler, state with a student that has left the base)."""
    experiment, words = built

    def with_options(*options, texts=("yes",)):
        config = load_config(BASE, [*words, *(f"--{option}" for option in options)])
        sampler = Scripted(experiment.model, experiment.chat, texts)
        changed = dataclasses.replace(experiment, config=config, sampler=sampler)
        items = [example.item for example in experiment.train]
        made = training_views(config, experiment.task, items, experiment.chat, lambda: sampler)
        train = tokenize(made.items, made.views, experiment.chat)
        changed = dataclasses.replace(changed, train=train, buckets=length_buckets(train, number=2, multiple=8))
        return changed, _state(experiment)

    return with_options


def _state(experiment):
    return new_state(experiment)._replace(step=jnp.int32(3), student=toys.random_lora(experiment.base))


def collect(prepared):
    experiment, state = prepared
    views, metrics = finish_batch(experiment, begin_batch(experiment, state, experiment.train[:BATCH]))
    return views, metrics, experiment.sampler


def rows(part):
    return [list(ids[kept]) for ids, kept in zip(part.ids, part.mask, strict=True)]


# --- Who samples ---


def test_the_student_samples_with_its_own_merged_weights(prepare):
    experiment, state = prepared = prepare(texts=("yes", "no", "maybe"))
    views, metrics, sampler = collect(prepared)
    (params,) = sampler.published
    toys.assert_trees_close(params, student_params(experiment, state))
    assert sampler.version == 3 and metrics.keys() == LENGTHS
    assert [experiment.chat.text(row) for row in rows(views.completions)] == ["yes", "no", "maybe", "yes"]
    assert np.all(views.sampler_logps[views.completions.mask] == -1.5)
    examples = experiment.train[:BATCH]
    assert rows(views.student) == [list(example.student) for example in examples] == sampler.prompts
    assert rows(views.teacher) == [list(example.teacher) for example in examples]
    assert views.contexts is None and views.negative is None
    assert views.student.ids.shape[1] % 8 == views.teacher.ids.shape[1] % 8 == 0


def test_gold_completions_are_not_sampled_and_have_no_sampler_logps(prepare):
    experiment, _ = prepared = prepare("rollout.source=gold")
    views, metrics, sampler = collect(prepared)
    assert rows(views.completions) == [list(example.gold) for example in experiment.train[:BATCH]]
    assert views.sampler_logps is None and sampler.published == [] and metrics.keys() == LENGTHS
    assert views.completions.ids.shape == (BATCH, LENGTH)
    assert views.teacher is not None


def test_supervised_training_has_no_teacher(prepare):
    views, _, _ = collect(prepare("rollout.source=gold", "objective.loss=nll"))
    assert views.teacher is None and views.contexts is None and views.negative is None


def test_the_base_samples_with_its_own_weights_and_short_completions_are_masked(prepare):
    """As in SSD: the initial model, whatever the student has become; its log-probs are not the student's."""
    options = ("objective.loss=nll", "rollout.source=base", "rollout.min_completion_length=3")
    experiment, _ = prepared = prepare(*options, texts=("", "a", "ab", "long enough"))
    views, _, sampler = collect(prepared)
    assert len(sampler.published) == 1 and sampler.published[0] is experiment.base
    assert views.sampler_logps is None and views.teacher is None
    # One token is the stop token: lengths 1, 2, 3 and 12.
    assert views.completions.mask.sum(axis=1).tolist() == [0, 0, 3, 12]


@pytest.mark.parametrize("masked", [False, True])
def test_truncated_completions_add_no_loss_where_that_is_asked(prepare, masked):
    prepared = prepare(f"rollout.mask_truncated_completions={str(masked).lower()}", texts=("yes", "on and on…"))
    views, _, _ = collect(prepared)
    assert views.completions.mask.sum(axis=1).tolist() == ([4, 0] if masked else [4, LENGTH]) * 2


def test_what_is_drawn_depends_on_seed_and_step(prepare):
    def key(step, *options):
        experiment, state = prepare(*options)
        collect((experiment, state._replace(step=jnp.int32(step))))
        return tuple(experiment.sampler.keys[0])

    assert key(3) == key(3)
    assert len({key(3), key(4), key(3, "seed=1")}) == 3


# --- Mixtures ---


def sources(prepared, steps=200):
    """Whether each step samples from the student."""
    experiment, state = prepared
    drawn = []
    for step in range(steps):
        batch = begin_batch(experiment, state._replace(step=jnp.int32(step)), experiment.train[:BATCH])
        views, metrics = finish_batch(experiment, batch)
        own = views.sampler_logps is not None
        assert metrics.keys() == LENGTHS | {"on_policy"} and metrics["on_policy"] == float(own)
        texts = rows(views.completions)
        assert (texts == [list(example.gold) for example in experiment.train[:BATCH]]) != own
        drawn.append(own)
    return drawn


@pytest.fixture
def quick_merge(monkeypatch):
    """Steps whose weights nobody looks at."""
    monkeypatch.setattr("unisd_jax.collection.policy", lambda experiment, state: (experiment.base, int(state.step)))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_mixture_draws_each_step_by_the_seed(prepare, quick_merge, share):
    run = functools.partial(prepare, f"rollout.on_policy_share={share}")
    first = sources(run())
    assert sources(run()) == first, "a resumed run draws the same"
    assert sources(run("seed=1")) != first
    # Four standard deviations of a binomial count.
    assert abs(np.mean(first) - share) < 4 * np.sqrt(share * (1 - share) / 200)


def test_the_ends_of_a_mixture(prepare, quick_merge):
    assert not any(sources(prepare("rollout.on_policy_share=0"), steps=5))
    views, metrics, _ = collect(prepare("rollout.on_policy_share=1"))
    assert views.sampler_logps is not None and metrics.keys() == LENGTHS


# --- Further views ---


def test_contexts_and_negatives_are_padded_beside_the_primary_view(prepare):
    options = (
        "objective.agreement.level=token", "teacher.contexts.num_auxiliary_contexts=2",
        "objective.contrast.contrastive_weight=0.1", "teacher.negatives.min_coverage=0.9",
    )  # fmt: skip
    experiment, _ = prepared = prepare(*options)
    views, _, _ = collect(prepared)
    examples = experiment.train[:BATCH]
    assert views.contexts.ids.shape[:2] == (BATCH, 2) and views.contexts.ids.shape[2] % 8 == 0
    for row, example in enumerate(examples):
        found = [list(ids[kept]) for ids, kept in zip(views.contexts.ids[row], views.contexts.mask[row], strict=True)]
        assert found == [list(ids) for ids in example.contexts]
    assert rows(views.negative) == [list(example.negative) for example in examples]
    assert all(
        negative != list(example.teacher) for negative, example in zip(rows(views.negative), examples, strict=True)
    )


# --- The student's own answers ---


def test_the_majority():
    replies = [("It is 4", "4"), ("5!", "5"), ("four: 4", "4"), ("?", None)]
    assert majority(replies, 4) == ("It is 4", 0.5), "the first reply with the answer"
    assert majority(replies, 8) == ("It is 4", 0.25), "unfinished samples count in the share"
    assert majority([("?", None)], 4) == (None, 0.0)
    assert majority([], 4) == (None, 0.0)


# Rows of four samples each: agreement 3/4, 1/4, 2/4 (one of them not finished), and nothing that finished.
SAMPLES = ("x", "y", "x", "x", "a", "b", "c", "d", "p", "q", "p", "p…", "z…", "z…", "z…", "z…")


def test_own_answers_are_the_teachers_demonstration(prepare):
    experiment, state = prepare("teacher.condition=self", texts=SAMPLES)
    examples = experiment.train[:BATCH]
    rollout = begin_batch(experiment, state, examples).answers.result()
    own = own_answers(experiment, rollout, examples)
    del experiment.sampler.prompts[4 * BATCH :]  # of the rollout itself
    assert own.shares == [0.75, 0.25, 0.5, 0.0] and own.accepted.tolist() == [True, False, True, False]
    assert experiment.sampler.prompts == [list(example.student) for example in examples for _ in range(4)]
    (published,) = experiment.sampler.published
    toys.assert_trees_close(published, student_params(experiment, state))
    for example, prompt, reply in zip(experiment.train, own.prompts, ("x", None, "p", None), strict=False):
        question = example.item.prompt
        if reply is None:
            assert list(prompt) == list(example.student) == experiment.chat.prompt_ids(student_messages(question))
        else:
            shown = teacher_messages(question, reply, condition="self", placement="inline")
            assert prompt == experiment.chat.prompt_ids(shown)
            assert example.item.completion not in experiment.chat.text(prompt), "no label is read"


def test_items_without_agreement_are_masked_and_counted(prepare):
    # The rollout of the batch takes the first four texts, each of them finished.
    views, metrics, sampler = collect(prepare("teacher.condition=self", texts=SAMPLES))
    assert metrics["self_agreement"] == pytest.approx(1.5 / 4) and metrics["self_accepted"] == 0.5
    # What is left out of the loss is still a completion that ended.
    assert metrics["eos_rate"] == 1.0 and metrics["completion_length"] > 0
    assert views.completions.mask.any(axis=1).tolist() == [True, False, True, False]
    assert len(sampler.keys) == 2 and sampler.keys[0] != sampler.keys[1], "own answers have draws of their own"
    assert len(sampler.prompts) == BATCH + 4 * BATCH


@pytest.mark.parametrize(("minimum", "accepted"), [(0.0, 0.75), (0.5, 0.5), (0.6, 0.25), (1.0, 0.0)])
def test_how_much_agreement_is_asked_for(prepare, minimum, accepted):
    options = ("teacher.condition=self", f"teacher.self_min_agreement={minimum}")
    _, metrics, _ = collect(prepare(*options, texts=SAMPLES))
    assert metrics["self_accepted"] == accepted


def test_an_own_answer_that_is_too_long_for_the_prompt_is_not_accepted(prepare):
    experiment, state = prepare("teacher.condition=self", texts=("x",))
    limit = len(experiment.train[0].student) + 5
    config = dataclasses.replace(
        experiment.config, data=dataclasses.replace(experiment.config.data, max_prompt_length=limit)
    )
    views, metrics, _ = collect((dataclasses.replace(experiment, config=config), state))
    assert metrics["self_agreement"] == 1.0 and metrics["self_accepted"] == 0.0
    assert not views.completions.mask.any() and rows(views.teacher) == rows(views.student)
