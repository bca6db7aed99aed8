"""Who lends whom a solved example, which texts are alike, and how instructions are induced."""

import random
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisd_jax.errors import UserError
from unisd_jax.teacher import retrieval
from unisd_jax.teacher.contexts import (
    assign_instructions,
    nearest_donors,
    random_donors,
    released_instructions,
    released_nearest_donors,
    released_random_donors,
    same_question,
)
from unisd_jax.teacher.induction import CALL_SIZE, example_groups, induce

# Few different words: the same question comes up again and again, in another case or spacing too.
QUESTIONS = st.lists(
    st.builds("{}{}{}".format, st.sampled_from(["", " "]), st.sampled_from("abcdeABC"), st.sampled_from(["", "\n"])),
    min_size=2,
    max_size=12,
).filter(lambda texts: len(set(map(same_question, texts))) > 1)


def by_distance(texts):
    """Neighbours by distance of index, the query itself first: what the caller must cope with."""
    return lambda query, count: sorted(range(len(texts)), key=lambda other: (abs(other - query), other))[:count]


def assert_donors_are_right(donors, questions, views, per_view):
    keys = list(map(same_question, questions))
    assert len(donors) == len(questions)
    for item, item_views in enumerate(donors):
        assert [len(view) for view in item_views] == [per_view] * views
        flat = [donor for view in item_views for donor in view]
        assert all(keys[donor] != keys[item] for donor in flat), "neither itself nor the same question"
        enough = min(views * per_view, len(set(keys)) - 1)
        assert len({keys[donor] for donor in flat}) == enough, "different questions while there are enough"
        assert all(flat[n] == flat[n - enough] for n in range(enough, len(flat))), "then they repeat in order"


@settings(deadline=None)
@given(questions=QUESTIONS, views=st.integers(1, 4), per_view=st.integers(1, 3), seed=st.integers(0, 5))
def test_random_donors(questions, views, per_view, seed):
    donors = random_donors(questions, views=views, per_view=per_view, seed=seed)
    assert_donors_are_right(donors, questions, views, per_view)
    assert donors == random_donors(questions, views=views, per_view=per_view, seed=seed)


@settings(deadline=None)
@given(questions=QUESTIONS, views=st.integers(1, 4), per_view=st.integers(1, 3))
def test_nearest_donors(questions, views, per_view):
    donors = nearest_donors(questions, views=views, per_view=per_view, rank=by_distance(questions))
    assert_donors_are_right(donors, questions, views, per_view)


def test_every_donor_is_drawn_and_the_seed_matters():
    questions = [f"question {n}" for n in range(30)]
    drawn = [random_donors(questions, views=2, per_view=1, seed=seed) for seed in range(200)]
    for item in (0, 15, 29):
        counts = [sum(donors[item][view] == [other] for donors in drawn for view in (0, 1)) for other in range(30)]
        assert counts[item] == 0 and sum(counts) == 400
        assert min(counts[:item] + counts[item + 1 :]) > 2, "13.8 on average"


def test_most_draws_survive_an_item_added_at_the_end():
    questions = [f"question {n}" for n in range(40)]
    before = random_donors(questions, views=2, per_view=1, seed=3)
    after = random_donors([*questions, "one more"], views=2, per_view=1, seed=3)
    assert sum(one == other for one, other in zip(before, after, strict=False)) > 30


def test_the_nearest_come_first_view_after_view():
    questions = [f"question {n}" for n in range(7)]
    donors = nearest_donors(questions, views=2, per_view=2, rank=by_distance(questions))
    assert donors[3] == [[2, 4], [1, 5]]


def test_neighbours_with_the_same_question_are_passed_over_however_many():
    questions = ["far", *["Same  question"] * 20, "same question", "near", "near"]
    (first, *_), (last, *_) = (
        nearest_donors(questions, views=1, per_view=2, rank=by_distance(questions))[item] for item in (1, 21)
    )
    assert first == [0, 22] and last == [22, 0]


@pytest.mark.parametrize("questions", [["only one"], ["the same", "The same "]])
def test_without_another_question_there_is_no_donor(questions):
    message = "ask one and the same question, expected two different ones; .*teacher.contexts.num_auxiliary_contexts=0"
    with pytest.raises(UserError, match=message):
        random_donors(questions, views=1, per_view=1, seed=0)
    with pytest.raises(UserError, match=message):
        nearest_donors(questions, views=1, per_view=1, rank=by_distance(questions))
    assert random_donors(questions, views=0, per_view=1, seed=0) == [[] for _ in questions]


