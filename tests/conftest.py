"""Eight CPU devices, checked array shapes, and the fixtures that stand for files a machine may not have."""

import os
from pathlib import Path

# jax reads these when it is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Must come before these packages are imported: the hook rewrites their functions as they load.
jaxtyping.install_import_hook(
    ["unisd_jax.losses", "unisd_jax.teacher", "unisd_jax.models", "unisd_jax.kernels"], "beartype.beartype"
)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the checkpoint before `-m` selects, so that no test can forget to."""
    for item in items:
        if "smollm2_path" in getattr(item, "fixturenames", ()):
            item.add_marker("real_model")
        if "vllm_python" in getattr(item, "fixturenames", ()):
            item.add_marker("real_vllm")
            item.add_marker(pytest.mark.timeout(1800))  # a server takes minutes to start, and again after each kill


def _existing_directory(variable: str, default: Path, what: str) -> Path:
    path = Path(os.environ.get(variable, default))
    if path.is_dir():
        return path
    if variable in os.environ:
        pytest.fail(f"{variable} is {path}, which is not a directory; expected {what}")
    pytest.skip(f"{what} not found at {path}; set {variable} to where it is")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of golden numbers; the test is skipped where it does not exist."""
    return _existing_directory("UNISD_GOLDEN", REPOSITORY.parent / "shared" / "golden", "the golden numbers")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The converted SmolLM2 checkpoint; the test is skipped before `make quickstart` has made it."""
    default = REPOSITORY / "models" / "smollm2-135m-instruct"
    return _existing_directory("UNISD_SMOLLM2", default, "the converted SmolLM2 checkpoint")


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter that has vLLM; the test is skipped before `make rollout-env` has made it."""
    path = Path(os.environ.get("UNISD_VLLM_PYTHON", REPOSITORY / ".venv-rollout" / "bin" / "python"))
    if path.exists():
        return path
    if "UNISD_VLLM_PYTHON" in os.environ:
        pytest.fail(f"UNISD_VLLM_PYTHON is {path}, which is not there; expected an interpreter with vLLM")
    pytest.skip(f"no vLLM at {path}: make rollout-env makes it; or set UNISD_VLLM_PYTHON")
