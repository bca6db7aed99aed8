"""What a run costs, with invented clocks, devices and GPU counters: nothing here depends on the machine."""

import json
import sys
from types import ModuleType, SimpleNamespace

import jax
import pytest

from unisd_jax import resources
from unisd_jax.config_options import ResourceOptions
from unisd_jax.resources import Meter, energy_text, known_watts, phase_rows, render

GPU = "NVIDIA H200"


@pytest.fixture
def clock(monkeypatch):
    """`clock.now` are the seconds that time.monotonic tells."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(resources.time, "monotonic", lambda: clock.now)
    return clock


def device(number=0, *, kind=GPU, platform="gpu", peak=None):
    stats = None if peak is None else {"peak_bytes_in_use": peak}
    return SimpleNamespace(
        local_hardware_id=number, device_kind=kind, platform=platform, memory_stats=lambda: stats, id=number
    )


@pytest.fixture
def set_devices(monkeypatch):
    """Gives jax these devices, the first `local` of them in this process."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed

    def set_them(devices, local=None):
        monkeypatch.setattr(jax, "devices", lambda: devices)
        monkeypatch.setattr(jax, "local_devices", lambda: devices[:local])

    return set_them


class FakeNvml(ModuleType):
    """NVML of a machine whose GPUs are called `names`; `joules` is what each has counted."""

    class NVMLError(Exception):
        pass

    def __init__(self, names):
        super().__init__("pynvml")
        self.names, self.joules, self.broken = names, [1e6 * (n + 1) for n in range(len(names))], None

    def nvmlInit(self):
        self._fail("init")

    def nvmlDeviceGetHandleByIndex(self, index):
        self._fail("handle")
        return index

    def nvmlDeviceGetHandleByUUID(self, name):
        return int(name.removeprefix("GPU-"))

    def nvmlDeviceGetName(self, handle):
        return self.names[handle]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self._fail("energy")
        return int(self.joules[handle] * 1000)

    def _fail(self, where):
        if self.broken == where:
            raise self.NVMLError(f"no {where}")


@pytest.fixture
def nvml(monkeypatch, set_devices):
    fake = FakeNvml([GPU] * 4)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def metered(clock, seconds=3600.0, *, devices=1, during=None, **constants):
    """The record of one phase of that many seconds and a million tokens."""
    meter = Meter(devices, ResourceOptions(**constants))
    with meter.phase("generation") as phase:
        clock.now += seconds
        phase.add(prompt_tokens=600_000, completion_tokens=400_000)
        if during is not None:
            during()
    return meter.record()


# --- time and tokens ---


def test_phases_add_up_and_an_inner_one_is_not_counted_twice(clock, set_devices):
    set_devices([device()])
    meter = Meter(1, ResourceOptions())
    clock.now += 50  # before any phase: counted nowhere
    with meter.phase("outer") as outer:
        clock.now += 1
        with meter.phase("inner") as inner:
            clock.now += 10
            inner.add(completion_tokens=5)
        clock.now += 2
        outer.add(prompt_tokens=3)
    clock.now += 50
    with meter.phase("inner") as inner:
        clock.now += 20
        inner.add(prompt_tokens=1, completion_tokens=7)
    record = meter.record()
    assert list(record["phases"]) == ["outer", "inner"]
    outer, inner = record["phases"]["outer"], record["phases"]["inner"]
    assert (outer["seconds"], outer["prompt_tokens"], outer["completion_tokens"]) == (3.0, 3, 0)
    assert (inner["seconds"], inner["prompt_tokens"], inner["completion_tokens"]) == (30.0, 1, 12)
    assert record["seconds"] == 33.0
    assert inner["tokens_per_second"] == pytest.approx(0.4)
    assert outer["tokens_per_second"] is None
    assert sum(phase["energy_kwh"] for phase in record["phases"].values()) == pytest.approx(record["energy_kwh"])


