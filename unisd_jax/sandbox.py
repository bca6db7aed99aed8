"""Runs Python programs that a model wrote, each in a process of its own that is limited and killed from outside."""

import contextlib
import functools
import itertools
import marshal
import math
import os
import secrets
import selectors
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

Kind = Literal["pass", "wrong_answer", "runtime_error", "syntax_error", "timeout", "memory", "no_code"]

LAYERS = ("namespaces", "landlock", "seccomp") if sys.platform == "linux" else ()
STARTUP = 60.0  # seconds until a program starts, which takes some hundredths of one on an idle machine
LOOK = 0.05  # seconds between two looks at the folder
FILE, FOLDER, FILES = 16 << 20, 64 << 20, 1000  # bytes of one file, bytes and number of all files
KEPT = 4000  # bytes of output and of report that are kept; the rest is read and forgotten
STARTED, END = b"\1", b"\0"

_CHILD = Path(__file__).with_name("sandbox_child.py")
# Compiled here, once, and handed over with the job: reading and compiling a file would take longer than Python's start.
_BEGIN = """
import builtins, marshal, sys
code, job = marshal.load(sys.stdin.buffer)
names = {"__builtins__": dict(vars(builtins))}
exec(code, names)
names["main"](job)
"""


class Outcome(NamedTuple):
    """How a program ended and, unless it passed, one line on why."""

    kind: Kind
    message: str


class _Heard(NamedTuple):
    """What came over the report pipe, the end of the output, and the outcome if the program was stopped."""

    said: bytes
    printed: bytes
    stopped: Outcome | None


def run_python(program: str, *, timeout: float = 10.0, memory_mb: int = 512) -> Outcome:
    """Runs `program` as a module named "program"; it passes if its last line is reached within `timeout` seconds.

    A failed assertion is a wrong answer; any other end before the last line, `sys.exit(0)` included, is an error. The
    kind "no_code" is never returned: it is for callers that found no program in a reply. May be called from threads.

    Everywhere: a fresh interpreter with `-I`, an empty temporary folder, no input, nothing of the caller's environment;
    limits on processor time, memory, the size of a file (16 MiB), of the folder (64 MiB, 1000 files, looked at 20 times
    a second; up to 1 GiB more in files that were removed and are still open) and on its run time, which counts from the
    program's first line. Output is discarded. The process group is killed, and the folder removed, at the end.

    On Linux as far as the kernel grants it, see `describe_containment`: Landlock lets it read only Python's and the
    system's libraries and write only its folder (kernels before 6.2: it can also empty a library file that this user
    owns); seccomp, on x86_64 and aarch64, refuses processes, threads, sockets, signals to others and administration,
    and ignores changes of a file's mode, owner and times; namespaces hide network and other processes.

    What it does not stop: whether a file exists, and its size, can be asked for. Without Landlock files are read and
    written wherever this user may; without seccomp and namespaces the network and this user's processes are reached,
    and root may fork. Code that sets out to deceive can pass: by objects that equal everything, by changing what its
    tests call, by a trace function that makes the code which runs it jump, or with `ctypes` in the process's memory.
    This guards against accidents and a model's shortcuts; put a container or a virtual machine around hostile code.

    Raises:
      OSError: the interpreter cannot be started, or ended before the program began.
    """
    secret = secrets.token_hex(16).encode()
    limits = {"RLIMIT_CPU": math.ceil(timeout) + 1, "RLIMIT_AS": memory_mb << 20, "RLIMIT_FSIZE": FILE}
    limits |= {"RLIMIT_NPROC": 0, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 64}
    heard = _run({"program": program, "limits": limits, "layers": LAYERS, **_places()}, secret, timeout)
    if heard.stopped is not None:
        return heard.stopped
    last = heard.printed.decode(errors="replace").strip().splitlines()[-1:]
    if not heard.said.startswith(STARTED):
        raise OSError(": ".join(["the sandbox's interpreter ended before the program began", *last]))
    begin = STARTED + secret
    if heard.said.startswith(begin) and heard.said.endswith(END):
        kind, _, message = heard.said[len(begin) : -len(END)].decode().partition(" ")
        return Outcome(kind, f"needs more than {memory_mb} MiB" if kind == "memory" else " ".join(message.split()))
    return Outcome("runtime_error", ": ".join(["ended before its last line", *last]))


def run_many(
    programs: Sequence[str], *, timeout: float = 10.0, memory_mb: int = 512, workers: int | None = None
) -> list[Outcome]:
    """Runs programs side by side, `workers` at a time (None: one for each CPU of this process); outcomes in order.

    Raises:
      OSError: as `run_python`.
    """
    with ThreadPoolExecutor(workers or usable_cpus()) as pool:
        return list(pool.map(functools.partial(run_python, timeout=timeout, memory_mb=memory_mb), programs))


def usable_cpus() -> int:
    """How many CPUs this process may use: a job often has a few of a machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def describe_containment() -> str:
    """One line for logs: which layers this machine grants, as a program finds them.

    Raises:
      OSError: as `run_python`.
    """
    probe = """
