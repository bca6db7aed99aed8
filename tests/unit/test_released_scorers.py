"""The release's scorers, slips included, against the results that its own code gave; ours beside them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_rows import COS_E, HUMANEVAL, MBPP, ROWS, load, write

from unisd_jax.data.tasks import TASKS, Item, choice, code_reply, get_task, gsm8k, released
from unisd_jax.sandbox import Outcome, run_python

# --- multiple choice ---

OPTIONS = ["gravity", "magnetism", "a student", "all of them", "none"]


def question(number, answer_form):
    return Item("x", "?", "", "B", details={"options": OPTIONS[:number], "format": answer_form})


@pytest.mark.parametrize(
    ("text", "theirs", "ours"),
    [
        ("Reasoning: x\nAnswer: B", ("B", "answer_line"), ("B", "answer_line")),
        ("**Answer: B**", ("B", "last_capital"), ("B", "answer_line")),
        ("Answer: <B>", ("B", "last_capital"), ("B", "answer_line")),
        ("Answer: Because\nAnswer: C", ("B", "answer_line"), ("C", "answer_line")),
        ("A student said so.\nThe answer is probably C.", ("A", "line_start"), (None, "none")),
        ("Answer:\n\nB. foo", ("B", "answer_line"), (None, "none")),
        ("The answer is **C**. A dog", ("A", "last_capital"), (None, "none")),
        ("Answer: Both A", ("B", "answer_line"), (None, "none")),
        ("I think a", (None, "none"), (None, "none")),
        ("answer: C", ("C", "last_capital"), ("C", "answer_line")),
        ("Answer: E", (None, "none"), (None, "none")),
        # not among the published vectors
        ("", (None, "none"), (None, "none")),
        ("Answer: A\nNo:\nAnswer: B", ("A", "answer_line"), ("B", "answer_line")),
        ("So the answer is (B).", ("B", "the_answer_is"), (None, "none")),
        ("My ANSWER: (C)", ("C", "answer_anywhere"), (None, "none")),
        ("Hm.\nC) it is, not A", ("C", "line_start"), (None, "none")),
        ("Answer: B. magnetism", ("B", "answer_line"), ("B", "option_text")),
    ],
)
def test_letter_of_a_free_reply(text, theirs, ours):
    item = question(4, "free")
    assert released.letter(text, 4, "free") == theirs
    assert choice.read(text, item) == ours and choice.parse(text, item) == ours[0]
    for grade, (letter, rule) in ((released.grade_choice, theirs), (choice.grade, ours)):
        assert grade(text, item) == {"exact": float(letter == "B"), "form": float(letter is not None), "rule": rule}


def test_a_fifth_choice_makes_its_letter_valid():
    assert released.letter("Answer: E", 5, "free") == ("E", "answer_line")
    assert choice.read("Answer: E", question(5, "free")) == ("E", "answer_line")


@pytest.mark.parametrize(
    ("text", "theirs", "ours"),
    [
        ('{"answer":"B"}', ("B", "json"), ("B", "json")),
        ('{"answer":"because"}', ("B", "json"), (None, "none")),
        ('```json\n{"answer":"C"}\n```', ("C", "json"), ("C", "json")),
        ("[1]", (None, "none"), (None, "none")),
        ('{"answer": 3}', (None, "none"), (None, "none")),
        ('{"answer":"B","reasoning":"x', ("B", "json_text"), (None, "none")),
        # not among the published vectors
        ('{"answer": "E"}', (None, "none"), (None, "none")),
        ('{"answer": ""}', (None, "none"), (None, "none")),
        ('```\n{"answer": 3}\n```\n```json\n{"answer": " d"}\n```', ("D", "json"), (None, "none")),
        ('So "Answer" : "c"', ("C", "json_text"), (None, "none")),
        ("[" * 9999, (None, "none"), (None, "none")),
    ],
)
def test_letter_of_a_json_reply(text, theirs, ours):
    assert released.letter(text, 4, "json") == theirs
    assert choice.read(text, question(4, "json")) == ours


@pytest.mark.parametrize(
    ("text", "theirs", "ours"),
    [
        ("B", ("B", "first_character"), ("B", "letter")),
        (" b.", ("B", "first_character"), ("B", "letter")),
        ("Because", ("B", "first_character"), (None, "none")),
        ("(B)", (None, "none"), ("B", "letter")),
        ("E", (None, "none"), (None, "none")),
        ("", (None, "none"), (None, "none")),
        ("ß", (None, "none"), (None, "none")),  # two characters in capitals
    ],
)
def test_letter_of_a_letter_reply(text, theirs, ours):
    assert released.letter(text, 4, "letter") == theirs
    assert choice.read(text, question(4, "letter")) == ours


def test_equal_options_are_told_apart_by_the_release(tmp_path):
    [item] = load("cos_e", write(tmp_path / "rows.jsonl", COS_E))  # A and B are both "water"
    assert choice.grade("Answer: A", item)["exact"] == 1 and released.grade_choice("Answer: A", item)["exact"] == 0


@pytest.mark.parametrize("name", ["scienceqa", "cos_e", "medmcqa", "gpqa"])
@pytest.mark.parametrize(("answer", "reply"), [("free", "Answer: %s"), ("letter", "%s"), ("json", '{"answer": "%s"}')])
def test_one_reply_per_option(name, answer, reply, tmp_path):
    [item] = load(name, write(tmp_path / "rows.jsonl", ROWS[name]), answer=answer)
    task, letters = get_task(name), "ABCDE"[: len(item.details["options"])]
    replies = task.options(item)
    assert replies == [reply % letter for letter in letters]
    assert [task.parse(text, item) for text in replies] == list(letters)
    assert task.grade(replies[letters.index(item.answer)], item)["exact"] == 1


def test_tasks_of_the_release_have_its_scorer_and_choices_their_options():
    assert {name for name, task in TASKS.items() if task.released} == set(TASKS) - {"short_answers", "jsonl"}
    assert {name for name, task in TASKS.items() if task.options} == {
        name for name, task in TASKS.items() if task.family == "choice"
    }


# --- GSM8K ---


@pytest.mark.parametrize(
    ("text", "theirs", "ours"),
    [
        ("#### 1,234.50", "1234.5", "1234.5"),
        ("#### $18 dollars", "18", "18"),
        ("#### -3.", "-3", "-3"),
        ("#### none. The answer is 7", "7", "7"),
        ("so 10-5=5", "5", None),
        ("1e5", "5", None),
        ("#### 12,34", "12", None),
        ("#### 5 ####", "5", None),
        ("50%", "50", None),
        ("answer: 5\nThe answer is 6", "6", None),
        # not among the published vectors
        ("#### 1\nno, #### 2", "2", "2"),
        ("The answer is unknown, Answer: 4, or 5", "4", None),
        ("#### 0.3333333", "0.333333", "0.3333333"),
        ("#### 2.000", "2", "2"),
        ("10 -5", "-5", None),
        ("none", None, None),
        ("", None, None),
        ("####", None, None),
    ],
)
def test_number(text, theirs, ours):
    assert released.number(text) == theirs
    assert gsm8k.parse(text, Item("x", "?", "", "5", details={"format": "free"})) == ours


@pytest.mark.parametrize(
    ("answer", "text", "exact"),
    [
        ("0.3333333", "#### 0.33333", 1), ("0.3333333", "#### 0.3332", 0), ("5", "5.00009", 1), ("5", "5.0002", 0),
        ("5", "five", 0), ("9" * 400, "9" * 400, 1), ("9" * 400, "8" * 400, 0), ("5", "9" * 400, 0),
    ],
)  # fmt: skip
def test_numbers_that_are_nearly_right_are_right(answer, text, exact):
    item = Item("x", "?", "", answer, details={"format": "free"})
    assert released.grade_number(text, item) == {"exact": exact, "form": float(text != "five")}


# --- tool use ---


@pytest.mark.parametrize(
    ("given_input", "gold", "score"),
    [
        ("junk", "junk", 1),
        ("{}", '{"a":"None"}', 1),
        ('{"a":5.0}', '{"a":5}', 0),
        ('{"a":true}', '{"a":"true"}', 0),
        ('{"a":1,"zz":2}', '{"a":"1"}', 1),
        ('{"x":1}', '{"a":""}', 1),
        ('{"x":1}', "{}", 0),
        ("[1, 2]", "[1,2]", 1),
        ('{"a":[1, 2]}', '{"a":[1,2]}', 1),
        ('{"a":{"x":1,"y":2}}', '{"a":{"y":2,"x":1}}', 0),
        ('{"a":"Wild"}', '{"a":"wild"}', 0),
        # not among the published vectors
        ('{"a":" wild "}', '{"a":"wild","b":null,"c":2}', 1 / 2),
        ("{}", "{}", 1),
        ('{"a":0}', '{"a":0}', 1),
        ('{"a":' * 3000, '{"a":1}', 0),
    ],
)
def test_input_score(given_input, gold, score):
    assert released.input_score(given_input, gold) == score


def tool_item(*calls, answer_form="free"):
    return Item("x", "?", "", "", details={"written": list(calls), "format": answer_form})


@pytest.mark.parametrize(
    ("text", "gold", "exact", "form", "action", "arguments"),
    [
        ('Action: go\nAction Input: {"a":1}', [("go", '{"a":1}')], 1, 1, 1, 1),
        ('Action: stop\nAction Input: {"a":1}', [("go", '{"a":1}')], 0, 1, 0, 1),  # wrong tool, right arguments
        ("", [("go", '{"a":1}')], 0, 0, 0, 0),
        ('Action: go\nAction Input: {"a":1}\nObservation: fine', [("go", '{"a":1}')], 0, 1, 1, 0),
        ("Action: go\nAction Input: junk", [("go", "{}")], 1, 1, 1, 1),
        ("Action: go\nAction Input: {}", [("go", "{}"), ("go", "{}")], 0, 1, 0, 0),
        ('Action: go\nAction Input: {"a":2,"b":3}', [("go", '{"a":1,"b":3}')], 0, 1, 1, 1 / 2),
    ],
)
def test_tool_score(text, gold, exact, form, action, arguments):
    expected = {"exact": exact, "form": form, "action": action, "arguments": arguments}
    assert released.grade_tools(text, tool_item(*gold)) == expected


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (
            "Thought: a\nAction: x\nAction Input: {}\nThought: b\nAction: y\nAction Input: {}\nObservation: foo",
            [("x", "{}"), ("y", "{}\nObservation: foo")],
        ),
        ("Action: x\n\nAction Input: {}", [("x", "{}")]),
        ("Action 1: x\nAction 1 Input: {}\nAction 2: y\nAction 2 Input: {}", [("x", "{}"), ("y", "{}")]),
        ("**Action:** x\n**Action Input:** {}", []),
        ("action: x\naction input: {}", []),
        # not among the published vectors
        ("Action: x Action Input: {}", []),
        ("Action: x\nand\nAction Input 3:", [("x\nand", "")]),
        ('Action: x\nAction Input: "{"a": 1}"', [("x", '{"a": 1}')]),
        ("Action: x\nAction: y\nAction Input: {}", [("x\nAction: y", "{}")]),
        ("Action: x", []),
        ("", []),
    ],
)
def test_calls_in_lines(text, calls):
    assert released.react_calls(text) == calls


PIECES = ["Action", " Input", ":", "\n", " ", "1", "Thought", "x", '"']


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_the_scan_finds_what_one_expression_would(text):
    """The release's way, which may take the cube of the length."""
    label = r"Action\s*\d*\s*{}:"
    start, put = label.format(""), label.format(r"Input\s*\d*\s*")
    found = re.findall(rf"(?s){start}(.*?)\n{put}(.*?)(?=\nThought|\n{start}|\Z)", text)
    assert released.react_calls(text) == [(action.strip(), put.strip().strip('"')) for action, put in found]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"tool_calls": [{"Action": " x", "Action_Input": {"é": [1]}}]}', [("x", '{"é": [1]}')]),
        ('{"tool_calls": []}', []),
        ('{"tool_calls": [{"Action": "x"}]}', []),  # ends the release's evaluation (E7)
        ('{"tool_calls": [{"Action": 3, "Action_Input": {}}]}', []),
        ('{"tool_calls": {"Action": "x", "Action_Input": {}}}', []),
        ("[1]", []),
        ("null", []),
        ("Action: x\nAction Input: {}", [("x", "{}")]),
        ("[" * 9999, []),
    ],
)
def test_calls_in_json(text, calls):
    assert released.json_calls(text) == calls
    found = released.grade_tools(text, tool_item(("x", "{}"), answer_form="json"))
    assert found["form"] == float(bool(calls))


