"""The sandbox: how honest programs end, and what a dishonest one does not get away with."""

import ctypes
import os
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time

import pytest

from unisd_jax import sandbox, sandbox_child
from unisd_jax.sandbox import Outcome, describe_containment, run_many, run_python

LONG = 60.0  # a limit that a correct run never meets, however busy the machine
LINUX = sys.platform == "linux"
GRANTED = describe_containment().partition(";")[0]


@pytest.fixture(params=["granted", "without_namespaces"])
def namespaces(request, monkeypatch):
    """Both kinds of machine: those that grant a process its own namespaces, and those that do not."""
    if request.param == "without_namespaces":
        keep(monkeypatch, *(layer for layer in sandbox.LAYERS if layer != "namespaces"))
    return request.param


@pytest.fixture
def unharmed(tmp_path, monkeypatch):
    """Afterwards the evaluator is as it was: nothing runs or lies about, and it has what it had."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = state()
    yield
    wait_until(lambda: running_in(tmp_path) == set())
    assert list(tmp_path.iterdir()) == []
    assert state() == before


def state():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    descriptors = set(os.listdir("/proc/self/fd")) if LINUX else None
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return environment, os.getcwd(), os.umask(os.umask(0o22)), handlers, descriptors, children()


def children():
    """Zombies included."""
    found = set()
    for number in filter(str.isdigit, os.listdir("/proc") if LINUX else ()):
        try:
            with open(f"/proc/{number}/stat") as file:
                if file.read().rpartition(")")[2].split()[1] == str(os.getpid()):
                    found.add(number)
        except OSError:
            continue  # it ended meanwhile
    return found


def running_in(folder):
    """The processes whose working directory is in `folder`, also when that is deleted."""
    found = set()
    for number in filter(str.isdigit, os.listdir("/proc") if LINUX else ()):
        try:
            if os.readlink(f"/proc/{number}/cwd").startswith(str(folder)):
                found.add(number)
        except OSError:
            continue
    return found


def wait_until(done, seconds=10):
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def keep(monkeypatch, *layers):
    monkeypatch.setattr(sandbox, "LAYERS", layers)


def needs(*layers):
    """Skips a test where the machine does not grant what it tests."""
    if missing := [layer for layer in layers if layer not in GRANTED]:
        pytest.skip(f"this machine grants no {' and no '.join(missing)}")


# --- honest programs ---


@pytest.mark.parametrize(
    ("program", "kind", "message"),
    [
        ("", "pass", ""),
        ("def f(x):\n    return x + 1\nassert f(1) == 2\n", "pass", ""),
        (
            "from __future__ import annotations\nimport math\nassert math.isclose(math.pi, 3.14159, abs_tol=1e-5)",
            "pass",
            "",
        ),
        ("assert __name__ == 'program'\nif __name__ == '__main__':\n    1 / 0", "pass", ""),
        ("print('é' * 1_000_000)", "pass", ""),
        (
            "import pickle\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\n"
            "assert pickle.loads(pickle.dumps(A(1))) == A(1)",
            "pass",
            "",
        ),
        ("import numpy\nassert numpy.ones((50, 50)).dot(numpy.ones(50)).sum() == 2500", "pass", ""),
        ("x = 1\nassert x == 2", "wrong_answer", "line 2: AssertionError:"),
        ("assert False, 'two\\nlines'", "wrong_answer", "line 1: AssertionError: two lines"),
        ("1 / 0", "runtime_error", "line 1: ZeroDivisionError: division by zero"),
        (
            "def f(n):\n    return f(n)\nf(1)",
            "runtime_error",
            "line 3: RecursionError: maximum recursion depth exceeded",
        ),
        ("input()", "runtime_error", "line 1: EOFError: EOF when reading a line"),
        ("def f(:", "syntax_error", "SyntaxError: invalid syntax (program.py, line 1)"),
        ("eval('1 +')", "runtime_error", "line 1: SyntaxError: invalid syntax (<string>, line 1)"),
    ],
)
def test_outcome(program, kind, message):
    assert run_python(program, timeout=LONG) == Outcome(kind, message)


@pytest.mark.parametrize("program", ["x = 1\0", "'\ud800'", "(" * 100_000])
def test_text_that_cannot_be_compiled_is_a_syntax_error(program):
    assert run_python(program, timeout=LONG).kind == "syntax_error"


def test_programs_do_not_see_each_other():
    assert run_python("import math\nmath.sqrt = None\nopen('left', 'w').close()", timeout=LONG).kind == "pass"
    assert run_python("import math, os\nassert math.sqrt(4) == 2 and not os.listdir()", timeout=LONG).kind == "pass"


def test_exit_is_there_and_can_be_caught():
    assert (
        run_python("try:\n    exit(3)\nexcept SystemExit as error:\n    assert error.code == 3", timeout=LONG).kind
        == "pass"
    )


def test_asyncio_copies_of_files_time_zones_and_timers_work(namespaces):
    program = """