import ctypes, os
found = ["namespaces"] if os.getpid() == 1 else []
try:
    os.listdir("..")
except PermissionError:
    found.append("landlock")
if hasattr(ctypes.CDLL(None), "prctl") and ctypes.CDLL(None).prctl(21, 0, 0, 0, 0) == 2:
    found.append("seccomp")
raise RuntimeError(" ".join(found))
"""
    granted = run_python(probe, timeout=STARTUP).message.partition("RuntimeError:")[2].split()
    missing = [layer for layer in ("namespaces", "landlock", "seccomp") if layer not in granted]
    return f"sandbox: {', '.join(['limits', *granted])}" + (f"; not here: {', '.join(missing)}" if missing else "")


@functools.cache
def _places() -> dict[str, list[str]]:
    """Where modules are installed, and all that may be read: with them the system's libraries and what those look up.

    A virtual environment often lies in a repository, so of `sys.prefix` only the libraries are named. `-S` spares the
    child the files that tell `site` of more places; editable installs are not found.
    """
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, "/", "/usr", "/usr/local"}
    shared = {os.path.join(prefix, name) for prefix in prefixes for name in ("lib", "lib64")}
    libraries = site.getsitepackages()
    used = {"/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/dev/urandom"}
    return {"libraries": libraries, "readable": sorted({*shared, *libraries, os.path.dirname(os.__file__), *used})}


@functools.cache
def _child_code():
    return compile(_CHILD.read_text(encoding="utf-8"), _CHILD.name, "exec")


def _run(job: dict[str, object], secret: bytes, timeout: float) -> _Heard:
    """Starts the child, hands it the job and listens; nothing of it is left afterwards."""
    with contextlib.ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="program-")
        stack.callback(_remove, folder)
        report, writable = os.pipe()
        stack.callback(os.close, report)
        try:
            child = _start(folder, writable)
        finally:
            os.close(writable)
        stack.callback(_end, child)
        job |= {"report": writable, "secret": len(secret)}
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(marshal.dumps((_child_code(), job)) + secret)
        return _listen(report, child.stdout.fileno(), folder, timeout)


def _start(folder: str, report: int) -> subprocess.Popen:
    # Numerical libraries would start a thread per core while they are imported, and fail.
    environment = {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _BEGIN]
    out = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, env=environment, pass_fds=(report,), start_new_session=True, **out)


def _end(child: subprocess.Popen) -> None:
    # Asked before it is killed, the outer process can collect the one inside the namespace, which else stays a zombie
    # wherever the first process of a container collects none.
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()


def _listen(report: int, output: int, folder: str, timeout: float) -> _Heard:
    """Reads until there is a report or the program has to be stopped: for its time or its files."""
    said, printed, look, deadline = b"", b"", math.inf, time.monotonic() + STARTUP
    with selectors.DefaultSelector() as selector:
        selector.register(report, selectors.EVENT_READ)
        selector.register(output, selectors.EVENT_READ)
        while (now := time.monotonic()) < deadline:
            if now >= look:
                if excess := _excess(folder):
                    return _Heard(said, printed, Outcome("runtime_error", excess))
                look = now + LOOK
            for key, _ in selector.select(min(deadline, look) - now):
                chunk = os.read(key.fd, 1 << 16)
                if key.fd == output:
                    printed = (printed + chunk)[-KEPT:]
                    if not chunk:
                        selector.unregister(output)
                    continue
                if chunk and not said:  # the program begins
                    now = time.monotonic()
                    look, deadline = now + LOOK, now + timeout
                said += chunk
                if not chunk or END in chunk or len(said) > KEPT:
                    return _Heard(said, printed, None)
    if not said:
        raise OSError(f"the sandbox's interpreter did not start within {STARTUP:g} s")
    return _Heard(said, printed, Outcome("timeout", f"still running after {timeout:g} s"))


def _excess(folder: str) -> str | None:
    """What is too much about the files in a folder; None if nothing is."""
    space, files, pending = 0, 0, [folder]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    files += 1
                    space += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    if space > FOLDER:
                        return f"wrote more than {FOLDER >> 20} MiB"
                    if files > FILES:
                        return f"made more than {FILES} files"
        except FileNotFoundError:
            continue  # it was removed meanwhile
        except OSError as error:
            return f"made files that cannot be counted ({error.strerror})"
    return None


def _remove(folder: str) -> None:
    """Removes a folder; what is deep inside moves up first, as nesting can be too deep for recursion and for paths."""
    name, number = os.path.join(folder, secrets.token_hex(8)), itertools.count()
    with contextlib.suppress(OSError):
        while entries := [*os.scandir(folder)]:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry)
                    continue
                for inner in _opened(entry):
                    if inner.is_dir(follow_symlinks=False):
                        _opened(inner)
                    os.rename(inner, f"{name}-{next(number)}")
                os.rmdir(entry)
        os.rmdir(folder)


def _opened(folder: os.DirEntry) -> list[os.DirEntry]:
    os.chmod(folder, 0o700)  # a program's folders can have any mode
    return [*os.scandir(folder)]
