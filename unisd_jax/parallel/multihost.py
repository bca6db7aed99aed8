"""Several processes as one run: joining, agreeing, gathering. The only module that asks which process this is.

Every process runs the same program on its own devices; one of them, the main one, writes and prints. Without other
processes everything here is a plain function of its argument.
"""

import hashlib
import json
import os
import secrets
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from unisd_jax.config import DistributedOptions
from unisd_jax.errors import ConfigError, UserError
from unisd_jax.interrupt import Interrupted
from unisd_jax.parallel.watch import Client, Server

# What a scheduler sets in each process of a job of several, and how it says that there are several.
_SCHEDULERS = {
    "SLURM_STEP_NUM_TASKS": lambda value: value.isdigit() and int(value) > 1,  # set by srun, not by salloc
    "OMPI_COMM_WORLD_SIZE": lambda value: value.isdigit() and int(value) > 1,
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,  # TPU slices on GKE
    "MEGASCALE_COORDINATOR_ADDRESS": bool,  # several TPU slices
    "JOB_COMPLETION_INDEX": bool,  # an indexed job of Kubernetes, of however many pods
}
# How jax's collectives say that the other side is gone.
_LOST = ("unavailable", "deadline_exceeded", "aborted", "gloo", "nccl", "coordination service", "connection")


_watch: Server | Client | None = None


class LostProcess(UserError):
    """Another process of the run is gone; this one cannot go on."""


