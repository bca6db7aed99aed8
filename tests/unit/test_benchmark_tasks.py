"""MBPP, CoS-E and ScienceQA: rows to items, replies to answers, on invented rows and on the real data where it lies."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest

from unisd_jax.data.tasks import Item, choice, get_task, jsonl, mbpp
from unisd_jax.errors import ConfigError, UserError

DATA = Path(os.environ.get("UNISD_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")


def real(name: str) -> Path:
    """The file of real rows, or a skip where there is none."""
    path = DATA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no benchmark data: {path} does not exist, UNISD_DATA names the folder")
    return path


def write(path, *rows):
    data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def without(row, *names):
    return {key: value for key, value in row.items() if key not in names}


FULL = {
    "task_id": 7,
    "text": "Add one to a number.",
    "code": "def helper(x):\r\n    return x\r\ndef add_one(x):\r\n    return helper(x) + 1\r\n",
    "test_list": ["assert abs(add_one(1)) == 2", "assert (add_one(helper(2))) == 3"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
SANITIZED = {
    "task_id": 8,
    "prompt": "Halve a number.",
    "code": "def half(x, by=2):\n    return x / by",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(half(3), 1.5)"],
}
COS_E = {
    "id": "a1",
    "question": "Where do fish live?",
    "choices": ["sky", "water", "sand", "water", "fire"],
    "answer": "water",
    "abstractive_explanation": "Fish breathe\n in water.",
    "upstream_index": 0,
}
SCIENCEQA = {
    "question": "Which is a gas?",
    "choices": ["steam", "ice", "iron", "rock"],
    "answer": 0,
    "hint": "Look around.",
    "lecture": "Gases fill their container.",
    "solution": "Steam is water\nas a gas.",
    "pid": "31",
    "upstream_index": 0,
}
ROWS = {"mbpp": FULL, "cos_e": COS_E, "scienceqa": SCIENCEQA}


# --- files ---


@pytest.mark.parametrize("name", ROWS)
def test_a_path_is_required(name):
    for split in ("train", "test"):
        with pytest.raises(ConfigError, match=rf"'{name}' has no data of its own: set data\.{split}_path"):
            get_task(name).load(split, None)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_plain_and_compressed_files_are_read(name, suffix, tmp_path):
    [item] = get_task(name).load("train", write(tmp_path / f"rows.{suffix}", ROWS[name]))
    assert get_task(name).grade(item.completion, item) == {"exact": 1.0, "form": 1.0}
    assert get_task(name).parse(item.completion, item) == item.answer


def test_the_users_own_data_may_be_compressed(tmp_path):
    path = write(tmp_path / "mine.jsonl.gz", {"prompt": "p", "completion": "c"})
    assert jsonl.load("train", path) == [Item("line-1", "p", "c", "c")]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"{}" + data, lambda data: data[:12] + b"?" * 30]
)
def test_a_broken_gzip_file_is_named(tmp_path, damage):
    path = write(tmp_path / "rows.jsonl.gz", *[FULL | {"task_id": number} for number in range(20)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz is not a whole gzip file"):
        mbpp.load("train", path)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("mbpp", without(FULL, "task_id"), "field 'task_id' is missing, expected a whole number; found fields: 'text'"),
        ("mbpp", FULL | {"task_id": "7"}, "field 'task_id' is a str, expected a whole number"),
        ("mbpp", FULL | {"task_id": True}, "field 'task_id' is a bool"),
        ("mbpp", without(FULL, "text"), "field 'text' is missing"),
        ("mbpp", FULL | {"code": " "}, "field 'code' is empty"),
        ("mbpp", FULL | {"code": "def f(:"}, "field 'code' is not Python: 'def f"),
        ("mbpp", FULL | {"code": "x = 1"}, "field 'code' defines no function at its top level"),
        ("mbpp", FULL | {"test_list": "assert f()"}, "field 'test_list' is a str, expected a list"),
        ("mbpp", FULL | {"test_list": ["assert f()", 3]}, r"field 'test_list'\[1\] is a int, expected a string"),
        ("mbpp", FULL | {"test_list": []}, "field 'test_list' has 0 entries, expected at least 1"),
        ("mbpp", FULL | {"test_list": ["assert ("]}, "field 'test_list' is not Python"),
        ("mbpp", FULL | {"test_setup_code": 3}, "field 'test_setup_code' is a int"),
        ("mbpp", SANITIZED | {"test_imports": "import math"}, "field 'test_imports' is a str"),
        ("cos_e", without(COS_E, "id"), "field 'id' is missing"),
        ("cos_e", COS_E | {"answer": "air"}, "field 'answer' is 'air', expected one of the texts in 'choices'"),
        ("cos_e", COS_E | {"choices": ["water"]}, "field 'choices' has 1 entries, expected at least 2"),
        ("cos_e", COS_E | {"choices": ["water", ""]}, r"field 'choices'\[1\] is empty"),
        ("cos_e", COS_E | {"choices": ["water"] * 27}, "field 'choices' has 27 entries, expected at most 26"),
        ("cos_e", COS_E | {"abstractive_explanation": []}, "field 'abstractive_explanation' is a list"),
        ("cos_e", COS_E | {"upstream_index": -1}, "field 'upstream_index' is -1"),
        ("scienceqa", SCIENCEQA | {"answer": 4}, "field 'answer' is 4, expected an index into the 4 choices"),
        ("scienceqa", SCIENCEQA | {"answer": "steam"}, "field 'answer' is a str, expected a whole number"),
        ("scienceqa", SCIENCEQA | {"lecture": 1}, "field 'lecture' is a int, expected a string"),
        ("scienceqa", "[1]", "found a JSON list, expected an object"),
        ("scienceqa", "{'a': 1}", "not valid JSON"),
    ],
)
def test_errors_name_file_line_and_field(name, row, message, tmp_path):
    path = write(tmp_path / "rows.jsonl", "", ROWS[name] | {"id": "zz", "pid": "99", "task_id": 99}, row)
    with pytest.raises(UserError, match=f"rows.jsonl, line 3: {message}") as caught:
        get_task(name).load("train", path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ROWS)
def test_ids_are_unique_and_files_not_empty(name, tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: id '.*' was already used"):
        get_task(name).load("train", write(tmp_path / "rows.jsonl", ROWS[name], ROWS[name]))
    with pytest.raises(UserError, match="holds no items"):
        get_task(name).load("train", write(tmp_path / "none.jsonl.gz"))


# --- multiple choice ---


@pytest.mark.parametrize(
    ("count", "position", "order"),
    [
        (4, 0, [2, 1, 3, 0]),
        (4, 1, [2, 3, 1, 0]),
        (4, 2, [1, 0, 2, 3]),
        (5, 0, [3, 1, 2, 4, 0]),
        (5, 1, [1, 4, 3, 2, 0]),
        (5, 2, [2, 1, 4, 0, 3]),
    ],
)
def test_order_of_the_options(count, position, order):
    assert choice.shuffled(count, position) == order


def test_scienceqa_item(tmp_path):
    [item] = get_task("scienceqa").load("train", write(tmp_path / "rows.jsonl", SCIENCEQA))
    assert (item.id, item.answer) == ("scienceqa-31", "D")
    assert item.details == {"options": ["iron", "ice", "rock", "steam"], "hint": "Look around."}
    assert item.completion == "Reasoning: Steam is water as a gas.\nAnswer: D"
    assert "Question: Which is a gas?\n\nContext: Gases fill their container.\n\nA. iron\nB. ice\n" in item.prompt
    assert item.prompt.endswith("\nReasoning: <your reasoning>\nAnswer: <A, B, C or D>")
    assert get_task("scienceqa").family == "choice"


def test_scienceqa_without_lecture_and_solution(tmp_path):
    rows = [SCIENCEQA | {"lecture": None, "solution": ""}, without(SCIENCEQA, "lecture", "solution", "hint", "pid")]
    for item in get_task("scienceqa").load("train", write(tmp_path / "rows.jsonl", *rows)):
        assert item.completion == "Answer: D"
        assert "Context" not in item.prompt
    assert item.id == "scienceqa-train-0"


def test_scienceqa_counts_positions_without_the_image_rows(tmp_path):
    row = without(SCIENCEQA, "upstream_index", "pid")
    rows = [row | {"image": None}, row | {"image": {"bytes": "", "path": None}}, row | {"has_image": True}, row]
    items = get_task("scienceqa").load("test", write(tmp_path / "rows.jsonl", *rows))
    assert [item.id for item in items] == ["scienceqa-test-0", "scienceqa-test-1"]
    assert items[1].details["options"] == ["iron", "rock", "ice", "steam"]
    with pytest.raises(UserError, match=r"only questions with an image.*data\.test_path"):
        get_task("scienceqa").load("test", write(tmp_path / "rows.jsonl", rows[1]))


def test_cos_e_takes_the_first_of_equal_choices(tmp_path):
    [item] = get_task("cos_e").load("train", write(tmp_path / "rows.jsonl", COS_E))
    assert item.details["options"] == ["water", "water", "sand", "fire", "sky"]
    assert (item.id, item.answer) == ("a1", "B")  # order 3, 1, 2, 4, 0
    assert item.completion == "Reasoning: Fish breathe in water.\nAnswer: B"


def test_cos_e_position_falls_back_to_the_row_number(tmp_path):
    rows = [without(COS_E, "upstream_index") | {"id": name} for name in "xyz"]
    items = get_task("cos_e").load("train", write(tmp_path / "rows.jsonl", *rows))
    assert items[2].details["options"] == ["sand", "water", "fire", "sky", "water"]


FOUR = Item("x", "?", "", "B", details={"options": ["gravity", "magnetism", "a student", "all of them"]})
FIVE = FOUR._replace(details={"options": [*FOUR.details["options"], "none"]})


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Reasoning: x\nAnswer: B", "B"),
        ("**Answer: B**", "B"),
        ("Answer: <B>", "B"),
        ("Answer: Because\nAnswer: C", "C"),
        ("A student said so.\nThe answer is probably C.", None),
        ("Answer:\n\nB. foo", None),
        ("The answer is **C**. A dog", None),
        ("Answer: Both A", None),
        ("I think a", None),
        ("answer: C", "C"),
        ("Answer: E", None),
        ("", None),
        # the last statement counts
        ("Answer: A\nNo, wait.\nAnswer: B", "B"),
        ("Answer: A\nAnswer: E", None),
        ("Answer: B\n\nI hope this helps! A good day.", "B"),
        # markdown
        ("### Final Answer: (B)", "B"),
        ("**Answer:** B", "B"),
        ("**Answer**: **B**", "B"),
        ("> - Answer: `B`.", "B"),
        ("__Answer: B__\r\n", "B"),
        # what may stand after the letter
        ("Answer: B.", "B"),
        ("Answer: B. magnetism, of course", "B"),
        ("Answer: B) Magnetism", "B"),
        ("Answer: b", "B"),
        ("Answer: B magnetism", "B"),
        ("Answer: C (a student)", "C"),
        ("Answer: B - because A is wrong", "B"),
        ("Answer: A student said so", None),
        ("Answer: a dog", None),
        ("Answer: B2", None),
        # two answers are none
        ("Answer: A or B", None),
        ("Answer: A, B", None),
        ("Answer: **A** and **B**", None),
        ("Answer: (A)/(B)", None),
        ("Answer: B\nAnswer: A or B", None),
        ("Answer: <A, B, C or D>", None),
    ],
)
def test_strict_parser(text, letter):
    assert choice.parse(text, FOUR) == letter
    assert choice.grade(text, FOUR) == {"exact": float(letter == "B"), "form": float(letter is not None)}


def test_valid_letters_are_the_items_own():
    assert choice.parse("Answer: E", FIVE) == "E"
    assert choice.parse("Answer: F", FIVE) is None


# --- MBPP ---


def test_full_row(tmp_path):
    [item] = mbpp.load("train", write(tmp_path / "rows.jsonl", FULL))
    assert item.id == "mbpp-7"
    assert item.answer == "def helper(x):\n    return x\ndef add_one(x):\n    return helper(x) + 1"
    assert item.completion == f"```python\n{item.answer}\n```"
    assert item.details == {"tests": FULL["test_list"], "setup": "", "name": "add_one"}
    assert item.prompt.startswith("Add one to a number.\n\n")
    assert "\ndef add_one(x):\n" in item.prompt
    assert "def helper" not in item.prompt
    assert "\n".join(FULL["test_list"]) in item.prompt
    assert get_task("mbpp").family == "code"


def test_sanitized_row(tmp_path):
    [item] = mbpp.load("train", write(tmp_path / "rows.jsonl", SANITIZED))
    assert "\ndef half(x, by=2):\n" in item.prompt
    assert "\nimport math\nassert math.isclose(half(3), 1.5)\n" in item.prompt
    assert item.details["setup"] == "import math"


def test_set_up_may_use_what_the_solution_defines(tmp_path):
    row = FULL | {
        "code": "class Node:\n    def __init__(self, x):\n        self.x = x\ndef value(node):\n    return node.x",
        "test_setup_code": "root = Node(3)\r\nother = Node(4)",
        "test_list": ["assert value(root) == 3"],
    }
    [item] = mbpp.load("train", write(tmp_path / "rows.jsonl", row))
    assert item.details["name"] == "value"
    assert mbpp.grade(item.completion, item)["exact"] == 1


@pytest.mark.parametrize(
    ("code", "test", "name"),
    [
        ("def helper(n): pass\ndef f(n): pass", "assert f(1) == 2", "f"),
        ("def f(n): pass\ndef helper(n): pass", "assert f(helper(1)) == 2", "f"),
        ("class P:\n    def __init__(self): pass\ndef f(a): pass", "assert f([P(), P()]) == 2", "f"),
        ("def f(a): pass\ndef g(a): pass", "assert not any(abs(f(1)) for _ in [1])", "f"),
        ("async def f(a): pass\ndef g(a): pass", "import asyncio\nassert asyncio.run(f(1))", "f"),
        ("def f(a): pass\ndef last(a): pass", "assert elsewhere(1) == 2", "last"),
        ("x = 1", "assert f(1)", None),
    ],
)
def test_tested_function(code, test, name):
    function = mbpp.tested_function(mbpp.ast.parse(code), [mbpp.ast.parse(test)])
    assert (function and function.name) == name


@pytest.fixture
def add_one(tmp_path):
    return mbpp.load("train", write(tmp_path / "rows.jsonl", FULL | {"test_list": ["assert add_one(1) == 2"]}))[0]


GOOD = "def add_one(x):\n    return x + 1"


@pytest.mark.parametrize(
    ("text", "code", "exact", "form"),
    [
        (f"```python\n{GOOD}\n```", GOOD, 1, 1),
        (f"Sure:\n\n```\n{GOOD}\n```\nIt adds one.", GOOD, 1, 1),
        (f"```py\n{GOOD}", GOOD, 1, 1),  # cut off
        (f"```python\r\n{GOOD}\r\n```", GOOD, 1, 1),
        ("1. Like this:\n   ```python\n   def add_one(x):\n       return x + 1\n   ```", GOOD, 1, 1),
        (f"```python\n{GOOD}\n```\n```python\nadd_one = None\n```", GOOD, 1, 1),
        (GOOD + "\n", GOOD, 1, 0),
        ("```python\ndef add_one(x):\n    return x\n```", "def add_one(x):\n    return x", 0, 1),
        ("```python\ndef add_one(x:\n```", "def add_one(x:", 0, 1),
        ("```python\ndef other(x):\n    return x + 1\n```", "def other(x):\n    return x + 1", 0, 1),
        (f"```python\n{GOOD}\nimport sys\nsys.exit(0)\n```", f"{GOOD}\nimport sys\nsys.exit(0)", 0, 1),
        ("```python\n```", None, 0, 1),
        ("I do not know.", None, 0, 0),
        ("", None, 0, 0),
        (" \n", None, 0, 0),
        ("def add_one(x): return '\0'", None, 0, 0),
        ("(" * 100_000, None, 0, 0),
    ],
)
def test_reply(add_one, text, code, exact, form):
    assert mbpp.parse(text, add_one) == code
    assert mbpp.grade(text, add_one) == {"exact": exact, "form": form}


# --- the real data ---


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("mbpp", "mbpp/train", 374),
        ("mbpp", "mbpp/test", 400),
        ("mbpp", "mbpp_sanitized/test", 157),
        ("cos_e", "cos_e/train", 9741),
        ("cos_e", "cos_e/validation", 1121),
        ("scienceqa", "scienceqa/train", 6508),
        ("scienceqa", "scienceqa/test", 2124),
    ],
)
def test_real_rows_load(name, file, count):
    items = get_task(name).load("train", real(file))
    assert len(items) == count
    for item in items:
        assert get_task(name).parse(item.completion, item) == item.answer
        assert item.prompt == item.prompt.strip()


@pytest.mark.parametrize(("file", "name"), [("cos_e/train", "cos_e"), ("scienceqa/train", "scienceqa")])
def test_real_gold_replies_are_right(file, name):
    rows = [json.loads(line) for line in gzip.decompress(real(file).read_bytes()).decode().splitlines()]
    for row, item in zip(rows, get_task(name).load("train", real(file)), strict=True):
        gold = row["answer"] if isinstance(row["answer"], str) else row["choices"][row["answer"]]
        assert item.details["options"]["ABCDE".index(item.answer)] == gold.strip()
        assert get_task(name).grade(item.completion, item) == {"exact": 1.0, "form": 1.0}
        assert re.fullmatch(r"(Reasoning: .+\n)?Answer: [A-E]", item.completion)


def test_real_solutions_with_a_helper_or_a_class_first():
    items = mbpp.load("train", real("mbpp/train")) + mbpp.load("test", real("mbpp/validation"))
    items = {item.id: item for item in items}
    helper_first, class_first = items["mbpp-592"], items["mbpp-601"]
    assert helper_first.details["name"] == "sum_Of_product"
    assert "\ndef sum_Of_product(n):\n" in helper_first.prompt
    assert helper_first.answer.startswith("def binomial_Coeff(n,k):")
    assert class_first.details["name"] == "max_chain_length"
    assert "\ndef max_chain_length(arr, n):\n" in class_first.prompt
    assert "def __init__(self, a, b):" in class_first.answer
    for item in (helper_first, class_first, items["mbpp-927"]):  # 927 has a set-up that uses the solution's class
        assert mbpp.grade(item.completion, item) == {"exact": 1.0, "form": 1.0}


@pytest.mark.parametrize(("file", "count"), [("mbpp_sanitized/train", 120), ("mbpp/train", 40)])
def test_real_solutions_pass_their_tests(file, count):
    items = mbpp.load("train", real(file))
    chosen = items[:: len(items) // count][:count]
    assert len(chosen) == count
    assert [item.id for item in chosen if mbpp.grade(item.completion, item)["exact"] != 1] == []
