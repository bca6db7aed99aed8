"""The sampler: what greedy means, what truncation keeps, when rows end, and whose randomness is whose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from unisd_jax.errors import UserError
from unisd_jax.losses import log_probs
from unisd_jax.models import completion_hidden
from unisd_jax.rollout import JaxSampler, Sampling, StaleWeights
from unisd_jax.rollout.jax_sampler import choose_token, truncate
from unisd_jax.types import Completions, Prompts

PAD = 31
PROMPTS, LENGTH = 6, 8


@pytest.fixture(scope="module")
def toy():
    """(model, params, prompts, generate(sampling, key=…, prompts=…)); the model is published as version 3."""
    model, params = toys.random_model()
    sampler = JaxSampler(model)
    sampler.publish(params, 3)
    prompts = toys.left_padded(np.random.default_rng(5), PROMPTS, 7)

    def generate(sampling, *, key=0, prompts=prompts):
        rollout = sampler.generate(*prompts, sampling, key=jax.random.key(key), version=3)
        return rollout._replace(**{name: np.asarray(getattr(rollout, name)) for name in rollout._fields[:4]})

    return model, params, prompts, generate


@pytest.fixture(scope="module")
def score(toy):
    """What the trainer says about a rollout: log-probs [B, T, V] at a temperature, in one pass without a cache."""
    model, params, prompts, _ = toy

    @jax.jit
    def logits(prompts, completions):
        return model.logits(params, completion_hidden(model, params, None, prompts, completions))

    def score(rollout, temperature=1.0, prompts=prompts):
        return np.asarray(log_probs(logits(prompts, Completions(rollout.ids, rollout.mask)) / temperature))

    return score


def greedy(stop_ids=(), length=LENGTH):
    return Sampling(length, stop_ids, PAD, temperature=0.0)


def drawn(**changes):
    return Sampling(**(dict(max_completion_length=LENGTH, stop_ids=(2,), pad_id=PAD) | changes))


def test_greedy_takes_the_likeliest_token(toy, score):
    *_, generate = toy
    rollout = generate(greedy())
    assert rollout.policy_version == 3
    assert rollout.ids.shape == (PROMPTS, LENGTH) and rollout.ids.dtype == np.int32
    assert rollout.mask.all() and not rollout.stopped.any()
    scores = score(rollout)
    np.testing.assert_array_equal(rollout.ids, scores.argmax(-1))
    np.testing.assert_allclose(rollout.logps, scores.max(-1), atol=1e-4)
    assert len(np.unique(rollout.ids)) > 4, "the rows do not all say the same"


def test_greedy_needs_no_key(toy):
    *_, generate = toy
    np.testing.assert_array_equal(generate(greedy(), key=0).ids, generate(greedy(), key=1).ids)


@pytest.mark.parametrize(
    "changes", [dict(temperature=1.0), dict(temperature=0.7, top_p=0.8, top_k=12, min_p=0.02)], ids=["plain", "cut"]
)
def test_log_probs_are_the_trainers_scores(toy, score, changes):
    """Of the whole softmax at the sampling temperature: truncation does not enter."""
    *_, generate = toy
    sampling = drawn(**changes)
    rollout = generate(sampling, key=1)
    scores = score(rollout, sampling.temperature)
    chosen = np.take_along_axis(scores, rollout.ids[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(rollout.logps[rollout.mask], chosen[rollout.mask], atol=1e-4)
    assert np.any(scores.argmax(-1)[rollout.mask] != rollout.ids[rollout.mask]), "not greedy by chance"


def test_left_padding_changes_nothing(toy):
    *_, prompts, generate = toy
    wider = Prompts(
        *(np.pad(x, ((0, 0), (4, 0)), constant_values=fill) for x, fill in zip(prompts, (9, 0), strict=True))
    )
    plain, padded = generate(drawn(), key=2), generate(drawn(), key=2, prompts=wider)
    np.testing.assert_array_equal(plain.ids, padded.ids)
    np.testing.assert_allclose(plain.logps, padded.logps, atol=1e-5)


def test_the_same_key_gives_the_same_tokens(toy):
    *_, generate = toy
    first, again, other = (generate(drawn(), key=key) for key in (4, 4, 5))
    for name in ("ids", "mask", "logps", "stopped"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.ids, other.ids)


def test_rows_do_not_depend_on_their_neighbours(toy):
    *_, prompts, generate = toy
    others = Prompts(np.array(prompts.ids), np.array(prompts.mask))
    rng = np.random.default_rng(8)
    others.ids[1:], others.mask[1:] = toys.left_padded(rng, PROMPTS - 1, 7)
    plain, changed = generate(drawn(), key=6), generate(drawn(), key=6, prompts=others)
    np.testing.assert_array_equal(plain.ids[0], changed.ids[0])
    np.testing.assert_allclose(plain.logps[0], changed.logps[0], atol=1e-5)
    assert not np.array_equal(plain.ids[1:], changed.ids[1:])


def test_equal_prompts_draw_different_tokens(toy):
    *_, prompts, generate = toy
    same = Prompts(np.repeat(prompts.ids[:1], PROMPTS, axis=0), np.repeat(prompts.mask[:1], PROMPTS, axis=0))
    rows = {tuple(row) for row in generate(drawn(stop_ids=()), key=7, prompts=same).ids}
    assert len(rows) == PROMPTS


def test_a_stop_token_ends_its_row_only(toy):
    *_, generate = toy
    free = generate(greedy()).ids
    # Tokens that greedy decoding is known to produce, at different places in different rows.
    stop_ids = (int(free[0, 2]), int(free[1, 4]))
    rollout = generate(greedy(stop_ids))
    for row, found, mask, logps, stopped in zip(
        free, rollout.ids, rollout.mask, rollout.logps, rollout.stopped, strict=True
    ):
        ends = np.flatnonzero(np.isin(row, stop_ids))
        length = ends[0] + 1 if len(ends) else LENGTH
        np.testing.assert_array_equal(found[:length], row[:length])
        np.testing.assert_array_equal(mask, np.arange(LENGTH) < length)
        assert np.all(found[length:] == PAD) and np.all(logps[length:] == 0) and np.all(logps[:length] < 0)
        assert stopped == bool(len(ends))
    assert rollout.mask.sum(axis=1).min() < LENGTH and rollout.stopped.any() and not rollout.stopped.all()


def test_stopping_at_the_last_token_is_stopping(toy):
    *_, generate = toy
    free = generate(greedy()).ids
    length = next(n for n in range(2, LENGTH) if free[0, n - 1] not in free[0, : n - 1])
    rollout = generate(greedy((int(free[0, length - 1]),), length))
    assert rollout.stopped[0] and rollout.mask[0].all()


def test_padding_that_is_also_the_stop_token(toy):
    """SmolLM2 pads with its end-of-turn token: the mask tells them apart."""
    *_, generate = toy
    stop = int(generate(greedy()).ids[0, 0])
    rollout = generate(Sampling(LENGTH, (stop,), stop, temperature=0.0))
    assert rollout.mask[0].tolist() == [True] + [False] * (LENGTH - 1)
    assert np.all(rollout.ids[0] == stop)


def test_one_token(toy):
    *_, generate = toy
    rollout = generate(greedy(length=1))
    assert rollout.ids.shape == (PROMPTS, 1) and rollout.mask.all()


def test_an_untouched_engine_and_a_stale_one_refuse(toy):
    model, params, prompts, _ = toy
    sampler = JaxSampler(model)
    ask = functools.partial(sampler.generate, *prompts, greedy(), key=jax.random.key(0))
    with pytest.raises(StaleWeights, match="holds policy version None, asked for 0: publish the weights first"):
        ask(version=0)
    sampler.publish(params, 7)
    with pytest.raises(StaleWeights, match="holds policy version 7, asked for 8"):
        ask(version=8)
    with pytest.raises(StaleWeights, match="holds policy version 7, asked for 6"):
        ask(version=6)
    assert issubclass(StaleWeights, UserError)


def test_published_weights_are_the_ones_used(toy):
    model, params, prompts, generate = toy
    sampler = JaxSampler(model)
    sampler.publish(toys.random_model(seed=1)[1], 4)
    other = sampler.generate(*prompts, greedy(), key=jax.random.key(0), version=4)
    assert not np.array_equal(other.ids, generate(greedy()).ids)


PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15])


def kept(probabilities, *, top_k=0, top_p=1.0, min_p=0.0):
    """Indices that stay, likeliest first."""
    logps = jnp.log(jnp.asarray(probabilities, jnp.float32))[None]
    result = np.asarray(truncate(logps, top_k=top_k, top_p=top_p, min_p=min_p))[0]
    stay = np.flatnonzero(np.isfinite(result))
    np.testing.assert_array_equal(result[stay], np.asarray(logps)[0, stay])
    return stay[np.argsort(-np.asarray(probabilities)[stay])].tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 3, 4, 2, 0]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 5}, [1, 3, 4, 2, 0]),
        ({"top_k": 9}, [1, 3, 4, 2, 0]),
        # The smallest set whose mass reaches top_p: 0.4 < 0.6 <= 0.4 + 0.3.
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"top_p": 0.96}, [1, 3, 4, 2, 0]),
        ({"top_p": 1e-6}, [1]),
        ({"top_p": 0.0}, [1]),
        # At least min_p times the largest: 0.4 · 0.3 = 0.12.
        ({"min_p": 0.3}, [1, 3, 4]),
        ({"min_p": 0.9}, [1]),
        ({"min_p": 1.0}, [1]),
        # top_p looks at what top_k left, renormalised: 0.7 of the whole is not 0.8 yet, 0.7/0.85 is.
        ({"top_p": 0.8}, [1, 3, 4]),
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),
        ({"top_p": 0.8, "min_p": 0.5}, [1, 3]),
    ],
    ids=str,
)
def test_truncation_by_hand(options, expected):
    assert kept(PROBABILITIES, **options) == expected


def test_tokens_that_were_impossible_stay_impossible():
    assert kept([0.0, 0.6, 0.0, 0.4], top_p=0.99, top_k=3, min_p=1e-4) == [1, 3]


@settings(max_examples=60, deadline=None)
@given(
    logits=arrays.arrays(np.float32, (1, 12), elements=st.floats(-20, 20, width=32)),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_truncation_in_general(logits, top_k, top_p, min_p):
    logps = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
    probabilities = np.exp(logps[0].astype(np.float64))
    stay = np.isfinite(truncate(jnp.asarray(logps), top_k=top_k, top_p=top_p, min_p=min_p))[0]
    assert stay[probabilities.argmax()], "the likeliest token always stays"
    assert probabilities[stay].min() >= probabilities[~stay].max(initial=0.0), "what stays is likelier than what goes"
    only = np.isfinite(truncate(jnp.asarray(logps), top_k=0, top_p=top_p, min_p=0.0))[0]
    assert probabilities[only].sum() >= top_p - 1e-5
    # Without its least likely members (ties go together) the set would be too small.
    least = probabilities[only].min()
    assert only.all() or probabilities[only & (probabilities > least)].sum() < top_p + 1e-5


def test_a_higher_temperature_spreads_and_a_lower_one_sharpens():
    logits = jnp.asarray(np.log(PROBABILITIES), jnp.float32)[None]
    keys = jax.random.split(jax.random.key(0), 1)
    token = None
    for temperature in (0.5, 1.0, 2.0):
        token, logp = choose_token(logits, keys, drawn(temperature=temperature))
        expected = PROBABILITIES ** (1 / temperature)
        assert float(logp[0]) == pytest.approx(np.log(expected[token[0]] / expected.sum()), abs=1e-5)
    assert token.dtype == jnp.int32


@pytest.mark.parametrize("changes", [dict(), dict(temperature=0.0), dict(top_k=2), dict(top_p=0.5), dict(min_p=0.9)])
def test_entries_without_a_token_are_never_drawn(changes):
    """The two likeliest entries of five have no token; the log-probs are of the softmax over all five."""
    probabilities = np.array([0.1, 0.05, 0.15, 0.3, 0.4])
    logits = jnp.tile(jnp.asarray(np.log(probabilities), jnp.float32), (200, 1))
    keys = jax.random.split(jax.random.key(3), 200)
    token, logp = choose_token(logits, keys, drawn(vocab_size=3, **changes))
    assert set(np.unique(token)) == ({0, 1, 2} if changes == {} else {2} if "top_k" not in changes else {0, 2})
    np.testing.assert_allclose(logp, np.log(probabilities)[token], atol=1e-5)


def chi_square(counts, probabilities):
    """Σ (found − expected)² / expected; about the number of cells where the draws follow the probabilities."""
    expected = probabilities * counts.sum()
    assert expected.min() > 5
    return np.sum((counts - expected) ** 2 / expected)


@pytest.mark.parametrize(
    ("changes", "support"),
    [
        (dict(), [0, 1, 2, 3, 4]),
        (dict(temperature=2.0), [0, 1, 2, 3, 4]),
        (dict(temperature=0.5, top_k=4), [1, 2, 3, 4]),
        (dict(top_p=0.71), [1, 3, 4]),
        (dict(min_p=0.5), [1, 3]),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(changes, support):
    draws, sampling = 20_000, drawn(**changes)
    logits = jnp.tile(jnp.asarray(np.log(PROBABILITIES), jnp.float32), (draws, 1))
    keys = jax.random.split(jax.random.key(11), draws)
    tokens, _ = jax.jit(choose_token, static_argnames="sampling")(logits, keys, sampling=sampling)
    counts = np.bincount(tokens, minlength=5)
    expected = PROBABILITIES[support] ** (1 / sampling.temperature)
    assert counts.sum() == counts[support].sum() == draws
    # Five cells at most: 1 in 1000 fair samples would exceed 18.5; the key is fixed.
    assert chi_square(counts[support], expected / expected.sum()) < 18.5


def test_pairs_of_tokens_follow_the_model():
    """Rows and steps draw independently: the joint distribution of two tokens is p(first)·p(second | first)."""
    model, params = toys.random_model(seed=2, vocab_size=4, num_layers=1)
    rows, prompt = 6000, np.array([[1, 3, 0]], np.int32)
    sampler = JaxSampler(model)
    sampler.publish(params, 0)
    rollout = sampler.generate(
        np.repeat(prompt, rows, axis=0), np.ones((rows, 3), bool), Sampling(2, (), 0, temperature=3.0),
        key=jax.random.key(1), version=0,
    )  # fmt: skip
    first, second = np.asarray(rollout.ids).T
    counts = np.bincount(4 * first + second, minlength=16)
    ids = np.concatenate([np.repeat(prompt, 4, axis=0), np.arange(4, dtype=np.int32)[:, None]], axis=1)
    hidden = jax.jit(model.hidden)(params, ids, np.ones_like(ids, bool))
    probabilities = np.exp(log_probs(model.logits(params, hidden) / 3.0)).astype(np.float64)
    joint = probabilities[0, 2][:, None] * probabilities[:, 3]
    # 15 degrees of freedom: 1 in 1000 fair samples would exceed 37.7.
    assert chi_square(counts, joint.ravel() / joint.sum()) < 37.7
