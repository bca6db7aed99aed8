"""The stand-ins for users: the scripted sampler keeps the contract of every rollout engine."""

import inspect
import subprocess
import sys

import jax
import numpy as np
import pytest
import toys

from unisd_jax.losses import log_probs
from unisd_jax.models import completion_hidden
from unisd_jax.rollout import JaxSampler, RolloutEngine, Sampling, StaleWeights
from unisd_jax.testing import FakeSampler, byte_tokenizer
from unisd_jax.types import Completions, Prompts

PAD, STOP, LENGTH, VERSION = 31, 2, 5, 3
REPLIES = [[7, 9, STOP], [4, 4, 4, 4, 4], [STOP], [5, 6, 7, 8, STOP]]
PROMPTS = Prompts(
    np.array([[1, 8, 3, 4], [PAD, PAD, 6, 5], [PAD, 9, 9, 9], [2, 7, 1, 8]], np.int32),
    np.array([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]], bool),
)


@pytest.fixture(scope="module")
def toy():
    return toys.random_model()


def generate(toy, reply, *, key=0, prompts=PROMPTS, logps=None, **changes):
    model, params = toy
    sampler = FakeSampler(model, reply, logps=logps)
    sampler.publish(params, VERSION)
    sampling = Sampling(**(dict(max_completion_length=LENGTH, stop_ids=(STOP,), pad_id=PAD) | changes))
    return sampler.generate(*prompts, sampling, key=jax.random.key(key), version=VERSION)


def own_scores(toy, rollout, *, temperature=1.0, prompts=PROMPTS):
    """The model's log-probs of the rollout's tokens, from its whole softmax."""
    model, params = toy
    hidden = completion_hidden(model, params, None, prompts, Completions(rollout.ids, rollout.mask))
    scores = np.asarray(log_probs(model.logits(params, hidden) / temperature))
    return np.take_along_axis(scores, rollout.ids[..., None], axis=-1)[..., 0]


def test_the_script_is_what_is_said(toy):
    rollout = generate(toy, REPLIES)
    assert rollout.policy_version == VERSION
    assert [row[kept].tolist() for row, kept in zip(rollout.ids, rollout.mask, strict=True)] == REPLIES
    assert np.all(rollout.ids[~rollout.mask] == PAD) and np.all(rollout.logps[~rollout.mask] == 0)
    assert rollout.stopped.tolist() == [True, False, True, True]
    kinds = [np.asarray(array).dtype for array in rollout[:4]]
    assert kinds == [np.int32, bool, np.float32, bool]
    assert rollout.ids.shape == rollout.mask.shape == rollout.logps.shape == (len(REPLIES), LENGTH)


@pytest.mark.parametrize(("temperature", "scored"), [(1.0, 1.0), (0.6, 0.6), (0.0, 1.0)])
def test_log_probs_are_the_models_own(toy, temperature, scored):
    """At the sampling temperature; at 1 when greedy."""
    rollout = generate(toy, REPLIES, temperature=temperature)
    expected = own_scores(toy, rollout, temperature=scored)
    np.testing.assert_allclose(rollout.logps[rollout.mask], expected[rollout.mask], atol=1e-5)
    assert np.std(rollout.logps[rollout.mask]) > 0.1


def test_it_repeats_the_real_sampler(toy):
    """Given the real sampler's tokens as its script, everything else is the same."""
    model, params = toy
    real = JaxSampler(model)
    real.publish(params, VERSION)
    sampling = Sampling(LENGTH, (14, 28), PAD)
    drawn = real.generate(*PROMPTS, sampling, key=jax.random.key(3), version=VERSION)
    script = [row[kept].tolist() for row, kept in zip(np.asarray(drawn.ids), np.asarray(drawn.mask), strict=True)]
    assert 0 < np.sum(drawn.stopped) < len(script), "rows that stop and rows that are cut"
    found = generate(toy, script, stop_ids=sampling.stop_ids)
    for name in ("ids", "mask", "stopped"):
        np.testing.assert_array_equal(getattr(found, name), getattr(drawn, name), err_msg=name)
    np.testing.assert_allclose(found.logps, drawn.logps, atol=1e-5)


