"""Compiled train steps, counted: one for each shape of a batch, kept on disk for the next run."""

import dataclasses
import functools
import hashlib
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from unisd_jax.experiment import Experiment
from unisd_jax.parallel.sharding import jit_step
from unisd_jax.step import train_step
from unisd_jax.types import TrainState, Views


class StepPrograms:
    """The train step, compiled when a batch of a new shape comes; `say` receives a line each time."""

    def __init__(self, experiment: Experiment, state: TrainState, *, say: Callable[[str], None]):
        self._experiment, self._say = experiment, say
        self._programs: dict[Any, Any] = {}
        self._steps = {audit: jit_step(_step(experiment, audit), state, experiment.mesh) for audit in (False, True)}
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._programs)

    def run(self, state: TrainState, views: Views) -> tuple[TrainState, dict[str, Any]]:
        """One update; `state`'s memory is reused."""
        budget, every = self._experiment.settings.budget, self._experiment.config.objective.agreement.budget.audit_steps
        audit = budget is not None and every > 0 and int(state.step) % every == 0
        key = audit, tuple(leaf.shape for leaf in jax.tree.leaves(views))
        if key not in self._programs:
            started = time.monotonic()
            traced = self._steps[audit].lower(state, self._experiment.base, views)
            self._programs[key] = traced.compile()
            seconds = time.monotonic() - started
            self.seconds += seconds
            self._say(f"compiled the train step for {describe(views)} in {seconds:.1f} s (program {len(self)})")
        return self._programs[key](state, self._experiment.base, views)


def describe(views: Views) -> str:
    """A batch's shape in words."""
    rows, length = views.completions.ids.shape
    prompts = {"student": views.student, "teacher": views.teacher, "contexts": views.contexts}
    prompts["negative"] = views.negative
    lengths = ", ".join(f"{name} {view.ids.shape[-1]}" for name, view in prompts.items() if view is not None)
    return f"{rows} completions of {length} tokens after prompts of {lengths}"


def use_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs in `folder` for later runs; None, or a cache that the environment names, changes nothing.

    Programs for CPUs stand apart by the instructions they may use: storage can be shared by different machines.
    """
    if folder is None or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    path = Path(folder)
    if jax.default_backend() == "cpu":
        path = path / f"{platform.machine()}-{hashlib.sha256(_cpu_features().encode()).hexdigest()[:12]}"
    jax.config.update("jax_compilation_cache_dir", str(path.absolute()))


def _step(experiment: Experiment, audit: bool) -> Callable:
    settings = dataclasses.replace(experiment.settings, audit=audit)
    return functools.partial(train_step, model=experiment.model, optimizer=experiment.optimizer, settings=settings)


def _cpu_features() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
