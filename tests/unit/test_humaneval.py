"""HumanEval: rows to items and replies to grades, on an invented row and on the real data where it lies."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from task_rows import HUMANEVAL, load, real, without, write

from unisd_jax.data.tasks import get_task, humaneval
from unisd_jax.errors import ConfigError, UserError

# With an import and a helper in the stub, which a reply may fail to repeat.
ROOTS = {
    "task_id": "Toy/1",
    "prompt": "import math\n\n\ndef square(x):\n    return x * x\n\n\ndef root(x: float) -> float:\n"
    '    """The other way round from square."""\n',
    "canonical_solution": "\n    return math.sqrt(x)\n",
    "test": "\n\ndef check(candidate):\n    assert candidate(9) == 3\n    assert candidate(square(5)) == 5\n\n",
    "entry_point": "root",
}
BODY = "    return math.sqrt(x)"
FUNCTION = f"def root(x):\n{BODY}"
HELPER = "def square(x):\n    return x * x"


@pytest.fixture
def roots(tmp_path):
    return load("humaneval", write(tmp_path / "rows.jsonl", ROOTS))[0]


def test_item(tmp_path):
    [item] = load("humaneval", write(tmp_path / "rows.jsonl.gz", HUMANEVAL))
    code = HUMANEVAL["prompt"] + "    return 2 * x"
    assert (item.id, item.answer, item.completion) == ("Toy/0", code, f"```python\n{code}\n```")
    assert item.prompt.startswith(HUMANEVAL["prompt"].strip() + "\n\nComplete the function above")
    assert "assert" not in item.prompt and item.question == HUMANEVAL["prompt"].strip()
    assert humaneval.parse(item.completion, item) == item.answer


def test_it_is_not_for_training(tmp_path):
    with pytest.raises(ConfigError, match="'humaneval' is for evaluation only and never trained on"):
        load("humaneval", write(tmp_path / "rows.jsonl", HUMANEVAL), side="train")
    assert get_task("humaneval").family == "code"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (HUMANEVAL | {"task_id": 3}, "field 'task_id' is a int, expected a string"),
        (HUMANEVAL | {"prompt": ""}, "field 'prompt' is empty"),
        (HUMANEVAL | {"entry_point": "halve"}, "field 'canonical_solution' is without the function 'halve'"),
        (HUMANEVAL | {"canonical_solution": "return ("}, r"field 'canonical_solution' is not Python \('return \('\)"),
        (HUMANEVAL | {"test": "assert double(2) == 4"}, "field 'test' is without the function 'check'"),
        (HUMANEVAL | {"test": "def check(:"}, "field 'test' is not Python"),
        *[(without(HUMANEVAL, name), f"field '{name}' is missing") for name in HUMANEVAL],
    ],
)
def test_errors_name_file_line_and_field(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", HUMANEVAL | {"task_id": "Toy/9"}, row)
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2: {message}"):
        load("humaneval", path)


@pytest.mark.parametrize(
    ("text", "outcome", "with_stub", "form"),
    [
        (f"```python\nimport math\n{HELPER}\n{FUNCTION}\n```", "pass", 1, 1),
        (f"import math\n{HELPER}\n{FUNCTION}\n", "pass", 1, 0),
        (f"```python\nimport math\n{HELPER}\n{FUNCTION}", "pass", 1, 1),  # cut off
        (f"```python\nfrom __future__ import annotations\nimport math\n{HELPER}\n{FUNCTION}\n```", "pass", 1, 1),
        (f"```python\n{FUNCTION}\n```", "runtime_error", 1, 1),  # neither import nor helper
        (f"```python\nimport math\n{FUNCTION}\n```", "runtime_error", 1, 1),
        (f"```python\n{BODY}\n```", "syntax_error", 1, 1),  # the body alone
        (f"```python\nimport math\n{HELPER}\n{FUNCTION.replace('sqrt', 'floor')}\n```", "wrong_answer", 0, 1),
        (f"```python\n{ROOTS['prompt']}```", "wrong_answer", 0, 1),  # the stub as it was
        ("```python\n```", "no_code", 0, 1),
        (f"```python\n{HELPER}\nimport sys\nsys.exit(0)\n```", "runtime_error", 0, 1),
        (f"```python\n{HELPER}\ndef root(x:\n```", "syntax_error", 0, 1),
        ("It returns math.sqrt(x).", "no_code", 0, 0),
        ("", "no_code", 0, 0),
    ],
)
def test_reply(roots, text, outcome, with_stub, form):
    assert humaneval.grade(text, roots) == {
        "exact": outcome == "pass", "exact_with_stub": with_stub, "form": form, "outcome": outcome,
    }  # fmt: skip


def test_real_solutions_pass_their_tests():
    items = load("humaneval", real("humaneval/test"))
    assert len(items) == len({item.id for item in items}) == 164
    for item in items:
        assert item.prompt == item.prompt.strip()
        assert humaneval.parse(item.completion, item) == item.answer
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        grades = list(pool.map(lambda item: humaneval.grade(item.completion, item), items))
    right = {"exact": 1.0, "exact_with_stub": 1.0, "form": 1.0, "outcome": "pass"}
    assert [item.id for item, grade in zip(items, grades, strict=True) if grade != right] == []
