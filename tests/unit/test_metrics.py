"""metrics.jsonl survives crashes, the screen stays readable, and wandb cannot kill a run."""

import io
import json
import re
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from unisd_jax import metrics
from unisd_jax.errors import UserError
from unisd_jax.metrics import COLUMNS, EVALUATION_COLUMNS, MetricsWriter, read_metrics
from unisd_jax.report import CURVES, PROGRESS_CURVES

VALUES = {
    "loss": 0.5,
    "divergence": 0.25,
    "entropy": 1.5,
    "completion_length": 12.0,
    "tokens_per_second": 64.0,
}
DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def write(run_dir, steps, **options):
    with MetricsWriter(run_dir, total_steps=40, name="tiny", **options) as writer:
        for step in steps:
            writer.log(step, VALUES | {"loss": 1.0 / step})


class Terminal(io.StringIO):
    def isatty(self):
        return True


# --- metrics.jsonl ---


def test_a_record_is_on_disk_when_log_returns(tmp_path):
    with MetricsWriter(tmp_path / "new" / "run", total_steps=2, name="tiny") as writer:
        writer.log(1, VALUES)
        assert read_metrics(tmp_path / "new" / "run" / "metrics.jsonl") == [{"step": 1, **VALUES}]


def test_non_finite_values_become_null_and_are_listed(tmp_path):
    with MetricsWriter(tmp_path, total_steps=2, name="tiny") as writer:
        writer.log(1, {"loss": float("nan"), "entropy": 2.0, "sampler_gap_max": float("-inf")})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in line and "Infinity" not in line
    expected = {"step": 1, "loss": None, "entropy": 2.0, "sampler_gap_max": None}
    assert json.loads(line) == expected | {"nonfinite": ["loss", "sampler_gap_max"]}


def test_values_may_be_arrays_of_one_number_and_integers_stay_integers(tmp_path):
    with MetricsWriter(tmp_path, total_steps=2, name="tiny") as writer:
        writer.log(np.int64(1), {"loss": jnp.bfloat16(0.5), "policy_version": jnp.int32(3), "entropy": np.float32(2)})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record == {"step": 1, "loss": 0.5, "policy_version": 3, "entropy": 2.0}
    assert isinstance(record["policy_version"], int)


@pytest.mark.parametrize(
    "values", [{"loss": np.ones(2)}, {"loss": None}, {"loss": "0.5"}, {"step": 1.0}, {"nonfinite": 1}]
)
def test_what_is_no_number_or_has_a_reserved_name_is_refused(tmp_path, values):
    with (
        MetricsWriter(tmp_path, total_steps=2, name="tiny") as writer,
        pytest.raises(ValueError, match="metric"),
    ):
        writer.log(1, values)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_truncate_after_drops_later_steps_and_the_half_written_line(tmp_path):
    write(tmp_path, range(1, 6))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 6, "lo')
    with MetricsWriter(tmp_path, total_steps=40, name="tiny") as writer:
        writer.truncate_after(3)
        writer.log(4, VALUES)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
    assert read_metrics(path)[2]["loss"] == 1 / 3
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_before_the_first_step_forgets_everything_and_without_a_file_does_nothing(tmp_path):
    with MetricsWriter(tmp_path, total_steps=40, name="tiny") as writer:
        writer.truncate_after(0)
    write(tmp_path, [1, 2])
    with MetricsWriter(tmp_path, total_steps=40, name="tiny") as writer:
        writer.truncate_after(0)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_truncation_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    write(tmp_path, range(1, 6))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def die(*_):
        raise KeyboardInterrupt

    with MetricsWriter(tmp_path, total_steps=40, name="tiny") as writer:
        monkeypatch.setattr("os.replace", die)
        with pytest.raises(KeyboardInterrupt):
            writer.truncate_after(2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("cut", [b'{"step": 3, "loss": 0.', b'{"step": 3}', '{"step": 3, "é'.encode()[:-1]])
def test_appending_never_glues_to_a_line_that_a_crash_cut_short(tmp_path, cut):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + cut)
    write(tmp_path, [4])
    whole = [3] if cut.endswith(b"}") else []
    assert [record["step"] for record in read_metrics(path)] == [1, 2, *whole, 4]


