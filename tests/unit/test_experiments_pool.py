"""Running jobs: order, failures, skipping, signals, kills, devices and memory. The jobs are small fakes."""

import dataclasses
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from unisd_jax.errors import ConfigError, UserError
from unisd_jax.experiments import pool as of_pool
from unisd_jax.experiments import slots
from unisd_jax.experiments.command import run_pool
from unisd_jax.experiments.jobs import FAILED, FINISHED, NOT_RUN, Job, is_finished
from unisd_jax.experiments.pool import Pool
from unisd_jax.experiments.slots import BESIDE, Slot, parse_devices
from unisd_jax.experiments.state import Manifest, is_locked
from unisd_jax.experiments.status import Screen, overview, time_left
from unisd_jax.io import try_lock
from unisd_jax.metrics import clock

REPOSITORY = Path(__file__).resolve().parents[2]
TWO = [Slot("a"), Slot("b")]
# Writes its result, and into `order` when it began and ended; a program says in between what it does.
BODY = """
import os, pathlib, signal, sys, time
out = pathlib.Path({out!r})
def note(what): (out / "order").open("a").write(f"{name} {{what}}\\n")
note("begins")
{program}
(out / {name!r}).mkdir(exist_ok=True); (out / {name!r} / "result.json").write_text("{{}}")
note("ends")
"""
# What a command does that has been given jobs: for tests that send signals to it.
COMMAND = """
import sys, json
sys.path.insert(0, {here!r})
from pathlib import Path
import unisd_jax.experiments.pool as of_pool
from unisd_jax.experiments.command import run_pool
from unisd_jax.experiments.jobs import read_job
from unisd_jax.experiments.slots import Slot
from unisd_jax.experiments.state import Manifest
of_pool.GRACE = of_pool.TERM_GRACE = 0.5
jobs = [read_job(record) for record in json.loads(Path({listed!r}).read_text())]
sys.exit(run_pool(jobs, [Slot("a"), Slot("b")], Manifest({out!r})))
"""


@pytest.fixture
def job(tmp_path):
    """`job(name, program)` is a job that runs the program and then writes its result."""

    def make(name, program="", needs=(), kind="train", outputs=True, **fields):
        text = BODY.format(out=str(tmp_path), name=name, program=program)
        return Job(
            kind=kind, name=name, key=name, command=(sys.executable, "-c", text), needs=tuple(needs),
            folder=str(tmp_path / "jobs" / name), outputs=(str(tmp_path / name / "result.json"),) if outputs else (),
            **fields,
        )  # fmt: skip

    return make


@pytest.fixture
def run(tmp_path, capsys):
    """`run(*jobs)` is (status, what was said, states) of the command."""

    def command(*jobs, on=TWO, **options):
        code = run_pool(jobs, on, Manifest(tmp_path), **options)
        records = Manifest(tmp_path).read()
        return code, capsys.readouterr().out, {job.name: records[job.name]["state"] for job in jobs}

    return command


