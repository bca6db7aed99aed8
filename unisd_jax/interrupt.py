"""Ctrl-C and SIGTERM as a request that the training loop honours between steps."""

import signal
import sys
from contextlib import contextmanager

# The exit status of a program that stopped because it was asked to, as shells report SIGINT.
INTERRUPTED = 130


class Interrupted(Exception):
    """The user asked to stop; the state is saved."""


class Stop:
    """Whether a stop was asked for."""

    requested = False


@contextmanager
def stop_on_signal():
    """Turns the first SIGINT or SIGTERM into `requested = True`; a second one acts at once."""
    stop = Stop()

    def request(number, _frame):
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        print("\nstopping after this step (once more to stop at once)", file=sys.stderr, flush=True)

    earlier = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