@given(count=st.integers(0, 6), size=st.integers(1, 6), views=st.integers(1, 8), seed=st.integers(0, 3))
def test_instructions_of_one_item_differ_while_there_are_enough(count, size, views, seed):
    pool = [f"rule {n}" for n in range(size)]
    assigned = assign_instructions(count, [*pool, pool[0]], views=views, seed=seed)
    assert assigned == assign_instructions(count, pool, views=views, seed=seed)
    assert len(assigned) == count
    for given_views in assigned:
        assert len(given_views) == views and set(given_views) <= set(pool)
        assert len(set(given_views)) == min(views, size)


def test_no_instruction_to_assign():
    with pytest.raises(UserError, match="no induced instruction, expected at least one: raise teacher.contexts"):
        assign_instructions(3, [], views=1, seed=0)


TEXTS = [
    "What is the plural of bird?",
    "How many legs do 3 spiders have?",
    "What is the plural of fish?",
    "How many legs do 4 spiders have?",
    "Name a river.",
]


def test_bm25_finds_what_shares_words():
    rank = retrieval.bm25_ranking(TEXTS)
    assert rank(0, 2) == [0, 2]
    assert rank(1, 2) == [1, 3]
    assert nearest_donors(TEXTS, views=1, per_view=1, rank=rank)[:4] == [[[2]], [[3]], [[0]], [[1]]]


def test_bm25_breaks_ties_by_index_and_gives_no_more_than_there_is():
    rank = retrieval.bm25_ranking(["red car", "blue boat", "red car", "red car", "green tree"])
    assert rank(0, 3) == [0, 2, 3]
    assert rank(4, 99) == [4, 0, 1, 2, 3]
    assert rank(4, 0) == []


@pytest.mark.parametrize("texts", [["?", "!", "..."], ["the", "of", "a thing"]])
def test_bm25_of_texts_without_words(texts):
    assert retrieval.bm25_ranking(texts)(0, 2) == [0, 1]


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, -1.0]), max_size=9), st.integers(0, 12))
def test_best_is_the_stable_order(scores, count):
    expected = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count]
    assert retrieval.best(np.float32(scores), count) == expected


def test_blocks_of_queries_change_nothing(monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float32)
    whole = [retrieval.cosine_ranking(vectors)(query, 5) for query in range(23)]
    monkeypatch.setattr(retrieval, "QUERIES_AT_ONCE", 4)
    rank = retrieval.cosine_ranking(vectors)
    assert [rank(query, 5) for query in range(23)] == whole
    assert rank(2, 5) == whole[2], "back to an earlier block"


def test_sentence_embeddings_through_the_optional_package(monkeypatch):
    class SentenceTransformer:
        def __init__(self, name):
            if name == "absent":
                raise OSError("no such model")

        def encode(self, texts, *, batch_size, normalize_embeddings, show_progress_bar):
            assert normalize_embeddings and not show_progress_bar
            vectors = np.array([[text.count("a") + 1.0, text.count("b")] for text in texts])
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    rank = retrieval.minilm_ranking(["aaa", "bbb", "aaab", "bb"])
    assert rank(0, 2) == [0, 2] and rank(1, 2) == [1, 3]
    with pytest.raises(
        UserError,
        match="'absent' cannot be loaded .*teacher.contexts.encoder_path to .* or teacher.contexts.encoder=bm25",
    ):
        retrieval.minilm_ranking(["a"], "absent")


