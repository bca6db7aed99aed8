"""How the benchmarks time a call. Needs nothing but Python: one of them runs in an environment of its own."""

import time
from collections.abc import Callable
from typing import Any


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Wall time of each of `repeats` calls, after one that compiles."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times
