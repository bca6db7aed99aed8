"""Which part of the package may import which: the table is the architecture, and imports point one way."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

BASE = {"errors", "io"}
DATA_TYPES = BASE | {"types", "config"}
MACHINERY = DATA_TYPES | {"kernels", "losses", "models", "random"}
SIDES = {"teacher", "data", "rollout", "parallel", "optim", "checkpoint", "metrics", "report"}
PARTS = MACHINERY | SIDES | {"step", "eval", "sandbox", "provenance", "resources", "markdown"}

ALLOWED = {
    "kernels": set(),
    "errors": set(),
    "io": set(),
    "random": set(),
    "types": BASE,
    "config": BASE,
    "losses": {"types", "kernels"},
    "models": BASE | {"types", "kernels"},
    "teacher": MACHINERY,
    "sandbox": set(),
    "data": MACHINERY | {"sandbox"},
    "rollout": MACHINERY | {"parallel", "interrupt"},
    "parallel": MACHINERY | {"interrupt"},
    "optim": MACHINERY,
    "checkpoint": MACHINERY | {"parallel"},
    "metrics": MACHINERY,
    "markdown": set(),
    "report": MACHINERY | {"metrics", "markdown", "resources"},
    "experiments": BASE | {"config", "data", "models", "interrupt", "metrics"},
    "claims": PARTS | {"experiment", "interrupt", "programs", "results", "sampling_ahead", "train"},
    "overview": BASE | {"config", "eval", "markdown", "metrics", "report"},
    "head_pass": MACHINERY | {"teacher"},
    "step": MACHINERY | {"teacher", "parallel", "head_pass"},
    "eval": MACHINERY | {"data", "rollout", "sandbox", "parallel", "markdown", "resources"},
    "made_once": PARTS,
    "preparation": PARTS | {"made_once"},
    "inputs": PARTS | {"preparation"},
    "experiment": PARTS | {"inputs", "preparation"},
    "collection": PARTS | {"experiment"},
    "sampling_ahead": PARTS | {"collection", "experiment"},
    "inert": set(),
    "provenance": set(),
    "resources": {"config", "markdown", "sandbox"},
    "testing": PARTS,
    "interrupt": BASE,
    "results": PARTS | {"experiment"},
    "programs": PARTS | {"experiment"},
    "guards": PARTS,
    "train": PARTS
    | {
        "collection",
        "experiment",
        "guards",
        "inert",
        "interrupt",
        "made_once",
        "programs",
        "progress",
        "results",
        "sampling_ahead",
    },
    "progress": PARTS | {"experiment", "measure", "subject"},
    "subject": PARTS | {"experiment", "inputs"},
    "measure": PARTS | {"experiment", "subject"},
    "measured": PARTS | {"experiment", "measure", "subject"},
    "evaluate": PARTS | {"experiment", "interrupt", "measure", "measured", "programs", "results", "subject"},
}
# Modules that were split off another one for length.
PART_OF = {f"config_{part}": "config" for part in ("loading", "modes", "options", "ranges", "validation")}
PART_OF["sandbox_child"] = "sandbox"
PART_OF["trackers"] = "metrics"

# Runs in vLLM's process, in vLLM's environment; nothing of the package imports it.
PLUGIN = Path("unisd_jax/rollout/plugin/unisd_sampling.py")
FOREIGN = {
    "torch",
    "vllm",
    "wandb",
    "tensorboardX",
    "datasets",
    "sentence_transformers",
    "bm25s",
    "tensorflow_datasets",
    "pyarrow",
    "pynvml",
}


def sources(root: Path, *folders: str) -> dict[Path, str]:
    """Path relative to `root` -> text of every Python file."""
    files = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    return {path.relative_to(root): path.read_text(encoding="utf-8") for path in files}


def component(module: str) -> str:
    """`unisd_jax.models.lora` -> `models`; the package itself, which only holds the version, -> empty."""
    name = module.removeprefix("unisd_jax").removeprefix(".").split(".")[0]
    return PART_OF.get(name, name)


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "unisd_jax" else ("unisd_jax", *parts))


def imports(path: Path, source: str) -> Iterator[tuple[str, bool, int]]:
    """(absolute module, whether inside a function, line) of imports, `import_module("...")` included."""
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]

    def walk(node: ast.AST, in_function: bool) -> Iterator[tuple[str, bool, int]]:
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, in_function, node.lineno) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package[: len(package) - level + 1] if level else []
                base = ".".join([*base, *([module] if module else [])])
                # `from unisd_jax import train` names a module, `from unisd_jax.models import Model` may not.
                yield from ((f"{base}.{alias.name}", in_function, node.lineno) for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield name, in_function, node.lineno
        in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, in_function)

    yield from walk(ast.parse(source), False)


def direction_errors(root: Path) -> list[str]:
    errors = []
    for path, source in sources(root, "unisd_jax", "kernels").items():
        importer = component(module_name(path))
        if importer and importer not in ALLOWED:
            errors.append(f"{path}: '{importer}' is not in this test's table; say there what it may import")
            continue
        allowed = ALLOWED.get(importer, set())
        for module, _, line in imports(path, source):
            if module.split(".")[0] == "kernels":
                errors.append(f"{path}:{line}: the canonical name is unisd_jax.kernels")
            if module.split(".")[0] != "unisd_jax":
                continue
            imported = component(module)
            is_component = imported in ALLOWED
            if is_component and imported != importer and imported not in allowed:
                errors.append(f"{path}:{line}: '{importer or 'unisd_jax'}' must not import '{imported}'")
            if module.count(".") > 1 and not is_component:
                errors.append(f"{path}:{line}: imports {module}, whose part is not in this test's table")
    return errors


def foreign_errors(root: Path) -> list[str]:
    errors, files = [], defaultdict(set)
    for path, source in sources(root, "unisd_jax", "kernels", "scripts").items():
        if path == PLUGIN:
            continue
        for module, in_function, line in imports(path, source):
            package = module.split(".")[0]
            if package not in FOREIGN:
                continue
            if path.parts[0] != "scripts":
                files[package].add(str(path))
            if not in_function:
                errors.append(f"{path}:{line}: import {package} inside the function that needs it")
    errors += [
        f"{package} is imported in {sorted(where)}; keep it in one file"
        for package, where in files.items()
        if len(where) > 1
    ]
    return errors


def process_index_errors(root: Path) -> list[str]:
    home = Path("unisd_jax/parallel/multihost.py")
    return [
        f"{path}: only {home} asks which process this is; take `is_main` as an argument"
        for path, source in sources(root, "unisd_jax", "kernels", "scripts").items()
        if "process_index" in source and path != home
    ]


def test_imports_point_one_way():
    assert direction_errors(REPOSITORY) == []


def test_foreign_packages_are_imported_in_one_file_inside_functions():
    assert foreign_errors(REPOSITORY) == []


def test_only_multihost_asks_for_the_process_index():
    assert process_index_errors(REPOSITORY) == []


def test_the_table_has_no_circles():
    placed: set[str] = set()
    while ready := {name for name, below in ALLOWED.items() if below <= placed} - placed:
        placed |= ready
    assert placed == set(ALLOWED)


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("unisd_jax/losses/a.py", "from unisd_jax.config import Config", "'losses' must not import 'config'"),
        ("unisd_jax/losses/a.py", "from unisd_jax import train", "'losses' must not import 'train'"),
        ("unisd_jax/losses/a.py", "from ..models import lora", "'losses' must not import 'models'"),
        ("unisd_jax/losses/__init__.py", "from ..models import lora", "'losses' must not import 'models'"),
        ("unisd_jax/models/a.py", "def f():\n    import unisd_jax.step", "'models' must not import 'step'"),
        (
            "unisd_jax/config_loading.py",
            "from unisd_jax.types import Views",
            "'config' must not import 'types'",
        ),
        ("unisd_jax/__init__.py", "from unisd_jax.train import run", "'unisd_jax' must not import 'train'"),
        (
            "kernels/fast/api.py",
            "from unisd_jax.errors import UserError",
            "'kernels' must not import 'errors'",
        ),
        ("unisd_jax/step.py", "import kernels.fast", "the canonical name is unisd_jax.kernels"),
        ("unisd_jax/novel.py", "", "'novel' is not in this test's table"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, path, source, message):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    assert [message in error for error in direction_errors(tmp_path)] == [True]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"unisd_jax/metrics.py": "import wandb"}, "import wandb inside the function"),
        ({"scripts/bench.py": "class A:\n    from torch import nn"}, "import torch inside the function"),
        (
            {
                "unisd_jax/a.py": "def f():\n    import datasets",
                "unisd_jax/b.py": "def f():\n    import datasets.load",
            },
            "keep it in one file",
        ),
        (
            {
                "unisd_jax/a.py": "def f(i):\n    i.import_module('vllm')",
                "kernels/b.py": "def f():\n    from vllm import LLM",
            },
            "vllm is imported in ['kernels/b.py', 'unisd_jax/a.py']",
        ),
    ],
)
def test_a_misplaced_foreign_import_is_found(tmp_path, files, message):
    for path, source in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
    assert [message in error for error in foreign_errors(tmp_path)] == [True]


def test_a_stray_process_index_is_found(tmp_path):
    for path in ("unisd_jax/parallel/multihost.py", "unisd_jax/metrics.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("is_main = jax.process_index() == 0")
    assert [error.split(":")[0] for error in process_index_errors(tmp_path)] == ["unisd_jax/metrics.py"]
