"""Runs a program for another process and ends it, with all that it started, once that process is gone or says so.

`python -I -S supervise.py PARENT GRACE PROGRAM [ARGUMENT ...]`, as the leader of a process group of its own: PARENT is
the process it works for, its parent. Needs nothing but Python, because it must outlive whatever goes wrong there.
"""

import ctypes
import os
import signal
import sys
import time

PR_SET_CHILD_SUBREAPER = 36  # of Linux, from <linux/prctl.h>


def main(parent: int, grace: float, command: list[str]) -> int:
    """Runs `command` until it ends, SIGTERM comes or `parent` is gone; returns its exit status as shells give it.

    Then the whole group gets SIGTERM and, where something is left of it after `grace` seconds, SIGKILL: that ends this
    process as well. Elsewhere than on Linux only `command` itself is waited for.
    """
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: asked.append(number))
    adopt_orphans()
    child, ended = os.posix_spawn(command[0], command, os.environ), {}
    # Not a pipe that closes with the parent: what the parent forks would keep it open.
    while any_left(ended) and child not in ended and not asked and os.getppid() == parent:
        time.sleep(0.1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    until = time.monotonic() + grace
    while any_left(ended):
        if time.monotonic() > until:
            os.killpg(0, signal.SIGKILL)
        time.sleep(0.05)
    status = os.waitstatus_to_exitcode(ended[child])
    return status if status >= 0 else 128 - status


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent dies, so that it can wait for them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def any_left(ended: dict[int, int]) -> bool:
    """Whether this process has children still; puts the statuses of those that ended into `ended`."""
    try:
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = found[1]
    except ChildProcessError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
