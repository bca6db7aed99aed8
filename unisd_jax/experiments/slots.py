"""The places where jobs run: a GPU or a few, chips of a TPU, a share of the cores; and the memory of the machine."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from unisd_jax.errors import ConfigError

# How many chips, in each direction of a host's grid, belong to so many of them (libtpu's names and forms).
TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
KIB, GIB = 2**10, 2**30


@dataclass(frozen=True)
class Slot:
    """One place for one job at a time. `environment` shows the job its devices and no others.

    `cores` are those that the job may use, all where there are none. `device`: whether it has what `Job.device` means.
    `exclusive`: no other command may use it meanwhile. `parts` are its devices, which another grouping has elsewhere.
    """

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] = ()
    device: bool = True
    is_cpu: bool = False
    exclusive: bool = True
    parts: tuple[str, ...] = ()


HERE = Slot("here", exclusive=False)  # what a scheduler has given to this process
BESIDE = Slot("cpu", {"JAX_PLATFORMS": "cpu"}, device=False, is_cpu=True)  # beside the GPUs or the TPU


def parse_devices(text: str | None) -> list[Slot]:
    """The slots of `--devices`: `0,1`, `0+1,2+3` (two GPUs a job), `tpu:0,1`, `cpu:2`; None: all GPUs, else the CPU.

    Raises:
      ConfigError: there are no such devices here.
    """
    if text is None:
        found = gpus()
        text = ",".join(found) if found else "cpu:1"
    kind, colon, names = text.partition(":")
    if kind == "cpu" and colon:
        return _cpu_slots(names)
    if colon and kind != "tpu":
        raise ConfigError(f"--devices is {text!r}, expected ids of GPUs such as 0,1, chips such as tpu:0,1 or cpu:2")
    groups = [tuple(group.split("+")) for group in (names if colon else text).split(",")]
    used = [name for group in groups for name in group]
    if not all(name.strip() == name != "" for name in used):
        raise ConfigError(f"--devices is {text!r}, which names no device; expected 0,1 or tpu:0,1 or cpu:2")
    if len(set(used)) < len(used):
        raise ConfigError(f"--devices is {text!r}, which names a device twice")
    return [(_tpu_slot if colon else _gpu_slot)(group) for group in groups] + [BESIDE]


def gpus() -> list[str]:
    """The ids of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name not in ("", "-1")]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


def require_gpus(slots: list[Slot]) -> None:
    """Refuses numbers of GPUs that this machine has not.

    Raises:
      ConfigError: as it says.
    """
    asked = [name for slot in slots for name in slot.environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    there = gpus() if asked else []
    for name in asked:
        if name.isdecimal() and name not in there:
            known = f"GPUs {', '.join(there)}" if there else "no GPU"
            raise ConfigError(f"--devices names GPU {name}, but this machine shows {known}; --devices cpu:1 is the CPU")


def _gpu_slot(names: tuple[str, ...]) -> Slot:
    parts = tuple(f"gpu{name}" for name in names)
    return Slot(f"gpu{'+'.join(names)}", {"CUDA_VISIBLE_DEVICES": ",".join(names)}, parts=parts)


def _tpu_slot(names: tuple[str, ...]) -> Slot:
    if len(names) not in TPU_BOUNDS:
        known = ", ".join(map(str, TPU_BOUNDS))
        raise ConfigError(f"--devices puts {len(names)} chips of a TPU together, expected {known} of them")
    environment = {"TPU_VISIBLE_CHIPS": ",".join(names), "TPU_PROCESS_BOUNDS": "1,1,1"}
    environment |= {"TPU_CHIPS_PER_PROCESS_BOUNDS": TPU_BOUNDS[len(names)]}
    return Slot(f"tpu{'+'.join(names)}", environment, parts=tuple(f"tpu{name}" for name in names))


def _cpu_slots(number: str) -> list[Slot]:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if not number.isdecimal() or not 1 <= int(number) <= len(cores):
        raise ConfigError(f"--devices is 'cpu:{number}', expected 1 to {len(cores)} jobs at a time on so many cores")
    shares = [cores[place :: int(number)] for place in range(int(number))]
    return [
        Slot(f"cpu{place}", {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(len(share))}, tuple(share), is_cpu=True)
        for place, share in enumerate(shares)
    ]


# --- Memory ---


def available_gib() -> float | None:
    """Memory that a new process can have, of the machine and of the control groups around this one; None: not known."""
    found = [_meminfo("MemAvailable"), *(limit - used for limit, used in _groups())]
    known = [amount for amount in found if amount is not None]
    return max(0, min(known)) / GIB if known else None


def total_gib() -> float | None:
    """All that there is to share out; None: not known."""
    known = [amount for amount in (_meminfo("MemTotal"), *(limit for limit, _ in _groups())) if amount is not None]
    return min(known) / GIB if known else None


def resident_gib(process_id: int) -> float:
    """What a process holds now; 0 where that cannot be told."""
    try:
        pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


def peak_gib(process_id: int) -> float | None:
    """The most that a process has held since its program was loaded; None where that cannot be told."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
        return next(int(line.split()[1]) * KIB / GIB for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, IndexError, ValueError):
        return None


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * KIB for line in lines if line.startswith(f"{name}:")), None)


def _groups() -> list[tuple[int, int]]:
    """(limit, used) of the control groups (version 2) with a limit; what files are cached there can be given back."""
    try:
        own = Path("/proc/self/cgroup").read_text().split("::")[1].strip().lstrip("/")
    except (OSError, IndexError):
        return []
    found = []
    for folder in (Path("/sys/fs/cgroup", own), *Path("/sys/fs/cgroup", own).parents):
        try:
            limit = int((folder / "memory.max").read_text())
            used = int((folder / "memory.current").read_text())
            cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no limit, or above the groups
            continue
        found.append((limit, used - int(cached.get("inactive_file", 0))))
    return found