def initialize(options: DistributedOptions, environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, before any device is used; in all but the main one, standard output is closed.

    Raises:
      ConfigError: what the options or the environment say is incomplete.
      UserError: the others could not be reached within `timeout` seconds.
    """
    arguments = join_arguments(options, environment)
    if arguments is None:
        return
    # On CPU devices the default has no collectives between processes.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM from the process, which then could only be killed.
    jax.config.update("jax_enable_preemption_service", False)
    timeouts = {"initialization_timeout": options.timeout, "heartbeat_timeout_seconds": options.timeout}
    where = arguments.get("coordinator_address", "the coordinator that the environment names")
    # Said before, because jax ends a process that finds no coordinator without raising anything.
    print(f"joining the other processes at {where}, for at most {options.timeout} s", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(**arguments, **timeouts)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"distributed.coordinator: no connection of all processes by {where} within {options.timeout} s "
            f"({str(error).strip().splitlines()[0]}); a run of one process is distributed.coordinator=none"
        ) from None
    if jax.process_count() > 1:
        _start_watch(arguments.get("coordinator_address"), options.timeout)
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)


def _start_watch(coordinator: str | None, timeout: int) -> None:
    """Connects every process to the main one, at the coordinator's host; runs without where that is not possible."""
    global _watch
    others = jax.process_count() - 1
    server = Server(others) if is_main() else None
    own = f"{socket.gethostname()}:{server.port}" if server else ""
    name, _, port = _text(multihost_utils.broadcast_one_to_all(_bytes(own))).rpartition(":")
    host = coordinator.rpartition(":")[0] if coordinator else name
    # On one machine its name need not resolve.
    host = "127.0.0.1" if name == socket.gethostname() else host
    problem = ""
    try:
        _watch = server or Client(jax.process_index(), host, int(port), min(timeout, 30))
        if server:
            server.accept(others, min(timeout, 30))
    except OSError as error:
        problem = str(error)
    # All or none: who is not connected must not be taken for lost.
    if largest(int(bool(problem)))[0]:
        _watch = None
        print(
            f"warning: no connection to port {port} of {host} ({problem or 'of another process'}): "
            f"a process that dies is noticed after {timeout} s only",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def join_arguments(options: DistributedOptions, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`, {} where jax finds them itself; None for a run of one process.

    Raises:
      ConfigError: an address without the number of processes or the number of this one.
    """
    coordinator = options.coordinator
    if coordinator == "auto":
        coordinator = environment.get("JAX_COORDINATOR_ADDRESS", "none")
        if coordinator == "none" and any(several(environment.get(name, "")) for name, several in _SCHEDULERS.items()):
            coordinator = "cluster"
    if coordinator == "none":
        return None
    if coordinator == "cluster":
        return {}
    numbers = {}
    for name in ("num_processes", "process_id"):
        variable = f"JAX_{name.upper()}"
        value = getattr(options, name)
        value = environment.get(variable) if value is None else value
        if value is None or not str(value).isdigit():
            found = "missing" if value is None else f"{value!r}"
            raise ConfigError(
                f"distributed.{name} is {found}: a coordinator ({coordinator}) needs it, as an option or as {variable}"
            )
        numbers[name] = int(value)
    if numbers["process_id"] >= numbers["num_processes"]:
        raise ConfigError(
            f"distributed.process_id is {numbers['process_id']}; expected 0 to num_processes - 1 = "
            f"{numbers['num_processes'] - 1}"
        )
    return {"coordinator_address": coordinator} | numbers


def is_main() -> bool:
    """Whether this process writes and prints."""
    return jax.process_index() == 0


def process_count() -> int:
    """How many processes run together."""
    return jax.process_count()


def own_share() -> tuple[int, int]:
    """(this process's number, how many there are), to divide work among them."""
    return jax.process_index(), jax.process_count()


def processes_here() -> int:
    """How many processes of the run are on this machine; all of them must call this."""
    if jax.process_count() == 1:
        return 1
    own = _bytes(socket.gethostname())
    return int((multihost_utils.process_allgather(own) == own).all(axis=1).sum())


def wait_for_all(what: str) -> None:
    """Returns when every process has come here, for instance after the main one has written `what`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def largest(*values: int) -> list[int]:
    """The largest of each value over all processes; all of them must call this, and all get the same answer."""
    if jax.process_count() == 1:
        return list(values)
    found = multihost_utils.process_allgather(np.asarray(values, np.int32))
    return [int(value) for value in found.max(axis=0)]


def mean(values: Sequence[float]) -> float:
    """The mean of all processes' values together."""
    own = np.array([np.sum(values), len(values)], np.float32)
    total, count = own if jax.process_count() == 1 else multihost_utils.process_allgather(own).sum(axis=0)
    return float(total / count)


def from_main(make: Callable[[], Any]) -> Any:
    """What `make` gives in the main process, as JSON has it, in all of them; the others do not call it."""
    if jax.process_count() == 1:
        return make()
    data = json.dumps(make()).encode() if is_main() else b""
    (size,) = largest(len(data))
    text = multihost_utils.broadcast_one_to_all(np.frombuffer(data.ljust(size), np.uint8))
    return json.loads(np.asarray(text, np.uint8).tobytes())


def require_same(what: str, text: str) -> None:
    """Refuses to go on when the processes have been given different things.

    Raises:
      ConfigError: another process has another text.
    """
    if jax.process_count() == 1:
        return
    own = _bytes(hashlib.sha256(text.encode()).hexdigest())
    if (multihost_utils.process_allgather(own) != own).any():
        raise ConfigError(f"the processes of this run have different {what}: start all of them with the same command")


def require_shared(folder: Any) -> None:
    """Refuses a folder that is not one and the same for all processes: checkpoints need that.

    Raises:
      ConfigError: what the main process wrote there is not seen by another one.
    """
    if jax.process_count() == 1:
        return
    token = _text(multihost_utils.broadcast_one_to_all(_bytes(secrets.token_hex(8))))
    mark = folder / f".seen_by_all.{token}"
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    wait_for_all(f"a file in {folder}")
    seen = largest(int(not mark.exists()))[0] == 0
    wait_for_all(f"the file in {folder} seen")
    if is_main():
        mark.unlink(missing_ok=True)
    if not seen:
        raise ConfigError(
            f"{folder} is not the same folder for all processes: output_dir must be on storage they share"
        )


def gather(array: Any) -> np.ndarray:
    """A whole array on every host, however it is divided; all processes must call this."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if array.is_fully_replicated:
            return np.asarray(array.addressable_data(0))
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def all_rows(own: np.ndarray, rows: Sequence[int], total: int) -> np.ndarray:
    """[total, …] on every host, of which this one gives `rows`, the others the rest; all processes must call this."""
    whole = np.zeros((total, *own.shape[1:]), own.dtype)
    whole[list(rows)] = own
    if jax.process_count() == 1:
        return whole
    return multihost_utils.process_allgather(whole).sum(axis=0, dtype=own.dtype)


def own_rows(sharding: NamedSharding, rows: int) -> list[int]:
    """Which of the global batch's rows this process's devices hold, in order; never none, see `build_mesh`."""
    places = sharding.addressable_devices_indices_map((rows,)).values()
    return sorted({row for (place,) in places for row in range(*place.indices(rows))})


def join_rows(own: np.ndarray, sharding: NamedSharding, rows: int) -> jax.Array:
    """The global array [rows, …] of which every process gives the rows that `own_rows` names."""
    if jax.process_count() == 1:
        return jax.device_put(own, sharding)
    first = {row: index for index, row in enumerate(own_rows(sharding, rows))}

    def part(place):
        start, stop, _ = place[0].indices(rows)
        return own[first[start] : first[start] + stop - start]

    return jax.make_array_from_callback((rows, *own.shape[1:]), sharding, part)


@contextmanager
def no_process_left_waiting():
    """Ends this process at once when it fails among several, with a traceback where it is not the user's error.

    Raises:
      LostProcess: instead of what jax makes of a process that is gone in the middle of a collective.
    """
    try:
        yield
    except (UserError, OSError, Interrupted):
        raise
    except Exception as error:  # whatever it is: jax would first wait for the others, and they for this process
        if jax.process_count() == 1:
            raise
        reason = str(error).strip().partition("\n")[0][:200]
        if isinstance(error, jax.errors.JaxRuntimeError) and any(word in reason.lower() for word in _LOST):
            raise LostProcess(
                f"another process of this run has stopped or cannot be reached ({reason}); "
                "start all of them again: they continue from the last checkpoint"
            ) from error
        traceback.print_exc()
        leave(1)
        raise


def leave(status: int, *, together: bool = False) -> int:
    """The exit status of a process that is done; unless all leave `together`, the others are not waited for."""
    if _watch is not None and together:
        _watch.leave()
    if jax.distributed.is_initialized() and not together:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode()[:256].ljust(256), np.uint8)


def _text(array: Any) -> str:
    return bytes(np.asarray(array, np.uint8)).decode().strip()
