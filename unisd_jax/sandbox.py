"""Runs a Python program that a model wrote, in a process of its own that is limited and killed from outside."""

import contextlib
import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from typing import Literal, NamedTuple

Kind = Literal["pass", "wrong_answer", "runtime_error", "syntax_error", "timeout", "memory"]
FAILURES = ("wrong_answer", "runtime_error", "syntax_error", "memory")
KEPT = 4000  # bytes of output and of report that are kept; the rest is read and forgotten
END = b"\0"

# The child. It sets its own limits: a hook of `subprocess` would fork this process, which JAX has filled with threads.
_CHILD = r'''
import ctypes, json, os, resource, signal, sys, types

NEW_USER, NEW_NETWORK, NEW_PROCESSES, PARENT_DEATH_SIGNAL = 0x10000000, 0x40000000, 0x20000000, 1

def isolate():
    """No network, no view of other processes, rights of root dropped; does nothing where the kernel forbids it."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "unshare"):
        return
    if libc.unshare(NEW_USER | NEW_NETWORK | NEW_PROCESSES) and libc.unshare(NEW_NETWORK | NEW_PROCESSES):
        return
    if child := os.fork():  # only a child is inside the new process namespace; all in it die with it
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)
    libc.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    # Once the first process of a namespace has ended, the kernel refuses any other: no fork, even for root.
    if not libc.unshare(NEW_PROCESSES):
        if not os.fork():
            os._exit(0)
        os.wait()

def attempt(program):
    try:
        code = compile(program, "program.py", "exec", dont_inherit=True)
    except Exception as error:
        return "syntax_error", error
    module = sys.modules["program"] = types.ModuleType("program")
    try:
        exec(code, module.__dict__)
    except AssertionError as error:
        return "wrong_answer", error
    except MemoryError as error:
        return "memory", error
    except BaseException as error:
        return "runtime_error", error
    return "pass", None

def describe(error):
    inside = error.__traceback__.tb_next
    return f"{f'line {inside.tb_lineno}: ' if inside else ''}{type(error).__name__}: {error}"[:500].replace("\0", " ")

def main():
    job, write, leave = json.load(sys.stdin), os.write, os._exit
    isolate()
    for name, value in job["limits"].items():
        limit = getattr(resource, name, None)
        try:
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, value))
        except (OSError, TypeError, ValueError):
            pass  # this system has no such limit
    kind, error = attempt(job["program"])
    said = job["nonce"] if error is None else f"{kind} {'' if kind == 'memory' else describe(error)}"
    write(job["report"], said.encode(errors="replace") + b"\0")
    leave(error is not None)

main()
'''


class Outcome(NamedTuple):
    """How a program ended and, unless it passed, one line on why."""

    kind: Kind
    message: str


def run_python(program: str, *, timeout: float = 10.0, memory_mb: int = 512) -> Outcome:
    """Runs `program` as a module named "program"; it passes if its last line is reached within `timeout` seconds.

    A failed assertion is a wrong answer; any other end before the last line, `sys.exit(0)` included, is an error. The
    program runs in a fresh isolated interpreter and an empty temporary directory, with nothing of the caller's
    environment, without input, network, threads or further processes, with limits on time, memory and file size; its
    output is discarded. Linux namespaces shut off network and other processes, where the kernel grants them.

    What it does not stop: the program reads and writes files wherever this user may; without namespaces it also reaches
    the network and this user's processes, and root may fork. Code that sets out to deceive can pass: by objects that
    equal everything, or by searching the interpreter for the secret that reports the end. This guards against accidents
    and against a model's shortcuts; put a container or a virtual machine around hostile code.

    Raises:
      OSError: the interpreter cannot be started.
    """
    nonce = secrets.token_hex(16)
    limits = {"RLIMIT_CPU": math.ceil(timeout) + 1, "RLIMIT_AS": memory_mb << 20, "RLIMIT_FSIZE": 16 << 20}
    limits |= {"RLIMIT_NPROC": 0, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 64}
    said, printed, late = _run({"program": program, "nonce": nonce, "limits": limits}, timeout)
    if said == nonce.encode() + END:
        return Outcome("pass", "")
    if late:
        return Outcome("timeout", f"still running after {timeout:g} s")
    kind, _, message = said.removesuffix(END).decode(errors="replace").partition(" ")
    if kind == "memory":
        return Outcome("memory", f"needs more than {memory_mb} MiB")
    if kind in FAILURES and said.endswith(END):
        return Outcome(kind, " ".join(message.split()))
    last = printed.decode(errors="replace").strip().splitlines()[-1:]
    return Outcome("runtime_error", ": ".join(["ended before its last line", *last]))


def _run(job: dict[str, object], timeout: float) -> tuple[bytes, bytes, bool]:
    """Starts the child, hands it the job and listens; nothing of it is left afterwards."""
    report, writable = os.pipe()
    with (
        tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder,
        open(report, "rb", buffering=0),
    ):
        try:
            child = _start(folder, writable)
        finally:
            os.close(writable)
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(json.dumps(job | {"report": writable}).encode())
            return _listen(report, child.stdout.fileno(), time.monotonic() + timeout)
        finally:
            _end(child)


def _start(folder: str, report: int) -> subprocess.Popen:
    # Numerical libraries would start a thread per core while they are imported, and fail.
    environment = {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-B", "-X", "utf8", "-c", _CHILD]
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


def _listen(report: int, output: int, deadline: float) -> tuple[bytes, bytes, bool]:
    """What came over the report pipe, the end of the output, and whether the deadline passed before the report."""
    said, printed = b"", b""
    with selectors.DefaultSelector() as selector:
        selector.register(report, selectors.EVENT_READ)
        selector.register(output, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, 1 << 16)
                if key.fd == output:
                    printed = (printed + chunk)[-KEPT:]
                    if not chunk:
                        selector.unregister(output)
                    continue
                said += chunk
                if not chunk or END in chunk or len(said) > KEPT:
                    return said, printed, False
    return said, printed, True