def test_without_the_optional_package_the_message_names_it_and_the_way_round(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install 'unisd_jax\[retrieval\]', or set teacher.contexts.encoder=bm25"):
        retrieval.minilm_ranking(["a", "b"])


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6), st.integers(0, 3))
def test_groups_of_examples_are_disjoint(count, per_set, instructions, seed):
    if count < per_set:
        with pytest.raises(UserError, match="teacher.contexts.induction_demonstrations is"):
            example_groups(count, per_set=per_set, instructions=instructions, seed=seed)
        return
    groups = example_groups(count, per_set=per_set, instructions=instructions, seed=seed)
    assert len(groups) == min(count // per_set, instructions)
    flat = [item for group in groups for item in group]
    assert len(flat) == len(set(flat)) == per_set * len(groups) and set(flat) <= set(range(count))
    assert groups == example_groups(count, per_set=per_set, instructions=instructions, seed=seed)


class Model:
    """Replies with the number of its call and row; every third reply is empty. Stops at call `stop`."""

    def __init__(self, stop=None):
        self.stop, self.calls, self.conversations = stop, [], []

    def __call__(self, conversations, call):
        if call == self.stop:
            raise KeyboardInterrupt
        self.calls.append(call)
        self.conversations += conversations
        return ["  \n" if (call + row) % 3 == 2 else f" rule {call}.{row}\n" for row in range(len(conversations))]


def run_induction(model, keep, record):
    questions = [f"question {n}" for n in range(50)]
    return induce(
        questions,
        [f"reply {n}" for n in range(50)],
        per_set=2,
        instructions=CALL_SIZE * 2 + 3,
        seed=0,
        generate=model,
        keep=keep,
        record=record,
    )


def test_induction_drops_empty_replies_and_records_all():
    model, records = Model(), {}
    found = run_induction(model, {}, records.update)
    assert model.calls == [0, 1, 2] and len(records) == CALL_SIZE * 2 + 3
    assert found == [text for text in records.values() if text] and len(found) < len(records)
    assert all(text == text.strip() for text in records.values())
    assert all("question" in conversation[0]["content"] for conversation in model.conversations)


@pytest.mark.parametrize("lost", [0, 3])
def test_a_stopped_induction_goes_on_to_the_same_end(lost):
    expected = run_induction(Model(), {}, lambda records: None)
    kept = {}
    with pytest.raises(KeyboardInterrupt):
        run_induction(Model(stop=2), kept, kept.update)
    for name in list(kept)[len(kept) - lost :]:
        del kept[name]
    model = Model()
    assert run_induction(model, kept, kept.update) == expected
    assert model.calls == ([1, 2] if lost else [2]), "what was complete is not asked for again"


def test_nothing_but_empty_replies():
    with pytest.raises(UserError, match="all 19 induced instructions are empty; raise teacher.contexts"):
        run_induction(lambda conversations, call: [""] * len(conversations), {}, lambda records: None)


@pytest.mark.parametrize("ranking", ["bm25", "cosine"])
def test_only_the_pool_is_named_in_the_order_of_all(ranking):
    texts = [f"word{number % 5} other{number % 3} w{number}" for number in range(30)]
    pool = [1, 4, 9, 16, 25, 29]
    if ranking == "bm25":
        whole, part = retrieval.bm25_ranking(texts), retrieval.bm25_ranking(texts, pool)
        assert retrieval.bm25_ranking(["!", "?", "a"], [0, 1])(2, 5) == [0, 1]
    else:
        vectors = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        whole, part = retrieval.cosine_ranking(vectors), retrieval.cosine_ranking(vectors, pool)
        for query in range(30):
            assert part(query, 6) == [text for text in whole(query, 30) if text in pool]
    for query in range(30):
        assert set(part(query, 3)) < set(pool) and len(part(query, 99)) == len(pool)
        assert part(query, 1)[0] == query or query not in pool


# --- as released ---


@pytest.mark.parametrize("count", [2, 5, 40])
def test_released_donors_are_the_releases_draw_from_the_list_of_the_others(count):
    generator, expected = random.Random(42), []
    for item in range(count):
        others = [other for other in range(count) if other != item]
        enough = len(others) >= 3
        drawn = generator.sample(others, 3) if enough else generator.choices(others, k=3)
        expected.append([[donor] for donor in drawn])
    assert released_random_donors(count, views=3, seed=42) == expected


def test_released_retrieval_takes_duplicates_and_on_request_the_item_itself():
    def rank(item, count):
        return [item, *(other for other in range(4) if other != item)][:count]

    shared = {"views": 2, "per_view": 1, "rank": rank}
    assert released_nearest_donors(4, itself=False, **shared)[2] == [[0], [1]]
    assert released_nearest_donors(4, itself=True, **shared)[2] == [[2], [0]]


def test_released_instructions_are_drawn_with_replacement_from_one_list():
    drawn = random.Random(7).choices(range(3), k=8)
    assigned = released_instructions(4, ["a", "b", "c"], views=2, seed=7)
    assert [text for views in assigned for text in views] == ["abc"[number] for number in drawn]
