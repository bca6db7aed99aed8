"""Batches of all lengths in few shapes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisd_jax.data.buckets import Buckets, Lengths, length_buckets, prompt_lengths
from unisd_jax.data.pipeline import Example, Examples
from unisd_jax.data.tokens import build_table

LENGTHS = st.tuples(st.integers(1, 90), st.integers(0, 200), st.integers(0, 120), st.integers(0, 60))


def example(student, teacher=0, contexts=0, negative=0) -> Example:
    others = tuple([0] * length for length in (contexts, max(contexts - 3, 1)) if contexts)
    return Example(None, [0] * student, [0] * teacher or None, [], others, [0] * negative or None)


@given(st.lists(LENGTHS, min_size=1, max_size=30), st.integers(1, 5), st.sampled_from([1, 8, 32]))
def test_every_batch_fits_its_bucket_and_there_are_few(lengths, number, multiple):
    examples = [example(*sizes) for sizes in lengths]
    buckets = length_buckets(examples, number=number, multiple=multiple)
    assert 1 <= len(buckets.edges) == len(buckets.lengths) <= number
    assert list(buckets.edges) == sorted(buckets.edges)
    for batch in (examples, *([one] for one in examples)):
        chosen = buckets.lengths[buckets.index(batch)]
        assert all(length % multiple == 0 for length in chosen)
        for one in batch:
            assert all(own <= room for own, room in zip(prompt_lengths(one), chosen, strict=True))
    whole = np.array([prompt_lengths(one) for one in examples]).max(axis=0)
    assert all(room < longest + multiple for room, longest in zip(buckets.lengths[-1], whole, strict=True))


VIEWS = st.tuples(st.booleans(), st.integers(0, 3), st.booleans())


@given(VIEWS, st.lists(st.lists(st.integers(1, 200), min_size=6, max_size=6), min_size=1, max_size=20))
def test_a_table_has_the_buckets_of_its_examples(views, lengths):
    teacher, contexts, negative = views
    names = ["student", "teacher", "context-1", "context-2", "context-3", "negative"]
    kept = [True, teacher, *(number < contexts for number in range(3)), negative]
    names = [name for name, there in zip(names, kept, strict=True) if there] + ["gold"]

    def make(rows):
        return [[np.zeros(lengths[row][column % 6], np.int32) for row in rows] for column in range(len(names))]

    table = Examples([None] * len(lengths), build_table(names, len(lengths), make))
    found, expected = (length_buckets(examples, number=3, multiple=8) for examples in (table, list(table)))
    assert found == expected
    assert found.index(table[:]) == len(found.edges) - 1


def test_no_examples_no_buckets():
    assert length_buckets([], number=3, multiple=8) == Buckets((), ())


def test_a_long_item_costs_only_its_own_batches():
    usual = [example(20 + index % 5, 40) for index in range(50)]
    buckets = length_buckets([*usual, example(400, 900)], number=4, multiple=8)
    assert buckets.lengths[buckets.index(usual)] == Lengths(24, 40, 0, 0)
    assert buckets.lengths[buckets.index([*usual, example(400, 900)])] == Lengths(400, 904, 0, 0)


def test_views_that_are_not_there_have_no_length():
    assert prompt_lengths(example(7)) == Lengths(7, 0, 0, 0)
    assert prompt_lengths(example(7, 9, 11, 13)) == Lengths(7, 9, 11, 13)


def test_examples_of_one_length_are_one_bucket():
    buckets = length_buckets([example(9, 17)] * 3, number=4, multiple=8)
    assert buckets.lengths == (Lengths(16, 24, 0, 0),)


def test_a_batch_that_is_longer_than_all_examples_has_no_bucket():
    buckets = length_buckets([example(9)], number=2, multiple=8)
    with pytest.raises(StopIteration):
        buckets.index([example(10)])
