"""Sums over completions: rows in their order, whatever the batches; never the logits of a whole batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from unisd_jax.eval import scores
from unisd_jax.eval.scores import Network, Pairs, distance_sums, logprob_sums

VOCABULARY = 264


@pytest.fixture(scope="module")
def networks():
    model, params = toys.random_model(vocab_size=VOCABULARY)
    return Network(model, params), Network(model, toys.random_model(seed=1, vocab_size=VOCABULARY)[1])


@pytest.fixture(scope="module")
def pairs():
    """Seven pairs, the lengths in no order; the third completion is empty."""
    rng = np.random.default_rng(0)
    lengths = [(9, 3), (4, 6), (12, 0), (5, 1), (20, 6), (3, 2), (7, 5)]
    rows = [[rng.integers(0, VOCABULARY, size).tolist() for size in both] for both in lengths]
    return Pairs(*zip(*rows, strict=True))


OPTIONS = {"pad_id": 0, "length_multiple": 4}


def close(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-4, atol=1e-4)


def test_sums_do_not_depend_on_the_batches(networks, pairs):
    one_by_one = distance_sums(*networks, pairs, batch_size=1, **OPTIONS)
    assert [row["tokens"] for row in one_by_one] == [len(completion) for completion in pairs.completions]
    close(distance_sums(*networks, pairs, batch_size=3, **OPTIONS), one_by_one)
    logps = logprob_sums(networks[0], pairs, batch_size=4, **OPTIONS)
    close([{"logp": row["logp"]} for row in logps], [{"logp": row["logp_adapted"]} for row in one_by_one])
    assert one_by_one[2] == dict.fromkeys(one_by_one[2], 0), "an empty completion has no score"


def test_the_two_sides_change_places(networks, pairs):
    there = distance_sums(*networks, pairs, batch_size=4, **OPTIONS)
    back = distance_sums(*networks[::-1], pairs, batch_size=4, **OPTIONS)
    swapped = {"kl_from_base": "kl_to_base", "logp_adapted": "logp_base", "entropy_adapted": "entropy_base"}
    swapped |= {value: name for name, value in swapped.items()}
    close(back, [{name: row[swapped.get(name, name)] for name in row} for row in there])


def test_known_rows_are_not_scored_again(networks, pairs, monkeypatch):
    recorded = []
    whole = distance_sums(*networks, pairs, batch_size=2, record=recorded.append, **OPTIONS)
    assert sorted(row for batch in recorded for row in batch) == list(range(7))
    known = recorded[0] | recorded[2]
    again = []
    assert distance_sums(*networks, pairs, batch_size=2, known=known, record=again.append, **OPTIONS) == whole
    assert [list(batch) for batch in again] == [list(recorded[1]), list(recorded[3])]


def test_logits_of_a_whole_batch_never_exist(networks):
    """The compiled program is looked through: nothing has the vocabulary as an axis beside more tokens than a chunk."""
    rows, prompt, completion, chunk = 8, 8, 64, 32
    model = networks[0].model
    model = dataclasses.replace(model, head_options=model.head_options._replace(chunk_size=chunk))
    views = (
        jnp.zeros((rows, prompt), jnp.int32), jnp.ones((rows, prompt), bool), jnp.zeros((rows, completion), jnp.int32),
        jnp.ones((rows, completion), bool),
    )  # fmt: skip
    call = functools.partial(scores._distances.__wrapped__, model=model, base_model=model)
    jaxpr = jax.make_jaxpr(call)(networks[0].params, networks[1].params, *views)
    shapes = set(array_shapes(jaxpr.jaxpr))
    wide = {shape for shape in shapes if VOCABULARY in shape and np.prod(shape) > VOCABULARY * 32}
    assert any(VOCABULARY in shape and chunk in shape for shape in shapes), "the chunks are what is looked for"
    assert all(np.prod(shape) // VOCABULARY <= max(chunk, 32) for shape in wide), wide


def array_shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars if hasattr(variable.aval, "shape"))
        for value in equation.params.values():
            for part in value if isinstance(value, list | tuple) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from array_shapes(inner)
