"""The sandbox: how honest programs end, and what a dishonest one does not get away with."""

import os
import sys
import time

import pytest

from unisd_jax import sandbox
from unisd_jax.sandbox import Outcome, run_python

LONG = 60.0  # a limit that a correct run never meets, however busy the machine


def loose(program: str) -> str:
    """The child without the kernel's namespaces, as on a machine that does not grant them."""
    return program.replace('if not hasattr(libc, "unshare")', "if True")


@pytest.fixture(params=["granted", "without_namespaces"])
def namespaces(request, monkeypatch):
    if request.param == "without_namespaces":
        assert loose(sandbox._CHILD) != sandbox._CHILD
        monkeypatch.setattr(sandbox, "_CHILD", loose(sandbox._CHILD))
    return request.param


def isolated() -> bool:
    """Whether the kernel lets a process have its own namespaces here."""
    return run_python("import os\nassert os.getpid() == 1", timeout=LONG).kind == "pass"


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


def test_it_leaves_no_files_and_no_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_python("pass", timeout=LONG)
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    run_python("open('a', 'w').write('x')", timeout=LONG)
    run_python("while True: pass", timeout=0.2)
    assert list(tmp_path.iterdir()) == []
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


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

TO_ALL_DESCRIPTORS = """
import os
for descriptor in range(64):
    try:
        os.write(descriptor, {})
    except OSError:
        pass
"""


@pytest.mark.parametrize(
    "program", ["while True: pass", CATCH_ALL, "import time\ntime.sleep(100)", "while True: print('x' * 10_000)"]
)
def test_what_does_not_end_is_a_timeout(namespaces, program):
    start = time.monotonic()
    assert run_python(program, timeout=0.5) == Outcome("timeout", "still running after 0.5 s")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "quit()",
        "raise SystemExit",
        "import os\nos._exit(0)",
        "import ctypes\nctypes.string_at(0)",
        "raise KeyboardInterrupt",
        "class E(Exception):\n    def __str__(self):\n        raise SystemExit(0)\nraise E",
    ],
)
def test_an_end_before_the_last_line_is_no_pass(namespaces, program):
    assert run_python(program + "\nassert False", timeout=LONG).kind == "runtime_error"


@pytest.mark.parametrize(
    "program",
    [
        "print('pass')\nprint('pass', file=__import__('sys').stderr)\nraise SystemExit",
        # The report's own form, to every descriptor there may be.
        TO_ALL_DESCRIPTORS.format("b'pass\\0'") + "os._exit(0)",
        TO_ALL_DESCRIPTORS.format("b'pass' * 10**6"),
        "import os\nos.write = lambda fd, data: None\nimport sys\nsys.exit = os._exit = lambda *a: None\nassert False",
    ],
)
def test_a_forged_report_is_no_pass(namespaces, program):
    assert run_python(program, timeout=LONG).kind in ("runtime_error", "wrong_answer")


def test_the_secret_is_nowhere_it_would_be_found_at_once():
    program = """
import os, re, sys
text = " ".join([*sys.argv, *sys.orig_argv, *os.environ.values(), sys.stdin.read()])
text += " ".join(map(repr, vars(sys.modules["__main__"]).values()))
assert not re.search(r"\\b[0-9a-f]{32}\\b", text)
"""
    assert run_python(program, timeout=LONG) == Outcome("pass", "")


@pytest.mark.parametrize("program", ["x = [0] * 10**10", "x = []\nwhile True: x.append(' ' * 10**6)"])
def test_a_memory_bomb(program):
    assert run_python(program, timeout=LONG, memory_mb=200) == Outcome("memory", "needs more than 200 MiB")


def test_too_large_a_file_is_refused():
    outcome = run_python("open('x', 'w').write('x' * 10**8)", timeout=LONG)
    assert (outcome.kind, "File too large" in outcome.message) == ("runtime_error", True)


def test_the_callers_environment_is_not_seen(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    allowed = "{'OPENBLAS_NUM_THREADS', 'LC_CTYPE'}"  # ours, and the interpreter's own
    program = f"import os, sys\nassert set(os.environ) <= {allowed}, os.environ\nassert '/elsewhere' not in sys.path"
    assert run_python(program, timeout=LONG) == Outcome("pass", "")


def test_no_fork_and_no_thread():
    if not isolated() and os.getuid() == 0:
        pytest.skip("root without namespaces may fork, as the docstring says")
    assert run_python("import os\nos.fork()", timeout=LONG).kind == "runtime_error"
    assert run_python("import os\nos.system('true') and 1 / 0", timeout=LONG).kind == "runtime_error"
    assert run_python("import threading\nthreading.Thread(target=print).start()", timeout=LONG).kind == "runtime_error"


def test_no_network_and_no_other_process():
    if not isolated():
        pytest.skip("the kernel grants no namespaces here")
    outcome = run_python("import socket\nsocket.create_connection(('127.0.0.1', 9), 5)", timeout=LONG)
    assert "unreachable" in outcome.message
    parent = os.getpid()
    assert run_python(f"import os\nos.kill({parent}, 0)", timeout=LONG).message.startswith("line 2: ProcessLookupError")
    assert run_python(f"open('/proc/{parent}/environ').read()", timeout=LONG).kind == "runtime_error"


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the process in /proc")
def test_a_program_in_a_session_of_its_own_is_killed_too():
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    program = f"import ctypes, os, time\nname = {mark[-14:]!r}\nctypes.CDLL(None).prctl(15, name.encode())\n"
    program += "try:\n    os.setsid()\nexcept OSError:\n    pass\ntime.sleep(300)"
    assert run_python(program, timeout=1.0).kind == "timeout"
    deadline = time.monotonic() + 10
    while (alive := mark[-14:] in _names()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


def _names() -> set[str]:
    names = set()
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{number}/comm") as file:
                names.add(file.read().strip())
        except OSError:
            continue  # it ended meanwhile
    return names
