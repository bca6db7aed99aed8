"""Programs that draw curves: they get every step under the names of metrics.jsonl, and cannot stop a run."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from unisd_jax.errors import UserError


class Wandb:
    """wandb as a guest: what goes wrong with it is said once, and the run goes on."""

    def __init__(self, run_dir: Path, name: str, options: dict[str, Any], say: Callable[[str], None]):
        self._say = say
        run_dir.mkdir(parents=True, exist_ok=True)
        start = partial(_import_wandb().init, **options, name=name, dir=str(run_dir))
        self._run, failure = _attempt(start)
        if failure:
            self._say(f"wandb did not start ({failure}); it logs offline into {run_dir / 'wandb'}")
            self._run, failure = _attempt(start, mode="offline")
            self._check(failure)

    def log(self, step: int, values: dict[str, int | float]) -> None:
        """Record one step."""
        if self._run is not None:
            self._check(_attempt(self._run.log, values, step=step)[1])

    def close(self, failed: bool) -> None:
        """End the run there."""
        if self._run is not None:
            self._check(_attempt(self._run.finish, exit_code=int(failed))[1])

    def _check(self, failure: str | None) -> None:
        if failure:
            self._run = None
            self._say(f"wandb failed ({failure}) and is off from here on; metrics.jsonl has every step")


def _attempt(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, str | None]:
    """What `call` returns, and None; or None, and the first line of what went wrong."""
    try:
        return call(*args, **options), None
    except Exception as error:
        return None, (str(error).strip() or type(error).__name__).splitlines()[0]


class TensorBoard:
    """Event files below the run directory, under the same names; a resumed run replaces what came after its start."""

    def __init__(self, run_dir: Path):
        self._folder = run_dir / "tensorboard"
        self._writer_class, self._writer = _import_tensorboard(), None

    def log(self, step: int, values: dict[str, int | float]) -> None:
        """Record one step."""
        if self._writer is None:
            # The files' names hold nothing finer than a second.
            suffix = f".{step}.{os.getpid()}"
            self._writer = self._writer_class(str(self._folder), purge_step=step, filename_suffix=suffix)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, _failed: bool) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()


def _import_tensorboard() -> type:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "logging.tensorboard is true and the package tensorboardX is not installed: "
            "install the extra with `pip install 'unisd_jax[tensorboard]'` or set logging.tensorboard=false"
        ) from None
    return SummaryWriter


def _import_wandb() -> ModuleType:
    try:
        import wandb
    except ImportError:
        wandb = None
    # A folder `wandb` in the current directory, which wandb itself leaves there, imports as an empty package.
    if not hasattr(wandb, "init"):
        raise UserError(
            "logging.wandb is true and the package wandb is not installed: "
            "install the extra with `pip install 'unisd_jax[wandb]'` or set logging.wandb=false"
        )
    return wandb