def test_a_block_that_raises_is_counted_and_closes_its_phase(clock, set_devices):
    set_devices([device()])
    meter = Meter(1, ResourceOptions())
    with meter.phase("outer"):
        with pytest.raises(ZeroDivisionError), meter.phase("inner"):
            clock.now += 4
            raise ZeroDivisionError
        clock.now += 1
    seconds = {name: phase["seconds"] for name, phase in meter.record()["phases"].items()}
    assert seconds == {"outer": 1.0, "inner": 4.0}


def test_a_phase_may_hold_itself_and_an_open_one_is_in_the_record(clock, set_devices):
    set_devices([device()])
    meter = Meter(1, ResourceOptions())
    with meter.phase("a"):
        clock.now += 1
        with meter.phase("a"):
            clock.now += 2
        assert meter.record()["seconds"] == 3.0
        clock.now += 4
    assert meter.record()["seconds"] == 7.0


def test_nothing_metered_divides_nothing_by_zero(clock, set_devices):
    set_devices([device()])
    meter = Meter(1, ResourceOptions())
    assert meter.record() | {"peak_memory_gib": 0} == {
        "phases": {}, "seconds": 0, "devices": 1, "device": GPU, "device_hours": 0.0, "peak_device_memory_gib": None,
        "peak_memory_gib": 0, "device_energy_kwh": 0.0, "energy_kwh": 0.0, "energy_source": "estimate",
        "estimated_energy_kwh": 0.0, "carbon_kg": 0.0, "kwh_per_million_tokens": None,
        "constants": {"device_watts": 700.0, "utilization": 0.7, "pue": 1.2, "carbon_g_per_kwh": 475.0},
        "note": "NVML does not count here (nvidia-ml-py is not installed)",
    }  # fmt: skip
    with meter.phase("instant") as phase:
        phase.add(completion_tokens=3)
    assert meter.record()["phases"]["instant"]["tokens_per_second"] is None
    assert meter.record()["kwh_per_million_tokens"] == 0.0
    assert render(meter.record())


# --- estimates ---


def test_vectors_of_the_specification(clock, set_devices):
    set_devices([device()])
    record = metered(clock)
    tokens = sum(record["phases"]["generation"][name] for name in ("prompt_tokens", "completion_tokens"))
    assert record["device_hours"] == pytest.approx(1.0)
    assert record["energy_kwh"] == record["estimated_energy_kwh"] == pytest.approx(0.588)
    assert record["device_energy_kwh"] == pytest.approx(0.49)
    assert record["carbon_kg"] == pytest.approx(0.2793)
    assert record["kwh_per_million_tokens"] / 1000 == pytest.approx(0.000588)  # per thousand
    assert record["carbon_kg"] * 1000 / tokens * 1000 == pytest.approx(0.2793)
    assert tokens / record["seconds"] == pytest.approx(277.78, abs=0.005)
    assert record["phases"]["generation"]["tokens_per_second"] == pytest.approx(400_000 / 3600)
    assert record["energy_source"] == "estimate"
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_each_constant_counts_and_so_does_the_size_of_the_mesh(clock, set_devices):
    set_devices([device(n) for n in range(8)])
    constants = {"device_watts": 350.0, "utilization": 0.5, "pue": 1.5, "carbon_g_per_kwh": 100.0}
    record = metered(clock, devices=4, **constants)  # four of eight: the others are not the run's
    assert record["device_hours"] == 4.0
    assert record["energy_kwh"] == pytest.approx(4 * 0.35 * 0.5 * 1.5)
    assert record["carbon_kg"] == pytest.approx(4 * 0.35 * 0.5 * 1.5 * 0.1)
    assert record["constants"] == constants


