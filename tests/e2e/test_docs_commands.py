"""Every command and program in the documentation, executed: in a folder of its own, with a tiny model and short runs.

The folder looks like the repository, but its configurations ask for little (`SMALL`), and `models/` holds a tiny
checkpoint under the real one's name. So commands run as they are printed, but for `PLACEHOLDERS` and `ADDED`. Those
that cannot run here stand in `ELSEWHERE`, with what is checked of them instead.
"""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pages
import pytest
import yaml
from run_checks import write_items
from task_rows import DONORS, ROWS, write

from unisd_jax.config import load_config, parse_command_line
from unisd_jax.config_loading import deep_merge
from unisd_jax.data.loading import load_items
from unisd_jax.data.sources import Place
from unisd_jax.data.tasks import get_task
from unisd_jax.models import load_hf
from unisd_jax.rollout import JaxSampler, Sampling
from unisd_jax.testing import tiny_checkpoint

MODEL = "models/smollm2-135m-instruct"
TRAIN, EVALUATE = "python -m unisd_jax.train", "python -m unisd_jax.evaluate"
# What others read: these are run first, once, in this order.
FIRST = (
    f"{TRAIN} --config configs/quickstart.yaml",
    f"{TRAIN} --config configs/quickstart_sft.yaml",
    f"{EVALUATE} --config configs/quickstart.yaml --model.path=runs/quickstart/hf --measure.base={MODEL}",
    f"{EVALUATE} --config configs/quickstart_sft.yaml --model.path=runs/quickstart-sft/hf --measure.base={MODEL}",
)
# What a command reads → the command on the same page that makes it.
AFTER = {r"jobs/sweep/": r"--cluster", r"runs/smollm2/": r"^for "}
# Merged over the sizes of the configurations.
SMALL = {
    "model": {"dtype": "float32", "lora": {"rank": 2, "alpha": 4.0}},
    "data": {"train_limit": 8, "test_limit": 4, "max_prompt_length": 3000, "length_multiple": 64, "length_buckets": 1},
    "teacher": {
        "contexts": {"induction_demonstrations": 1, "induction_instructions": 3, "induction_max_length": 8},
        "negatives": {"max_length": 8},
    },
    "rollout": {"max_completion_length": 32, "max_sampler_gap": 0.01},
    "train": {"steps": 2, "batch_size": 2, "micro_batches": 1},
    "evaluation": {"batch_size": 4, "max_completion_length": 8, "drift_tokens": 4},
    "checkpoint": {"every": 1},
}
# What the modes' own runs do without: the quickstart's evaluate.
TRAIN_ONLY = {"train": {"steps": 1}, "evaluation": {"enabled": False, "drift_tokens": 0}}
# What stands for something of the reader's, or for something that is not here → what it is here.
PLACEHOLDERS = {
    r"(?<=--model\.path=)DIR\b": MODEL,
    r"Qwen/Qwen2\.5-7B-Instruct": MODEL,
    r"(?<=--config )FILE\b": "configs/quickstart_vllm.yaml",
    r"(?<=--data )DATA\b": "rows",
    r"\bFOLDER OTHER_FOLDER": "runs/quickstart/evaluation/* runs/quickstart-sft/evaluation/*",
    r"\b([AB]-seed\d)": r"seeds/\1",
    r"(run_experiments.*) --devices \d[\d,]*": r"\1 --devices cpu:1",
    r"(?<=jobs\.json )\d+": "0",
    r"--seeds 0,1,2(?= --devices)": "--seeds 0",
}
# What is added to the commands that match.
ADDED = {
    r"--data\.task=gsm8k": "--data.path=rows",
    # The recipes of the paper's models; tests/e2e/test_paper_recipe.py trains by one.
    r"unisd_jax\.train .*configs/paper/": "--print-config",
    r"--mesh\.fsdp=[48](?!.*print-config)": "--train.batch_size=8",
    r"scripts/bench_step": "--model tiny --batch 1 --prompt 8 --teacher-prompt 8 --completion 8 --repeats 1 --out x",
}
# Only planned, with --dry-run: one sweep is made for real, and servers and several GPUs are not here.
DRY = r"run_experiments\.py (agreement|sensitivity|ablation)|rollout\.vllm_server|rollout\.vllm\.(addresses|devices)="
# All else trains or measures, or reads what others have made, and takes longer than some five seconds.
QUICK = r"^make |--print-config|--dry-run|--cluster|submit\.sh|aot_step|estimate_paper"


