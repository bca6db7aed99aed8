"""Greedy evaluation and drift: batches of one shape whose filling never counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from unisd_jax.data.chat import Chat
from unisd_jax.data.pipeline import Example
from unisd_jax.data.tasks.base import Item, Task
from unisd_jax.eval import retention
from unisd_jax.eval.batches import Rows, length_batches
from unisd_jax.eval.generation import Reply, generate_replies, greedy
from unisd_jax.eval.retention import UNRELATED_PROMPTS, base_replies
from unisd_jax.eval.runner import evaluate_examples, gold_logprob
from unisd_jax.eval.scores import Network, token_logps
from unisd_jax.rollout import JaxSampler, Rollout
from unisd_jax.testing import byte_tokenizer

LENGTH = 6


@pytest.fixture(scope="module")
def toy():
    return toys.random_model(vocab_size=264)


@pytest.fixture(scope="module")
def chat():
    tokenizer = byte_tokenizer()
    return Chat(tokenizer, (tokenizer.eos_token_id,))


@pytest.fixture(scope="module")
def examples(chat):
    """Five items with prompts and gold completions of different lengths."""
    rows = []
    for number in range(5):
        item = Item(str(number), "?" * (3 * number + 1), "yes" * (number + 1), "yes")
        messages = [{"role": "user", "content": item.prompt}]
        prompt = chat.prompt_ids(messages)
        rows.append(Example(item, prompt, prompt, chat.reply_ids(messages, item.completion)))
    return rows


class Parrot:
    """An engine that replies with scripted texts and remembers what it was asked."""

    def __init__(self, chat, texts):
        self.chat, self.texts, self.shapes, self.published = chat, list(texts), [], []

    def publish(self, params, version):
        self.published.append(version)

    def generate(self, prompt_ids, prompt_mask, sampling, *, key, version):
        assert sampling.temperature == 0 and sampling.stop_ids == self.chat.stop_ids
        self.shapes.append(prompt_ids.shape)
        ids = np.full((len(prompt_ids), sampling.max_completion_length), sampling.pad_id, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row in range(len(prompt_ids)):
            text = self.texts.pop(0) if self.texts else "filling"
            tokens = self.chat.tokenizer(text)["input_ids"][: ids.shape[1]]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        stopped = np.isin(ids, self.chat.stop_ids).any(axis=1)
        return Rollout(ids, mask, np.zeros(ids.shape, np.float32), stopped, version)


def test_batches_hold_similar_lengths_in_few_shapes():
    lengths = [(30,), (3,), (31,), (5,), (90,)]
    assert list(length_batches(lengths, size=2, multiple=8)) == [
        Rows([1, 3], (8,)), Rows([0, 2], (48,)), Rows([4], (96,)),
    ]  # fmt: skip
    assert list(length_batches([(7, 2)], size=4, multiple=1)) == [Rows([0], (7, 2))]
    assert list(length_batches([], size=4, multiple=1)) == []


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), min_size=1, max_size=30),
    st.integers(1, 7),
    st.sampled_from([1, 8, 32]),
)
def test_every_row_is_in_one_batch_that_holds_it(lengths, size, multiple):
    batches = list(length_batches(lengths, size=size, multiple=multiple))
    assert sorted(number for rows in batches for number in rows.numbers) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows.numbers) <= size and all(length % multiple == 0 for length in rows.lengths)
        assert all(need <= has for n in rows.numbers for need, has in zip(lengths[n], rows.lengths, strict=True))
    assert len({rows.lengths for rows in batches}) <= 10 * 7, "halves of the longest, so few shapes"


def test_replies_are_graded_and_the_filling_is_not(toy, chat, examples):
    model, params = toy
    texts = ["yes<|im_end|>", "no<|im_end|>", "yes<|im_end|>", "neither", "yes, sir"]
    engine = Parrot(chat, texts)
    kinds = {True: "right", False: "wrong"}

    def grade(text, item):
        return {"exact": float(text == item.answer), "kind": kinds[text == item.answer]}

    task = Task("yes", lambda split, path: [], grade)
    result = evaluate_examples(
        engine, model, params, examples, chat, task,
        version=4, max_completion_length=LENGTH, batch_size=2, length_multiple=8,
    )  # fmt: skip
    assert engine.published == [4]
    assert len(engine.shapes) == 3 and len(set(engine.shapes)) == 1, "one program serves all batches"
    assert engine.shapes[0][1] % 8 == 0
    assert result.replies == ["yes", "no", "yes", "neithe", "yes, s"]
    assert [grade["exact"] for grade in result.grades] == [1, 0, 1, 0, 0]
    assert result.means["exact"] == pytest.approx(2 / 5) and "kind" not in result.means
    assert result.means["truncated_share"] == pytest.approx(2 / 5)
    direct = gold_logprob(Network(model, params), examples, chat, batch_size=2, length_multiple=8)
    assert result.means["gold_logprob"] == direct


def generate(toy, chat, examples, size=2, multiple=8, **options):
    model, params = toy
    engine = JaxSampler(model)
    engine.publish(params, 0)
    prompts = [example.student for example in examples]
    return generate_replies(
        engine, prompts, greedy(chat, LENGTH), key=jax.random.key(0), version=0, batch_size=size,
        length_multiple=multiple, **options,
    )  # fmt: skip


def test_greedy_replies_do_not_depend_on_the_batch(toy, chat, examples):
    found = [generate(toy, chat, examples, size, multiple) for size, multiple in ((2, 8), (5, 1))]
    assert found[0] == found[1] and len(found[0]) == 5
    assert all(type(token) is int for reply in found[0] for token in reply.ids)
    backwards = generate(toy, chat, examples[::-1])
    assert backwards[::-1] == found[0], "replies come in the order of the prompts"


def test_finished_is_said_of_replies_that_end_with_a_stop_token(toy, chat, examples):
    for reply in generate(toy, chat, examples):
        assert reply.finished == (reply.ids[-1] in chat.stop_ids) and 1 <= len(reply.ids) <= LENGTH


def test_known_batches_are_not_generated_again(toy, chat, examples):
    recorded = []
    whole = generate(toy, chat, examples, record=recorded.append)
    assert [len(batch) for batch in recorded] == [2, 2, 1]
    assert {row: reply for batch in recorded for row, reply in batch.items()} == dict(enumerate(whole))
    again = []
    known = recorded[0] | {row: Reply([1, 2], False) for row in recorded[1]}
    found = generate(toy, chat, examples, known=known, record=again.append)
    assert again == recorded[2:], "only what is missing"
    assert [found[row] for row in recorded[1]] == [Reply([1, 2], False)] * 2, "what is known is kept as it is"


def test_gold_logprob_is_the_mean_over_all_tokens(toy, chat, examples):
    """Pooled over tokens, not averaged over items; the same for every batch size."""
    model, params = toy
    logps = []
    logits = jax.jit(lambda ids: model.logits(params, model.hidden(params, ids, jnp.ones_like(ids, bool))))
    for example in examples[:3]:
        ids = np.array([example.student + example.gold], np.int32)
        scores = np.asarray(jax.nn.log_softmax(logits(ids)))[0]
        start = len(example.student)
        logps += [scores[at - 1, ids[0, at]] for at in range(start, ids.shape[1])]
    for batch_size in (2, 3):
        found = gold_logprob(Network(model, params), examples[:3], chat, batch_size=batch_size, length_multiple=8)
        assert found == pytest.approx(np.mean(logps), rel=1e-4)


def test_token_logps_are_those_of_the_completion(toy):
    model, params = toy
    rng = np.random.default_rng(0)
    prompts, completions = toys.left_padded(rng, 3, 5), toys.right_padded(rng, 3, 4)
    found = np.asarray(token_logps(params, *prompts, *completions, model=model))
    assert found.shape == (3, 4) and np.array_equal(found < 0, completions[1])
    # Scoring a prompt one token longer gives the same numbers one place earlier.
    longer = [np.concatenate([a, b[:, :1]], axis=1) for a, b in zip(prompts, completions, strict=True)]
    shorter = [x[:, 1:] for x in completions]
    again = np.asarray(token_logps(params, *longer, *shorter, model=model))
    np.testing.assert_allclose(found[:, 1:][shorter[1]], again[shorter[1]], atol=1e-5)


def drift(toy, chat, trained, batch_size):
    model, base = toy
    replies = base_replies(JaxSampler(model), base, chat, max_completion_length=4, batch_size=3, length_multiple=16)
    networks = (Network(model, weights) for weights in (trained, base))
    return retention.drift(*networks, replies, chat, batch_size=batch_size, length_multiple=16)


@pytest.fixture
def few_prompts(monkeypatch):
    monkeypatch.setattr(retention, "UNRELATED_PROMPTS", UNRELATED_PROMPTS[:5])


def test_drift(toy, chat, few_prompts):
    _, base = toy
    other = toys.random_model(seed=1, vocab_size=264)[1]
    assert drift(toy, chat, base, 3) == pytest.approx(0.0, abs=1e-6)
    slightly = jax.tree.map(lambda x, y: 0.95 * x + 0.05 * y, base, other)
    near, far = drift(toy, chat, slightly, 3), drift(toy, chat, other, 3)
    assert 0 < near < far < np.log(2)
    assert drift(toy, chat, slightly, 5) == pytest.approx(near, rel=1e-4), "filled-up rows do not count"


def test_the_unrelated_prompts_are_distinct():
    assert len(set(UNRELATED_PROMPTS)) == len(UNRELATED_PROMPTS) >= 16