import asyncio, datetime, os, random, shutil, signal, tempfile
async def three():
    await asyncio.sleep(0.01)
    return 3
assert asyncio.run(three()) == 3
with tempfile.TemporaryDirectory() as folder:
    with open(os.path.join(folder, "a"), "w") as file:
        file.write("text")
    shutil.copy2(os.path.join(folder, "a"), "b")
assert open("b").read() == "text" and os.listdir() == ["b"]
datetime.datetime.now().astimezone()
print("x", file=open(os.devnull, "w"))
fired = []
signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.01)
signal.pause()
signal.raise_signal(signal.SIGALRM)
assert len(fired) == 2
"""
    assert run_python(program, timeout=LONG) == Outcome("pass", "")


@pytest.mark.parametrize("layers", [(), ("namespaces",), ("landlock",), ("seccomp",), ("landlock", "seccomp")])
def test_programs_run_with_any_of_the_layers(layers, monkeypatch):
    keep(monkeypatch, *(layer for layer in layers if layer in sandbox.LAYERS))
    program = "import numpy\nopen('a', 'w').write('x')\nassert numpy.ones(3).sum() == 3 and open('a').read() == 'x'"
    assert run_python(program, timeout=LONG) == Outcome("pass", "")
    assert run_python("1 / 0", timeout=LONG).message == "line 1: ZeroDivisionError: division by zero"
    assert run_python("while True: pass", timeout=0.3).kind == "timeout"


# --- many, and the sandbox's own failures ---


def test_many_programs_keep_their_order(unharmed):
    kinds = ["pass", "wrong_answer", "runtime_error", "syntax_error"] * 4
    text = {"pass": "", "wrong_answer": "assert 0", "runtime_error": "1 / 0", "syntax_error": "("}
    assert [outcome.kind for outcome in run_many([text[kind] for kind in kinds], timeout=LONG, workers=4)] == kinds
    assert run_many([]) == []


@pytest.mark.skipif(os.name != "posix", reason="counts descriptors as POSIX has them")
def test_programs_side_by_side_do_not_share_descriptors():
    program = """
import os
found = []
for number in range(10_000):
    try:
        os.fstat(number)
        found.append(number)
    except OSError:
        pass
assert len(found) == 4, found  # the standard ones and the report
"""
    assert set(run_many([program] * 24, timeout=LONG, workers=8)) == {Outcome("pass", "")}


def test_the_start_of_the_interpreter_does_not_count(monkeypatch):
    monkeypatch.setattr(sandbox, "_BEGIN", "import time\ntime.sleep(1)\n" + sandbox._BEGIN)
    assert run_python("pass", timeout=0.5).kind == "pass"


def test_an_interpreter_that_does_not_start_is_no_failure_of_the_program(monkeypatch, unharmed):
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_BEGIN", "raise ValueError('broken')")
        with pytest.raises(OSError, match="ended before the program began: ValueError: broken"):
            run_python("pass")
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "STARTUP", 0.2)
        patch.setattr(sandbox, "_BEGIN", "import time\ntime.sleep(60)")
        with pytest.raises(OSError, match="did not start within 0.2 s"):
            run_python("pass")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        run_python("pass")


def test_containment_is_described(monkeypatch):
    line = describe_containment()
    assert line.startswith("sandbox: limits") and "\n" not in line
    keep(monkeypatch)
    assert describe_containment.__wrapped__() == "sandbox: limits; not here: namespaces, landlock, seccomp"


# --- attacks ---

CATCH_ALL = """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
"""

TIMERS = """
import signal
def again(*_):
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    raise TimeoutError
signal.signal(signal.SIGALRM, again)
signal.alarm(1)
signal.setitimer(signal.ITIMER_REAL, 0.01)
while True:
    try:
        while True:
            pass
    except TimeoutError:
        pass