class Elsewhere(NamedTuple):
    """Why a command is not run here, and the test or stage of .ci/run that does what it does."""

    reason: str
    by: str


ELSEWHERE = {
    r"make quickstart": Elsewhere("downloads, installs and trains for 17 minutes", ".ci/run: make quickstart"),
    r"make claims": Elsewhere("trains for 50 minutes", "tests/e2e/test_make_claims.py"),
    r"make test": Elsewhere("all tests", ".ci/run: make test"),
    r"make rollout-env": Elsewhere("installs vLLM", ".ci/run: make test-vllm"),
    r"pip install -e '\.\[(\w+)\]'": Elsewhere("downloads CUDA", "tests/unit/test_packaging.py"),
    r"python -m venv browser && browser/bin/pip .*": Elsewhere("downloads a browser", "tests/unit/test_overview.py"),
    r"UNISD_BROWSER_PYTHON=.*": Elsewhere("needs that browser", "tests/unit/test_overview.py"),
    r".*--objective\.focus=2": Elsewhere(
        "an option that the page adds", "tests/unit/test_own_mechanism.py::test_the_edit_makes_an_option_that_trains"
    ),
}
# Programs that other tests execute, and what they check of their outcome.
PROGRAMS = {
    "README.md": "tests/unit/test_docs.py",
    "docs/tasks.md": "tests/e2e/test_own_task.py",
    "docs/own_mechanism.md": "tests/unit/test_own_mechanism.py",
    "docs/own_model.md": "tests/unit/test_own_model.py",
}

pytestmark = pytest.mark.xdist_group("docs_commands")


@functools.cache
def all_commands() -> dict[str, list[str]]:
    """{command: pages that print it}."""
    found: dict[str, list[str]] = {}
    for name in pages.PAGES:
        for command in pages.commands(name):
            found.setdefault(command, []).append(name)
    return found


def elsewhere(command: str) -> Elsewhere | None:
    return next((found for pattern, found in ELSEWHERE.items() if re.fullmatch(pattern, command)), None)


def filled(command: str) -> str:
    """The command with what it needs here."""
    for pattern, stands_for in PLACEHOLDERS.items():
        command = re.sub(pattern, stands_for, command)
    for pattern, words in ADDED.items():
        command += f" {words}" if re.search(pattern, command) else ""
    return f"{command} --dry-run" if re.search(DRY, command) and "--dry-run" not in command else command


def is_slow(command: str) -> bool:
    return not re.search(QUICK, filled(command))


def here(command: str) -> str:
    """The command as it is run in the folder."""
    if TRAIN not in command or command in FIRST or not is_slow(command):
        return filled(command)
    # Runs of one name and other options would refuse to share a folder.
    return f"{filled(command)} --output_dir=runs/{list(all_commands()).index(command)}"


# --- The folder ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cache_dir):
    """The repository in small."""
    root = tmp_path_factory.mktemp("docs")
    for name in ("configs", "scripts", ".ci"):
        shutil.copytree(pages.REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(pages.REPOSITORY / name, root)
    shrink(root / "configs/base.yaml", TRAIN_ONLY)
    shrink(root / "configs/quickstart_common.yaml", {"evaluation": {"enabled": True}})
    shrink(root / "configs/smollm2_benchmarks.yaml", {"data": {"path": "rows"}})
    tiny_checkpoint(root / MODEL, max_position=8192)
    write_rows(root / "rows")
    write_items(root / "train.jsonl", "t", 8)
    write_items(root / "test.jsonl", "e", 4)
    fake = root / ".venv-rollout/bin/python"
    fake.parent.mkdir(parents=True)
    program = shlex.join([sys.executable, str(pages.REPOSITORY / "tests/fake_vllm.py")])
    fake.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(pages.REPOSITORY))} exec {program} "$@"\n')
    sbatch = root / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\necho "$@" >> submitted\nwc -l < submitted\n')
    for file in (fake, sbatch):
        file.chmod(0o755)
    return root


