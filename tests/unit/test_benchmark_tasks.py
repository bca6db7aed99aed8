"""MBPP and multiple choice: rows to items, replies to answers, on invented rows and on the real data where it lies."""

import gzip
import json
import re

import pytest
from task_rows import COS_E, MBPP, MBPP_SANITIZED, ROWS, SCIENCEQA, load, real, without, write

from unisd_jax.data.tasks import Item, choice, get_task, mbpp
from unisd_jax.errors import UserError

# Three tasks whose files stand for those of all.
FILES = ("mbpp", "cos_e", "scienceqa")


# --- files ---


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_plain_and_compressed_files_are_read(name, suffix, tmp_path):
    [item] = load(name, write(tmp_path / f"rows.{suffix}", ROWS[name]))
    grades = get_task(name).grade(item.completion, item)
    assert (grades["exact"], grades["form"]) == (1.0, 1.0)
    assert get_task(name).parse(item.completion, item) == item.answer


def test_the_users_own_data_may_be_compressed(tmp_path):
    path = write(tmp_path / "mine.jsonl.gz", {"prompt": "p", "completion": "c"})
    assert load("jsonl", path) == [Item("line-1", "p", "c", "c")]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"{}" + data, lambda data: data[:12] + b"?" * 30]
)
def test_a_broken_gzip_file_is_named(tmp_path, damage):
    path = write(tmp_path / "rows.jsonl.gz", *[MBPP | {"task_id": number} for number in range(20)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz is not a whole gzip file"):
        load("mbpp", path)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("mbpp", without(MBPP, "task_id"), "field 'task_id' is missing, expected a whole number; found fields: 'text'"),
        ("mbpp", MBPP | {"task_id": "7"}, "field 'task_id' is a str, expected a whole number"),
        ("mbpp", MBPP | {"task_id": True}, "field 'task_id' is a bool"),
        ("mbpp", without(MBPP, "text"), "field 'text' is missing"),
        ("mbpp", MBPP | {"code": " "}, "field 'code' is empty"),
        ("mbpp", MBPP | {"code": "def f(:"}, "field 'code' is not Python .'def f"),
        ("mbpp", MBPP | {"code": "x = 1"}, "field 'code' is without a function at its top level"),
        ("mbpp", MBPP | {"test_list": "assert f()"}, "field 'test_list' is a str, expected a list"),
        ("mbpp", MBPP | {"test_list": ["assert f()", 3]}, r"field 'test_list'\[1\] is a int, expected a string"),
        ("mbpp", MBPP | {"test_list": []}, "field 'test_list' has 0 entries, expected at least 1"),
        ("mbpp", MBPP | {"test_list": ["assert ("]}, "field 'test_list' is not Python"),
        ("mbpp", MBPP | {"test_setup_code": 3}, "field 'test_setup_code' is a int"),
        ("mbpp", MBPP_SANITIZED | {"test_imports": "import math"}, "field 'test_imports' is a str"),
        ("cos_e", without(COS_E, "id"), "field 'id' is missing"),
        ("cos_e", COS_E | {"answer": "air"}, "field 'answer' is 'air', expected one of the texts in 'choices'"),
        ("cos_e", COS_E | {"choices": ["water"]}, "field 'choices' has 1 entries, expected at least 2"),
        ("cos_e", COS_E | {"choices": ["water", ""]}, r"field 'choices'\[1\] is empty"),
        ("cos_e", COS_E | {"choices": ["water"] * 27}, "field 'choices' is a list of 27 entries, expected at most 26"),
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
        load(name, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_ids_are_unique_and_files_not_empty(name, tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: id '.*' was already used"):
        load(name, write(tmp_path / "rows.jsonl", ROWS[name], ROWS[name]))
    with pytest.raises(UserError, match="holds no items"):
        load(name, write(tmp_path / "none.jsonl.gz"))


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
    assert choice.shuffled(count, 42 + position) == order


def test_scienceqa_item(tmp_path):
    [item] = load("scienceqa", write(tmp_path / "rows.jsonl", SCIENCEQA | {"subject": "natural science"}))
    assert (item.id, item.answer) == ("scienceqa-31", "D")
    options = ["iron", "ice", "rock", "steam"]
    assert item.details == {"options": options, "format": "free", "subject": "natural science", "topic": ""}
    assert item.completion == "Reasoning: Steam is water as a gas.\nAnswer: D"
    assert "\n\nBackground: Gases fill their container.\n\nContext: A kettle whistles.\n\nQuestion: W" in item.prompt
    assert "Question: Which is a gas?\n\nA. iron\nB. ice\n" in item.prompt
    assert item.prompt.endswith("\nReasoning: <your reasoning>\nAnswer: <A, B, C or D>")
    assert get_task("scienceqa").family == "choice"


def test_scienceqa_without_lecture_and_solution(tmp_path):
    rows = [SCIENCEQA | {"lecture": None, "solution": ""}, without(SCIENCEQA, "lecture", "solution", "hint", "pid")]
    for item in load("scienceqa", write(tmp_path / "rows.jsonl", *rows)):
        assert item.completion == "Answer: D"
        assert "Background" not in item.prompt
    assert item.id == "scienceqa-at-0" and "Context" not in item.prompt


def test_scienceqa_counts_positions_without_the_image_rows(tmp_path):
    row = without(SCIENCEQA, "upstream_index", "pid")
    rows = [row | {"image": None}, row | {"image": {"bytes": "", "path": None}}, row | {"has_image": True}, row]
    items = load("scienceqa", write(tmp_path / "rows.jsonl", *rows))
    assert [item.id for item in items] == ["scienceqa-at-0", "scienceqa-at-1"]
    assert items[1].details["options"] == ["iron", "rock", "ice", "steam"]
    with pytest.raises(UserError, match=r"no item is left of 1 rows \(1 with an image\)"):
        load("scienceqa", write(tmp_path / "rows.jsonl", rows[1]))


def test_cos_e_takes_the_first_of_equal_choices(tmp_path):
    [item] = load("cos_e", write(tmp_path / "rows.jsonl", COS_E))
    assert item.details["options"] == ["water", "water", "sand", "fire", "sky"]
    assert (item.id, item.answer) == ("a1", "B")  # order 3, 1, 2, 4, 0
    assert item.completion == "Reasoning: Fish breathe in water.\nAnswer: B"


def test_cos_e_position_falls_back_to_the_row_number(tmp_path):
    rows = [without(COS_E, "upstream_index") | {"id": name} for name in "xyz"]
    items = load("cos_e", write(tmp_path / "rows.jsonl", *rows))
    assert items[2].details["options"] == ["sand", "water", "fire", "sky", "water"]


OPTIONS = ["gravity", "magnetism", "a student", "all of them"]
FOUR = Item("x", "?", "", "B", details={"options": OPTIONS, "format": "free"})
FIVE = FOUR._replace(details={"options": [*OPTIONS, "none"], "format": "free"})


@pytest.mark.parametrize(
    ("text", "letter", "rule"),
    [
        ("Reasoning: x\nAnswer: B", "B", "answer_line"),
        ("**Answer: B**", "B", "answer_line"),
        ("Answer: <B>", "B", "answer_line"),
        ("Answer: Because\nAnswer: C", "C", "answer_line"),
        ("A student said so.\nThe answer is probably C.", None, "none"),
        ("Answer:\n\nB. foo", None, "none"),
        ("The answer is **C**. A dog", None, "none"),
        ("Answer: Both A", None, "none"),
        ("I think a", None, "none"),
        ("answer: C", "C", "answer_line"),
        ("Answer: E", None, "none"),
        ("", None, "none"),
        # the last statement counts
        ("Answer: A\nNo, wait.\nAnswer: B", "B", "answer_line"),
        ("Answer: A\nAnswer: E", None, "none"),
        ("Answer: B\n\nI hope this helps! A good day.", "B", "answer_line"),
        # markdown
        ("### Final Answer: (B)", "B", "answer_line"),
        ("**Answer:** B", "B", "answer_line"),
        ("**Answer**: **B**", "B", "answer_line"),
        ("> - Answer: `B`.", "B", "answer_line"),
        ("__Answer: B__\r\n", "B", "answer_line"),
        # what may stand after the letter
        ("Answer: B.", "B", "answer_line"),
        ("Answer: B. magnetism, of course", "B", "option_text"),
        ("Answer: B) Magnetism", "B", "option_text"),
        ("Answer: b", "B", "answer_line"),
        ("Answer: B magnetism", "B", "option_text"),
        ("Answer: C (a student)", "C", "option_text"),
        ("Answer: B - because A is wrong", "B", "answer_line"),
        ("Answer: A student said so", None, "none"),
        ("Answer: a dog", None, "none"),
        ("Answer: B2", None, "none"),
        # two answers are none
        ("Answer: A or B", None, "none"),
        ("Answer: A, B", None, "none"),
        ("Answer: **A** and **B**", None, "none"),
        ("Answer: (A)/(B)", None, "none"),
        ("Answer: B\nAnswer: A or B", None, "none"),
        ("Answer: <A, B, C or D>", None, "none"),
    ],
)
def test_strict_parser(text, letter, rule):
    assert choice.parse(text, FOUR) == letter
    assert choice.grade(text, FOUR) == {"exact": float(letter == "B"), "form": float(letter is not None), "rule": rule}


def test_valid_letters_are_the_items_own():
    assert choice.parse("Answer: E", FIVE) == "E"
    assert choice.parse("Answer: F", FIVE) is None


@pytest.mark.parametrize("name", ["cos_e", "scienceqa"])
def test_the_gold_reply_has_the_form_that_is_asked_for(name, tmp_path):
    path, reasons = write(tmp_path / "rows.jsonl", ROWS[name]), {"cos_e": "Fish", "scienceqa": "Steam"}[name]
    for answer in choice.ANSWERS:
        for reasoning in (True, False):
            [item] = load(name, path, answer=answer, reasoning=reasoning)
            rule = "answer_line" if answer == "free" else answer
            assert get_task(name).grade(item.completion, item) == {"exact": 1.0, "form": 1.0, "rule": rule}
            assert (reasons in item.completion) is (reasoning and answer != "letter")
            assert ('"reasoning"' in item.prompt) is (reasoning and answer == "json")
            assert ("Reasoning:" in item.prompt) is (reasoning and answer == "free")


@pytest.mark.parametrize(
    ("answer", "text", "letter"),
    [
        ("letter", " b.\n", "B"), ("letter", "(B)", "B"), ("letter", "Answer: B", None), ("letter", "BA", None),
        ("letter", "", None), ("letter", "E", None),
        ("json", '{"answer": "B"}', "B"), ("json", '```json\n{"reasoning": "x", "answer": "b"}\n```', "B"),
        ("json", '{"answer": "because"}', None), ("json", "[1]", None), ("json", '{"answer": 3}', None),
        ("json", '{"answer": "B", "reasoning": "x', None), ("json", "Answer: B", None), ("json", "[" * 9999, None),
    ],
)  # fmt: skip
def test_the_other_forms_are_read_strictly(answer, text, letter):
    item = FOUR._replace(details={"options": OPTIONS, "format": answer})
    assert choice.parse(text, item) == letter


def test_lecture_and_hint_can_be_left_out(tmp_path):
    path = write(tmp_path / "rows.jsonl", SCIENCEQA)
    [item] = load("scienceqa", path, lecture=False, hint=False)
    assert "Background" not in item.prompt and "Context" not in item.prompt
    assert load("scienceqa", path)[0].prompt != item.prompt


def test_as_released_a_demonstration_has_a_form_of_its_own(tmp_path):
    path = write(tmp_path / "rows.jsonl", SCIENCEQA, SCIENCEQA | {"pid": "32", "solution": ""})
    completions = [item.completion for item in load("scienceqa", path, answer="json", as_released=True)]
    assert completions[0] == "Reasoning: Steam is water as a gas.\nAnswer: D" and len(completions[1]) == 1


# --- MBPP ---


@pytest.mark.parametrize(
    ("code", "tests", "signature", "demonstration"),
    [
        ("def h(n): return n\ndef f(a, b): return h(a)", ["assert f(1, 2) == 1"], "def h(n):", "def f(n): return n"),
        ("class P:\n    def __init__(self): pass\ndef f(a): pass", ["assert f(1) is None"], "def f(a):", "def f(self)"),
        ("def f(a): return a", ["assert abs(f(1)) == 1"], "def f(a):", "def abs(a)"),
        ("def f(a): return a", ["assert (f(1)) == 1"], "def f(a):", "def f(a)"),
        ("def g(a): return a", ["assert set(f(1)) == 1"], "def g(a):", "def f(a)"),
    ],
)
def test_as_released_the_first_function_is_taken_for_the_tested_one(code, tests, signature, demonstration, tmp_path):
    path = write(tmp_path / "rows.jsonl", MBPP | {"code": code, "test_list": tests})
    [item] = load("mbpp", path, as_released=True)
    assert f"\n{signature}\n" in item.prompt and demonstration in item.completion
    [item] = load("mbpp", path)
    assert code in item.completion


def test_full_row(tmp_path):
    [item] = load("mbpp", write(tmp_path / "rows.jsonl", MBPP))
    assert item.id == "mbpp-7"
    assert item.answer == "def helper(x):\n    return x\ndef add_one(x):\n    return helper(x) + 1"
    assert item.completion == f"```python\n{item.answer}\n```"
    assert item.details == {"tests": MBPP["test_list"], "setup": "", "name": "add_one"}
    assert item.prompt.startswith("Add one to a number.\n\n")
    assert "\ndef add_one(x):\n" in item.prompt
    assert "def helper" not in item.prompt
    assert "\n".join(MBPP["test_list"]) in item.prompt
    assert get_task("mbpp").family == "code"


def test_sanitized_row(tmp_path):
    [item] = load("mbpp", write(tmp_path / "rows.jsonl", MBPP_SANITIZED))
    assert "\ndef half(x, by=2):\n" in item.prompt
    assert "\nimport math\nassert math.isclose(half(3), 1.5)\n" in item.prompt
    assert item.details["setup"] == "import math"


def test_set_up_may_use_what_the_solution_defines(tmp_path):
    row = MBPP | {
        "code": "class Node:\n    def __init__(self, x):\n        self.x = x\ndef value(node):\n    return node.x",
        "test_setup_code": "root = Node(3)\r\nother = Node(4)",
        "test_list": ["assert value(root) == 3"],
    }
    [item] = load("mbpp", write(tmp_path / "rows.jsonl", row))
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
    return load("mbpp", write(tmp_path / "rows.jsonl", MBPP | {"test_list": ["assert add_one(1) == 2"]}))[0]


GOOD = "def add_one(x):\n    return x + 1"


@pytest.mark.parametrize(
    ("text", "code", "outcome", "form"),
    [
        (f"```python\n{GOOD}\n```", GOOD, "pass", 1),
        (f"Sure:\n\n```\n{GOOD}\n```\nIt adds one.", GOOD, "pass", 1),
        (f"```py\n{GOOD}", GOOD, "pass", 1),  # cut off
        (f"```python\r\n{GOOD}\r\n```", GOOD, "pass", 1),
        ("1. Like this:\n   ```python\n   def add_one(x):\n       return x + 1\n   ```", GOOD, "pass", 1),
        (f"```python\n{GOOD}\n```\n```python\nadd_one = None\n```", GOOD, "pass", 1),
        (GOOD + "\n", GOOD, "pass", 0),
        ("```python\ndef add_one(x):\n    return x\n```", "def add_one(x):\n    return x", "wrong_answer", 1),
        ("```python\ndef add_one(x:\n```", "def add_one(x:", "syntax_error", 1),
        ("```python\ndef other(x):\n    return x + 1\n```", "def other(x):\n    return x + 1", "runtime_error", 1),
        (f"```python\n{GOOD}\nimport sys\nsys.exit(0)\n```", f"{GOOD}\nimport sys\nsys.exit(0)", "runtime_error", 1),
        ("```python\n```", None, "no_code", 1),
        ("I do not know.", None, "no_code", 0),
        ("", None, "no_code", 0),
        (" \n", None, "no_code", 0),
        ("def add_one(x): return '\0'", None, "no_code", 0),
        ("(" * 100_000, None, "no_code", 0),
    ],
)
def test_reply(add_one, text, code, outcome, form):
    assert mbpp.parse(text, add_one) == code
    assert mbpp.grade(text, add_one) == {"exact": outcome == "pass", "form": form, "outcome": outcome}


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
    items = load(name, real(file))
    assert len(items) == count
    for item in items:
        assert get_task(name).parse(item.completion, item) == item.answer
        assert item.prompt == item.prompt.strip()


@pytest.mark.parametrize(("file", "name"), [("cos_e/train", "cos_e"), ("scienceqa/train", "scienceqa")])
def test_real_gold_replies_are_right(file, name):
    rows = [json.loads(line) for line in gzip.decompress(real(file).read_bytes()).decode().splitlines()]
    for row, item in zip(rows, load(name, real(file)), strict=True):
        gold = row["answer"] if isinstance(row["answer"], str) else row["choices"][row["answer"]]
        assert item.details["options"]["ABCDE".index(item.answer)] == gold.strip()
        assert get_task(name).grade(item.completion, item) == {"exact": 1.0, "form": 1.0, "rule": "answer_line"}
        assert re.fullmatch(r"(Reasoning: .+\n)?Answer: [A-E]", item.completion)


def test_real_solutions_with_a_helper_or_a_class_first():
    items = load("mbpp", real("mbpp/train")) + load("mbpp", real("mbpp/validation"))
    items = {item.id: item for item in items}
    helper_first, class_first = items["mbpp-592"], items["mbpp-601"]
    assert helper_first.details["name"] == "sum_Of_product"
    assert "\ndef sum_Of_product(n):\n" in helper_first.prompt
    assert helper_first.answer.startswith("def binomial_Coeff(n,k):")
    assert class_first.details["name"] == "max_chain_length"
    assert "\ndef max_chain_length(arr, n):\n" in class_first.prompt
    assert "def __init__(self, a, b):" in class_first.answer
    for item in (helper_first, class_first, items["mbpp-927"]):  # 927 has a set-up that uses the solution's class
        assert mbpp.grade(item.completion, item) == {"exact": 1.0, "form": 1.0, "outcome": "pass"}


@pytest.mark.parametrize(("file", "count"), [("mbpp_sanitized/train", 120), ("mbpp/train", 40)])
def test_real_solutions_pass_their_tests(file, count):
    items = load("mbpp", real(file))
    chosen = items[:: len(items) // count][:count]
    assert len(chosen) == count
    assert [item.id for item in chosen if mbpp.grade(item.completion, item)["exact"] != 1] == []
