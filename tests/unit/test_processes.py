"""Joining, agreeing and noticing who is gone, as far as one process can show it."""

import socket
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisd_jax.config import DistributedOptions
from unisd_jax.errors import ConfigError, UserError
from unisd_jax.interrupt import Interrupted
from unisd_jax.parallel import multihost
from unisd_jax.parallel.mesh import build_mesh
from unisd_jax.parallel.multihost import join_arguments
from unisd_jax.parallel.sharding import batch_sharding
from unisd_jax.parallel.watch import Client, Server


def test_a_run_of_one_process_joins_nobody():
    assert join_arguments(DistributedOptions(), {}) is None
    assert join_arguments(DistributedOptions(coordinator="none"), {"JAX_COORDINATOR_ADDRESS": "a:1"}) is None
    multihost.initialize(DistributedOptions(coordinator="none"), {})
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # a shell inside an allocation, not a step
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "host-0"}, True),
        ({"JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_what_a_scheduler_says_is_left_to_jax(environment, joins):
    assert join_arguments(DistributedOptions(), environment) == ({} if joins else None)


def test_an_address_comes_from_options_or_environment():
    variables = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    expected = {"coordinator_address": "host:1234", "num_processes": 2, "process_id": 1}
    assert join_arguments(DistributedOptions(), variables) == expected
    options = DistributedOptions(coordinator="other:5", num_processes=3, process_id=0)
    assert join_arguments(options, variables) == {
        "coordinator_address": "other:5",
        "num_processes": 3,
        "process_id": 0,
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"JAX_PROCESS_ID": None}, "distributed.process_id is missing"),
        ({"JAX_NUM_PROCESSES": "two"}, "distributed.num_processes is 'two'"),
        ({"JAX_PROCESS_ID": "2"}, "distributed.process_id is 2; expected 0 to num_processes - 1 = 1"),
    ],
)
def test_an_address_alone_is_not_enough(changes, words):
    variables = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"} | changes
    with pytest.raises(ConfigError) as error:
        join_arguments(DistributedOptions(), {name: value for name, value in variables.items() if value is not None})
    assert words in str(error.value) and "\n" not in str(error.value)


def test_one_process_agrees_with_itself(tmp_path):
    assert multihost.largest(3, 5) == [3, 5]
    assert multihost.mean([1.0, 2.0, 6.0]) == 3.0
    assert multihost.is_main() and multihost.process_count() == 1
    multihost.require_same("configurations", "x")
    multihost.require_shared(tmp_path)
    multihost.wait_for_all("nothing")
    assert multihost.leave(0, together=True) == 0 and multihost.leave(2) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8)], ids=str)
def test_rows_are_joined_and_gathered(shape):
    sharding = batch_sharding(build_mesh(*shape))
    assert multihost.own_rows(sharding, 8) == list(range(8))
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    whole = multihost.join_rows(rows, sharding, 8)
    assert whole.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(multihost.gather(whole), rows)
    np.testing.assert_array_equal(multihost.gather(jnp.arange(3)), np.arange(3))


@pytest.fixture
def among_several(monkeypatch):
    """As if there were two processes; [the exit statuses with which this one would have ended]."""
    ends = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "leave", ends.append)
    return ends


def fail(error):
    with multihost.no_process_left_waiting():
        raise error


def test_one_process_fails_as_always():
    for error in (ValueError("x"), UserError("x"), jax.errors.JaxRuntimeError("UNAVAILABLE: x")):
        with pytest.raises(type(error), match="x"):
            fail(error)


@pytest.mark.parametrize("text", ["UNKNOWN: Gloo all-reduce failed: Connection reset", "UNAVAILABLE: Socket closed"])
def test_a_lost_process_is_said_in_one_line(among_several, text):
    with pytest.raises(multihost.LostProcess, match="another process of this run has stopped"):
        fail(jax.errors.JaxRuntimeError(text))
    assert among_several == []


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), KeyError("bug")])
def test_any_other_error_ends_the_process_with_its_traceback(among_several, capsys, error):
    """Out of memory is not another process's fault; and one that waits for the end of all would be waited for."""
    with pytest.raises(type(error)):
        fail(error)
    assert among_several == [1] and "Traceback" in capsys.readouterr().err


def test_the_user_s_errors_pass(among_several):
    for error in (UserError("x"), FileNotFoundError("x"), Interrupted("x")):
        with pytest.raises(type(error)):
            fail(error)
    assert among_several == []


def test_a_mesh_of_several_processes_has_all_their_devices(among_several):
    with pytest.raises(ConfigError, match="2 x 1 x 1 = 2 devices, but the 2 processes of this run have 8"):
        build_mesh(2)
    assert build_mesh(2, 4).size == 8


class Group:
    """A server and two clients in this process; `lost[who]` is filled when that one is told of a loss."""

    def __init__(self):
        self.lost = {name: (threading.Event(), []) for name in ("server", 1, 2)}
        self.server = Server(2, self.report("server"))
        accepting = threading.Thread(target=self.server.accept, args=(2, 5.0))
        accepting.start()
        self.clients = {
            index: Client(index, "127.0.0.1", self.server.port, 5.0, self.report(index)) for index in (1, 2)
        }
        accepting.join()

    def report(self, name):
        def on_loss(index):
            event, found = self.lost[name]
            found.append(index)
            event.set()

        return on_loss

    def told(self, name, timeout=5.0):
        event, found = self.lost[name]
        event.wait(timeout)
        return found


def cut(connection: socket.socket) -> None:
    """What the system does with the connections of a process that is killed."""
    connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def test_the_loss_of_any_process_is_told_to_all_others():
    group = Group()
    cut(group.clients[1]._connection)
    assert group.told("server") == [1] and group.told(2) == [1]


def test_the_loss_of_the_main_process_is_noticed_by_all():
    group = Group()
    for connection in group.server._connections.values():
        cut(connection)
    # In this test the main one lives on and tells the others of each other, too.
    assert 0 in group.told(1) + group.told(2)


def test_who_says_goodbye_is_not_lost():
    group = Group()
    for end in (*group.clients.values(), group.server):
        end.leave()
    for connection in (*group.server._connections.values(), *(client._connection for client in group.clients.values())):
        cut(connection)
    assert [group.told(name, timeout=0.2) for name in ("server", 1, 2)] == [[], [], []]


def test_who_is_no_process_of_the_run_is_sent_away():
    server = Server(1, lambda index: None)  # without it, the end of this test would be the loss of a process
    strangers = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n")
    strangers[1].close()
    accepting = threading.Thread(target=server.accept, args=(1, 5.0))
    accepting.start()
    client = Client(3, "127.0.0.1", server.port, 5.0, lambda index: None)
    accepting.join(timeout=10)
    assert list(server._connections) == [3]
    client.leave()


def test_nobody_comes():
    with pytest.raises(TimeoutError):
        Server(1).accept(1, timeout=0.1)
