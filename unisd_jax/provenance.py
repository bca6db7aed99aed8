"""What a number was measured with, for every file that holds numbers."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """What a number was measured with: versions, device, commit."""
    names = (
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
        "transformers",
        "unisd-jax",
    )
    versions = {"python": platform.python_version()} | {name: _version(name) for name in names}
    device = jax.devices()[0]
    return {
        "versions": versions,
        "device": f"{len(jax.devices())} x {device.device_kind} ({device.platform}), {os.cpu_count()} CPU cores",
        "commit": _commit(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
