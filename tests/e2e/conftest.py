"""What the end-to-end tests share: a tiny chat model with data, a configuration, and ways to run the command."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
import yaml
from filelock import FileLock
from jax.experimental.compilation_cache import compilation_cache
from run_checks import Outcome, write_items

from unisd_jax import train
from unisd_jax.testing import tiny_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]

# Adapters with an EMA teacher that moves every second step, a checkpoint every second step, six steps in all.
OPTIONS = {
    "name": "run",
    "model": {"dtype": "float32", "lora": {"rank": 4, "alpha": 8.0}},
    "data": {"task": "jsonl", "max_prompt_length": 200, "length_multiple": 16},
    "teacher": {"placement": "turns", "ema_sync_steps": 2},
    "rollout": {"max_completion_length": 8, "temperature": 1.0, "max_sampler_gap": 1e-4},
    "optimizer": {"learning_rate": 1e-2},
    "train": {"steps": 6, "batch_size": 4, "compilation_cache": None},
    "evaluation": {"batch_size": 6, "max_completion_length": 8, "drift_tokens": 4},
    "checkpoint": {"every": 2, "keep": 2},
}
# Far more than is needed: with a limit, jax locks the folder, so that several processes can use it.
CACHE_BYTES = 2**30


class Workspace(NamedTuple):
    """A checkpoint directory, training items (ids t0 …), test items, and a configuration that names all three."""

    root: Path
    model: Path
    train: Path
    test: Path
    config: Path


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = shared_folder(tmp_path_factory) / "workspace"
    found = Workspace(root, root / "tiny", root / "train.jsonl", root / "test.jsonl", root / "run.yaml")
    with FileLock(f"{root}.lock"):
        if not found.config.exists():
            tiny_checkpoint(found.model)
            write_items(found.train, "t", 20)
            write_items(found.test, "e", 6)
            tree = {"inherit": str(REPOSITORY / "configs/modes/ema.yaml")} | OPTIONS
            tree["model"] = tree["model"] | {"path": str(found.model)}
            tree["data"] = tree["data"] | {"train_path": str(found.train), "test_path": str(found.test)}
            found.config.write_text(yaml.safe_dump(tree))
    return found


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of this test session; of all its workers when there are several."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled programs, so that only the first of several equal runs pays for them; shared by parallel workers."""
    return shared_folder(tmp_path_factory) / "compiled"


@pytest.fixture(scope="session")
def cli_environment(cache_dir: Path) -> dict[str, str]:
    """The environment of a command: that of this process, so that both can use the same compiled programs."""
    return os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COMPILATION_CACHE_DIR": str(cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(CACHE_BYTES),
    }


@pytest.fixture(scope="session")
def cli(workspace: Workspace, cli_environment: dict[str, str]) -> Callable[..., Outcome]:
    """`cli(output_dir, *overrides, before="", environment={})` runs the command in a process of its own.

    `before` is Python that runs in that process first: how a test puts a kill at an exact place.
    """

    def run(output_dir: Path, *overrides: str, before: str = "", environment: dict[str, str] | None = None) -> Outcome:
        program = ["-m", "unisd_jax.train"]
        if before:
            main = "import sys; from unisd_jax import train; sys.exit(train.main(sys.argv[1:]))"
            program = ["-c", f"{before}\n{main}"]
        command = [
            sys.executable,
            *program,
            "--config",
            str(workspace.config),
            f"--output_dir={output_dir}",
            *overrides,
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, cwd=workspace.root,
            env=cli_environment | (environment or {}),
        )  # fmt: skip
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def compiled_once(cache_dir: Path) -> Iterator[None]:
    """The compilation cache for runs inside the test process; switched off again for the tests of other folders."""
    changes = {
        "jax_compilation_cache_dir": str(cache_dir),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_compilation_cache_max_size": CACHE_BYTES,
    }
    earlier = {name: getattr(jax.config, name) for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in earlier.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def main(workspace: Workspace, compiled_once: None, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`main(output_dir, *overrides)` runs the command inside the test process."""

    def run(output_dir: Path, *overrides: str) -> Outcome:
        capfd.readouterr()
        code = train.main(["--config", str(workspace.config), f"--output_dir={output_dir}", *overrides])
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def finished(cli: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run by the command that nothing disturbed, and what it said. Tests read it and leave it alone."""
    output_dir = shared_folder(tmp_path_factory) / "finished"
    said = output_dir / "said.json"
    with FileLock(f"{output_dir}.lock"):
        if not said.exists():
            outcome = cli(output_dir)
            assert outcome.code == 0, outcome.err
            said.write_text(json.dumps(outcome))
    return output_dir / "run", Outcome(*json.loads(said.read_text()))