def shrink(path: Path, more: dict) -> None:
    """The same configuration with small sizes, also in its presets, and with what is `more` to be changed."""
    tree = deep_merge(deep_merge(yaml.safe_load(path.read_text()), SMALL), more)
    for name, variant in tree.get("variants", {}).items():
        if name.startswith("preset."):
            tree["variants"][name] = deep_merge(variant, {part: SMALL[part] for part in ("data", "rollout", "train")})
    path.write_text(yaml.safe_dump(tree))


def write_rows(root: Path) -> None:
    """A folder for data.path: invented rows of the benchmarks under the names of their splits."""
    for name, row in ROWS.items():
        task = get_task(name)
        if task.source is None:
            continue
        (root / name).mkdir(parents=True)
        write(root / name / f"{task.test.rpartition('/')[2]}.jsonl", row)
        if task.train is not None:
            write(root / name / f"{task.train.rpartition('/')[2]}.jsonl", *DONORS[name])
    sums = [{"question": f"What is {n} + 3?", "answer": f"{n} and 3 are {n + 3}.\n#### {n + 3}"} for n in range(6)]
    write(root / "gsm8k/train.jsonl", *(row | {"upstream_index": index} for index, row in enumerate(sums)))


@pytest.fixture(scope="module")
def run(folder, cache_dir):
    """`run(command)` is what it printed; a command that was run is not run again."""
    environment = os.environ | {
        "PATH": os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(pages.REPOSITORY),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

    @functools.cache
    def one(command: str) -> str:
        devices = re.search(r"--mesh\.fsdp=(\d+)|--devices (\d)$", command)
        count = next(filter(None, devices.groups())) if devices else 1
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=300,
            env=environment | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"},
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\nended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    return one


@pytest.fixture(scope="module")
def prepared(folder, run):
    """The folder with the runs, evaluations and recorded numbers that commands read."""
    for command in FIRST:
        run(command)
    for name in ("ema-0", "ema-1", "sft-0"):
        shutil.copytree(folder / "runs/quickstart", folder / "runs" / name)
    for name, of in {"A": "quickstart", "B": "quickstart-sft"}.items():
        (evaluation,) = (folder / "runs" / of / "evaluation").iterdir()
        for seed in range(3):
            shutil.copytree(evaluation, folder / "seeds" / f"{name}-seed{seed}")
    record_numbers(folder / "numbers")
    return folder


def record_numbers(root: Path) -> None:
    """A tiny checkpoint with its own forward pass, as scripts/check_models.py compares."""
    model, params = load_hf(tiny_checkpoint(root / "toy"))
    ids = np.arange(36, dtype=np.int32).reshape(3, 12)
    mask = np.arange(12) >= np.array([[0], [4], [9]])
    hidden = jax.jit(model.hidden)(params, ids, mask)
    sampler = JaxSampler(model)
    sampler.publish(params, 0)
    greedy = sampler.generate(ids, mask, Sampling(4, (), 0, temperature=0.0), key=jax.random.key(0), version=0).ids
    logits = np.asarray(model.logits(params, hidden))
    np.savez(
        root / "toy.npz", input_ids=ids, attention_mask=mask.astype(np.int64), last_hidden=np.asarray(hidden),
        logits=logits, greedy=np.asarray(greedy),
    )  # fmt: skip


# --- Commands ---


def marked(command: str):
    return pytest.param(command, marks=[pytest.mark.slow] if is_slow(command) else [], id=command[:100])


@pytest.mark.parametrize("command", [marked(command) for command in all_commands() if elsewhere(command) is None])
def test_the_command_runs(request, run, command):
    if is_slow(command):
        request.getfixturevalue("prepared")
    for pattern, earlier in AFTER.items():
        if re.search(pattern, command):
            run(here(next(other for other in all_commands() if re.search(earlier, other))))
    run(here(command))


@pytest.mark.parametrize(
    "command",
    [command for command in all_commands() if is_slow(command) and " -m unisd_jax" in command.split("\n")[0]],
)
def test_the_options_are_read(folder, monkeypatch, command):
    """Also in make test, for the commands that only make test-slow runs."""
    if elsewhere(command):
        pytest.skip(elsewhere(command).reason)
    monkeypatch.chdir(folder)
    words = shlex.split(here(command))
    parse_command_line(words[words.index("-m") + 2 :], "prog")


@pytest.mark.parametrize("pattern", ELSEWHERE)
def test_what_cannot_run_here_is_run_elsewhere(folder, pattern):
    """And is still on a page; a target of make exists, an extra is declared."""
    found = [command for command in all_commands() if re.fullmatch(pattern, command)]
    assert found, f"no page prints {pattern} any more: remove it"
    path, _, name = ELSEWHERE[pattern].by.partition("::")
    path, _, stage = path.partition(": ")
    text = pages.page(path)
    assert f"def {name}(" in text if name else (stage or "def test") in text
    for command in found:
        if command.startswith("make "):
            subprocess.run([*shlex.split(command), "-n"], cwd=folder, check=True, capture_output=True)
        if extra := re.search(r"\[(\w+)\]", command):
            assert extra[1] in tomllib.loads(pages.page("pyproject.toml"))["project"]["optional-dependencies"]
        if variable := re.match(r"UNISD_\w+", command):
            assert variable[0] in text


@pytest.mark.parametrize("pattern", [*PLACEHOLDERS, *ADDED])
def test_nothing_in_the_tables_is_left_over(pattern):
    assert any(re.search(pattern, filled(command)) or re.search(pattern, command) for command in all_commands()), (
        pattern
    )


def test_what_the_tables_shrink_is_an_option():
    load_config(
        pages.REPOSITORY / "configs/base.yaml",
        [f"--{name}={json.dumps(value)}" for name, value in SMALL.items()] + ["--model.path=x"],
    )


# --- Programs and data ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in pages.PAGES if name not in PROGRAMS and pages.blocks(name, "python")]
)
def test_the_programs_run(prepared, run, name):
    for number, program in enumerate(pages.blocks(name, "python")):
        file = f"{Path(name).stem}_{number}.py"
        (prepared / file).write_text(program, encoding="utf-8")
        run(f"python {file}")


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_other_tests_run(name):
    assert pages.blocks(name, "python"), f"{name} has no program any more: remove it"
    assert "exec(compile(" in pages.page(PROGRAMS[name]) or "get_task(" in pages.page(PROGRAMS[name])


@pytest.mark.parametrize("name", [name for name in pages.PAGES if pages.blocks(name, "yaml")])
def test_configurations_are_read(folder, name):
    for number, text in enumerate(pages.blocks(name, "yaml")):
        path = folder / "configs" / f"{Path(name).stem}_{number}.yaml"
        path.write_text(text if "inherit:" in text else f"inherit: modes/unisd_star.yaml\n{text}", encoding="utf-8")
        load_config(path, [f"--model.path={MODEL}"])


@pytest.mark.parametrize("name", [name for name in pages.PAGES if pages.blocks(name, "json")])
def test_rows_are_read(tmp_path, name):
    """As one's own data: an object may be broken over lines to fit."""
    for text in pages.blocks(name, "json"):
        rows = text.replace("}\n", "}\0").replace("\n", " ").replace("\0", "\n")
        (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
        items = load_items(get_task("jsonl"), "train", place=Place(file=tmp_path / "rows.jsonl")).items
        assert len(items) == len(rows.splitlines())
