"""The pages of the documentation, and what stands in their code blocks."""

import re
import shutil
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")))
# What a line of a block begins with if it is a command, after variables that it sets.
PROGRAMS = "python python3 make pip jupyter bash sh srun sbatch curl source git docker for".split()
STARTS = re.compile(rf"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\S*/)?(?:{'|'.join(PROGRAMS)})(?= |$)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def page(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    """A page without its code blocks."""
    return BLOCK.sub("", page(name))


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of a page in one language; those without a name have ""."""
    return [text for found, text in BLOCK.findall(page(name)) if found == language]


def commands(name: str) -> list[str]:
    """The commands in the blocks of a page, each on one line: continuations joined, comments cut off.

    A loop is one command up to its `done`; `...` at the end of a line stands for more options and is cut off too.
    """
    found = []
    for language in ("", "bash", "sh", "console"):
        for block in blocks(name, language):
            lines = iter(block.replace("\\\n", " ").splitlines())
            for line in lines:
                if not STARTS.match(line):
                    continue
                while line.startswith("for ") and not line.endswith("done"):
                    line += "\n" + next(lines)
                line = re.sub(
                    r"\s+#\s.*$|\[--\S+ \.\.\.\]|\s(?:\.\.\.|…)$", "", line.removeprefix("$ "), flags=re.MULTILINE
                )
                found.append(line if "\n" in line else " ".join(line.split()))
    return found


def copied_package(folder: Path) -> Path:
    """A copy of what a run needs of the repository, to be edited."""
    for name in ("unisd_jax", "kernels", "configs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    # It tells the package that the kernels lie beside it.
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    return folder


def apply_diff(diff: str, folder: Path) -> set[str]:
    """Makes the edit that a page shows, and returns the files; what a hunk replaces must occur once in its file."""
    edited = set()
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        name, *hunks = re.split(r"^@@\n", part, flags=re.MULTILINE)
        path = folder / name.strip()
        text = path.read_text(encoding="utf-8")
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            assert all(line[0] in " +-" for line in lines), hunk
            old = "".join(line[1:] for line in lines if line[0] != "+")
            assert text.count(old) == 1, f"{name.strip()} has {text.count(old)} times\n{old}"
            text = text.replace(old, "".join(line[1:] for line in lines if line[0] != "-"))
        path.write_text(text, encoding="utf-8")
        edited.add(name.strip())
    return edited