@pytest.mark.parametrize(
    ("kind", "watts"),
    [
        ("NVIDIA H200", 700),
        ("NVIDIA H200 NVL", 600),
        ("NVIDIA H100 80GB HBM3", 700),
        ("NVIDIA H100 PCIe", 350),
        ("NVIDIA A100-SXM4-80GB", 400),
        ("NVIDIA A100 80GB PCIe", 300),
        ("NVIDIA GH200 480GB", None),
        ("TPU v5 lite", None),
        ("Abacus 1", None),
    ],
)
def test_watts_of_devices(kind, watts):
    assert known_watts(kind) == watts


def test_cpu_devices_share_the_threads_of_the_process(monkeypatch, clock, set_devices):
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert known_watts("cpu") == 48.0
    set_devices([device(n, kind="cpu", platform="cpu") for n in range(8)])
    for devices in (1, 4):  # simulated devices are the same processor, however many there are
        record = metered(clock, devices=devices)
        assert record["energy_kwh"] == pytest.approx(0.048 * 0.7 * 1.2)
        assert record["note"] is None


def test_an_unknown_device_has_no_energy_and_says_which_option_gives_it(clock, set_devices):
    set_devices([device(kind="Abacus 1", platform="abacus")])
    record = metered(clock)
    assert record["energy_source"] == "unknown"
    names = ("device_energy_kwh", "energy_kwh", "estimated_energy_kwh", "carbon_kg", "kwh_per_million_tokens")
    assert [record[name] for name in names] == [None] * 5
    assert record["phases"]["generation"]["energy_kwh"] is None
    assert record["note"] == "the watts of 'Abacus 1' are not known: set resources.device_watts"
    assert energy_text(record) == f"Energy not measured, and no estimate: {record['note']}."
    assert metered(clock, device_watts=10.0)["energy_kwh"] == pytest.approx(0.01 * 0.7 * 1.2)


# --- NVML ---


def test_energy_is_what_the_gpus_count_during_the_phases(clock, set_devices, nvml):
    set_devices([device(n) for n in range(4)])
    meter = Meter(2, ResourceOptions())
    nvml.joules = [joules + 500.0 for joules in nvml.joules]  # before any phase
    with meter.phase("outer"):
        nvml.joules[0] += 1e5
        nvml.joules[3] += 9e9  # not a device of the mesh
        with meter.phase("inner"):
            nvml.joules[1] += 2.6e5
            clock.now += 3600
    record = meter.record()
    assert record["energy_source"] == "nvml"
    assert record["device_energy_kwh"] == pytest.approx(0.1)
    assert record["energy_kwh"] == pytest.approx(0.12)
    assert record["carbon_kg"] == pytest.approx(0.12 * 0.475)
    assert record["phases"]["outer"]["energy_kwh"] == pytest.approx(0.12 * 10 / 36)
    assert record["phases"]["inner"]["energy_kwh"] == pytest.approx(0.12 * 26 / 36)
    assert record["estimated_energy_kwh"] == pytest.approx(2 * 0.588)
    assert record["note"] is None
    assert energy_text(record) == "0.12 kWh (2 devices, counted by NVML x PUE 1.2), 0.057 kg CO2e at 475 g/kWh."


