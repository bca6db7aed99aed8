"""The clone, an editable install and a wheel hold the same package, and none hides PyPI's own `kernels`."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import unisd_jax

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
KERNEL_TEST = """
import unisd_jax, unisd_jax.kernels.fused_linear_logprob as imported
from unisd_jax.kernels.fused_linear_logprob import fused_linear_logprob, api
assert imported is fused_linear_logprob is unisd_jax.kernels.fused_linear_logprob
import jax.numpy as jnp
assert fused_linear_logprob(jnp.ones((2, 3)), jnp.ones((5, 3)), jnp.zeros(2, int)).logp.shape == (2,)
print(unisd_jax.__file__, api.__file__)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is packaged, so that building leaves nothing in the clone."""
    copy = tmp_path_factory.mktemp("source") / "unisd_jax"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("unisd_jax", "kernels"):
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / file, copy / file)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """Built from the sdist, as a release is, so that a file which the sdist lacks is missed."""
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)], cwd=source)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture
def installed_wheel(wheel, tmp_path) -> Path:
    """A site-packages folder with the wheel in it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site-packages")
    return tmp_path / "site-packages"


@pytest.fixture
def editable_install(source, tmp_path) -> Path:
    """A site-packages folder with what `pip install --editable` puts there."""
    build = f"from setuptools.build_meta import build_editable; print(build_editable({str(tmp_path)!r}))"
    run([sys.executable, "-c", build], cwd=source)
    (editable,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(editable) as archive:
        archive.extractall(tmp_path / "site-packages")
    return tmp_path / "site-packages"


def run(command: list[str], cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def run_with_sites(code: str, *sites: Path, cwd: Path) -> str:
    """Run `code` where only `sites`, .pth files included, and then the dependencies can be imported.

    -S keeps this environment's own editable install out of the way.
    """
    dependencies = sysconfig.get_path("purelib")
    prelude = (
        "import site, sys\n"
        f"for folder in {[str(path) for path in sites]!r}: site.addsitedir(folder)\n"
        f"sys.path.append({dependencies!r})\n"
    )
    return run([sys.executable, "-I", "-S", "-c", prelude + code], cwd=cwd)


def make_foreign_kernels(folder: Path) -> None:
    (folder / "kernels" / "intruder").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text("FOREIGN = True\n")
    (folder / "kernels" / "intruder" / "__init__.py").write_text("")


def test_the_list_of_packages_matches_the_tree():
    def folders(top: str, prefix: str) -> set[str]:
        found = (path.parent.relative_to(REPOSITORY / top) for path in (REPOSITORY / top).rglob("__init__.py"))
        return {".".join((prefix, *path.parts)) for path in found}

    expected = folders("unisd_jax", "unisd_jax") | folders("kernels", "unisd_jax.kernels")
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(expected), "add each folder to tool.setuptools.packages in pyproject.toml"
    kernels = {path.parent.name for path in (REPOSITORY / "kernels").glob("*/__init__.py")}
    mapped = {f"unisd_jax.kernels.{name}": f"kernels/{name}" for name in kernels}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == mapped
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


def test_every_source_file_lies_in_a_package():
    for top in ("unisd_jax", "kernels"):
        strays = [p for p in (REPOSITORY / top).rglob("*.py") if not (p.parent / "__init__.py").exists()]
        assert strays == [], "these files would be missing from the wheel"


def test_the_wheel_holds_every_module_and_data_file_and_no_top_level_kernels(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"unisd_jax-{unisd_jax.__version__}.dist-info/METADATA").decode()
        licence = archive.read(f"unisd_jax-{unisd_jax.__version__}.dist-info/licenses/LICENSE")
    expected = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "unisd_jax").rglob("*.py")}
    expected |= {f"unisd_jax/{p.relative_to(REPOSITORY)}" for p in (REPOSITORY / "kernels").rglob("*.py")}
    files = [path for kind in ("*.jsonl", "*.css") for path in (REPOSITORY / "unisd_jax").rglob(kind)]
    data = {str(path.relative_to(REPOSITORY)) for path in files}
    assert len(data) > 2, "the embedded task's items or the report's style are missing"
    assert names == expected | data
    assert "unisd_jax/kernels/fused_linear_logprob/api.py" in names
    assert not any(line.startswith("Requires-Dist: torch") for line in metadata.splitlines())
    assert licence == (REPOSITORY / "LICENSE").read_bytes()


@pytest.mark.parametrize("foreign", ["none", "beside", "elsewhere"])
def test_the_wheel_works_beside_a_foreign_kernels_package(installed_wheel, tmp_path, foreign):
    other = tmp_path / "other"
    other.mkdir()
    code = KERNEL_TEST
    if foreign != "none":
        make_foreign_kernels(installed_wheel if foreign == "beside" else other)
        code += "import kernels, importlib.util as u; assert kernels.FOREIGN\n"
        code += "assert u.find_spec('unisd_jax.kernels.intruder') is None, 'the other package was mixed in'\n"
    else:
        code += "import importlib.util as u; assert u.find_spec('kernels') is None\n"
    files = run_with_sites(code, installed_wheel, other, cwd=tmp_path).split()
    assert all(file.startswith(str(installed_wheel)) for file in files)


def test_an_editable_install_works_beside_a_foreign_kernels_package(editable_install, source, tmp_path):
    make_foreign_kernels(editable_install)
    code = KERNEL_TEST + "import kernels; assert kernels.FOREIGN"
    unisd_file, kernel_file = run_with_sites(code, editable_install, cwd=tmp_path).split()
    assert Path(unisd_file) == source / "unisd_jax" / "__init__.py"
    assert Path(kernel_file) == source / "kernels" / "fused_linear_logprob" / "api.py"


def test_the_clone_works_beside_a_foreign_kernels_package(source, tmp_path):
    make_foreign_kernels(tmp_path / "other")
    code = KERNEL_TEST + "import kernels; assert kernels.FOREIGN"
    for sites in ([source, tmp_path / "other"], [tmp_path / "other", source]):
        _, kernel_file = run_with_sites(code, *sites, cwd=tmp_path).split()
        assert Path(kernel_file) == source / "kernels" / "fused_linear_logprob" / "api.py"


def test_importing_the_package_loads_no_jax(tmp_path):
    code = "import unisd_jax, sys; print(sorted({'jax', 'numpy', 'torch', 'transformers'} & set(sys.modules)))"
    assert run_with_sites(code, REPOSITORY, cwd=tmp_path).strip() == "[]"


def test_no_part_of_the_package_starts_a_device_when_it_is_imported(tmp_path):
    packages = PROJECT["tool"]["setuptools"]["packages"]
    code = (
        f"import importlib\nfor name in {packages!r}: importlib.import_module(name)\n"
        "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    )
    assert run_with_sites(code, REPOSITORY, cwd=tmp_path).strip() == "False"


def test_the_locks_satisfy_the_declared_ranges():
    packaging = pytest.importorskip("packaging.requirements")
    for name, python in (("py311", "3.11"), ("py312", "3.12")):
        lines = (REPOSITORY / ".ci" / "constraints" / f"{name}.txt").read_text().splitlines()
        pins = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
        assert "torch" not in pins
        for text in PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]:
            requirement = packaging.Requirement(text)
            if requirement.name == "unisd_jax" or not (
                requirement.marker is None or requirement.marker.evaluate({"python_version": python})
            ):
                continue
            assert requirement.specifier.contains(pins[requirement.name.lower()]), f"{name}: {text}"
