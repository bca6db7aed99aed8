"""What the end-to-end tests share: a tiny chat model with data, a configuration, and ways to run the command."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
import yaml
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
    "train": {"steps": 6, "batch_size": 4},
    "evaluation": {"batch_size": 6, "max_completion_length": 8, "drift_tokens": 4},
    "checkpoint": {"every": 2, "keep": 2},
}


class Workspace(NamedTuple):
    """A checkpoint directory, training items (ids t0 …), test items, and a configuration that names all three."""

    root: Path
    model: Path
    train: Path
    test: Path
    config: Path


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("workspace")
    model = tiny_checkpoint(root / "tiny")
    paths = write_items(root / "train.jsonl", "t", 20), write_items(root / "test.jsonl", "e", 6)
    tree = {"inherit": str(REPOSITORY / "configs/modes/ema.yaml"), "output_dir": str(root / "never")} | OPTIONS
    tree["model"] = tree["model"] | {"path": str(model)}
    tree["data"] = tree["data"] | {"train_path": str(paths[0]), "test_path": str(paths[1])}
    config = root / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    return Workspace(root, model, *paths, config)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled programs, so that only the first of several equal runs pays for them."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def cli_environment(cache_dir: Path) -> dict[str, str]:
    """The environment of a command: that of this process, so that both can use the same compiled programs."""
    return os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COMPILATION_CACHE_DIR": str(cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
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
    output_dir = tmp_path_factory.mktemp("finished")
    outcome = cli(output_dir)
    assert outcome.code == 0, outcome.err
    return output_dir / "run", outcome
