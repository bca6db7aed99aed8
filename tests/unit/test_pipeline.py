"""Tokenising, padding and batching: an order that is fixed by the seed, resumes exactly, and cuts nothing."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisd_jax.data.batching import pad_completions, pad_contexts, pad_prompts, round_up
from unisd_jax.data.chat import load_chat
from unisd_jax.data.pipeline import Example, ViewMessages, batches, tokenize
from unisd_jax.data.tasks.base import Item
from unisd_jax.errors import UserError
from unisd_jax.teacher import student_messages, teacher_messages
from unisd_jax.testing import tiny_checkpoint

# --- Order ---


def examples(count: int) -> list[Example]:
    return [Example(Item(str(i), f"prompt {i}", f"reply {i}", ""), [i], [i], [i]) for i in range(count)]


def stream(count=10, batch_size=5, *, seed=0, shuffle=True):
    return batches(examples(count), batch_size=batch_size, seed=seed, shuffle=shuffle)


def ids(batch_list) -> list[int]:
    return [int(example.item.id) for batch in batch_list for example in batch]


def test_the_same_seed_gives_the_same_order_and_another_seed_another():
    first, again, other = (ids(itertools.islice(stream(seed=seed), 6)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_every_epoch_holds_every_item_once_in_a_new_order():
    order = ids(itertools.islice(stream(), 8))
    epochs = [tuple(order[start : start + 10]) for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)


def test_batches_that_span_two_epochs_lose_and_repeat_nothing():
    order = ids(itertools.islice(stream(count=7, batch_size=3), 7))
    assert [sorted(order[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3


def test_without_shuffling_the_file_order_repeats():
    assert ids(itertools.islice(stream(count=4, batch_size=2, shuffle=False), 4)) == [0, 1, 2, 3] * 2


def test_a_batch_is_a_list_of_whole_examples():
    batch = next(stream(batch_size=4))
    assert len(batch) == 4
    assert all(isinstance(example, Example) and example.student == [int(example.item.id)] for example in batch)


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 4, 9])
def test_the_place_is_restored_exactly(taken):
    iterator = stream(count=7, batch_size=3)
    ids(itertools.islice(iterator, taken))
    saved = json.loads(json.dumps(iterator.get_state()))  # a checkpoint holds it as JSON
    expected = ids(itertools.islice(iterator, 8))

    resumed = stream(count=7, batch_size=3)
    resumed.set_state(saved)
    assert ids(itertools.islice(resumed, 8)) == expected


def test_the_place_is_restored_over_one_that_has_moved_on():
    iterator = stream()
    next(iterator)
    saved, expected = iterator.get_state(), ids([next(iterator)])
    ids(itertools.islice(iterator, 5))
    iterator.set_state(saved)
    assert ids([next(iterator)]) == expected


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match=r"train\.batch_size is 11, but there are only 10 training items"):
        stream(batch_size=11)
    assert len(next(stream(batch_size=10))) == 10


# --- Tokenising ---


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return load_chat(tiny_checkpoint(tmp_path_factory.mktemp("pipeline") / "tiny"))


def items(*lengths: int) -> list[Item]:
    return [Item(f"i{index}", "p" * length, "gold", "gold") for index, length in enumerate(lengths)]


def views_of(item: Item) -> ViewMessages:
    teacher = teacher_messages(item.prompt, item.completion, condition="gold", placement="turns")
    return ViewMessages(student_messages(item.prompt), teacher)


def tokenized(chat, items, views=None, **options):
    return tokenize(items, [views_of(item) for item in items] if views is None else views, chat, **options)


def test_an_example_holds_the_prompts_of_its_views_and_the_gold_reply(chat):
    (example,), dropped = tokenized(chat, items(5), max_prompt_length=500)
    student = student_messages("ppppp")
    assert example.student == chat.prompt_ids(student)
    assert example.teacher == chat.prompt_ids(
        [*student, {"role": "assistant", "content": "gold"}, {"role": "user", "content": "ppppp"}]
    )
    assert example.gold == chat.reply_ids(student, "gold")
    assert example.item.id == "i0" and dropped == 0
    assert example.contexts == () and example.negative is None


def test_auxiliary_and_negative_prompts_are_tokenised_where_there_are_any(chat):
    (item,) = items(5)
    question = student_messages(item.prompt)
    contexts = tuple([{"role": "user", "content": text}] for text in ("one", "two and more"))
    wrong = teacher_messages(item.prompt, "wrong", condition="gold", placement="turns")
    (example,), _ = tokenized(chat, [item], [ViewMessages(question, None, contexts, wrong)], max_prompt_length=500)
    assert example.teacher is None
    assert example.contexts == tuple(chat.prompt_ids(context) for context in contexts)
    assert example.negative == chat.prompt_ids(wrong)


def test_every_view_counts_for_the_length_and_is_named(chat):
    (item,) = items(5)
    question, long = student_messages(item.prompt), student_messages("p" * 60)
    limit = len(chat.prompt_ids(long)) - 1
    for name, views in (
        ("auxiliary prompt 2", ViewMessages(question, question, (question, long))),
        ("the negative prompt", ViewMessages(question, question, (), long)),
    ):
        with pytest.raises(UserError, match=rf"i0: {name} has \d+ tokens, data\.max_prompt_length is {limit}"):
            tokenized(chat, [item], [views], max_prompt_length=limit, overlong="error")
        assert tokenized(chat, [item], [views], max_prompt_length=limit + 1, overlong="error")[1] == 0


def test_too_long_items_are_dropped_whole_and_counted(chat):
    all_of_them, _ = tokenized(chat, items(5, 60, 6, 61), max_prompt_length=500)
    limit = len(all_of_them[2].teacher)
    kept, dropped = tokenized(chat, items(5, 60, 6, 61), max_prompt_length=limit)
    assert dropped == 2
    assert kept == [all_of_them[0], all_of_them[2]], "what is kept is not cut"


def test_the_teachers_prompt_counts_too(chat):
    (example,), _ = tokenized(chat, items(5), max_prompt_length=500)
    assert len(example.student) < len(example.teacher)
    with pytest.raises(UserError, match=r"i0: the teacher's prompt has \d+ tokens, data\.max_prompt_length is"):
        tokenized(chat, items(5), max_prompt_length=len(example.teacher) - 1, overlong="error")
    assert tokenized(chat, items(5), max_prompt_length=len(example.teacher), overlong="error")[1] == 0


def test_gold_completions_have_a_limit_only_where_they_are_trained_on(chat):
    (example,), _ = tokenized(chat, items(5), max_prompt_length=500)
    assert tokenized(chat, items(5), max_prompt_length=500, max_gold_length=len(example.gold))[1] == 0
    with pytest.raises(UserError, match=r"i0: the gold completion .* rollout\.max_completion_length is"):
        tokenized(chat, items(5), max_prompt_length=500, max_gold_length=len(example.gold) - 1, overlong="error")


def test_overlong_error_names_the_item_and_both_ways_out(chat):
    with pytest.raises(UserError, match=r"item i1: the student's prompt .*raise the limit.*data\.overlong=drop"):
        tokenized(chat, items(5, 300), max_prompt_length=200, overlong="error")


def test_nothing_left_is_an_error(chat):
    with pytest.raises(UserError, match=r"all 2 items are too long .data\.max_prompt_length is 10.: nothing is left"):
        tokenized(chat, items(5, 6), max_prompt_length=10)


# --- Padding ---

ROWS = st.lists(st.lists(st.integers(1, 100), max_size=9), min_size=1, max_size=5)


@given(ROWS, st.integers(1, 8), st.integers(1, 12))
def test_prompts_are_padded_on_the_left_to_a_multiple(rows, multiple, at_least):
    padded, mask = pad_prompts(rows, pad_id=0, multiple=multiple, at_least=at_least)
    width = max(at_least, *map(len, rows))
    assert padded.shape == mask.shape == (len(rows), -(-width // multiple) * multiple)
    assert padded.dtype == np.int32 and mask.dtype == bool
    for row, row_ids, row_mask in zip(rows, padded, mask, strict=True):
        assert list(row_ids[row_mask]) == row
        assert list(row_mask) == [False] * (len(row_mask) - len(row)) + [True] * len(row)
        assert not row_ids[~row_mask].any()


@given(ROWS, st.integers(0, 3))
def test_completions_are_padded_on_the_right_to_the_length(rows, spare):
    length = max(map(len, rows)) + spare
    padded, mask = pad_completions(rows, pad_id=7, length=length)
    assert padded.shape == mask.shape == (len(rows), length)
    for row, row_ids, row_mask in zip(rows, padded, mask, strict=True):
        assert list(row_ids) == row + [7] * (length - len(row))
        assert list(row_mask) == [True] * len(row) + [False] * (length - len(row))


def test_a_completion_that_does_not_fit_is_never_cut():
    with pytest.raises(ValueError, match="row 1 has 4 tokens, more than 3"):
        pad_completions([[1, 2], [1, 2, 3, 4]], pad_id=0, length=3)


@given(
    st.integers(1, 3).flatmap(
        lambda k: st.lists(
            st.lists(st.lists(st.integers(1, 99), max_size=6), min_size=k, max_size=k), min_size=1, max_size=4
        )
    ),
    st.integers(1, 8),
)
def test_contexts_are_padded_on_the_left_to_one_width(rows, multiple):
    padded, mask = pad_contexts(rows, pad_id=0, multiple=multiple)
    longest = max(len(prompt) for row in rows for prompt in row)
    assert padded.shape == mask.shape == (len(rows), len(rows[0]), round_up(max(longest, 1), multiple))
    for row, row_ids, row_mask in zip(rows, padded, mask, strict=True):
        assert [list(ids[kept]) for ids, kept in zip(row_ids, row_mask, strict=True)] == row
        assert np.array_equal(np.sort(row_mask, axis=-1), row_mask), "the padding comes first"


def test_round_up():
    assert [round_up(length, 32) for length in (1, 31, 32, 33, 64)] == [32, 32, 32, 64, 64]
