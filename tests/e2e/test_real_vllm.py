"""The real engine: it says what our sampler says, what it has loaded is proved, and it is repaired when it is lost."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from run_checks import TRAIN_ONLY, read_metrics, read_result

from unisd_jax import rollout
from unisd_jax.config import load_config
from unisd_jax.data.batching import pad_prompts
from unisd_jax.data.chat import load_chat
from unisd_jax.models import Lora, LoraFactors, completion_scores, init_lora, load_hf
from unisd_jax.models.safetensors_io import Entry, TensorFile, new_tensor_file
from unisd_jax.rollout import JaxSampler, RolloutFailed, Sampling
from unisd_jax.rollout.engines import make_engine
from unisd_jax.rollout.jax_sampler import truncate
from unisd_jax.rollout.vllm_http import Server
from unisd_jax.testing import tiny_checkpoint
from unisd_jax.types import Completions, Prompts

REPOSITORY = Path(__file__).resolve().parents[2]
QUESTIONS = (
    "What is the plural of bird?", "Name the largest planet.", "Write a haiku about rain.", "2 + 2 =",
    "List three colours.", "Who wrote Hamlet?", "Explain gravity to a child.", "What is the capital of France?",
)  # fmt: skip


def words(vllm_python, *more):
    return ["--rollout.engine=vllm", f"--rollout.vllm.python={vllm_python}", "--rollout.vllm.cache_gib=1", *more]


# --- One server, SmolLM2, adapters allowed ---


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    model, params = load_hf(smollm2_path)
    return model, params, load_chat(smollm2_path)


@pytest.fixture(scope="module")
def engine(smollm2, smollm2_path, vllm_python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    overrides = words(vllm_python, "--rollout.vllm.sync=adapter", "--model.lora.rank=8", f"--output_dir={folder}")
    overrides += [f"--model.path={smollm2_path}", "--model.dtype=float32", "--rollout.max_completion_length=48"]
    overrides += ["--evaluation.max_completion_length=48", "--data.max_prompt_length=200"]
    config = load_config(REPOSITORY / "configs" / "base.yaml", overrides)
    model, _, chat = smollm2
    prompts = prompts_of(chat)
    sequences = [(prompt, prompts[row - 1][-20:]) for row, prompt in enumerate(prompts)]
    engine = make_engine(config, model, smollm2_path, sequences, pad_id=chat.pad_id, folder=folder, training=True)
    yield engine
    engine.close()


def prompts_of(chat):
    return [chat.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS]


def both(engine, smollm2, params, sampling, lora=None, version=0, key=0):
    """The rollouts of the engine and of our own sampler, as numpy arrays."""
    model, _, chat = smollm2
    ids, mask = pad_prompts(prompts_of(chat), pad_id=chat.pad_id)
    found = []
    for sampler in (engine, JaxSampler(model)):
        sampler.publish(params, version, lora)
        rollout = sampler.generate(ids, mask, sampling, key=jax.random.key(key), version=version)
        found.append(jax.tree.map(np.asarray, rollout))
    return found


def sampling_of(chat, **changes):
    return Sampling(48, chat.stop_ids, chat.pad_id, vocab_size=chat.vocab_size, **changes)


def random_adapter(params, size=0.02):
    lora = init_lora(jax.random.key(0), params, rank=8, alpha=16.0, targets=("q", "v", "down"))
    factors = {
        path: LoraFactors(a, size * jax.random.normal(jax.random.key(number), b.shape))
        for number, (path, (a, b)) in enumerate(lora.factors.items())
    }
    return Lora(factors, lora.scale)


def test_greedy_replies_are_those_of_our_sampler_token_by_token(engine, smollm2):
    theirs, ours = both(engine, smollm2, smollm2[1], sampling_of(smollm2[2], temperature=0.0))
    assert np.array_equal(theirs.ids, ours.ids) and np.array_equal(theirs.mask, ours.mask)
    assert np.array_equal(theirs.stopped, ours.stopped) and theirs.mask.sum() > 100
    np.testing.assert_allclose(theirs.logps, ours.logps, atol=5e-4)
    assert engine.measurements()["probe_gap_max"] < 5e-4


@pytest.mark.parametrize("alone", [True, False], ids=["adapter", "merged"])
def test_other_weights_are_loaded_and_say_other_things(engine, smollm2, alone):
    model, params, chat = smollm2
    lora = random_adapter(params)
    engine._adapter_only = alone
    theirs, ours = both(engine, smollm2, params, sampling_of(chat, temperature=0.0), lora, version=1 + alone)
    assert np.array_equal(theirs.ids, ours.ids)
    measured = engine.measurements()
    assert measured["probe_gap_max"] < 5e-4 and measured["server_repairs"] == 0
    assert (measured["sync_gib"] < 0.02) == alone
    engine._adapter_only = True
    back, own = both(engine, smollm2, params, sampling_of(chat, temperature=0.0), version=4)
    assert np.array_equal(back.ids, own.ids) and not np.array_equal(back.ids, theirs.ids)


def test_what_is_drawn_has_the_log_probs_of_our_model_and_repeats(engine, smollm2):
    model, params, chat = smollm2
    sampling = sampling_of(chat, temperature=0.7, top_p=0.9, top_k=40, min_p=0.02)
    first, _ = both(engine, smollm2, params, sampling, version=5)
    again, _ = both(engine, smollm2, params, sampling, version=5)
    other, _ = both(engine, smollm2, params, sampling, version=5, key=1)
    # What is computed together depends on which request comes first: rounding may turn a draw here and there.
    assert np.mean((first.ids == again.ids).all(axis=1)) > 0.7 > np.mean((first.ids == other.ids).all(axis=1))
    prompts = Prompts(*pad_prompts(prompts_of(chat), pad_id=chat.pad_id))
    said = Completions(*map(jnp.asarray, (first.ids, first.mask)))
    scores = completion_scores(model, params, None, Prompts(*map(jnp.asarray, prompts)), said, temperature=0.7)
    np.testing.assert_allclose(np.where(first.mask, scores.logp, 0), first.logps, atol=5e-4)


DRAWABLE = """
import sys
import numpy as np, torch
from unisd_sampling import Settings, drawable
arrays = np.load(sys.argv[1])
found = [drawable(torch.tensor(arrays["logits"]), Settings(*values)).numpy() for values in eval(sys.argv[2])]
np.savez(sys.argv[3], *found)
"""


def test_what_can_be_drawn_is_what_our_sampler_can_draw(vllm_python, tmp_path):
    """The processor inside vLLM against `jax_sampler.truncate`: the same tokens, the same log-probs."""
    logits = 4 * np.random.default_rng(0).standard_normal((16, 500)).astype(np.float32)
    settings = [(0.7, 0, 0.9, 0.0, 0), (1.0, 20, 1.0, 0.0, 480), (1.3, 0, 1.0, 0.1, 0), (0.7, 50, 0.8, 0.05, 490)]
    np.savez(tmp_path / "logits.npz", logits=logits)
    environment = os.environ | {"PYTHONPATH": str(Path(rollout.__file__).with_name("plugin"))}
    subprocess.run(
        [vllm_python, "-c", DRAWABLE, tmp_path / "logits.npz", repr(settings), tmp_path / "found.npz"],
        env=environment, check=True, capture_output=True,
    )  # fmt: skip
    found = np.load(tmp_path / "found.npz")
    for number, (temperature, top_k, top_p, min_p, vocab_size) in enumerate(settings):
        logps = jax.nn.log_softmax(jnp.asarray(logits) / temperature)
        if vocab_size:
            logps = jnp.where(jnp.arange(500) < vocab_size, logps, -jnp.inf)
        expected = np.asarray(truncate(logps, top_k=top_k, top_p=top_p, min_p=min_p))
        kept = np.isfinite(expected)
        assert np.array_equal(np.isfinite(found[f"arr_{number}"]), kept) and 1 <= kept.sum(axis=1).min() < 480
        np.testing.assert_allclose(found[f"arr_{number}"][kept], expected[kept], atol=1e-5)


def test_a_head_that_is_left_behind_is_caught_and_named(engine, smollm2, monkeypatch):
    """What an ordinary checkpoint of tied weights does: without a head of its own the server keeps the old one."""
    model, params, chat = smollm2
    moved = params | {"embed": {"weight": params["embed"]["weight"] * 1.05}}
    write = engine._publisher.write

    def without_head(*arguments, **options):
        published = write(*arguments, **options)
        (path,) = published.folder.glob("*.safetensors")
        file = TensorFile(path)
        kept = [
            Entry(name, file.view(name).shape, file.view(name).dtype) for name in file.names if "lm_head" not in name
        ]
        values = [np.array(file.view(entry.name)) for entry in kept]
        with new_tensor_file(path, kept) as append:
            for value in values:
                append(value)
        return published

    monkeypatch.setattr(engine._publisher, "write", without_head)
    with pytest.raises(RolloutFailed, match=r"nats from the trainer's.*lm_head\.weight"):
        both(engine, smollm2, moved, sampling_of(chat, temperature=0.0), version=6)


# --- Training ---


def servers(folder):
    """The processes of servers that were started with a log or a model below `folder`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if "vllm" in line.lower() and str(folder) in line:
            found.append(process)
    return found