"""

FORK_BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""

TO_ALL_DESCRIPTORS = """
import os
for descriptor in range(64):
    try:
        os.write(descriptor, {})
    except OSError:
        pass
"""

SAME_REPORT = """
import os
copy = os.open("forged", os.O_CREAT | os.O_RDWR)
for descriptor in {*range(64)} - {copy}:
    os.dup2(copy, descriptor)
"""

PATCHED = """
import builtins, os, sys
builtins.AssertionError = builtins.MemoryError = builtins.BaseException = builtins.Exception = OSError
builtins.exec = builtins.compile = builtins.type = lambda *a, **k: None
os.write = os._exit = sys.exit = lambda *a: None
sys.modules.clear()
sys.stdin = sys.stdout = sys.stderr = None
assert False
"""

REPLACED_VERDICT = """
import sys
class Anything(bytes):
    def __radd__(self, left):
        return left[:32] + b"pass" + bytes(1)
    __add__ = __rmod__ = __radd__
frame = sys._getframe()
while frame := frame.f_back:
    for name in frame.f_globals:
        if name not in ("attempt", "__builtins__"):
            frame.f_globals[name] = Anything() if name.isupper() else lambda *_: Anything(b"pass")
assert False
"""

# Name: program, how it ends.
ATTACKS = {
    "infinite_loop": ("while True: pass", "timeout"),
    "swallows_the_timeout": (CATCH_ALL, "timeout"),
    "timers": (TIMERS, "timeout"),
    "sleeps": ("import time\ntime.sleep(100)", "timeout"),
    "stops_itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass", "timeout"),
    "output_flood": ("while True: print('x' * 10_000)", "timeout"),
    "error_flood": ("import sys\nwhile True: sys.stderr.write('x' * 10_000)", "timeout"),
    "raw_flood": ("import os\nwhile True: os.write(1, b'x' * 100_000)", "timeout"),
    "fork_bomb": (FORK_BOMB, "timeout"),
    "fork": ("import os\nos.fork()", "runtime_error"),
    "shell": ("import os\nassert os.system('true') == 0", "wrong_answer"),
    "exec": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'exit 0'])", "runtime_error"),
    "subprocess": ("import subprocess\nsubprocess.run(['true'])", "runtime_error"),
    "threads": ("import threading\nwhile True: threading.Thread(target=input).start()", "runtime_error"),
    "memory_at_once": ("x = [0] * 10**10", "memory"),
    "memory_in_large_pieces": ("x = []\nwhile True: x.append(' ' * 10**6)", "memory"),
    "memory_in_small_pieces": ("x = []\nwhile True: x.append([])", "memory"),
    "file_of_10_gb": ("f = open('x', 'wb')\nfor _ in range(10**4): f.write(b'x' * 10**6)", "runtime_error"),
    "sparse_file_of_10_gb": ("open('x', 'wb').truncate(10**10)", "runtime_error"),
    "many_large_files": ("i = 0\nwhile True:\n    i += 1\n    open(f'{i}', 'wb').write(b'x' * 2**24)", "runtime_error"),
    "many_small_files": ("i = 0\nwhile True:\n    i += 1\n    open(f'{i}', 'wb').close()", "runtime_error"),
    "nested_folders": ("import os\nwhile True:\n    os.mkdir('d' * 99)\n    os.chdir('d' * 99)", "runtime_error"),
    "sys_exit": ("import sys\nsys.exit(0)", "runtime_error"),
    "quit": ("quit()", "runtime_error"),
    "system_exit": ("raise SystemExit", "runtime_error"),
    "os_exit": ("import os\nos._exit(0)", "runtime_error"),
    "atexit": ("import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit", "runtime_error"),
    "interrupt": ("raise KeyboardInterrupt", "runtime_error"),
    "exit_in_the_message": ("class E(Exception):\n    def __str__(self): exit(0)\nraise E", "runtime_error"),
    "null_pointer": ("import ctypes\nctypes.string_at(0)", "runtime_error"),
    "abort": ("import os\nos.abort()", "runtime_error"),
    "recursion": ("def f(n):\n    return f(n)\nf(1)", "runtime_error"),
    "recursion_in_c": (
        "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)", "runtime_error",
    ),
    "recursion_in_pickle": (
        "import pickle, sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\npickle.dumps(x)",
        "runtime_error",
    ),
    "recursion_in_a_method": (
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __eq__(self, x): return self == x\nA() == A()",
        "runtime_error",
    ),
    "patched_checker": (PATCHED, "wrong_answer"),
    "patched_by_frames": (
        "import sys\nf = sys._getframe()\nwhile f := f.f_back:\n    f.f_globals.clear()\nassert False", "runtime_error",
    ),
    "replaced_verdict": (REPLACED_VERDICT, "wrong_answer"),
    "printed_verdict": ("print('pass\\0', flush=True)\nraise SystemExit", "runtime_error"),
    # The report's own form, to every descriptor there may be.
    "forged_report": (TO_ALL_DESCRIPTORS.format("b'pass\\0'") + "os._exit(0)", "runtime_error"),
    "flooded_report": (TO_ALL_DESCRIPTORS.format("b'pass' * 10**6"), "runtime_error"),
    "closed_descriptors": ("import os\nos.closerange(0, 64)", "runtime_error"),
    "replaced_descriptors": (SAME_REPORT, "runtime_error"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_contained(name, namespaces, unharmed):
    program, kind = ATTACKS[name]
    if LINUX and name in ("fork", "fork_bomb", "shell", "exec", "subprocess", "threads"):
        needs("seccomp")
    start = time.monotonic()
    outcome = run_python(program, timeout=0.7 if kind == "timeout" else LONG, memory_mb=200)
    assert outcome.kind == kind, outcome
    if kind == "timeout":
        assert outcome.message == "still running after 0.7 s"
        assert time.monotonic() - start < 20


def test_unlimited_recursion_ends_by_the_limit_of_memory(unharmed):
    program = "import sys\nsys.setrecursionlimit(10**9)\ndef f(n):\n    return f(n)\nf(1)"
    assert run_python(program, timeout=LONG, memory_mb=100).kind in ("memory", "runtime_error")


def test_the_excess_is_named():
    assert run_python("x = [0] * 10**10", timeout=LONG, memory_mb=200).message == "needs more than 200 MiB"
    assert "File too large" in run_python("open('x', 'w').write('x' * 10**8)", timeout=LONG).message
    assert run_python(ATTACKS["many_large_files"][0], timeout=LONG).message == "wrote more than 64 MiB"
    assert run_python(ATTACKS["many_small_files"][0], timeout=LONG).message == "made more than 1000 files"


def test_folders_without_rights_are_removed(namespaces, unharmed):
    program = (
        "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\nos.umask(0o777)\nos.mkdir('a/d')\nos.mkdir('e')"
    )
    assert run_python(program, timeout=LONG) == Outcome("pass", "")


def test_links_are_not_followed_when_files_are_removed(tmp_path, monkeypatch):
    keep(monkeypatch)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    program = f"import os\nos.mkdir('a')\nos.symlink({str(kept)!r}, 'b')\nos.symlink({str(kept)!r}, 'a/c')"
    assert run_python(program, timeout=LONG) == Outcome("pass", "")
    assert (kept / "file").read_text() == "x"


def test_the_secret_is_nowhere_it_would_be_found():
    program = r"""