@pytest.fixture
def started(tmp_path):
    """`started(*jobs)` is a process that runs the jobs; it is ended at the end."""
    processes = []

    def start(*jobs):
        listed = tmp_path / "listed.json"
        listed.write_text(json.dumps([job.record() for job in jobs]))
        text = COMMAND.format(here=str(REPOSITORY), listed=str(listed), out=str(tmp_path))
        processes.append(subprocess.Popen(
            [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ))  # fmt: skip
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def order(tmp_path):
    path = tmp_path / "order"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


# --- Order, failures, skipping ---

# Goes on when another job does the same; after 10 seconds it has failed.
MEET = """
note("waits")
until = time.time() + 10
while (out / "order").read_text().count("waits") < 2: time.sleep(.05) if time.time() < until else sys.exit(1)
"""
UNLESS_NOW = "(out / 'now').exists() or sys.exit(1)"


def test_jobs_run_after_what_they_need_and_several_at_a_time(job, run, tmp_path):
    code, said, states = run(job("one", MEET), job("two", MEET), job("last", needs=["one", "two"]))
    assert code == 0 and set(states.values()) == {FINISHED}
    assert order(tmp_path)[-2:] == ["last begins", "last ends"]
    assert "3 finished" in said.splitlines()[-1]


def test_a_failure_stops_only_what_needs_it_and_is_told_at_the_end(job, run, tmp_path):
    bad = job("bad", "print('what went wrong'); sys.exit(3)")
    jobs = bad, job("after", needs=["bad"]), job("later", needs=["after"]), job("good"), job("fine", needs=["good"])
    code, said, states = run(*jobs)
    assert code == 1
    assert states == {"bad": FAILED, "after": NOT_RUN, "later": NOT_RUN, "good": FINISHED, "fine": FINISHED}
    end = said[said.rindex("1 failed") :]
    assert "    what went wrong" in end and bad.words() in end and f"log: {bad.log}" in end
    assert "not run: after, which needs bad (failed)" in end and "not run: later, which needs after (not run)" in end
    assert Manifest(tmp_path).read()["bad"]["status"] == 3


def test_a_report_is_made_of_what_there_is_and_again_once_all_is_there(job, run, tmp_path):
    report = job("report", kind="report", needs=["bad", "good"], outputs=False)
    jobs = job("bad", UNLESS_NOW), job("good"), report
    assert run(*jobs)[2] == {"bad": FAILED, "good": FINISHED, "report": FINISHED} and not is_finished(report)
    (tmp_path / "now").touch()
    assert run(*jobs)[0] == 0 and is_finished(report)
    assert order(tmp_path).count("report ends") == 2 and order(tmp_path).count("good ends") == 1
    run(*jobs)
    assert order(tmp_path).count("report ends") == 2


def test_nothing_is_run_twice_and_what_failed_is_run_again(job, run, tmp_path):
    jobs = job("bad", UNLESS_NOW), job("good"), job("after", needs=["bad"])
    assert run(*jobs)[0] == 1
    (tmp_path / "now").touch()
    code, said, states = run(*jobs)
    assert code == 0 and set(states.values()) == {FINISHED} and "1 finished or not needed" in said
    assert order(tmp_path).count("good begins") == 1 and order(tmp_path).count("bad begins") == 2
    assert jobs[0].log.read_text().count("=== ") == 2, "the log of the first attempt is kept"
    assert run(*jobs)[0] == 0 and len(order(tmp_path)) == 7


def test_a_job_that_ends_well_without_its_result_has_failed(job, run):
    code, said, states = run(job("empty", "sys.exit(0)"))
    assert code == 1 and states == {"empty": FAILED} and "it wrote no result" in said


def test_a_command_that_does_not_exist_has_failed(job, run, tmp_path):
    code, said, states = run(dataclasses.replace(job("lost"), command=("/no/such/program",)), job("good"))
    assert code == 1 and states == {"lost": FAILED, "good": FINISHED} and "cannot be started" in said


def test_results_are_preferred_to_more_runs(job, run, tmp_path):
    jobs = [job("t1"), job("t2"), job("e1", needs=["t1"], kind="evaluate")]
    run(*jobs, on=[Slot("one")])
    assert [line for line in order(tmp_path) if line.endswith("begins")] == ["t1 begins", "e1 begins", "t2 begins"]


def test_the_manifest_has_commands_states_and_costs_of_all_that_was_planned(job, run, tmp_path):
    run(job("one", "time.sleep(.5)", about={"mode": "ema"}))  # long enough to be looked at
    run(job("two"))
    record = Manifest(tmp_path).read()["one"]
    assert record["state"] == FINISHED and record["command"][0] == sys.executable and record["about"] == {"mode": "ema"}
    assert record["seconds"] > 0 and 0 < record["peak_memory_gib"] < 1 and record["slot"] in ("a", "b")
    assert set(Manifest(tmp_path).read()) == {"one", "two"}


def test_a_manifest_that_is_something_else_is_left_alone(job, tmp_path):
    (tmp_path / "jobs.json").write_text("[]")
    with pytest.raises(UserError, match="is not a list of jobs"):
        run_pool([job("one")], TWO, Manifest(tmp_path))
    assert (tmp_path / "jobs.json").read_text() == "[]" and order(tmp_path) == []


# --- Stopping and killing ---

SAVES = """
def save(*_): note("saves"); sys.exit(130)
signal.signal(signal.SIGINT, save)
note("ready"); time.sleep(60)
"""
STUBBORN = """
signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
import subprocess; child = subprocess.Popen(["sleep", "60"]); (out / "child").write_text(str(child.pid))
note("ready"); time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_every_job_save_and_starts_no_other(job, started, tmp_path, number):
    if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("SIGHUP is ignored here, as under nohup, and stays so")
    process = started(job("one", SAVES), job("two", SAVES), job("three"))
    wait_for(lambda: order(tmp_path).count("one ready") + order(tmp_path).count("two ready") == 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "the same command continues" in err and "Traceback" not in err
    assert {"one saves", "two saves"} <= set(order(tmp_path)) and "three begins" not in order(tmp_path)
    states = {name: record["state"] for name, record in Manifest(tmp_path).read().items()}
    assert states == {"one": "interrupted", "two": "interrupted", "three": "waiting"}, out


@pytest.mark.parametrize("times", [1, 2])
def test_what_does_not_end_is_killed_with_what_it_started(job, started, tmp_path, times):
    process = started(job("one", STUBBORN))
    wait_for(lambda: "one ready" in order(tmp_path))
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    process.communicate(timeout=20)
    assert process.returncode == 130
    child = int((tmp_path / "child").read_text())
    wait_for(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2])


def test_a_report_is_out_of_date_once_a_run_is_made_again(job, run, started, tmp_path):
    report = job("report", kind="report", needs=["one"], outputs=False)
    assert run(job("one"), report)[0] == 0 and is_finished(report)
    (tmp_path / "one" / "result.json").unlink()
    interrupts = "signal.signal(2, signal.SIG_IGN); os.kill(os.getppid(), signal.SIGINT)"
    process = started(job("one", interrupts), report)
    assert process.wait(timeout=20) == 130 and is_finished(job("one")) and not is_finished(report)


def test_a_lost_terminal_lets_every_job_save(job, tmp_path):
    listed = tmp_path / "listed.json"
    listed.write_text(json.dumps([job("one", SAVES).record(), job("two", SAVES).record()]))
    text = COMMAND.format(here=str(REPOSITORY), listed=str(listed), out=str(tmp_path))
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", text])
    said = threading.Thread(target=read_until, args=(terminal, done := threading.Event()))
    said.start()
    wait_for(lambda: sum("ready" in line for line in order(tmp_path)) == 2)
    done.set()
    said.join()
    os.close(terminal)  # the kernel sends SIGHUP, and a shell would send another
    os.kill(child, signal.SIGHUP)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert sum("saves" in line for line in order(tmp_path)) == 2


def read_until(descriptor, done):
    """Reads what a terminal shows; a read that waits would keep it open."""
    while not done.is_set():
        if select.select([descriptor], [], [], 0.05)[0]:
            os.read(descriptor, 1000)


def test_a_pipe_that_nobody_reads_changes_nothing(job, started, tmp_path):
    process = started(job("one", "time.sleep(1)"), job("two", needs=["one"]))
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert order(tmp_path) == ["one begins", "one ends", "two begins", "two ends"]


def test_a_killed_command_leaves_its_jobs_to_end_and_the_next_one_does_not_start_them_again(job, started, tmp_path):
    slow = "note('ready')\nwhile not (out / 'go').exists(): time.sleep(.05)"
    jobs = job("one", slow), job("two", needs=["one"])
    first = started(*jobs)
    wait_for(lambda: "one ready" in order(tmp_path))
    first.kill()
    first.communicate()
    assert is_locked(jobs[0].lock)
    second = started(*jobs)
    wait_for(lambda: Manifest(tmp_path).read()["one"]["state"] == "runs elsewhere")
    (tmp_path / "go").touch()
    out, err = second.communicate(timeout=20)
    assert second.returncode == 0, out + err
    assert order(tmp_path) == ["one begins", "one ready", "one ends", "two begins", "two ends"]


def test_a_killed_command_and_job_go_on(job, started, tmp_path):
    first = started(job("one", "(out / 'pid').write_text(str(os.getpid())); note('ready'); time.sleep(60)"))
    wait_for(lambda: "one ready" in order(tmp_path))
    first.kill()
    first.communicate()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    second = started(job("one"))
    out, err = second.communicate(timeout=20)
    assert second.returncode == 0, out + err
    assert order(tmp_path) == ["one begins", "one ready", "one begins", "one ends"]


def test_two_commands_share_the_work_and_the_slots(job, started, tmp_path):
    short = "time.sleep(.3)"
    jobs = [job(f"job{number}", short) for number in range(6)]
    both = started(*jobs), started(*jobs)
    for process in both:
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, out + err
    lines = order(tmp_path)
    assert sorted(line for line in lines if line.endswith("begins")) == [f"job{number} begins" for number in range(6)]
    at_once = [sum(1 if line.endswith("begins") else -1 for line in lines[: end + 1]) for end in range(len(lines))]
    assert max(at_once) == 2, "two slots, whoever uses them"


def test_a_lock_lasts_as_long_as_the_process_that_was_given_it(tmp_path):
    held = try_lock(tmp_path / "lock")
    with subprocess.Popen(["sleep", "60"], pass_fds=[held]) as child:
        os.close(held)
        assert is_locked(tmp_path / "lock") and try_lock(tmp_path / "lock") is None
        child.kill()
    wait_for(lambda: not is_locked(tmp_path / "lock"))
    assert not is_locked(tmp_path / "none") and not (tmp_path / "none").exists()


# --- Devices ---


def test_every_job_sees_the_devices_of_its_slot_alone(job, run, tmp_path):
    show = f"note(os.environ['CUDA_VISIBLE_DEVICES'])\n{MEET}"
    run(job("one", show), job("two", show), on=parse_devices("3,0+1"))
    assert {line.split()[1] for line in order(tmp_path)} >= {"3", "0,1"}


def test_another_grouping_keeps_off_devices_that_a_job_still_has(job, run, tmp_path):
    held = try_lock(tmp_path / "jobs" / "slots" / "gpu1.lock")
    try:
        ended = job("one", "(out / 'seen').write_text(os.environ['CUDA_VISIBLE_DEVICES'])")
        run(ended, on=parse_devices("0+1,2+3"))
        assert (tmp_path / "seen").read_text() == "2,3"
    finally:
        os.close(held)


def test_what_needs_no_device_runs_beside_them(job, run, tmp_path):
    show = "note(os.environ.get('CUDA_VISIBLE_DEVICES', 'none') + os.environ.get('JAX_PLATFORMS', ''))"
    cache = job("cache", show, kind="cache", device=False, outputs=False)
    user = job("user", show, needs=["cache"])
    run(cache, user, on=[Slot("gpu0", {"CUDA_VISIBLE_DEVICES": "0"}), BESIDE])
    records = Manifest(tmp_path).read()
    assert records["cache"]["slot"] == "cpu" and records["user"]["slot"] == "gpu0"


def test_cores_are_shared_out(job, run, tmp_path, monkeypatch):
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        pytest.skip("one core cannot be shared out")
    show = (
        "time.sleep(.5); note(f'{sorted(os.sched_getaffinity(0))} {os.environ[\"JAX_PLATFORMS\"]}'.replace(', ', ','))"
    )
    run(job("one", show), job("two", show), on=parse_devices("cpu:2"))
    used = [json.loads(line.split()[1]) for line in order(tmp_path) if "[" in line]
    assert sorted(used[0] + used[1]) == mine


def test_devices_are_slots():
    assert [slot.environment for slot in parse_devices("0,GPU-ab12")[:2]] == [
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "GPU-ab12"},
    ]
    chips = parse_devices("tpu:0+1,2+3")[1].environment
    assert chips["TPU_VISIBLE_CHIPS"] == "2,3" and chips["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "1,2,1"
    (slot,) = parse_devices("cpu:1")
    assert slot.environment["JAX_PLATFORMS"] == "cpu" and slot.cores == tuple(sorted(os.sched_getaffinity(0)))


def test_without_a_choice_all_gpus_are_used_else_the_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [slot.name for slot in parse_devices(None)] == ["gpu2", "gpu5", "cpu"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [slot.name for slot in parse_devices(None)] == ["cpu0"]
    slots.require_gpus(parse_devices("cpu:1"))
    with pytest.raises(ConfigError, match="shows no GPU"):
        slots.require_gpus(parse_devices("0"))


# --- Memory ---


def most_at_once(tmp_path):
    lines = order(tmp_path)
    return max(sum(1 if line.endswith("begins") else -1 for line in lines[: end + 1]) for end in range(len(lines)))


@pytest.mark.parametrize(("free", "at_once"), [(10.0, 2), (7.0, 1)])
def test_no_more_jobs_start_than_their_memory_allows(job, run, tmp_path, monkeypatch, free, at_once):
    monkeypatch.setattr(of_pool, "available_gib", lambda: free)
    code, _, _ = run(*(job(f"job{number}", "time.sleep(.4)") for number in range(3)), memory_gib=4.0)
    assert code == 0 and most_at_once(tmp_path) == at_once


def test_measured_memory_takes_the_place_of_the_guess(job, run, tmp_path, monkeypatch):
    on = [Slot("cpu0", is_cpu=True), Slot("cpu1", is_cpu=True)]
    monkeypatch.setattr(of_pool, "available_gib", lambda: 3.0)
    about = {"model": "m"}
    run(*(job(f"a{number}", "time.sleep(.4)", about=about, expected_gib=5.0) for number in range(2)), on=on)
    assert most_at_once(tmp_path) == 1, "a guess of 5 GiB: one at a time, although none fits"
    (tmp_path / "order").unlink()
    run(*(job(f"b{number}", "time.sleep(.4)", about=about, expected_gib=5.0) for number in range(2)), on=on)
    assert most_at_once(tmp_path) == 2


@pytest.mark.parametrize(("in_all", "waits"), [(24.0, False), (200.0, True)])
def test_a_job_that_once_took_more_than_is_free_runs_alone(job, run, tmp_path, monkeypatch, in_all, waits):
    """At once if that was on a larger machine, else after a while: others hold the memory."""
    about = {"model": "m"}
    before = job("before", about=about)
    run(before)
    Manifest(tmp_path).update("before", peak_memory_gib=100.0)
    for name, amount in (("available_gib", 3.0), ("total_gib", in_all)):
        monkeypatch.setattr(of_pool, name, lambda amount=amount: amount)
    monkeypatch.setattr(of_pool, "PATIENCE", 1.5)
    note = "(out / 'times').open('a').write(f'{time.time()}\\n')"
    stamp = f"{note}; time.sleep(2); {note}"
    began = time.time()
    assert (
        run(before, job("one", stamp, about=about), job("two", stamp, about=about), on=parse_devices("cpu:1"))[0] == 0
    )
    first, ended, second, _ = map(float, (tmp_path / "times").read_text().split())
    assert (first - began >= 1.5) == waits and (second - ended >= 1.5) == waits


def test_what_the_command_itself_holds_is_not_a_job_s_memory(job, run, tmp_path):
    ballast = np.ones(300 * 2**20, np.uint8)
    run(job("one", "time.sleep(.5)"))
    assert ballast.all() and 0 < Manifest(tmp_path).read()["one"]["peak_memory_gib"] < 0.2


def test_a_job_waits_until_memory_is_free(job, tmp_path, monkeypatch):
    monkeypatch.setattr(of_pool, "available_gib", lambda: 5.0 if (tmp_path / "free").exists() else 1.0)
    pool = Pool([job("one")], TWO, Manifest(tmp_path), Screen(), memory_gib=4.0)
    assert pool._step() and not pool.running and pool.note == "one waits for memory: needs 4.0 GiB, 1.0 are free"
    (tmp_path / "free").touch()
    assert pool._step() and set(pool.running) == {"one"}
    wait_for(lambda: not pool._step())
    assert pool.states == {"one": FINISHED}


def test_the_machine_s_memory_is_read():
    available, total = slots.available_gib(), slots.total_gib()
    if available is None:
        pytest.skip("this system does not say")
    assert 0 < available <= total and 0 < slots.resident_gib(os.getpid()) < total


# --- What is shown ---


def test_the_time_left_is_that_of_such_jobs(job, tmp_path):
    jobs = [job(f"t{number}", about={"mode": "ema"}) for number in range(4)]
    pool = Pool(jobs, TWO, Manifest(tmp_path), Screen())
    assert time_left(pool) is None and "4 waiting; ETA -" in overview(pool)
    pool.finished.append(jobs[0].record() | {"seconds": 100.0})
    pool.states["t0"] = FINISHED
    assert time_left(pool) == 150.0 and "1 finished, 3 waiting; ETA 2:30" in overview(pool)
    assert clock(3723) == "1:02:03"


def test_a_terminal_gets_a_table_and_a_file_plain_lines(job, tmp_path):
    listed = tmp_path / "listed.json"
    listed.write_text(json.dumps([job("one", "time.sleep(1.5)", about={"steps": 7}).record()]))
    text = COMMAND.format(here=str(REPOSITORY), listed=str(listed), out=str(tmp_path))
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=side, stderr=side, env=os.environ | {"TERM": "xterm"}
    )
    os.close(side)
    shown = b""
    try:
        while chunk := os.read(main, 65536):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    os.close(main)
    assert process.wait(timeout=20) == 0 and b"0/7" in shown and "━".encode() in shown
    (tmp_path / "one" / "result.json").unlink()
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, timeout=30, env=os.environ | {"FORCE_COLOR": "1"}
    )
    assert done.returncode == 0 and b"\x1b" not in done.stdout and b"start" in done.stdout