def test_unisd_star_trains_through_it(smollm2_path, vllm_python, cli_environment, tmp_path):
    """Several steps of the quickstart with every mechanism; the proof after every sync, and nothing left behind."""
    options = words(vllm_python, f"--model.path={smollm2_path}", "--train.steps=3", "--data.test_limit=16")
    options += ["--evaluation.drift_tokens=8", "--train.batch_size=8", f"--output_dir={tmp_path}"]
    options += [f"--teacher.cache_dir={tmp_path}/cache", "--data.train_limit=64"]
    command = [sys.executable, "-m", "unisd_jax.train", "--config", str(REPOSITORY / "configs/quickstart_vllm.yaml")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "quickstart-vllm"
    lines = read_metrics(run_dir)
    assert [line["policy_version"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert line["probe_gap_max"] < 2e-3 and line["sampler_gap_max"] < 2e-3, line
        assert line["seconds_sync_load"] > 0 and line["server_repairs"] == 0
    result = read_result(run_dir)
    assert result["after_metrics"]["gold_logprob"] > result["before_metrics"]["gold_logprob"]
    assert servers(tmp_path) == []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    sizes = dict(hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=128, tied_embeddings=True)
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", **sizes)


FAULTS = """
import os, signal
from unisd_jax.rollout.lanes import Lane
answer, faults = Lane._answer, {{1: signal.SIGKILL, 2: signal.SIGSTOP}}
def answer_under_fire(self, target, *rest):
    number = faults.pop(int(target.label.split("/")[1]), None)
    if number is not None:
        # The whole group, as the kernel does to a process that takes too much memory, or when a machine swaps.
        os.killpg(self._process._process.pid, number)
    return answer(self, target, *rest)
Lane._answer = answer_under_fire
from unisd_jax.metrics import MetricsWriter
log = MetricsWriter.log
def log_and_kill(self, step, values):
    log(self, step, values)
    if step == {step}: os.kill(os.getpid(), signal.SIGKILL)
MetricsWriter.log = log_and_kill
"""


def test_killed_hung_and_resumed(tiny, vllm_python, cli, tmp_path):
    """The server is killed in the second step and hangs in the third, the trainer is killed after the fourth."""
    options = words(vllm_python, f"--model.path={tiny}", "--rollout.vllm.request_timeout=10", "--train.steps=6")
    options += ["--rollout.max_sampler_gap=1e-3", *TRAIN_ONLY]
    assert cli(tmp_path, *options, before=FAULTS.format(step=4)).code == -signal.SIGKILL
    lines = read_metrics(tmp_path / "run")
    assert [line["server_repairs"] for line in lines] == [0, 1, 2, 2]
    until = time.monotonic() + 30
    while servers(tiny) and time.monotonic() < until:
        time.sleep(0.5)
    assert servers(tiny) == []
    outcome = cli(tmp_path, *options)
    assert outcome.code == 0 and "continuing after step 2" in outcome.out, outcome
    lines = read_metrics(tmp_path / "run")
    assert [line["policy_version"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert all(line["probe_gap_max"] < 2e-3 and line["sampler_gap_max"] < 2e-3 for line in lines)
    owner = f"run-{hashlib.sha256(str(tmp_path / 'run').encode()).hexdigest()[:8]}"
    assert servers(tiny) == [] and not list(Path("/dev/shm").glob(f"unisd-{owner}-*"))


# --- bfloat16 ---


def test_in_bfloat16_other_weights_arrive_and_kept_ones_are_noticed(tiny, vllm_python, tmp_path, monkeypatch):
    """Rounding hides one update; what is computed in the same way twice is the same to the last bit."""
    overrides = words(vllm_python, f"--model.path={tiny}", f"--output_dir={tmp_path}", "--data.max_prompt_length=200")
    overrides += ["--rollout.max_completion_length=16", "--evaluation.max_completion_length=16"]
    config = load_config(REPOSITORY / "configs" / "base.yaml", overrides)
    model, params = load_hf(tiny, dtype=jnp.bfloat16)
    chat = load_chat(tiny)
    prompts = prompts_of(chat)
    pairs = [(prompt, prompts[row - 1][-20:]) for row, prompt in enumerate(prompts)]
    engine = make_engine(config, model, tiny, pairs, pad_id=chat.pad_id, folder=tmp_path, training=True)
    ids, mask = pad_prompts(prompts, pad_id=chat.pad_id)

    def other(scale):
        return params | {"norm": {"scale": params["norm"]["scale"] * jnp.bfloat16(scale)}}

    def sample(version, weights):
        engine.publish(weights, version)
        return engine.generate(ids, mask, Sampling(4, (), 0), key=jax.random.key(0), version=version)

    try:
        for version, scale in enumerate((1.0, 1.02, 1.04)):
            sample(version, other(scale))
            assert engine.measurements()["probe_gap"] < 0.05
        monkeypatch.setattr(Server, "load_weights", lambda server, folder, label: server.set_label(label))
        with pytest.raises(RolloutFailed, match="it has kept its weights"):
            sample(3, other(1.06))
    finally:
        engine.close()