@pytest.mark.parametrize("visible", ["2,0", " GPU-2 , GPU-0"])
def test_gpus_are_those_that_cuda_visible_devices_lists(monkeypatch, clock, set_devices, nvml, visible):
    set_devices([device(n) for n in range(2)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def draw():
        nvml.joules[2] += 3.6e6
        nvml.joules[0] += 9e9

    assert metered(clock, during=draw)["device_energy_kwh"] == pytest.approx(1.0)


def test_gpus_of_other_processes_are_taken_to_draw_the_same(clock, set_devices, nvml):
    set_devices([device(n % 2) for n in range(4)], local=2)

    def draw():
        nvml.joules[:2] = [joules + 3.6e6 for joules in nvml.joules[:2]]

    record = metered(clock, devices=4, during=draw)
    assert record["device_energy_kwh"] == pytest.approx(4.0)
    assert record["note"] == "measured on 2 of 4 devices and scaled to all of them"
    assert record["note"] in energy_text(record)


@pytest.mark.parametrize(
    ("broken", "note"),
    [
        ("init", "NVML does not count here (no init)"),
        ("handle", "NVML does not count here (no handle)"),
        ("energy", "NVML does not count here (no energy)"),
    ],
)
def test_without_counters_there_is_the_estimate_and_why(clock, set_devices, nvml, broken, note):
    nvml.broken = broken
    set_devices([device()])
    record = metered(clock)
    assert (record["energy_source"], record["note"]) == ("estimate", note)
    assert record["energy_kwh"] == pytest.approx(0.588)
    assert "estimate" in energy_text(record) and note in energy_text(record)


def test_counters_that_fail_later_leave_the_estimate_of_the_whole_run(clock, set_devices, nvml):
    set_devices([device()])

    def fail():
        nvml.broken = "energy"

    record = metered(clock, during=fail)
    assert record["energy_source"] == "estimate"
    assert record["energy_kwh"] == record["phases"]["generation"]["energy_kwh"] == pytest.approx(0.588)
    assert record["note"] == "NVML stopped counting (no energy)"


def test_a_gpu_that_nvml_calls_otherwise_is_not_measured(clock, set_devices, nvml):
    nvml.names = ["NVIDIA T4"] * 4  # as where CUDA and NVML number the GPUs differently
    set_devices([device()])
    record = metered(clock)
    assert record["energy_source"] == "estimate"
    assert "GPU 0 is 'NVIDIA T4', which jax calls 'NVIDIA H200'" in record["note"]


def test_nvml_is_not_asked_where_the_devices_are_no_gpus(clock, set_devices, nvml):
    set_devices([device(kind="cpu", platform="cpu")])
    assert metered(clock)["energy_source"] == "estimate"


# --- memory ---


def test_peak_memory_is_that_of_the_devices_of_the_mesh_in_this_process(clock, set_devices):
    set_devices([device(n, peak=(n + 1) * 2**30) for n in range(4)], local=3)
    assert metered(clock, devices=2)["peak_device_memory_gib"] == [1.0, 2.0]
    assert metered(clock, devices=4)["peak_device_memory_gib"] == [1.0, 2.0, 3.0]
    set_devices([device(0, peak=1), device(1)])
    assert metered(clock, devices=2)["peak_device_memory_gib"] is None


def test_on_this_machine():
    meter = Meter(1, ResourceOptions())
    with meter.phase("generation"):
        jax.numpy.ones(10).sum().block_until_ready()
    record = meter.record()
    assert 0.02 < record["peak_memory_gib"] < 2**10
    assert record["device"] == jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        assert record["peak_device_memory_gib"] is None
        assert record["energy_source"] == "estimate" and record["energy_kwh"] > 0.0


# --- for a reader ---


def test_the_text_of_an_estimate_shows_its_constants(clock, set_devices):
    set_devices([device(kind="cpu", platform="cpu", peak=2**31)])
    record = metered(clock, device_watts=700.0) | {"peak_memory_gib": 1.5}
    assert render(record) == [
        "| phase | seconds | prompt tokens | completion tokens | tokens/s |",
        "| --- | --- | --- | --- | --- |",
        "| generation | 3600.0 | 600,000 | 400,000 | 111.1 |",
        "",
        "0.588 kWh (estimate: 1 device x 700 W x utilisation 0.7 x PUE 1.2), 0.279 kg CO2e at 475 g/kWh.",
        "",
        "Peak memory of the process 1.50 GiB, of each device 2.00 GiB.",
    ]


def test_what_a_phase_has_not_is_a_dash(clock, set_devices):
    set_devices([device()])
    meter = Meter(1, ResourceOptions())
    with meter.phase("setup"):
        clock.now += 1.25
    assert phase_rows(meter.record()) == [["setup", "1.2", "-", "-", "-"]]
    assert "2 devices" in energy_text(meter.record() | {"devices": 2})
