"""What a run costs: time and tokens by phase, peak memory, energy, carbon.

Energy is what the GPUs themselves have counted (NVML) where they do, and is called an estimate everywhere else.
"""

import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import jax

from unisd_jax.config_options import ResourceOptions
from unisd_jax.markdown import table
from unisd_jax.sandbox import usable_cpus

# Watts of one device under full load, the most that the makers' data sheets name; by the start of jax's device_kind,
# what is more special first. TPUs have no such sheets.
WATTS = {
    "NVIDIA H200 NVL": 600.0,
    "NVIDIA H200": 700.0,
    "NVIDIA H100 NVL": 400.0,
    "NVIDIA H100 PCIe": 350.0,
    "NVIDIA H100": 700.0,
    "NVIDIA A100-SXM4": 400.0,
    "NVIDIA A100 80GB PCIe": 300.0,
    "NVIDIA A100-PCIE-40GB": 250.0,
}
# An assumption: between 3.1 (a server's Xeon Platinum 8480+, 350 W for 112 threads) and 6.6 (a desktop's Ryzen 7 7700X,
# 105 W for 16). What jax calls CPU devices share the threads of the process.
WATTS_PER_CPU_THREAD = 4.0

_JOULES_PER_KWH = 3.6e6
_HEADINGS = ("phase", "seconds", "prompt tokens", "completion tokens", "tokens/s")


