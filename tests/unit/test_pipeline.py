"""Tokenising, padding and batching: an order that is fixed by the seed, resumes exactly, and cuts nothing."""

import itertools
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisd_jax.data import tokens
from unisd_jax.data.batching import pad_completions, pad_contexts, pad_prompts, round_up
from unisd_jax.data.chat import Chat, load_chat
from unisd_jax.data.pipeline import Example, ViewMessages, batches, fitting, length_report, tokenize
from unisd_jax.data.tasks.base import Item
from unisd_jax.errors import UserError
from unisd_jax.teacher import student_messages, teacher_messages
from unisd_jax.testing import TURN_END, byte_tokenizer, tiny_checkpoint

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


def listed(example: Example) -> list:
    """An example's ids as lists, which compare with ==."""
    ids = (example.student, example.teacher, example.gold, *example.contexts, example.negative)
    return [example.item.id, *(None if part is None else list(part) for part in ids)]


def all_views(item: Item) -> ViewMessages:
    contexts = tuple([{"role": "user", "content": f"{text} {item.prompt}"}] for text in ("one", "two and more"))
    wrong = teacher_messages(item.prompt, "wrong", condition="gold", placement="turns")
    return ViewMessages(student_messages(item.prompt), views_of(item).teacher, contexts, wrong)


def test_an_example_holds_the_prompts_of_its_views_and_the_gold_reply(chat):
    (example,) = tokenized(chat, items(5))
    student = student_messages("ppppp")
    shown = [*student, {"role": "assistant", "content": "gold"}, {"role": "user", "content": "ppppp"}]
    assert listed(example) == [
        "i0",
        chat.prompt_ids(student),
        chat.prompt_ids(shown),
        chat.reply_ids(student, "gold"),
        None,
    ]
    assert example.contexts == () and example.negative is None


def test_auxiliary_and_negative_prompts_are_tokenised_where_there_are_any(chat):
    (item,) = items(5)
    views = all_views(item)._replace(teacher=None)
    (example,) = tokenized(chat, [item], [views])
    assert example.teacher is None
    assert [list(ids) for ids in example.contexts] == [chat.prompt_ids(context) for context in views.contexts]
    assert list(example.negative) == chat.prompt_ids(views.negative)


def test_the_ids_are_int32_arrays_that_nobody_can_change(chat, tmp_path):
    own = items(5, 6)
    for cache in (None, tmp_path, tmp_path):
        for example in tokenized(chat, own, [all_views(item) for item in own], cache=cache):
            for ids in (example.student, example.teacher, example.gold, *example.contexts, example.negative):
                assert type(ids) is np.ndarray and ids.dtype == np.int32 and not ids.flags.writeable


def test_examples_are_a_sequence(chat):
    found = tokenized(chat, items(5, 6, 7))
    assert len(found) == 3 and [example.item.id for example in found] == ["i0", "i1", "i2"]
    assert found[-1].item.id == found[2].item.id == "i2"
    assert [example.item.id for example in found[1:]] == ["i1", "i2"] and isinstance(found[:1][0], Example)
    with pytest.raises(IndexError):
        found[3]
    assert found.names == ("student", "teacher", "gold") and found.lengths.dtype == np.int32
    sizes = [[len(example.student), len(example.teacher), len(example.gold)] for example in found]
    assert found.lengths.tolist() == sizes


def test_no_items_are_no_examples(chat, tmp_path):
    found, dropped = fitting(tokenized(chat, [], cache=tmp_path), max_prompt_length=10)
    assert len(found) == 0 and list(found) == [] and not dropped and length_report(found, dropped) == []
    assert list(tmp_path.iterdir()) == []


def test_items_must_have_the_same_views(chat):
    first, second = items(5, 6)
    with pytest.raises(ValueError, match="different views"):
        tokenized(chat, [first, second], [views_of(first), all_views(second)])


def test_replies_and_prompts_of_any_length(chat):
    """An empty reply is its stop token; nothing is cut, however long."""
    own = [Item("empty", "", "", ""), Item("long", "p" * 200_000, "r" * 100_000, "")]
    empty, long = tokenized(chat, own)
    assert list(empty.gold) == [chat.tokenizer.eos_token_id]
    assert chat.text(long.gold) == "r" * 100_000 and chat.text(long.student).count("p") == 200_000


# --- Too long ---


def test_every_view_counts_for_the_length_and_is_named(chat):
    (item,) = items(5)
    question, long = student_messages(item.prompt), student_messages("p" * 60)
    limit = len(chat.prompt_ids(long)) - 1
    for name, views in (
        ("the student's prompt", ViewMessages(long, question)),
        ("the teacher's prompt", ViewMessages(question, long)),
        ("auxiliary prompt 2", ViewMessages(question, question, (question, long))),
        ("the negative prompt", ViewMessages(question, question, (), long)),
    ):
        found = tokenized(chat, [item], [views])
        with pytest.raises(UserError, match=rf"i0: {name} has \d+ tokens, data\.max_prompt_length is {limit}"):
            fitting(found, max_prompt_length=limit, overlong="error")
        assert len(fitting(found, max_prompt_length=limit + 1, overlong="error")[0]) == 1