def test_the_gold_calls_are_compared_as_they_are_written(tmp_path):
    gold = [{"Action": "forecast", "Action_Input": '{"days": 3.0}'}]
    row = ROWS["tooluse"] | {"golden_answer": gold, "golden_response": []}
    [item] = load("tooluse", write(tmp_path / "rows.jsonl", row))
    task = get_task("tooluse")
    for written, theirs in (("3.0", 1), ("3", 0)):
        reply = f'Action: forecast\nAction Input: {{"days": {written}}}'
        assert task.grade(reply, item)["exact"] == 1 and task.released(reply, item)["exact"] == theirs


# --- code ---


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"code": "x = 1", "y": 2}', "x = 1"),
        ('{"code": 3}', '{"code": 3}'),
        ("```\na\n```\n```python\nb\n```", "b\n"),
        ("```py\na\n```\n```\nb\n```", "a\n"),
        ("so\n```\na\n``` and ```python\nb", "a\n"),
        ("```python\na", "```python\na"),  # cut off (E18)
        ("```python a```", "```python a```"),
        ("\n a \n", "a"),
        ("", ""),
    ],
)
def test_code_of_a_reply(text, code):
    assert released.extract_code(text) == code


@pytest.mark.parametrize(
    ("outcome", "category"),
    [
        (Outcome("pass", ""), "passed"),
        (Outcome("wrong_answer", "line 2: AssertionError:"), "assertion"),
        (Outcome("wrong_answer", "line 2: AssertionError: is 3"), "execution_error"),
        (Outcome("runtime_error", "line 2: ValueError:"), "assertion"),
        (Outcome("runtime_error", "line 2: ValueError: Timeout of the call"), "timeout"),
        (Outcome("runtime_error", "line 2: TimeoutError: late"), "execution_error"),
        (Outcome("timeout", "still running after 10 s"), "timeout"),
        (Outcome("memory", "needs more than 512 MiB"), "execution_error"),
        (Outcome("syntax_error", "SyntaxError: invalid syntax (program.py, line 1)"), "execution_error"),
        (Outcome("runtime_error", "ended before its last line: Timeout: none"), "execution_error"),
    ],
)
def test_how_an_end_is_counted(outcome, category):
    assert released.category(outcome) == category


