"""A vLLM server as a process of its own: its start, what its log says, its end.

A trainer starts one with `start_server`; by hand, on this or another host, it is

    python -m unisd_jax.rollout.vllm_server --config FILE [--a.b=c ...]
"""

import contextlib
import dataclasses
import errno
import functools
import http.client
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from unisd_jax import config as configuration
from unisd_jax.config import Config
from unisd_jax.errors import ConfigError, UserError, report_error
from unisd_jax.interrupt import INTERRUPTED
from unisd_jax.models.hub import local_checkpoint
from unisd_jax.rollout.vllm_command import adapter_rank, needed_length, server_command

SUPERVISE = Path(__file__).with_name("supervise.py")
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
READ = 4 << 20  # bytes at the end of a log that are looked at

# What vLLM's processes put before a line, what they say at every end, lines that say why one ended, and what
# only follows from another one's end.
_PREFIX = re.compile(
    r"(\(\w+ pid=\d+\) )?((?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL)(: +| \d\d-\d\d [\d:]+ \[[^\]]*\] ?))?"
)
_NOISE = re.compile(r".*resource_tracker.*|warnings\.warn\(.*")
_CAUSE = re.compile(r"[\w.]*(Error|Exception)(: .*)?|\S+: error: .*|.* died unexpectedly.*")
_RESULT = re.compile("EngineDeadError|Engine core initialization failed|Executor failed")


def free_port(host: str) -> int:
    """A port of `host` where nothing listens now.

    Raises:
      ConfigError: this machine cannot listen on `host`.
    """
    with _reserved(host, 0) as reserved:
        return reserved.getsockname()[1]


def _reserved(host: str, port: int) -> socket.socket:
    """A socket at `port` (0: a free one) that leaves it to a server, but not to whoever looks for a free one.

    Raises:
      UserError: something listens there.
      ConfigError: this machine cannot listen on `host`.
    """
    reserved = socket.socket()
    try:
        # With this a port can be bound again as long as nobody listens there; without, it is not given out.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, port != 0)
        reserved.bind((host, port))
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        return reserved
    except OSError as error:
        reserved.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"rollout.vllm.port: {port} of {host} is taken; name another, or null for a free one"
            ) from None
        raise ConfigError(
            f"rollout.vllm.host: cannot listen on {host}:{port} ({error.strerror or error}); expected an address of "
            "this machine, such as 127.0.0.1"
        ) from None