def test_too_long_items_are_dropped_whole_and_counted(chat):
    every = tokenized(chat, items(5, 60, 6, 61))
    kept, dropped = fitting(every, max_prompt_length=len(every[2].teacher))
    assert dropped.total() == 2
    assert [listed(example) for example in kept] == [listed(every[0]), listed(every[2])], "what is kept is not cut"
    assert kept.lengths.tolist() == every.lengths[[0, 2]].tolist()
    assert listed(fitting(kept, max_prompt_length=len(every[0].teacher))[0][0]) == listed(every[0]), "and again"


def test_dropped_items_are_counted_by_the_first_reason(chat):
    short, long = student_messages("p"), student_messages("p" * 60)
    limit = len(chat.prompt_ids(long)) - 1
    own = [Item(str(index), "p", "r" * (30 if index == 4 else 3), "") for index in range(5)]
    views = [
        ViewMessages(short, short, (short, long)), ViewMessages(short, short, (long, long)),
        ViewMessages(long, long, (long, long)), ViewMessages(short, short, (short, short)),
        ViewMessages(short, short, (short, short)),
    ]  # fmt: skip
    kept, dropped = fitting(tokenized(chat, own, views), max_prompt_length=limit, max_gold_length=20)
    assert [example.item.id for example in kept] == ["3"]
    assert dropped == {
        f"auxiliary prompt over data.max_prompt_length={limit}": 2,
        f"student's prompt over data.max_prompt_length={limit}": 1,
        "gold completion over rollout.max_completion_length=20": 1,
    }
    assert length_report(kept, dropped)[-1] == (
        f"4 of 5 items dropped: 2 auxiliary prompt over data.max_prompt_length={limit}, 1 student's prompt over "
        f"data.max_prompt_length={limit}, 1 gold completion over rollout.max_completion_length=20"
    )


def test_the_report_of_lengths(chat):
    own = items(5, 6, 27)
    found = tokenized(chat, own, [all_views(item) for item in own])
    base = len(found[0].student) - 5
    lines = length_report(*fitting(found, max_prompt_length=500))
    assert lines[0] == f"student's prompt: {base + 5} / {base + 6} / {base + 27} tokens (shortest, median, longest)"
    kinds = ["student's prompt", "teacher's prompt", "auxiliary prompt", "negative prompt", "gold completion"]
    assert [line.partition(":")[0] for line in lines[:-1]] == kinds
    assert lines[4] == "gold completion: 5 / 5 / 5 tokens (shortest, median, longest)"
    assert lines[-1] == "0 of 3 items dropped"


def test_gold_completions_have_a_limit_only_where_they_are_trained_on(chat):
    found = tokenized(chat, items(5))
    limit = len(found[0].gold)
    assert len(fitting(found, max_prompt_length=500, max_gold_length=limit)[0]) == 1
    with pytest.raises(UserError, match=r"i0: the gold completion .* rollout\.max_completion_length is"):
        fitting(found, max_prompt_length=500, max_gold_length=limit - 1, overlong="error")


def test_overlong_error_names_the_item_and_both_ways_out(chat):
    with pytest.raises(UserError, match=r"item i1: the student's prompt .*raise the limit.*data\.overlong=drop"):
        fitting(tokenized(chat, items(5, 300)), max_prompt_length=200, overlong="error")


def test_nothing_left_is_an_error(chat):
    expected = r"all 2 items are too long .student's prompt over data\.max_prompt_length=10.: nothing is left"
    with pytest.raises(UserError, match=expected):
        fitting(tokenized(chat, items(5, 6)), max_prompt_length=10)


# --- The cache of token ids ---


