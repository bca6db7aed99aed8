"""What the documentation names exists: tests, files, options, modes, metrics."""

import ast
import re

import pytest
from pages import BLOCK, PAGES, REPOSITORY, blocks, page, prose

from unisd_jax.config_loading import walk_options
from unisd_jax.config_modes import MODES
from unisd_jax.config_options import Config
from unisd_jax.data.tasks import TASKS

SECTIONS = {name.split(".")[0] for name, _, _ in walk_options(Config) if "." in name}
OPTIONS = {name for name, _, _ in walk_options(Config)}


def in_backticks(name: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", prose(name)))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_pages_and_headings(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        if re.match(r"https?:", target):
            continue
        path, _, heading = target.partition("#")
        found = (REPOSITORY / name).parent / path if path else REPOSITORY / name
        assert found.exists(), f"{name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", found.read_text(encoding="utf-8")), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_table_of_contents_has_every_page():
    linked = re.findall(r"^\| \[(\w+\.md)\]", page("docs/README.md"), flags=re.MULTILINE)
    assert sorted(linked) == sorted(
        name.removeprefix("docs/") for name in PAGES if name.startswith("docs/") and name != "docs/README.md"
    )


@pytest.mark.parametrize("name", PAGES)
def test_options_exist(name):
    """`section.option`, `section.option=value` and `section.part` with dots name options or sections of them."""
    for text in in_backticks(name):
        option = re.match(rf"(?:--)?((?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+)", text)
        other = "/" in text or text.endswith((".json", ".safetensors", ".py")) or text == "train.run"
        if option is None or other:
            continue  # a path, a file, a function
        found = option.group(1)
        assert found in OPTIONS or any(known.startswith(f"{found}.") for known in OPTIONS), f"{name}: {text}"


@pytest.mark.parametrize("name", PAGES)
def test_files_exist(name):
    for text in in_backticks(name):
        path = text.split("::")[0]
        if re.fullmatch(r"(unisd_jax|configs|scripts|tests|docs|kernels|notebooks|\.ci)/[\w./-]+", path):
            assert (REPOSITORY / path).exists(), f"{name}: {text}"


def test_the_readme_s_programs_run_and_the_fused_loss_is_the_hand_written_one(capsys):
    programs = blocks("README.md", "python")
    printed = []
    for program in programs:
        exec(compile(program, "README.md", "exec"), {})
        printed.append(capsys.readouterr().out.split())
    by_hand, fused = next(words for words, program in zip(printed, programs, strict=True) if "def by_hand" in program)
    assert len(printed) == 2 and float(fused) == pytest.approx(float(by_hand), rel=1e-5)


def test_every_difference_has_a_test_that_exists():
    rows = [line for line in page("docs/differences.md").splitlines() if line.startswith("| D-")]
    assert [int(row[4:6]) for row in rows] == list(range(1, 27))
    of_data = [line for line in page("docs/tasks.md").splitlines() if line.startswith("| A")]
    of_evaluation = [line for line in page("docs/evaluation.md").splitlines() if re.match(r"\| [ERS]\d", line)]
    assert len(of_data) == 18 and len(of_evaluation) == 19
    for row in rows + of_data + of_evaluation:
        named = re.findall(r"`(tests/[\w/.]+\.py)(?:::(\w+))?`", row.split("|")[-2])
        assert named, row
        for path, test in named:
            source = (REPOSITORY / path).read_text(encoding="utf-8")
            functions = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
            assert not test or test in functions, f"{path} has no {test}"


def test_every_task_is_documented():
    rows = {line.split("`")[1] for line in page("docs/tasks.md").splitlines() if line.startswith("| `") and "|" in line}
    assert set(TASKS) <= rows


def test_every_mode_is_documented_and_has_a_file():
    text = page("docs/mechanisms.md")
    for mode in set(MODES) - {"custom"}:
        assert (REPOSITORY / "configs" / "modes" / f"{mode}.yaml").exists()
        level, _, method = mode.rpartition("_")
        assert f"`{mode}`" in text or (level.startswith("agreement") and f"`_{method}`" in text), mode


def test_every_option_is_explained():
    """One comment a line: the base configuration is the reference of the options."""
    explained = {
        match.group(1)
        for line in page("configs/base.yaml").split("\nvariants:")[0].splitlines()
        if (match := re.match(r"\s*(?:# )?(\w+):.*#", line))
    }
    assert {name.rpartition(".")[2] for name in OPTIONS} <= explained


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_left_to_be_filled_in(name):
    assert not re.search(r"\b(TODO|TBD|FIXME|XXX|[A-Z]+_TABLE)\b", page(name))