def test_other_hosts_write_nothing(tmp_path, capsys):
    with MetricsWriter(tmp_path / "run", total_steps=2, name="tiny", is_main=False, wandb={"project": "p"}) as writer:
        writer.truncate_after(0)
        writer.log(1, VALUES)
        writer.message("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


# --- read_metrics ---


def test_read_leaves_out_a_half_written_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss"')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    path.write_text("")
    assert read_metrics(path) == []


@pytest.mark.parametrize("line", ["{oops", "", "[1, 2]", '{"loss": 1.0}', '{"step": "2"}'])
def test_read_names_the_line_that_is_no_record(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: found"):
        read_metrics(path)


def test_read_without_a_file(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl is not there"):
        read_metrics(tmp_path / "metrics.jsonl")


# --- The screen ---


def test_plain_output_is_one_header_and_aligned_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # CI systems set it; it must not bring escape codes into a log
    with MetricsWriter(tmp_path, total_steps=400, name="tiny [bold]") as writer:
        writer.log(9, VALUES | {"loss": 12345.678})
        writer.message("saved [9]")
        writer.log(10, {"loss": float("nan"), "entropy": -1.23456e-05})
    out, err = capsys.readouterr()
    assert "\x1b" not in out and "\r" not in out and err == ""
    title, header, first, message, second = out.splitlines()
    assert (title, message) == ("tiny [bold]", "saved [9]")
    assert header.split() == ["step", "loss", "divergence", "entropy", "length", "tokens/s", "ETA"]
    assert first.split() == ["9/400", "1.235e+04", "0.25", "1.5", "12", "64", "-"]
    assert second.split()[:6] == ["10/400", "nan", "-", "-1.235e-05", "-", "-"]
    assert len(header) == len(first) == len(second)


def test_eta_is_the_median_step_time_times_the_steps_left(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 130.0, 132.0, 134.0, 136.0])  # the second step took long, as when something compiles
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    write(tmp_path, [1, 2, 3, 4, 40])
    shown = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert shown == ["-", "19:00", "9:52", "1:12", "0:00"]


def test_eta_beyond_an_hour(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 190.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    write(tmp_path, [1, 2])
    assert capsys.readouterr().out.splitlines()[-1].endswith(" 2:00:20")


def use_terminal(monkeypatch, lines=40, term="xterm"):
    """Called in the test itself: pytest puts its own stdout in place after the fixtures are made."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": term, "COLUMNS": "100", "LINES": str(lines)}.items():
        monkeypatch.setenv(name, value)
    return stream


def test_a_terminal_shows_one_table_with_the_last_rows(tmp_path, monkeypatch):
    terminal = use_terminal(monkeypatch)
    write(tmp_path, range(1, 21))
    assert sys.stdout is terminal  # what the live display redirects is given back
    final = terminal.getvalue().rsplit("tiny", 1)[1]
    assert re.findall(r"(\d+)/40", final) == [str(step) for step in range(9, 21)]
    assert all(heading in final for heading in ("loss", "divergence", "entropy", "length", "tokens/s", "ETA"))


def test_a_low_terminal_keeps_the_newest_row(tmp_path, monkeypatch):
    terminal = use_terminal(monkeypatch, lines=10)
    write(tmp_path, range(1, 21))
    final = terminal.getvalue().rsplit("tiny", 1)[1]
    assert re.findall(r"(\d+)/40", final) == ["17", "18", "19", "20"]


def test_messages_stand_above_the_table_and_are_not_markup(tmp_path, monkeypatch):
    terminal = use_terminal(monkeypatch)
    with MetricsWriter(tmp_path, total_steps=40, name="tiny") as writer:
        writer.log(1, VALUES)
        writer.message("saved [step 1]")
    text = terminal.getvalue()
    assert text.count("saved [step 1]") == 1
    assert text.index("saved [step 1]") < text.rindex("1/40")


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_gets_plain_lines(tmp_path, monkeypatch, term):
    terminal = use_terminal(monkeypatch, term=term)
    write(tmp_path, [1])
    assert "\x1b" not in terminal.getvalue() and "1/40" in terminal.getvalue()


def test_an_exception_passes_through_and_stops_the_table(tmp_path, monkeypatch):
    terminal = use_terminal(monkeypatch)
    with (
        pytest.raises(RuntimeError, match="boom"),
        MetricsWriter(tmp_path, total_steps=40, name="tiny") as writer,
    ):
        writer.log(1, VALUES)
        raise RuntimeError("boom")
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is visible again
    writer.close()
    writer.log(2, VALUES)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


# --- wandb ---


class FakeRun:
    def __init__(self, fail_at=None):
        self.logged, self.exit_code, self.fail_at = [], None, fail_at

    def log(self, values, step):
        if step == self.fail_at:
            raise ConnectionError("lost\nmore lines")
        self.logged.append((step, values["loss"]))

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def fake_wandb(monkeypatch):
    """A module whose `init` gives what stands in `outcomes`, one after the other, raising exceptions."""
    module = types.ModuleType("wandb")
    module.outcomes, module.calls = [], []

    def init(**arguments):
        module.calls.append(arguments)
        outcome = module.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_every_step_and_the_configuration(tmp_path, fake_wandb):
    run = FakeRun()
    fake_wandb.outcomes = [run]
    write(tmp_path, [1, 2], wandb={"project": "p", "config": {"seed": 0}})
    expected = {"project": "p", "config": {"seed": 0}, "name": "tiny", "dir": str(tmp_path)}
    assert fake_wandb.calls == [expected]
    assert run.logged == [(1, 1.0), (2, 0.5)]
    assert run.exit_code == 0


def test_wandb_hears_of_a_failed_run(tmp_path, fake_wandb):
    run = FakeRun()
    fake_wandb.outcomes = [run]
    with (
        pytest.raises(RuntimeError),
        MetricsWriter(tmp_path, total_steps=1, name="t", wandb={"project": "p"}),
    ):
        raise RuntimeError
    assert run.exit_code == 1


def test_wandb_without_network_goes_offline_and_says_so_once(tmp_path, fake_wandb, capsys):
    run = FakeRun()
    fake_wandb.outcomes = [ConnectionError("no such host"), run]
    write(tmp_path, [1, 2], wandb={"project": "p"})
    assert fake_wandb.calls[1]["mode"] == "offline"
    assert len(run.logged) == 2
    out = capsys.readouterr().out
    assert out.count("wandb did not start (no such host); it logs offline into") == 1
    assert "wandb failed" not in out


def test_wandb_that_cannot_even_go_offline_is_left_out(tmp_path, fake_wandb, capsys):
    fake_wandb.outcomes = [ConnectionError("no such host"), OSError("disk full")]
    write(tmp_path, [1, 2], wandb={"project": "p"})
    assert "wandb failed (disk full) and is off from here on" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_wandb_that_fails_in_the_middle_is_left_out(tmp_path, fake_wandb, capsys):
    run = FakeRun(fail_at=2)
    fake_wandb.outcomes = [run]
    write(tmp_path, [1, 2, 3], wandb={"project": "p"})
    assert run.logged == [(1, 1.0)] and run.exit_code is None
    assert capsys.readouterr().out.count("wandb failed (lost) and is off") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_wandb_that_cannot_finish_does_not_fail_the_run(tmp_path, fake_wandb, monkeypatch, capsys):
    def finish(self, exit_code):
        raise TimeoutError

    monkeypatch.setattr(FakeRun, "finish", finish)
    fake_wandb.outcomes = [FakeRun()]
    write(tmp_path, [1], wandb={"project": "p"})
    assert "wandb failed (TimeoutError)" in capsys.readouterr().out


@pytest.mark.parametrize("found", [None, types.ModuleType("wandb")], ids=["no package", "folder of old runs"])
def test_wandb_not_installed_names_the_option_and_the_extra(tmp_path, monkeypatch, found):
    monkeypatch.setitem(sys.modules, "wandb", found)
    with pytest.raises(UserError, match=r"logging\.wandb.*unisd_jax\[wandb\]"):
        MetricsWriter(tmp_path, total_steps=2, name="tiny", wandb={"project": "p"})


# --- docs/metrics.md ---


def test_every_metric_that_is_shown_or_drawn_is_documented():
    rows = re.findall(r"^\| (`[^|]+) \|", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    drawn = CURVES | PROGRESS_CURVES
    used = {*COLUMNS.values(), *EVALUATION_COLUMNS.values(), *(name for curves in drawn.values() for name in curves)}
    assert used <= documented


# --- TensorBoard ---


def events(folder):
    """{name: [(step, value)]} of the event files in a folder, oldest first, without those that a later start purges."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found = {}
    for file in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, place = file.read_bytes(), 0
        while place < len(data):
            length = int.from_bytes(data[place : place + 8], "little")
            body = data[place + 12 : place + 12 + length]
            assert int.from_bytes(data[place + 12 + length : place + 16 + length], "little") == masked_crc32c(body)
            event, place = Event.FromString(body), place + 16 + length
            if event.HasField("session_log"):
                found = {name: [pair for pair in pairs if pair[0] < event.step] for name, pairs in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_gets_the_same_names_and_a_resumed_run_replaces_what_it_repeats(tmp_path):
    write(tmp_path, [1, 2, 3], tensorboard=True)
    write(tmp_path, [3, 4], tensorboard=True)
    (line, *_) = read_metrics(tmp_path / "metrics.jsonl")
    found = events(tmp_path / "tensorboard")
    assert set(found) == set(line) - {"step"}
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]


def test_tensorboard_that_is_not_installed_is_said_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="logging.tensorboard is true and the package tensorboardX is not installed"):
        MetricsWriter(tmp_path, total_steps=1, name="t", tensorboard=True)