import gc, os, re, sys
secret = re.compile(r"\b[0-9a-f]{32}\b")
text = " ".join([*sys.argv, *sys.orig_argv, *os.environ.values(), sys.stdin.read()])
frame, pending = sys._getframe(), gc.get_objects()
while frame := frame.f_back:
    text += repr(frame.f_locals) + repr(frame.f_globals)
    pending += [frame, frame.f_locals, frame.f_globals, *gc.get_referents(frame)]
seen = set()
while pending:
    thing = pending.pop()
    if id(thing) in seen or thing is text or thing is seen or thing is pending:
        continue
    seen.add(id(thing))
    if isinstance(thing, (str, bytes)):
        text += thing if isinstance(thing, str) and len(thing) < 100 else repr(thing) if len(thing) < 100 else ""
    else:
        pending += gc.get_referents(thing)
assert not secret.search(text), secret.search(text)
"""
    assert run_python(program, timeout=LONG) == Outcome("pass", "")


def test_the_callers_environment_is_not_seen(monkeypatch, namespaces):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    allowed = "{'OPENBLAS_NUM_THREADS', 'LC_CTYPE'}"  # ours, and the interpreter's own
    program = f"import os, sys\nassert set(os.environ) <= {allowed}, os.environ\nassert '/elsewhere' not in sys.path"
    assert run_python(program, timeout=LONG) == Outcome("pass", "")


@pytest.mark.parametrize(
    "action",
    [
        "open('/etc/passwd')",
        "open({repository!r} + '/pyproject.toml')",
        "os.listdir({repository!r})",
        "os.listdir(os.path.expanduser('~')) if os.path.isdir(os.path.expanduser('~')) else open('/etc/passwd')",
        "os.listdir('/')",
        "os.listdir('..')",
        "open('/proc/{parent}/environ')",
        "open('/proc/{parent}/mem')",
        "open('/proc/self/environ')",
        "open({outside!r})",
        "open({outside!r}, 'a')",
        "open({outside!r} + '-new', 'w')",
        "os.truncate({outside!r}, 0)",
        "os.remove({outside!r})",
        "os.rename({outside!r}, 'here')",
        "os.link({outside!r}, 'here')",
        "os.symlink({outside!r}, 'here') or open('here')",
        "os.mkdir({outside!r} + '-new')",
        "open('/dev/shm/new', 'w')",
        "open('here', 'w').close() or os.rename('here', {outside!r})",
        "os.mknod('device', 0o60600, 0)",
        "os.rmdir(os.getcwd())",
    ],
)
def test_files_outside_are_neither_read_nor_written(action, tmp_path, namespaces):
    needs("landlock", "seccomp")
    outside = tmp_path / "outside"
    outside.write_text("gold")
    names = {"repository": os.path.dirname(sandbox.__file__) + "/..", "parent": os.getpid(), "outside": str(outside)}
    outcome = run_python(f"import os\n{action.format(**names)}", timeout=LONG)
    assert outcome.kind == "runtime_error" and "PermissionError" in outcome.message or "Errno 18" in outcome.message
    assert outside.read_text() == "gold" and list(tmp_path.iterdir()) == [outside]


def test_modes_and_times_of_files_outside_stay(tmp_path, namespaces):
    needs("seccomp")
    path = tmp_path / "outside"
    path.write_text("x")
    before = path.stat()
    program = f"import os\nos.chmod({str(path)!r}, 0)\nos.utime({str(path)!r}, (0, 0))\nos.chown({str(path)!r}, 1, 1)"
    assert run_python(program, timeout=LONG) == Outcome("pass", "")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(before.st_mode)
    assert path.stat()[:9] == before[:9]


@pytest.mark.parametrize(
    "action",
    [
        "socket.create_connection(('127.0.0.1', 9), 5)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        "socket.socket(socket.AF_UNIX).connect('/run/any')",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "socket.socket().bind(('127.0.0.1', 0))",
    ],
)
def test_no_network(action, namespaces):
    needs("seccomp")
    outcome = run_python(f"import socket\n{action}", timeout=LONG)
    assert outcome == Outcome("runtime_error", "line 2: PermissionError: [Errno 1] Operation not permitted")


@pytest.mark.parametrize(
    "action",
    [
        "os.kill({parent}, 0)",
        "os.kill(os.getppid(), signal.SIGKILL)",
        "os.killpg(0, signal.SIGKILL)",
        "os.kill(-1, signal.SIGKILL)",
        "os.kill({parent} + 2**32 - 2**32, signal.SIGTERM)",
        "os.pidfd_open({parent})",
        "fcntl.fcntl(0, fcntl.F_SETOWN, {parent})",
        "os.setpriority(os.PRIO_PROCESS, {parent}, 19)",
        "resource.prlimit({parent}, resource.RLIMIT_NOFILE, (9, 9))",
    ],
)
def test_other_processes_are_out_of_reach(action, namespaces):
    needs("seccomp")
    text = f"import fcntl, os, resource, signal\n{action.format(parent=os.getpid())}"
    outcome = run_python(text, timeout=LONG)
    assert outcome.kind == "runtime_error" and outcome.message.startswith("line 2: PermissionError"), outcome


@pytest.mark.skipif(not LINUX, reason="looks for the process in /proc")
def test_a_program_in_a_session_of_its_own_is_killed_too(namespaces):
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    program = f"import ctypes, os, time\nname = {mark[-14:]!r}\nctypes.CDLL(None).prctl(15, name.encode())\n"
    program += "try:\n    os.setsid()\nexcept OSError:\n    pass\ntime.sleep(300)"
    assert run_python(program, timeout=1.0).kind == "timeout"
    wait_until(lambda: mark[-14:] not in _names())


def _names() -> set[str]:
    names = set()
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{number}/comm") as file:
                names.add(file.read().strip())
        except OSError:
            continue  # it ended meanwhile
    return names


@pytest.mark.skipif(not LINUX, reason="only Linux tells a process that its parent is dead")
@pytest.mark.parametrize("layers", [sandbox.LAYERS, sandbox.LAYERS[1:]])
def test_a_program_does_not_survive_the_evaluator(layers, tmp_path):
    undo = "import ctypes, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\ntime.sleep(300)"
    text = "import tempfile\nfrom unisd_jax import sandbox\n"
    text += f"tempfile.tempdir, sandbox.LAYERS = {str(tmp_path)!r}, {layers}"
    text += f"\nsandbox.run_python({undo!r}, timeout=300)"
    evaluator = subprocess.Popen([sys.executable, "-c", text])
    try:
        wait_until(lambda: running_in(tmp_path), LONG)
        time.sleep(0.5)
    finally:
        evaluator.kill()
        evaluator.wait()
    wait_until(lambda: not running_in(tmp_path))


# --- one layer by itself ---


def test_namespaces_alone(monkeypatch):
    needs("namespaces")
    keep(monkeypatch, "namespaces")
    outcome = run_python("import socket\nsocket.create_connection(('127.0.0.1', 9), 5)", timeout=LONG)
    assert "unreachable" in outcome.message
    parent = os.getpid()
    assert run_python(f"import os\nos.kill({parent}, 0)", timeout=LONG).message.startswith("line 2: ProcessLookupError")
    assert run_python(f"open('/proc/{parent}/environ').read()", timeout=LONG).kind == "runtime_error"
    assert run_python("import os\nos.fork()", timeout=LONG).kind == "runtime_error"
    assert run_python("import threading\nthreading.Thread(target=print).start()", timeout=LONG).kind == "runtime_error"


def test_landlock_alone(monkeypatch):
    needs("landlock")
    keep(monkeypatch, "landlock")
    assert "PermissionError" in run_python("open('/etc/passwd')", timeout=LONG).message
    assert run_python("open('a', 'w').close()", timeout=LONG).kind == "pass"


def test_seccomp_alone(monkeypatch):
    needs("seccomp")
    keep(monkeypatch, "seccomp")
    assert "PermissionError" in run_python("import os\nos.fork()", timeout=LONG).message
    assert run_python("open('/etc/passwd')", timeout=LONG).kind == "pass"


class Kernel:
    """Stands in for the C library: answers as a kernel with this version of Landlock, and keeps what it was given."""

    def __init__(self, version=0):
        self.version, self.given, self.filter = version, [], []

    def syscall(self, number, attributes, *rest):
        if number == sandbox_child.CREATE_RULESET and attributes is None:
            return self.version
        self.given.append((number, rest[1] if number == sandbox_child.ADD_RULE else attributes))
        return os.open("/", os.O_RDONLY) if number == sandbox_child.CREATE_RULESET else 0

    def prctl(self, option, mode, program, *rest):
        length, address = struct.unpack("HP", program)
        self.filter = list(struct.iter_unpack("HBBI", ctypes.string_at(address, 8 * length)))

    def answer(self, machine, number, *arguments):
        """What the filter says to a system call."""
        data = struct.pack("=iIQ6Q", number, machine, 0, *arguments, *[0] * (6 - len(arguments)))
        position = value = 0
        while True:
            operation, if_true, if_false, operand = self.filter[position]
            position += 1
            if operation == 0x20:
                value = struct.unpack_from("=I", data, operand)[0]
            elif operation == 0x54:
                value &= operand
            elif operation == 0x06:
                return operand
            else:
                position += if_true if (value == operand if operation == 0x15 else value >= operand) else if_false


@pytest.mark.skipif(not LINUX, reason="Landlock is Linux's")
@pytest.mark.parametrize(("version", "bits", "network"), [(1, 13, 0), (2, 14, 0), (3, 15, 0), (4, 15, 3), (7, 16, 3)])
def test_old_versions_of_landlock_are_asked_for_what_they_know(version, bits, network):
    kernel = Kernel(version)
    sandbox_child.confine(kernel, ["/lib", "/dev/urandom", "/nowhere"])
    (_, attributes), *rules, (_, _) = kernel.given
    assert struct.unpack("QQQ", attributes)[:2] == ((1 << bits) - 1, network)
    assert len(rules) == 4
    assert all(struct.unpack("=Qi", rule)[0] & ~((1 << bits) - 1) == 0 for _, rule in rules)
    nothing = Kernel(-1)
    sandbox_child.confine(nothing, [])
    assert nothing.given == []


@pytest.mark.skipif(not LINUX, reason="seccomp is Linux's")
@pytest.mark.parametrize("machine", sandbox_child.MACHINES)
def test_the_filter_of_each_machine(machine, monkeypatch):
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "", "", "", machine)))
    kernel, (column, name) = Kernel(), sandbox_child.MACHINES[machine]
    sandbox_child.refuse(kernel)
    child = sandbox_child
    for calls, answer in ((child.REFUSED, child.REFUSE), (child.IGNORED, child.IGNORE)):
        for numbers in calls.values():
            if numbers[column] is not None:
                assert kernel.answer(name, numbers[column]) == answer
    kill, limits, pair, control = (
        child.CONDITIONAL[call][0][column] for call in ("kill", "prlimit64", "socketpair", "fcntl")
    )
    for number, arguments, answer in (
        (kill, (os.getpid(), 9), child.ALLOW), (kill, (os.getppid(), 9), child.REFUSE), (kill, (0, 9), child.REFUSE),
        (limits, (0,), child.ALLOW), (limits, (os.getppid(),), child.REFUSE),
        (pair, (1, 0x80801), child.ALLOW), (pair, (1, 0x80802), child.REFUSE),
        (control, (3, 8), child.REFUSE), (control, (3, 1), child.ALLOW),
    ):  # fmt: skip
        assert kernel.answer(name, number, *arguments) == answer
    assert kernel.answer(name, (0, 63)[column]) == child.ALLOW  # read
    assert kernel.answer(name, 1 << 30) == child.REFUSE
    assert kernel.answer(0x40000003, 1) == child.KILL


@pytest.mark.skipif(not LINUX, reason="seccomp is Linux's")
def test_other_machines_get_no_filter(monkeypatch):
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "", "", "", "riscv64")))
    kernel = Kernel()
    sandbox_child.refuse(kernel)
    assert kernel.filter == []