def fenced(code):
    return f"```python\n{code}\n```"


@pytest.fixture
def add_one(tmp_path):
    return load("mbpp", write(tmp_path / "rows.jsonl", MBPP | {"test_list": ["assert add_one(1) == 2"]}))[0]


@pytest.fixture
def runs(monkeypatch):
    """The programs that are run; those that never end are given less time."""
    seen = []
    monkeypatch.setattr(
        code_reply, "run_python", lambda program: seen.append(program) or run_python(program, timeout=2)
    )
    code_reply.verdict.cache_clear()
    yield seen
    code_reply.verdict.cache_clear()


@pytest.mark.parametrize(
    ("text", "theirs", "form", "ours"),
    [
        (fenced("def add_one(x): return x + 1"), "passed", 1, "pass"),
        (fenced("def add_one(x): return x"), "assertion", 1, "wrong_answer"),
        (fenced("def add_one(x): assert x > 9, 'small'"), "execution_error", 1, "wrong_answer"),
        (fenced("def add_one(x): raise ValueError('Timeout')"), "timeout", 1, "runtime_error"),
        # The release passes the first of these and ends at the second (S2): neither is reproduced.
        (
            fenced("while True:\n    try:\n        while True: pass\n    except BaseException: pass"),
            "timeout",
            1,
            "timeout",
        ),
        (fenced("import sys\nsys.exit(0)"), "execution_error", 1, "runtime_error"),
        ("```python\ndef add_one(x): return x + 1", "execution_error", 0, "pass"),  # cut off (E18)
        (" def add_one(x): return x + 1", "passed", 1, "no_code"),
        ("def add_one(x): return x + 1", "passed", 0, "pass"),
        ("def add_one(x): return x + 1\n", "passed", 1, "pass"),  # white space counts as a form (E17)
        ("I do not know.", "execution_error", 0, "no_code"),
        ("", "execution_error", 0, "no_code"),
    ],
)
def test_code_is_scored(add_one, runs, text, theirs, form, ours):
    task = get_task("mbpp")
    assert task.released(text, add_one) == {"exact": theirs == "passed", "form": form, "outcome": theirs}
    assert task.grade(text, add_one)["outcome"] == ours


@pytest.mark.parametrize("name", ["mbpp", "humaneval"])
def test_one_run_serves_both_scores(name, runs, tmp_path):
    [item], task = load(name, write(tmp_path / "rows.jsonl", ROWS[name])), get_task(name)
    for text in (item.completion, f"{item.completion}\nIt works."):
        assert task.grade(text, item)["exact"] == task.released(text, item)["exact"] == 1
    assert len(runs) == 1


def test_humaneval_is_run_without_its_stub_and_checked_once(runs, tmp_path):
    row = HUMANEVAL | {"test": HUMANEVAL["test"] + "\ncheck(double)\n"}
    called, plain = load("humaneval", write(tmp_path / "rows.jsonl", row | {"task_id": "Toy/1"}, HUMANEVAL))
    task, body = get_task("humaneval"), fenced("    return 2 * x")
    assert task.released(called.completion, called)["exact"] == task.released(plain.completion, plain)["exact"] == 1
    assert [program.count("\ncheck(double)\n") for program in runs] == [1, 1]
    assert task.released(body, plain)["outcome"] == "execution_error"
    assert task.grade(body, plain)["exact_with_stub"] == 1