class OwnServer:
    """A server process that ends, with all that it started, when this process does, however that ends."""

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], *, log: Path, address: str, grace: float = GRACE
    ):
        self.address, self.log = address, log
        self._grace, self._stopped, self._was_ready = grace, False, False
        log.parent.mkdir(parents=True, exist_ok=True)
        supervisor = [sys.executable, "-I", "-S", str(SUPERVISE), str(os.getpid()), str(grace)]
        with open(log, "ab") as output:
            self._begin = output.tell()
            # A session of its own: the terminal's Ctrl-C is for the trainer, which stops the server in its time.
            self._process = subprocess.Popen(
                [*supervisor, *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Its exit status, when it has ended."""
        return self._process.wait()

    def stop(self) -> None:
        """Ends it and everything it started; again: nothing."""
        if self._stopped:
            return
        self._stopped = True
        self._process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._grace + 5)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def ready(self) -> bool:
        """Whether it answers that it is well."""
        host, _, port = self.address.removeprefix("http://").rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=5)
        try:
            connection.request("GET", "/health")
            answered = connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            answered = False
        finally:
            connection.close()
        self._was_ready |= answered
        return answered

    def log_tail(self, lines: int) -> list[str]:
        """The last lines of its log that are more than information, without the prefixes of vLLM's processes."""
        return self._lines()[-lines:]

    def reason(self) -> str:
        """Why it ended or does not become ready, in one line, as far as its log says."""
        lines, status = self._lines(), self._process.poll()
        causes = [number for number, line in enumerate(lines) if _CAUSE.fullmatch(line) and not _RESULT.search(line)]
        if causes:
            # At the start the first one brings down the others; later the earlier ones were survived.
            number = causes[-1 if self._was_ready else 0]
            # pydantic's errors say it in the line below.
            text = " ".join(lines[number : number + 2 if "ValidationError" in lines[number] else number + 1])
        elif status in (128 + signal.SIGKILL, -signal.SIGKILL):
            text = "killed from outside, as where memory is short"
        else:
            text = " / ".join(lines[-3:]) or "its log says nothing"
        return textwrap.shorten(text, 400, placeholder=" ...") + ("" if status is None else f" (exit status {status})")

    def port_taken(self) -> bool:
        """Whether its log says that something else listens on its port."""
        return any("address already in use" in line.lower() for line in self._lines())

    def _lines(self) -> list[str]:
        with open(self.log, "rb") as file:
            file.seek(max(self._begin, os.fstat(file.fileno()).st_size - READ))
            text = file.read().decode(errors="replace")
        lines = []
        for line in text.splitlines():
            prefix = _PREFIX.match(line)
            rest = line[prefix.end() :].strip()
            if rest and prefix["level"] not in ("DEBUG", "INFO", "WARNING") and not _NOISE.fullmatch(rest):
                lines.append(rest)
        return lines


def start_server(
    config: Config,
    checkpoint: Path,
    log: Path,
    *,
    lora_rank: int | None = None,
    say: Callable[[str], None] = print,
) -> OwnServer:
    """Starts a server with the weights of `checkpoint` and waits until it is ready; its output is appended to `log`.

    Raises:
      UserError: it ends, or is not ready in time, or its port is taken; the message says why and where its log is.
    """
    vllm = config.rollout.vllm
    for attempt in range(1, vllm.attempts + 1):
        with _reserved(vllm.host, vllm.port or 0) as reserved:
            port = reserved.getsockname()[1]
            command, environment = server_command(
                config, checkpoint, port, max_length=needed_length(config), lora_rank=lora_rank
            )
            address = f"http://{'127.0.0.1' if vllm.host == '0.0.0.0' else vllm.host}:{port}"
            say(f"starting a vLLM server at {address}, which takes a while; its log is {log}")
            server = OwnServer(command, environment, log=log, address=address)
            try:
                seconds = _wait_until_ready(server, vllm.start_timeout)
                say(f"the vLLM server is ready after {seconds:.0f} s")
                return server
            except BaseException as error:
                server.stop()
                another = isinstance(error, _Ended) and server.port_taken() and vllm.port is None
                if not another or attempt == vllm.attempts:
                    raise
                say(f"port {port} was taken meanwhile, trying another")
    raise AssertionError("the last attempt returns or raises")


class _Ended(UserError):
    """A server ended while it was starting."""


def _wait_until_ready(server: OwnServer, timeout: float) -> float:
    """Returns how long that took, in seconds."""
    begun = time.monotonic()
    while True:
        ready = server.ready()
        # Not alive although ready: another server answered, on the port that this one did not get.
        if not server.alive():
            raise _Ended(
                f"the vLLM server ended at its start: {server.reason()}; its log is {server.log}, its options are "
                "rollout.vllm.cache_gib, max_length, dtype, devices and arguments"
            )
        if ready:
            return time.monotonic() - begun
        if time.monotonic() > begun + timeout:
            raise UserError(
                f"the vLLM server was not ready after {timeout:g} s: {server.reason()}; its log is {server.log}, more "
                "time is given by rollout.vllm.start_timeout"
            )
        time.sleep(0.2)


# --- By hand ---


def serve(config: Config, *, dry_run: bool) -> None:
    """Runs a server in the foreground until it ends or a signal raises KeyboardInterrupt.

    Raises:
      UserError: it does not start, or it ends.
    """
    vllm = config.rollout.vllm
    port = vllm.port or free_port(vllm.host)
    config = dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, vllm=dataclasses.replace(vllm, port=port))
    )
    checkpoint = local_checkpoint(config.model.path)
    lora_rank = adapter_rank(config) if vllm.sync == "adapter" else None
    if dry_run:
        command, environment = server_command(
            config, checkpoint, port, max_length=needed_length(config), lora_rank=lora_rank
        )
        changed = [f"{name}={value}" for name, value in environment.items() if os.environ.get(name) != value]
        dropped = [word for name in os.environ if name not in environment for word in ("-u", name)]
        print(shlex.join(["env", *dropped, *changed, *command]))
        return
    if vllm.host not in ("127.0.0.1", "localhost"):
        print(
            f"warning: rollout.vllm.host={vllm.host}: whoever reaches port {port} can replace the model and have this "
            "user's files read; let only trainers reach it",
            flush=True,
        )
    log = Path(config.output_dir) / f"vllm-{port}.log"
    server = start_server(config, checkpoint, log, lora_rank=lora_rank, say=functools.partial(print, flush=True))
    try:
        host = socket.gethostname() if vllm.host == "0.0.0.0" else vllm.host
        use = f"--rollout.engine=vllm --rollout.vllm.addresses=[http://{host}:{port}]"
        print(f"serving {config.model.path} at http://{host}:{port}; for a trainer: {use}", flush=True)
        server.wait()
        raise UserError(f"the vLLM server ended: {server.reason()}; its log is {log}")
    finally:
        server.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 2 bad input or a server that ended, 130 stopped by a signal."""
    program = "python -m unisd_jax.rollout.vllm_server"
    # SIGINT too: a shell may have it ignored for what runs in the background.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        command = configuration.parse_command_line(sys.argv[1:] if argv is None else argv, program)
        if command.print_config:
            print(configuration.to_yaml(command.config), end="")
        else:
            serve(command.config, dry_run=command.dry_run)
    except (UserError, OSError) as error:
        return report_error(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
