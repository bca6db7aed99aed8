"""The engine of vLLM servers, against the stand-in: the right weights, every row once, or a clear stop."""

import contextlib
import dataclasses
import errno
import functools
import gc
import signal
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from fake_vllm import GENERATE, RELOAD, FakeVllm, say

from unisd_jax.config import VllmOptions
from unisd_jax.data.batching import pad_prompts
from unisd_jax.errors import ConfigError, UserError
from unisd_jax.models import load_hf, merge, save_hf
from unisd_jax.rollout import JaxSampler, RolloutFailed, Sampling, StaleWeights, lanes, weights
from unisd_jax.rollout.engines import is_here, own_addresses
from unisd_jax.rollout.lanes import Lane
from unisd_jax.rollout.probe import make_probe
from unisd_jax.rollout.vllm_client import VllmEngine
from unisd_jax.rollout.vllm_rows import requests
from unisd_jax.rollout.weights import Publisher

SAMPLING = Sampling(6, (3, 7), 0, temperature=0.8)
GREEDY = dataclasses.replace(SAMPLING, temperature=0.0)
TRUNCATED = dataclasses.replace(SAMPLING, top_p=0.9, top_k=12, min_p=0.01, vocab_size=60)
PROMPTS = [[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [9, 10], [11, 12, 13], [9, 10], [14], [15, 16]]
KEY = jax.random.key(11)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    save_hf(folder, *toys.random_model(vocab_size=64, tied_embeddings=True))
    return folder


@pytest.fixture(scope="module")
def start(checkpoint):
    return load_hf(checkpoint)


@pytest.fixture(scope="module")
def running(checkpoint):
    with FakeVllm(checkpoint) as first, FakeVllm(checkpoint) as second:
        yield first, second


@pytest.fixture
def fakes(running):
    """Two servers as after their start, without faults."""
    for fake in running:
        fake.reset()
    return running


@pytest.fixture
def fake(fakes):
    return fakes[0]


@pytest.fixture
def make(start, checkpoint, tmp_path):
    """`make(fake, ..., owner="one", bound=0.002, adapter_only=False, **options)`: an engine, closed in the end."""
    rng = np.random.default_rng(3)
    sequences = [(toys.random_tokens(rng, 5, 64), toys.random_tokens(rng, 4, 64)) for _ in range(2)]
    with contextlib.ExitStack() as stack:

        def make(*fakes, owner="one", bound=0.002, adapter_only=False, **changes):
            options = VllmOptions(**{"request_timeout": 20.0, "start_timeout": 5.0, "attempts": 3} | changes)
            engine = VllmEngine(
                start[0], bound=bound, adapter_only=adapter_only,
                lanes=[Lane(options, owner=owner, address=fake.address) for fake in fakes],
                publisher=Publisher(tmp_path / owner, start[0], owner=owner, dtype="float32", base="base"),
                probe=make_probe(sequences, pad_id=0, prompt_length=8, completion_length=4),
                max_sequences=options.max_sequences,
            )  # fmt: skip
            stack.callback(engine.close)
            return engine

        yield make


@functools.cache
def changed(start_params, seed, size=0.1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(size * rng.standard_normal(leaf.shape, np.float32)), start_params.tree
    )


class Weights:
    """The first weights, and others by their number."""

    def __init__(self, tree):
        self.tree = tree

    def __getitem__(self, seed):
        return self.tree if seed == 0 else changed(self, seed)


@pytest.fixture(scope="module")
def params(start):
    return Weights(start[1])


def generate(engine, version, sampling=SAMPLING, prompts=PROMPTS, key=KEY):
    return begin(engine, version, sampling, prompts, key).result()


def begin(engine, version, sampling=SAMPLING, prompts=PROMPTS, key=KEY):
    return engine.begin(*pad_prompts(prompts, pad_id=0, multiple=8), sampling, key=key, version=version)


def by_jax(start, params, sampling, version=0):
    sampler = JaxSampler(start[0])
    sampler.publish(params, version)
    return sampler.generate(*pad_prompts(PROMPTS, pad_id=0, multiple=8), sampling, key=KEY, version=version)


def assert_equal(found, expected, *, logps=0.0):
    for name in ("ids", "mask", "stopped"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(found.logps, expected.logps, atol=logps)
    assert found.policy_version == expected.policy_version


def asked(*fakes):
    """The rows, as (prompt, seed), that were answered; not the probe's."""
    prompts = set(map(tuple, PROMPTS))
    return {(prompt, seed) for fake in fakes for _, prompt, seed in fake.samples if prompt in prompts}


def forget(*fakes):
    for fake in fakes:
        fake.samples.clear()


@pytest.fixture(scope="module")
def expected(running, start, checkpoint, params, tmp_path_factory):
    """What a rollout of version 1 is, when nothing fails."""
    with FakeVllm(checkpoint) as fake:
        options = VllmOptions()
        probe = make_probe([([1, 2], [3, 4])], pad_id=0)
        folder = tmp_path_factory.mktemp("expected")
        engine = VllmEngine(
            start[0], bound=0.002, probe=probe, max_sequences=64,
            lanes=[Lane(options, owner="one", address=fake.address)],
            publisher=Publisher(folder, start[0], owner="one", dtype="float32", base="base"),
        )  # fmt: skip
        with contextlib.closing(engine):
            engine.publish(params[1], 1)
            return generate(engine, 1)


# --- The same as the sampler in this process ---


def test_greedy_rollouts_are_those_of_the_sampler_in_this_process(make, fake, start, params):
    engine = make(fake)
    for version in (0, 1):
        engine.publish(params[version], version)
        assert_equal(generate(engine, version, GREEDY), by_jax(start, params[version], GREEDY, version), logps=1e-4)


def test_log_probs_are_those_of_the_whole_softmax_at_the_temperature(make, fake, start, params, expected):
    """Of the very tokens that were drawn."""
    engine = make(fake)
    engine.publish(params[1], 1)
    for sampling in (SAMPLING, TRUNCATED):
        rollout = generate(engine, 1, sampling)
        for prompt, ids, mask, logps in zip(PROMPTS, rollout.ids, rollout.mask, rollout.logps, strict=True):
            scores = say(start[0], params[1], prompt, ids[mask].tolist(), 0.8)[1]
            np.testing.assert_allclose(logps[mask], scores, atol=1e-4)
    assert_equal(generate(engine, 1), expected)


def test_options_pass_through(make, fake, params):
    engine = make(fake)
    engine.publish(params[1], 1)
    generate(engine, 1)
    fake.log.clear()
    generate(engine, 1, TRUNCATED)
    bodies = [body for _, path, body in fake.log if path == GENERATE]
    assert sum(body["sampling_params"]["n"] for body in bodies) == len(PROMPTS)
    for body in bodies:
        settings = body["sampling_params"]
        assert settings["max_tokens"] == 6 and settings["stop_token_ids"] == [3, 7] and settings["temperature"] == 1.0
        assert settings["extra_args"]["unisd"] == {
            "temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.01, "vocab_size": 60
        }  # fmt: skip


def test_rows_of_one_prompt_are_one_request_and_every_row_has_a_seed_of_its_own():
    found = requests(PROMPTS, range(8), 100, most=2, greedy=False)
    assert [(request.row, request.n, request.seed) for request in found] == [
        (0, 2, 100), (2, 1, 102), (3, 1, 103), (4, 1, 104), (5, 1, 105), (6, 1, 106), (7, 1, 107),
    ]  # fmt: skip
    # Rows of another process lie between.
    found = requests([[1], [1], [1]], [1, 3, 4], 2**31 - 1, most=64, greedy=False)
    assert [(request.row, request.n, request.seed) for request in found] == [(1, 1, 2**31), (3, 2, 2**31 + 2)]
    assert {request.seed for request in requests(PROMPTS, range(8), 100, most=64, greedy=True)} == {0}


def test_what_is_drawn_depends_on_the_key_and_not_on_how_it_is_asked_for(make, fakes, params, expected):
    engine = make(*fakes, max_sequences=2)
    engine.publish(params[1], 1)
    assert_equal(generate(engine, 1), expected)
    assert max(body["sampling_params"]["n"] for fake in fakes for _, path, body in fake.log if path == GENERATE) == 2
    other = generate(engine, 1, key=jax.random.key(12))
    assert (other.ids != expected.ids).any()
    assert len({tuple(row) for row in expected.ids[:3].tolist()}) == 3


def test_measurements_are_of_what_was_published_since_the_last_call(make, fake, params):
    engine = make(fake)
    assert engine.measurements() == {"server_repairs": 0}
    engine.publish(params[0], 0)
    generate(engine, 0)
    found = engine.measurements()
    sizes = sum(leaf.size for leaf in jax.tree.leaves(params[0])) + params[0]["embed"]["weight"].size
    assert found["sync_gib"] == pytest.approx(4 * sizes / 2**30)
    assert 0 < found["probe_gap"] <= found["probe_gap_max"] < 1e-5
    assert all(found[f"seconds_sync_{part}"] > 0 for part in ("convert", "write", "load"))
    engine.publish(params[0], 1)
    generate(engine, 1)
    assert engine.measurements() == {"server_repairs": 0}
    assert fake.label.startswith("one/1/") and sum(path == RELOAD for _, path, _ in fake.log) == 1


# --- Versions and owners ---


def test_another_version_is_refused(make, fake, params):
    engine = make(fake)
    with pytest.raises(StaleWeights, match="holds policy version None, asked for 0"):
        begin(engine, 0)
    engine.publish(params[0], 0)
    with pytest.raises(StaleWeights, match="holds policy version 0, asked for 1"):
        begin(engine, 1)


def test_a_rollout_that_two_versions_made_is_refused(make, fake, params):
    engine = make(fake)
    engine.publish(params[0], 0)
    generate(engine, 0)
    fake.fault("mixed")
    with pytest.raises(StaleWeights, match="another"):
        generate(engine, 0)
    with pytest.raises(StaleWeights, match="another"):
        generate(engine, 0)  # and from then on


def test_a_second_run_is_refused_or_takes_over_and_then_the_first_stops(make, fake, params):
    first, second = make(fake, owner="one", take_over=True), make(fake, owner="two")
    first.publish(params[1], 1)
    generate(first, 1)
    second.publish(params[2], 1)
    with pytest.raises(RolloutFailed, match=r"serves the weights of another run, one/1/.*take_over=true"):
        generate(second, 1)
    assert fake.label.startswith("one/1/")

    third = make(fake, owner="three", take_over=True)
    third.publish(params[2], 1)
    generate(third, 1)
    forget(fake)
    with pytest.raises(RolloutFailed, match=r"now serves three/1/.*another run has taken this server over"):
        generate(first, 1)
    fourth = make(fake, owner="one", take_over=True)
    fourth.publish(params[1], 1)
    generate(fourth, 1)
    third.publish(params[3], 2)  # take_over is for the start alone
    with pytest.raises(RolloutFailed, match=r"now serves one/1/"):
        generate(third, 2)


def test_after_the_end_of_a_run_another_may_have_its_server(make, fake, start, params):
    first, second = make(fake, owner="one"), make(fake, owner="two")
    first.publish(params[1], 1)
    generate(first, 1)
    first.close()
    assert fake.label == "left"
    second.publish(params[2], 1)
    assert_equal(generate(second, 1, GREEDY), by_jax(start, params[2], GREEDY, 1), logps=1e-4)
    with pytest.raises(RolloutFailed, match="closed"):
        generate(first, 1)


def test_a_server_that_a_killed_trainer_left_paused_goes_on_for_the_same_run_alone(make, fake, params, expected):
    fake.label, fake.paused = "one/7/000000000000", True
    other = make(fake, owner="two", request_timeout=0.5, attempts=1)
    other.publish(params[1], 1)
    with pytest.raises(RolloutFailed, match="another run, one/7/000000000000: .*take_over=true"):
        generate(other, 1)
    assert fake.paused
    engine = make(fake)
    engine.publish(params[1], 1)
    assert_equal(generate(engine, 1), expected)


def test_a_killed_run_goes_on_with_another_number_of_processes(make, fake, params):
    for left, owner in (("run-1a2b3c4d-0", "run-1a2b3c4d"), ("run-1a2b3c4d", "run-1a2b3c4d-1")):
        fake.label = f"{left}/7/000000000000"
        engine = make(fake, owner=owner)
        engine.publish(params[1], 1)
        generate(engine, 1)
    fake.label = "run-1a2b3c4d-12345678/7/000000000000"
    stranger = make(fake, owner="run-1a2b3c4d")
    stranger.publish(params[1], 1)
    with pytest.raises(RolloutFailed, match="weights of another run"):
        generate(stranger, 1)


def test_no_more_completions_are_asked_for_at_once_than_the_server_makes(make, fake, params, monkeypatch):
    engine, under_way, most, lock = make(fake, max_sequences=4), 0, 0, threading.Lock()
    engine.publish(params[1], 1)
    generate(engine, 1)
    complete = lanes.Server.complete

    def counted(self, *args, n=1, **asked):
        nonlocal under_way, most
        with lock:
            under_way += n
            most = max(most, under_way)
        time.sleep(0.05)
        try:
            return complete(self, *args, n=n, **asked)
        finally:
            with lock:
                under_way -= n

    monkeypatch.setattr(lanes.Server, "complete", counted)
    generate(engine, 1, prompts=[[1, 2]] * 3 + [[3, 4]] * 3 + [[5, 6]] * 3)
    assert 3 <= most <= 4


def test_a_run_that_goes_on_pushes_its_weights_before_it_samples(make, fake, params, expected):
    killed, resumed = make(fake), make(fake)
    killed.publish(params[2], 1)
    generate(killed, 1)
    fake.log.clear()
    resumed.publish(params[1], 1)
    assert_equal(generate(resumed, 1), expected)
    paths = [path for _, path, _ in fake.log]
    assert RELOAD in paths


# --- Weights that did not arrive ---

WRONG = {
    "skip:model.layers.0.mlp.down_proj.weight": r"still has version 1's .*mlp",
    "keep_head": "output head",
    "swap_layers:0,1": "layers 0 and 1 exchanged",
    "ignore_reload": "still has version 1's weights, all of them",
    "transpose:model.layers.1.self_attn.q_proj.weight": "transposed",
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_weights_stop_the_run_before_anything_is_sampled(make, fake, params, fault):
    engine = make(fake)
    engine.publish(params[1], 1)
    generate(engine, 1)
    forget(fake)
    fake.fault(fault)
    engine.publish(params[2], 2)
    with pytest.raises(RolloutFailed, match=rf"with one/2/.*max_probe_gap is 0.002.*{WRONG[fault]}") as caught:
        generate(engine, 2)
    assert "\n" not in str(caught.value)
    assert not asked(fake)


@pytest.mark.parametrize("fault", [None, "ignore_reload"])
def test_where_the_bound_is_wide_a_server_that_scores_as_before_is_found(make, fake, params, fault):
    engine = make(fake, bound=50.0)
    engine.publish(params[1], 1)
    generate(engine, 1)
    if fault:
        fake.fault(fault)
    engine.publish(changed(params, 2, 0.001), 2) if fault is None else engine.publish(params[2], 2)
    with pytest.raises(RolloutFailed, match="has kept its weights") if fault else contextlib.nullcontext():
        generate(engine, 2)


def test_a_repaired_server_scores_as_it_did_where_the_bound_is_wide(make, fake, params):
    """It dies in the middle, and what it is then sent does not arrive."""
    engine = make(fake, bound=50.0)
    engine.publish(params[1], 1)
    generate(engine, 1)
    fake.restart()
    fake.fault("ignore_reload", times=None)
    with pytest.raises(RolloutFailed, match="nats on average from its own before: it has other weights"):
        generate(engine, 1)


def test_a_mean_above_an_eighth_of_the_bound_is_too_much(make, fake, params):
    engine = make(fake, bound=0.5)
    engine.publish(params[0], 0)
    generate(engine, 0)
    scored = engine._scored
    engine._scored = lambda *on: scored(*on) + np.float32(0.1)
    engine.publish(params[1], 1)
    with pytest.raises(RolloutFailed, match=r"0\.1 on average .* for the average 0\.0625"):
        generate(engine, 1)


def test_nothing_keeps_published_weights_alive(make, fake, params):
    engine = make(fake)
    own = jax.tree.map(jnp.copy, params[1])
    leaf = weakref.ref(jax.tree.leaves(own)[0])
    engine.publish(own, 1)
    generate(engine, 1)
    del own
    gc.collect()
    assert leaf() is None


def test_weights_that_are_no_numbers_are_not_published(make, fake, params):
    engine = make(fake)
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), params[0])
    with pytest.raises(RolloutFailed, match="NaN or infinity"):
        engine.publish(broken, 1)
    assert engine.version is None


# --- Faults while sampling ---


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("fault", ["drop", "error500", "abort"])
def test_a_fault_changes_nothing_and_no_row_is_lost_or_doubled(make, fake, params, expected, fault, after):
    engine = make(fake)
    engine.publish(params[1], 1)
    generate(engine, 1)
    whole = asked(fake)
    assert len(whole) == len(PROMPTS)
    forget(fake)
    fake.fault(fault, after=after)
    assert_equal(generate(engine, 1), expected)
    assert asked(fake) == whole
    assert engine.measurements()["server_repairs"] == 1


@pytest.mark.parametrize("fault", ["die", "oom"])
def test_a_server_that_comes_back_gets_the_weights_again(make, fake, params, expected, fault):
    def back():
        fake.stop()
        threading.Timer(0.5, fake.start).start()

    engine = make(fake)
    engine.publish(params[1], 1)
    generate(engine, 1)
    fake.on_death = back
    try:
        fake.fault(fault, after=2)
        assert_equal(generate(engine, 1), expected)
    finally:
        fake.on_death = None
    assert fake.label.startswith("one/1/")


def test_a_server_that_was_restarted_unseen_gets_the_weights_again(make, fake, params, expected):
    engine = make(fake)
    engine.publish(params[1], 1)
    generate(engine, 1)
    fake.restart()
    assert_equal(generate(engine, 1), expected)
    fake.restart()
    engine.publish(params[2], 2)
    generate(engine, 2)
    fake.restart()
    engine.publish(params[2], 3)  # which is no more than another label
    generate(engine, 3)
    assert fake.label.startswith("one/3/")


def test_a_request_without_an_answer_is_sent_again(make, fake, params, expected):
    engine = make(fake, request_timeout=1.5)
    engine.publish(params[1], 1)
    fake.fault("hang", after=4)
    assert_equal(generate(engine, 1), expected)
    fake.release()


def test_a_server_that_stays_away_ends_the_run(make, fake, params):
    engine = make(fake, start_timeout=0.3)
    engine.publish(params[1], 1)
    generate(engine, 1)
    fake.stop()
    with pytest.raises(RolloutFailed, match=r"http://127.0.0.1:\d+.*connection failed.*rollout.vllm.start_timeout"):
        generate(engine, 1)


def test_a_server_that_always_fails_ends_the_run(make, fake, params):
    engine = make(fake, attempts=2)
    engine.publish(params[1], 1)
    generate(engine, 1)
    fake.fault("error500", times=None)
    with pytest.raises(RolloutFailed, match=r"failed 2 times \(rollout.vllm.attempts\).*500 Internal Server Error"):
        generate(engine, 1)


def test_no_server_at_the_start_is_an_error_at_once(make, fake, params):
    engine = make(fake)
    fake.stop()
    engine.publish(params[1], 1)
    begun = time.monotonic()
    with pytest.raises(UserError, match="start one with"):
        generate(engine, 1)
    assert time.monotonic() - begun < 2


def test_the_end_does_not_wait_for_a_server_that_hangs(make, fake, params, monkeypatch):
    monkeypatch.setattr("unisd_jax.rollout.lanes.CLOSING_SECONDS", 0.3)
    engine = make(fake, request_timeout=600.0)
    engine.publish(params[1], 1)
    generate(engine, 1)
    for path in (GENERATE, "/weight_info"):
        fake.fault("hang", times=None, path=path)
    begin(engine, 1)
    time.sleep(0.1)
    begun = time.monotonic()
    engine.close()
    assert time.monotonic() - begun < 2
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    fake.release()


def test_nothing_is_loaded_into_a_server_that_was_let_go(make, fake, params):
    engine = make(fake)
    engine.publish(params[1], 1)
    begin(engine, 1)
    engine.publish(params[2], 2)
    pending = begin(engine, 2)
    engine.close()
    with pytest.raises(RolloutFailed, match="closed"):
        pending.result()
    label = fake.label
    assert label in ("left", "default") and not fake.paused


# --- Loading and files ---


def versions(folder):
    return sorted(entry.name for entry in folder.glob("*")) if folder.exists() else []


def test_a_load_that_fails_once_is_done_again(make, fake, params, expected):
    engine = make(fake)
    fake.fault("reload500")
    engine.publish(params[1], 1)
    assert_equal(generate(engine, 1), expected)
    assert engine.measurements()["server_repairs"] == 1


def test_a_load_that_always_fails_ends_the_run(make, fake, params):
    engine = make(fake, attempts=2)
    fake.fault("reload500", times=None)
    engine.publish(params[1], 1)
    with pytest.raises(RolloutFailed, match=r"failed 2 times \(rollout.vllm.attempts\).*made to fail"):
        generate(engine, 1)
    assert not fake.paused


def test_a_full_disk_stops_and_leaves_nothing_half_written(make, fake, params, tmp_path, monkeypatch):
    engine = make(fake)
    engine.publish(params[1], 1)
    generate(engine, 1)
    shards = weights.write_shards

    def full(folder, *arguments):
        shards(folder, *arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "write_shards", full)
    with pytest.raises(RolloutFailed, match=r"no room.*rollout.vllm.sync_dir"):
        engine.publish(params[2], 2)
    assert versions(tmp_path / "one") == ["v00000001"]
    monkeypatch.setattr(weights, "write_shards", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(RolloutFailed, match="I/O error"):
        engine.publish(params[2], 2)
    engine.close()
    assert versions(tmp_path / "one") == []


def test_files_of_two_versions_at_most_and_those_that_are_needed(make, fake, params, expected, tmp_path):
    """Three versions ahead of a slow server, which dies under the first."""
    engine = make(fake)
    engine.publish(params[0], 0)
    generate(engine, 0)
    seen = set()
    fake.fault("slow:0.1", times=None)
    fake.fault(lambda reply: seen.add(len(versions(tmp_path / "one"))), times=None)
    engine.publish(params[1], 1)
    pending = [begin(engine, 1)]
    for version in (2, 3, 4):
        engine.publish(params[version], version)
        assert len(versions(tmp_path / "one")) <= 2
        pending.append(begin(engine, version))
        if version == 2:
            fake.restart()
    assert [found.result().policy_version for found in pending] == [1, 2, 3, 4]
    assert_equal(pending[0].result(), expected)
    assert versions(tmp_path / "one") == ["v00000004"] and max(seen) == 2
    engine.close()
    assert not (tmp_path / "one").exists()


def test_two_sets_of_weights_under_one_version_do_not_overwrite_each_other(make, fake, params, start):
    """As where own answers come from the student and completions from the base."""
    engine = make(fake)
    fake.fault("slow:0.1", times=None)
    engine.publish(params[1], 1)
    one = begin(engine, 1, GREEDY)
    engine.publish(params[2], 1)
    other = begin(engine, 1, GREEDY)
    assert_equal(one.result(), by_jax(start, params[1], GREEDY, 1), logps=1e-4)
    assert_equal(other.result(), by_jax(start, params[2], GREEDY, 1), logps=1e-4)


def test_it_begins_without_waiting(make, fake, params):
    engine = make(fake)
    fake.fault("slow:0.5")
    begun = time.monotonic()
    engine.publish(params[1], 1)
    first = begin(engine, 1)
    assert time.monotonic() - begun < 0.5
    engine.publish(params[2], 2)
    second = begin(engine, 2)
    assert second.result().policy_version == 2 and first.result().policy_version == 1


def test_an_interrupt_ends_the_wait(make, fake, params):
    engine = make(fake)
    engine.publish(params[1], 1)
    generate(engine, 1)
    fake.fault("hang", times=None)
    pending = begin(engine, 1)
    # A shell may have it ignored for what runs in the background.
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    begun = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            pending.result()
    finally:
        signal.signal(signal.SIGINT, earlier)
        fake.release()
    assert time.monotonic() - begun < 10


# --- Several servers ---


def test_servers_share_the_rows_and_hold_the_same_version(make, fakes, params, expected):
    engine = make(*fakes)
    engine.publish(params[1], 1)
    assert_equal(generate(engine, 1), expected)
    assert all(fake.samples for fake in fakes)
    fakes[1].fault("slow:0.5", path=RELOAD)
    engine.publish(params[2], 2)
    for fake in fakes:
        fake.log.clear()
    generate(engine, 2)
    assert {fake.label.rpartition("/")[0] for fake in fakes} == {"one/2"}


def test_one_of_two_is_lost_and_comes_back(make, fakes, params, expected):
    engine = make(*fakes)
    engine.publish(params[1], 1)
    generate(engine, 1)
    whole = asked(*fakes)
    forget(*fakes)
    fakes[1].fault("die", after=1)
    threading.Timer(1.0, fakes[1].start).start()
    assert_equal(generate(engine, 1), expected)
    assert asked(*fakes) == whole
    engine.publish(params[2], 2)
    generate(engine, 2)


def test_one_of_two_is_gone_for_good(make, fakes, params):
    engine = make(*fakes, start_timeout=0.3)
    engine.publish(params[1], 1)
    generate(engine, 1)
    fakes[1].stop()
    with pytest.raises(RolloutFailed, match=rf"{fakes[1].address}.*start_timeout"):
        generate(engine, 1)


def test_addresses_are_shared_out():
    four = ["http://a:1", "http://a:2", "http://b:1", "http://b:2"]
    assert own_addresses(four, 1, 2) == four[2:] and own_addresses([], 1, 2) == []
    with pytest.raises(ConfigError, match="names 4 servers for 3 processes; expected a multiple"):
        own_addresses(four, 0, 3)
    assert is_here("http://127.0.0.1:8000") and not is_here("http://10.0.0.1:8000")


# --- Adapters alone ---


def test_adapters_alone_are_sent_and_sent_again(make, fake, params, start):
    model, base = start
    engine = make(fake, adapter_only=True)
    loras = [toys.random_lora(base, seed) for seed in range(2)]

    def check(version, lora):
        merged = merge(base, lora)
        assert_equal(generate(engine, version, GREEDY), by_jax(start, merged, GREEDY, version), logps=1e-4)

    engine.publish(base, 0, loras[0])
    check(0, loras[0])
    assert engine.measurements()["probe_gap_max"] < 1e-5
    engine.publish(base, 1, loras[1])
    check(1, loras[1])
    assert len(fake.adapters) == 1
    assert [path for _, path, _ in fake.log].count(RELOAD) == 1, "the base, once"
    engine.publish(merge(base, loras[0]), 1)  # an evaluation of whole weights
    check(1, loras[0])
    engine.publish(base, 1, loras[1])
    check(1, loras[1])
    fake.restart()
    check(1, loras[1])
    assert list(fake.adapters) == [fake.label]
    assert not any("load_inplace" in body for _, _, body in fake.log if body), "vLLM would read it at every step"
