"""Where the numbers of a step go: metrics.jsonl always, one table for the eye, wandb and TensorBoard when asked for.

`docs/metrics.md` says what every number means.
"""

import json
import math
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from unisd_jax.errors import UserError
from unisd_jax.io import write_text_atomic
from unisd_jax.trackers import TensorBoard, Wandb

METRICS_FILE = "metrics.jsonl"

# Heading on the screen -> name of the metric. The step comes before these, the time left after them.
COLUMNS = {
    "loss": "loss",
    "divergence": "divergence",
    "entropy": "entropy",
    "length": "completion_length",
    "tokens/s": "tokens_per_second",
}
# Beside them where the run is evaluated on the way: gain and forgetting, empty in the steps between.
EVALUATION_COLUMNS = {"exact": "eval_exact", "drift": "eval_drift"}
_ROWS = 12  # steps that stay visible in the live table
_RECENT = 20  # step times whose median gives the time left: one slow step, as for a checkpoint, does not move it
_WIDTH = 10  # of a plain column: the longest "%.4g" is "-1.234e-05"


class MetricsWriter:
    """Writes the metrics of each step to every sink; a context manager.

    On hosts other than the first it writes nothing: they share the run directory and would interleave lines.

    Args:
      run_dir: holds `metrics.jsonl`; made if it is not there.
      total_steps: of the whole run, for the time left.
      name: of the run, shown above the table.
      evaluated: whether some steps have metrics `eval_...`.
      is_main: whether this is host 0.
      wandb: None, or {"project": str, "config": dict} to log to wandb as well.
      tensorboard: whether to write TensorBoard's event files as well.

    Raises:
      UserError: a package that is asked for is not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_steps: int,
        name: str,
        evaluated: bool = False,
        is_main: bool = True,
        wandb: dict[str, Any] | None = None,
        tensorboard: bool = False,
    ):
        self._screen = self._records = None
        self._trackers: list[Wandb | TensorBoard] = []
        if not is_main:
            return
        self._screen = _Screen(name, total_steps, COLUMNS | (EVALUATION_COLUMNS if evaluated else {}))
        if wandb is not None:
            self._trackers.append(Wandb(Path(run_dir), name, wandb, say=self.message))
        if tensorboard:
            self._trackers.append(TensorBoard(Path(run_dir)))
        self._records = _Records(Path(run_dir) / METRICS_FILE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record one step. Values are numbers or arrays of one number; they may be NaN or infinite.

        Raises:
          ValueError: a value is no single number, or is named "step" or "nonfinite".
        """
        if self._records is None:
            return
        scalars = {name: _scalar(name, value) for name, value in values.items()}
        self._records.log(step, scalars)
        self._screen.log(step, scalars)
        for tracker in self._trackers:
            tracker.log(step, scalars)

    def message(self, text: str) -> None:
        """Print a line above the table."""
        if self._screen is not None:
            self._screen.message(text)

    def truncate_after(self, step: int) -> None:
        """On resume: forget what was logged after `step`, where the run continues (-1 forgets everything)."""
        if self._records is not None:
            self._records.truncate_after(step)

    def close(self, *, failed: bool = False) -> None:
        """Close every sink; a second call does nothing. wandb comes last: it may wait for the network."""
        if self._screen is not None:
            self._screen.close()
        for tracker in self._trackers:
            tracker.close(failed)
        self._screen = self._records = None
        self._trackers = []


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, oldest first. A last line that a crash cut short is left out.

    Raises:
      UserError: there is no such file, or another line is not a record (names the line).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not there: expected the {METRICS_FILE} of a run directory")
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            found = line[:60].decode("utf-8", errors="replace")
            raise UserError(
                f"{path}, line {number}: found {found!r}, expected a JSON object with an integer `step`; "
                "delete the line or start a run under another name"
            )
        records.append(record)
    return records


def _scalar(name: str, value: Any) -> int | float:
    if name in ("step", "nonfinite"):
        raise ValueError(f"a metric is named {name!r}, which every record already has: give it another name")
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind in "OSU":
        raise ValueError(f"metric {name!r} is {value!r}: expected a single number")
    return int(array.item()) if np.issubdtype(array.dtype, np.integer) else float(array.item())


class _Records:
    """`metrics.jsonl`: one JSON object per step, on disk before the next step starts."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            # A crash cut the last line short; appending to it would spoil the next record as well.
            self._rewrite(read_metrics(path))

    def log(self, step: int, values: dict[str, int | float]) -> None:
        record: dict[str, Any] = {"step": int(step)}
        record |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
        if nonfinite:
            record["nonfinite"] = nonfinite
        # Opened and closed at each step: what is logged is out of this process when log() returns.
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def truncate_after(self, step: int) -> None:
        if self._path.exists():
            self._rewrite([record for record in read_metrics(self._path) if record["step"] <= step])

    def _rewrite(self, records: list[dict[str, Any]]) -> None:
        write_text_atomic(self._path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


class _Screen:
    """A live table on a terminal; aligned lines without escape codes anywhere else."""

    def __init__(self, name: str, total_steps: int, columns: dict[str, str]):
        self._name, self._total, self._metrics = name, total_steps, list(columns.values())
        self._headings = ["step", *columns, "ETA"]
        self._durations: deque[float] = deque(maxlen=_RECENT)
        self._last_time: float | None = None
        self._rows: deque[list[str]] = deque(maxlen=_ROWS)
        self._live: Live | None = None
        self._console = Console(file=sys.stdout)
        # rich takes FORCE_COLOR, which CI systems set, for a terminal: ask the stream itself as well.
        terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._is_terminal = terminal and sys.stdout.isatty()

    def log(self, step: int, values: dict[str, int | float]) -> None:
        shown = [_number(values.get(metric)) for metric in self._metrics]
        row = [f"{step}/{self._total}", *shown, self._time_left(step)]
        if self._is_terminal:
            self._rows.append(row)
            self._draw()
            return
        if not self._rows:
            print(f"{self._name}\n{self._line(self._headings)}")
        self._rows.append(row)
        print(self._line(row), flush=True)

    def message(self, text: str) -> None:
        if self._is_terminal:
            self._console.print(Text(text), soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _draw(self) -> None:
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        table = Table(title=Text(self._name))
        for heading in self._headings:
            table.add_column(heading, justify="right", no_wrap=True)
        # A live display taller than the terminal loses its newest rows; title and borders take six lines.
        visible = max(1, min(_ROWS, self._console.height - 6))
        for row in list(self._rows)[-visible:]:
            table.add_row(*row)
        self._live.update(table, refresh=True)

    def _line(self, cells: list[str]) -> str:
        step_width = max(len("step"), 2 * len(str(self._total)) + 1)
        return "  ".join([cells[0].rjust(step_width), *(cell.rjust(_WIDTH) for cell in cells[1:])])

    def _time_left(self, step: int) -> str:
        now = time.monotonic()
        if self._last_time is not None:
            self._durations.append(now - self._last_time)
        self._last_time = now
        if not self._durations:
            return "-"
        return clock(statistics.median(self._durations) * max(0, self._total - step))


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