def test_the_published_weights_are_the_ones_that_score(toy):
    model, _ = toy
    other = model, toys.random_model(seed=1)[1]
    first, second = generate(toy, REPLIES), generate(other, REPLIES)
    np.testing.assert_allclose(second.logps[second.mask], own_scores(other, second)[second.mask], atol=1e-5)
    assert np.max(np.abs(first.logps - second.logps)) > 0.1


def test_an_untouched_engine_and_a_stale_one_refuse(toy):
    model, params = toy
    sampler = FakeSampler(model, REPLIES)

    def ask(version):
        return sampler.generate(*PROMPTS, Sampling(LENGTH, (STOP,), PAD), key=jax.random.key(0), version=version)

    with pytest.raises(StaleWeights, match="holds policy version None, asked for 0"):
        ask(0)
    sampler.publish(params, 7)
    for version in (6, 8):
        with pytest.raises(StaleWeights, match=f"holds policy version 7, asked for {version}"):
            ask(version)
    assert ask(7).policy_version == 7


def test_a_function_sees_the_prompt_without_padding_its_row_and_a_key_of_its_own(toy):
    seen = []

    def reply(prompt, row, key):
        seen.append((prompt, row, jax.random.key_data(key).tolist()))
        return [prompt[-1], int(jax.random.randint(key, (), 3, 30)), STOP]

    rollout = generate(toy, reply, key=5)
    prompts, rows, keys = zip(*seen, strict=True)
    assert list(prompts) == [[1, 8, 3, 4], [6, 5], [9, 9, 9], [2, 7, 1, 8]] and list(rows) == [0, 1, 2, 3]
    assert keys == tuple(jax.random.key_data(jax.random.fold_in(jax.random.key(5), row)).tolist() for row in rows)
    assert rollout.ids[:, 0].tolist() == [4, 5, 9, 8]
    np.testing.assert_array_equal(rollout.ids, generate(toy, reply, key=5).ids)
    assert not np.array_equal(rollout.ids, generate(toy, reply, key=6).ids)


def test_fewer_replies_than_rows_are_repeated(toy):
    rollout = generate(toy, REPLIES[:3])
    assert rollout.ids[3].tolist() == rollout.ids[0].tolist()


@pytest.mark.parametrize(
    ("reply", "expected", "stopped"),
    [([7, STOP, 8, STOP], [7, STOP], True), ([4] * 9, [4] * 5, False), ([4] * 5 + [STOP], [4] * 5, False)],
    ids=["first stop", "limit", "stop beyond the limit"],
)
def test_a_reply_ends_where_a_real_engine_would_end_it(toy, reply, expected, stopped):
    rollout = generate(toy, [reply])
    assert rollout.ids[0][rollout.mask[0]].tolist() == expected and rollout.stopped.tolist() == [stopped] * 4


@pytest.mark.parametrize("reply", [[], [7, 8]], ids=["empty", "short"])
def test_a_reply_without_an_end_is_refused(toy, reply):
    with pytest.raises(ValueError, match=rf"row 1: the reply has {len(reply)} tokens and no stop token \(2,\)"):
        generate(toy, [[STOP], reply])


def test_log_probs_may_be_given(toy):
    given = [[-0.5, -1.0, -1.5, -2.0, -2.5, -9.0]]
    rollout = generate(toy, REPLIES, logps=given)
    np.testing.assert_array_equal(rollout.logps, np.where(rollout.mask, np.float32(given[0][:LENGTH]), 0))
    with pytest.raises(ValueError, match="row 0: 2 log-probs for a completion of 3 tokens"):
        generate(toy, REPLIES, logps=[[-1.0, -1.0]])


def test_it_has_the_methods_of_an_engine():
    for name in ("publish", "generate"):
        found, asked = (
            list(inspect.signature(getattr(kind, name)).parameters) for kind in (FakeSampler, RolloutEngine)
        )
        assert found == asked


def test_the_byte_tokenizer_has_one_token_per_byte():
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé?")["input_ids"]
    assert len(ids) == 4 and tokenizer.decode(ids) == "aé?"


def test_the_stand_ins_say_nothing_about_missing_torch():
    code = "from unisd_jax.testing import FakeSampler, byte_tokenizer; byte_tokenizer()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