def cached(chat, cache: Path, own: list[Item], **options) -> list:
    return [
        listed(example) for example in tokenized(chat, own, [all_views(item) for item in own], cache=cache, **options)
    ]


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many conversations each call to the tokenizer had."""
    found, original = [], Chat.prompts_ids

    def prompts_ids(self, conversations):
        found.append(len(conversations))
        return original(self, conversations)

    monkeypatch.setattr(Chat, "prompts_ids", prompts_ids)
    return found


@pytest.fixture
def small_parts(monkeypatch):
    """Four items in each part."""
    monkeypatch.setattr(tokens, "PART_ROWS", 4)


def test_what_is_read_back_is_what_was_made(chat, tmp_path, calls, small_parts):
    own = items(*range(1, 11))
    without = cached(chat, None, own)
    first, made = cached(chat, tmp_path / "tokens", own), len(calls)
    second = cached(chat, tmp_path / "tokens", own)
    assert without == first == second
    assert len(calls) == made, "nothing is tokenised again"
    (folder,) = (tmp_path / "tokens").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [f"part-0000{n}.int32" for n in range(3)]


def test_whatever_decides_the_ids_names_the_folder(chat, tmp_path):
    own = items(5, 6)
    views = [all_views(item) for item in own]

    def folder(own=own, views=views, chat=chat) -> str:
        before = set(tmp_path.iterdir())
        tokenize(own, views, chat, cache=tmp_path)
        return "".join(path.name for path in set(tmp_path.iterdir()) - before)

    def with_last(**changes) -> list[ViewMessages]:
        return [views[0], views[1]._replace(**changes)]

    question = [{"role": "user", "content": "another"}]
    assert folder() and not folder(), "the same again is the same folder"
    assert not folder([item._replace(id="x", answer="y", negative="z") for item in own]), "no token comes of these"
    assert folder([own[0], own[1]._replace(completion="other")])
    assert folder(views=with_last(student=question)) and folder(views=with_last(teacher=question))
    assert folder(views=with_last(contexts=(views[1].contexts[0], question))) and folder(
        views=with_last(negative=question)
    )
    assert folder(views=with_last(contexts=views[1].contexts[::-1])), "the order counts"
    assert folder(views=[view._replace(negative=None) for view in views])
    assert folder(own[::-1], views[::-1]) and folder(own[:1], views[:1])
    assert folder(views=with_last(student=[*question, *views[1].student]))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ 'Hi!' }}" + tokenizer.chat_template
    assert folder(chat=Chat(tokenizer, chat.stop_ids, head_rows=chat.head_rows))
    assert folder(chat=Chat(byte_tokenizer(), chat.stop_ids, head_rows=None))


def test_a_template_that_writes_the_date_is_not_read_back_on_another_day(chat, tmp_path):
    tokenizer, own = byte_tokenizer(), items(5)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    for day in ("Monday", "Tuesday"):
        tokenizer.bos_token = day
        (example,) = tokenized(Chat(tokenizer, chat.stop_ids), own, cache=tmp_path)
        assert day in tokenizer.decode(example.student)


def test_two_processes_make_a_share_each_and_read_all(chat, tmp_path, calls, small_parts):
    own, barrier, found = items(*range(1, 19)), threading.Barrier(2, timeout=60), {}

    def process(index: int) -> None:
        found[index] = cached(chat, tmp_path, own, share=(index, 2), wait=barrier.wait)

    threads = [threading.Thread(target=process, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    segments = 5
    assert sum(calls) == segments * len(own), "every item was tokenised by one of them only"
    assert found[0] == found[1] == cached(chat, None, own)


def test_what_one_process_cannot_tokenise_stops_all_of_them(chat, tmp_path, small_parts):
    """None is left waiting, and each says what is wrong."""
    own = items(*range(1, 10))
    own[5] = own[5]._replace(completion=f"before{TURN_END}after")
    barrier, found = threading.Barrier(2, timeout=60), {}

    def process(index: int) -> None:
        try:
            cached(chat, tmp_path, own, share=(index, 2), wait=barrier.wait)
        except UserError as error:
            found[index] = str(error)

    threads = [threading.Thread(target=process, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.keys() == {0, 1} and found[0] == found[1] and "ends the turn" in found[0]


def test_a_run_that_was_killed_goes_on_with_the_parts_it_has(chat, tmp_path, calls, small_parts, monkeypatch):
    own, write = items(*range(1, 19)), tokens.write_bytes_atomic

    def killed(path, data):
        if path.name == "part-00002.int32":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(tokens, "WORKERS", 1)
    monkeypatch.setattr(tokens, "write_bytes_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        cached(chat, tmp_path, own)
    (folder,) = tmp_path.iterdir()
    there = {path.name for path in folder.iterdir()}
    assert {"part-00000.int32", "part-00001.int32"} <= there and "part-00002.int32" not in there
    monkeypatch.setattr(tokens, "write_bytes_atomic", write)
    calls.clear()
    assert cached(chat, tmp_path, own) == cached(chat, None, own)
    segments, left = 5, sum(min(4, 18 - 4 * part) for part in range(5) if f"part-0000{part}.int32" not in there)
    assert sum(calls) == segments * (left + len(own))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_an_os_error(chat, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        cached(chat, tmp_path / "tokens", items(5))


def test_a_file_where_the_folder_should_be_is_an_os_error(chat, tmp_path):
    (tmp_path / "tokens").write_text("")
    with pytest.raises(OSError):
        cached(chat, tmp_path / "tokens", items(5))


def test_a_full_disk_leaves_no_half_part(chat, tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            cached(chat, tmp_path, items(5))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert cached(chat, tmp_path, items(5)) == cached(chat, None, items(5))


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
