"""Noticing at once that a process of the run is gone: a connection from each to the main one, which the system closes.

jax's own heartbeat takes its whole timeout and ends the process with a stack trace; it stays as the second net, for a
machine that vanishes without closing its connections.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from unisd_jax.errors import BAD_INPUT

GOODBYE = b"goodbye\n"
# Seconds in which a process may still end by itself, with an error of its own that says more.
GRACE = 3.0


def lost(index: int) -> None:
    """Ends this process because process `index` is gone: it may be waiting for it in a collective, for ever."""
    text = f"error: process {index} of this run has stopped; start all of them again: they continue from the last"
    print(f"{text} checkpoint", file=sys.stderr, flush=True)
    time.sleep(GRACE)
    sys.stdout.flush()
    os._exit(BAD_INPUT)


class Server:
    """The main process's end: tells every other process when one is gone."""

    def __init__(self, others: int, on_loss: Callable[[int], None] = lost):
        self._on_loss = on_loss
        self._listener = socket.create_server(("", 0), backlog=others)
        self._connections: dict[int, socket.socket] = {}
        self.port: int = self._listener.getsockname()[1]

    def accept(self, others: int, timeout: float) -> None:
        """Waits for the others to connect; who is no process of this run is sent away.

        Raises:
          TimeoutError: they have not in time.
        """
        until, found = time.monotonic() + timeout, {}
        while len(found) < others:
            self._listener.settimeout(max(0.01, until - time.monotonic()))
            connection, _ = self._listener.accept()
            connection.settimeout(max(0.01, until - time.monotonic()))
            lines = connection.makefile("rb")
            line = _last_line(lines)
            if not line.strip().isdigit():
                connection.close()
                continue
            connection.settimeout(None)
            found[int(line)] = connection, lines
        self._connections = {index: connection for index, (connection, _) in found.items()}
        for index, (_, lines) in found.items():
            threading.Thread(target=self._listen, args=(index, lines), daemon=True).start()

    def _listen(self, index: int, lines) -> None:
        if _last_line(lines) == GOODBYE:
            return
        for other, connection in self._connections.items():
            if other != index:
                _send(connection, b"%d\n" % index)
        self._on_loss(index)

    def leave(self) -> None:
        """Says goodbye to all."""
        for connection in self._connections.values():
            _send(connection, GOODBYE)


class Client:
    """Any other process's end."""

    def __init__(self, index: int, host: str, port: int, timeout: float, on_loss: Callable[[int], None] = lost):
        self._on_loss = on_loss
        self._connection = socket.create_connection((host, port), timeout=timeout)
        self._connection.settimeout(None)
        _send(self._connection, b"%d\n" % index)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        line = _last_line(self._connection.makefile("rb"))
        if line != GOODBYE:
            self._on_loss(int(line or 0))

    def leave(self) -> None:
        """Says goodbye."""
        _send(self._connection, GOODBYE)


def _last_line(lines) -> bytes:
    """The one line the other side sends; empty if its connection is closed without."""
    try:
        return lines.readline()
    except OSError:
        return b""


def _send(connection: socket.socket, line: bytes) -> None:
    try:
        connection.sendall(line)
    except OSError:
        pass  # it is gone already, and its own thread says so