@dataclass
class Phase:
    """What one phase has used so far; `joules` are those of this process' devices, 0 where they do not count."""

    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    joules: float = 0.0

    def add(self, *, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """Counts tokens that this phase has read and written."""
        self.prompt_tokens += int(prompt_tokens)
        self.completion_tokens += int(completion_tokens)


class Meter:
    """Adds up what each phase of a run uses.

    Make it after the processes of the run have found each other: it asks jax for its devices.
    """

    def __init__(self, devices: int, constants: ResourceOptions) -> None:
        """Watches the first `devices` devices, which are those of a mesh of that size, in all processes together."""
        self._count, self._constants = devices, constants
        self._kind = jax.devices()[0].device_kind
        here = jax.local_devices()
        self._local = [device for device in jax.devices()[:devices] if device in here]
        given = constants.device_watts
        self._watts = known_watts(self._kind, len(self._local)) if given is None else given
        self._phases: dict[str, Phase] = {}
        self._open: list[Phase] = []
        self._note: str | None = None
        self._counter = self._start_counter()
        self._last = self._read()

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """The block is part of this phase, also when it raises; within another phase, it is not part of that one.

        A name may come again: its blocks add up.
        """
        self._settle()
        phase = self._phases.setdefault(name, Phase())
        self._open.append(phase)
        try:
            yield phase
        finally:
            self._settle()
            self._open.pop()

    def seconds(self, name: str) -> float:
        """What a phase has taken so far."""
        self._settle()
        return self._phases[name].seconds if name in self._phases else 0.0

    def record(self) -> dict[str, Any]:
        """All of it, as JSON has it; what was not measured or cannot be known is None.

        "devices" and all energies are those of the whole mesh, tokens those that were added in this process.
        "device_energy_kwh" is what the devices drew, "energy_kwh" that times PUE, and "estimated_energy_kwh" the latter
        by the constants alone, for comparison where the devices count. "constants" are those that were used.
        """
        self._settle()
        phases, constants = self._phases.values(), self._constants
        seconds = sum(phase.seconds for phase in phases)
        tokens = sum(phase.prompt_tokens + phase.completion_tokens for phase in phases)
        drawn = self._drawn(seconds, sum(phase.joules for phase in phases))
        energy = _times(drawn, constants.pue)
        return {
            "phases": {name: self._phase_record(phase) for name, phase in self._phases.items()},
            "seconds": seconds,
            "devices": self._count,
            "device": self._kind,
            "device_hours": seconds / 3600 * self._count,
            "peak_device_memory_gib": peak_device_memory_gib(self._local),
            "peak_memory_gib": peak_memory_gib(),
            "device_energy_kwh": drawn,
            "energy_kwh": energy,
            "energy_source": "nvml" if self._counter else "unknown" if energy is None else "estimate",
            "estimated_energy_kwh": _times(self._estimate(seconds), constants.pue),
            "constants": asdict(constants) | {"device_watts": self._watts},
            "carbon_kg": _times(energy, constants.carbon_g_per_kwh / 1000),
            "kwh_per_million_tokens": _ratio(_times(energy, 1e6), tokens),
            "note": self._describe(),
        }

    def _settle(self) -> None:
        """Gives time and energy since the last call to the innermost phase that is open."""
        now = self._read()
        if self._open:
            self._open[-1].seconds += now[0] - self._last[0]
            self._open[-1].joules += now[1] - self._last[1]
        self._last = now

    def _read(self) -> tuple[float, float]:
        """Seconds and joules on clocks that only go up."""
        joules = 0.0
        if self._counter:
            try:
                joules = self._counter.joules()
            except self._counter.error as error:
                self._counter, self._note = None, f"NVML stopped counting ({error})"
        return time.monotonic(), joules

    def _start_counter(self) -> "_EnergyCounter | None":
        if not self._local or self._local[0].platform != "gpu":
            return None
        try:
            return _EnergyCounter(self._local)
        except _NoCounter as error:
            self._note = f"NVML does not count here ({error})"
            return None

    def _drawn(self, seconds: float, joules: float) -> float | None:
        """kWh of all devices; those of other processes are taken to draw what those of this one do."""
        if self._counter is None:
            return self._estimate(seconds)
        return joules / _JOULES_PER_KWH * self._count / len(self._local)

    def _estimate(self, seconds: float) -> float | None:
        """kWh of all devices, by the constants."""
        return _times(self._watts, seconds / 3600 * self._count / 1000 * self._constants.utilization)

    def _phase_record(self, phase: Phase) -> dict[str, Any]:
        return {
            "seconds": phase.seconds,
            "prompt_tokens": phase.prompt_tokens,
            "completion_tokens": phase.completion_tokens,
            "tokens_per_second": _ratio(phase.completion_tokens or None, phase.seconds),
            "energy_kwh": _times(self._drawn(phase.seconds, phase.joules), self._constants.pue),
        }

    def _describe(self) -> str | None:
        notes = [self._note] if self._note else []
        if self._counter and len(self._local) < self._count:
            notes.append(f"measured on {len(self._local)} of {self._count} devices and scaled to all of them")
        if not self._counter and self._watts is None:
            notes.append(f"the watts of {self._kind!r} are not known: set resources.device_watts")
        return "; ".join(notes) or None


def known_watts(device_kind: str, local_devices: int = 1) -> float | None:
    """Watts of one device under full load; None where they are not known.

    Args:
      device_kind: jax's name of it.
      local_devices: devices of this process that share its CPU threads, where they are CPU devices.
    """
    if device_kind.lower() == "cpu":
        return WATTS_PER_CPU_THREAD * usable_cpus() / max(local_devices, 1)
    return next((watts for name, watts in WATTS.items() if device_kind.startswith(name)), None)


def peak_device_memory_gib(devices: Sequence[jax.Device]) -> list[float] | None:
    """The most memory that jax has had allocated on each of these devices; None where it does not count, as on CPU."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    return None if None in peaks or not peaks else [peak / 2**30 for peak in peaks]


def peak_memory_gib() -> float:
    """The most memory of the machine, as opposed to its devices, that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def render(record: dict[str, Any]) -> list[str]:
    """Markdown lines of `Meter.record()`: a table of phases and sentences on energy, carbon and memory."""
    lines = table(_HEADINGS, phase_rows(record)).splitlines()
    return [*lines, *([""] if lines else []), energy_text(record), "", _memory_text(record)]


def phase_rows(record: dict[str, Any]) -> list[list[str]]:
    """Per phase its name, seconds, prompt tokens, completion tokens, completion tokens per second."""
    rows = []
    for name, phase in record["phases"].items():
        speed = phase["tokens_per_second"]
        tokens = (f"{phase[key]:,}" if phase[key] else "-" for key in ("prompt_tokens", "completion_tokens"))
        rows.append([name, f"{phase['seconds']:.1f}", *tokens, "-" if speed is None else f"{speed:.1f}"])
    return rows


def energy_text(record: dict[str, Any]) -> str:
    """One sentence on energy and carbon with every constant in it; says "estimate" unless the devices counted."""
    constants, count, note = record["constants"], record["devices"], record["note"]
    if record["energy_source"] == "unknown":
        return f"Energy not measured, and no estimate: {note}."
    how = f"{count} device{'s' * (count != 1)}"
    if record["energy_source"] == "nvml":
        how = f"{how}, counted by NVML"
    else:
        how = f"estimate: {how} x {constants['device_watts']:g} W x utilisation {constants['utilization']:g}"
    return (
        f"{record['energy_kwh']:.3g} kWh ({how} x PUE {constants['pue']:g}), {record['carbon_kg']:.3g} kg CO2e at "
        f"{constants['carbon_g_per_kwh']:g} g/kWh{f'; {note}' if note else ''}."
    )


def _memory_text(record: dict[str, Any]) -> str:
    text = f"Peak memory of the process {record['peak_memory_gib']:.2f} GiB"
    peaks = record["peak_device_memory_gib"]
    return f"{text}, of each device {', '.join(f'{peak:.2f}' for peak in peaks)} GiB." if peaks else f"{text}."


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _ratio(value: float | None, divisor: float) -> float | None:
    return None if value is None or not divisor else value / divisor


class _NoCounter(Exception):
    """Why the energy of these devices is not counted."""


class _EnergyCounter:
    """Joules that GPUs have drawn since their driver was loaded, whichever program used them."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        try:
            import pynvml
        except ImportError:
            raise _NoCounter("nvidia-ml-py is not installed") from None
        self._nvml, self.error = pynvml, pynvml.NVMLError
        try:
            pynvml.nvmlInit()
            self._handles = [self._handle(device) for device in devices]
            self.joules()
        except pynvml.NVMLError as error:
            raise _NoCounter(str(error)) from None

    def joules(self) -> float:
        """Of all the devices together."""
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles) / 1000

    def _handle(self, device: jax.Device) -> Any:
        """NVML numbers all GPUs of the machine, CUDA those that CUDA_VISIBLE_DEVICES lists, in its order."""
        number, visible = device.local_hardware_id, os.environ.get("CUDA_VISIBLE_DEVICES")
        name = visible.split(",")[number].strip() if visible else str(number)
        by_number = name.isdigit()
        handle = (
            self._nvml.nvmlDeviceGetHandleByIndex(int(name))
            if by_number
            else self._nvml.nvmlDeviceGetHandleByUUID(name)
        )
        # CUDA may number GPUs of different kinds in another order, and a slice of a GPU has no counter of its own.
        found = self._nvml.nvmlDeviceGetName(handle)
        if found != device.device_kind:
            raise _NoCounter(f"GPU {name} is {found!r}, which jax calls {device.device_kind!r}")
        return handle
