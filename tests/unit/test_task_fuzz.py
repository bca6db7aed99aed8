"""Damaged rows and files: each is read rightly, which is worked out anew here, or refused in a line that says where."""

import ast
import copy
import functools
import gzip
import io
import itertools
import json
import operator
import re
import time
from decimal import Decimal
from string import ascii_uppercase

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from task_rows import DATA, MBPP_SANITIZED, ROWS, write

from unisd_jax.data.loading import load_items
from unisd_jax.data.rows import Row, read_rows
from unisd_jax.data.sources import Place
from unisd_jax.data.tasks import Form, code_reply, get_task, tooluse
from unisd_jax.data.tasks.base import identity
from unisd_jax.errors import UserError
from unisd_jax.sandbox import Outcome

CHECKS = settings(
    max_examples=1000, deadline=None, report_multiple_bugs=False, suppress_health_check=[HealthCheck.too_slow]
)  # fmt: skip
LONGEST_MESSAGE = 600

PLAIN = {"prompt": "What is 3 + 3?", "completion": "6"}
TWO_CALLS = ROWS["tooluse"] | {
    "golden_answer": [
        {"Action": "forecast", "Action_Input": '{"city": "Oslo", "unit": "", "days": 1.0}'},
        {"Action": "sendNote", "Action_Input": '{"to": "Léa", "tags": [], "when": {"hour": 7, "day": null}}'},
    ],
    "golden_response": [],
}
POOLS = {name: [row] for name, row in ROWS.items()}
POOLS["mbpp"] = [ROWS["mbpp"], MBPP_SANITIZED]
POOLS["jsonl"] = [ROWS["jsonl"], PLAIN]
POOLS["tooluse"] = [ROWS["tooluse"], TWO_CALLS]
PUBLISHED = {
    "mbpp": ("mbpp/train", "mbpp_sanitized/test"),
    "tooluse": ("tooluse/train_small",),
    "scienceqa": ("scienceqa/test",),
    "cos_e": ("cos_e/validation",),
    "medmcqa": ("medmcqa/validation",),
    "gsm8k": ("gsm8k/test",),
    "humaneval": ("humaneval/test",),
}
for _name, _files in PUBLISHED.items():
    for _path in (DATA / f"{_file}.jsonl.gz" for _file in _files):
        if _path.exists():
            POOLS[_name] += [dict(row.fields) for row in read_rows(_path)[::40][:5]]

# --- damage ---

DEEP = '{"a": ' + "[" * 200 + "]" * 200 + "}"
TEXTS = (
    "", " \n\t", "A", "E", "0", "-1", "####", "so\n#### 5", "#### 1,000.50", "#### five", "#### ٣٦", "#### -$7.00",
    "#### 123456789012345678901234567890123456789.5", "water", "Answer: B", "```\nx\n```", "{", '{"city": "Oslo"',
    "[1]", "{}", '{"x": NaN}', '{"x": "\\ud800"}', DEEP, "user", "robot", "system", "def f(x):\n    return x",
    "def f(x=" + "-" * 900 + "1):\n    return x", "(" * 3000, "lambda: 0", "x" * 100_000, "é" * 100_000, "9" * 100_000,
    "\ud800", "half \udfff character", "a\0b", "\u202eright to left", "e\u0301\u0301\u0301", "😀👩‍👩‍👧", "\ufeffmark",
    "line\u2028separator\x85next\x1cfile", "carriage\rreturn\r\nboth", "\x7f\x1b[31m", "'quotes\"\\",
)  # fmt: skip
VALUES = (
    None, 0, 1, 2, 3, 4, -1, 26, 99, 10**400, -(10**400), True, False, 0.0, 1.0, 0.5, float("nan"), float("inf"),
    [], {}, [[]], [None], [1, "x"], ["x"], ["x", "y"], ["a"] * 27, {"a": [1]}, [{}], [{"role": "user"}],
    [{"role": "user", "content": "x"}], [{"Action": "f", "Action_Input": "{}"}], *TEXTS,
)  # fmt: skip


def places(value, path=()):
    """The path of everything inside a row."""
    inside = value.items() if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    return [(*path, key) for key, _ in inside] + [place for key, part in inside for place in places(part, (*path, key))]


def drop(parent, key, number):
    del parent[key]


def another(number):
    return copy.deepcopy(VALUES[number % len(VALUES)])  # further damage must not reach the table


def put_another(parent, key, number):
    parent[key] = another(number)


def add_unknown(parent, key, number):
    if isinstance(parent, dict):
        parent[TEXTS[number % len(TEXTS)]] = another(number)
    else:
        parent.insert(key, another(number))


def insert_text(parent, key, number):
    if isinstance(text := parent[key], str):
        at = 7 * number % (len(text) + 1)
        parent[key] = text[:at] + TEXTS[number % len(TEXTS)] + text[at:]


def cut_text(parent, key, number):
    if isinstance(parent[key], str | list):
        parent[key] = parent[key][: 7 * number % (len(parent[key]) + 1)]


def change_look(parent, key, number):
    if isinstance(text := parent[key], str):
        parent[key] = (f" {text}\n", text.upper(), text.replace("#", ""), text[::-1], text[:400] * 300)[number % 5]


def reorder(parent, key, number):
    found = parent[key]
    if isinstance(found, list):
        turn = number % (len(found) + 1)
        parent[key] = found[turn:] + found[:turn] if number % 2 else found + found[turn : turn + 1]


def swap(parent, key, number):
    others = list(parent) if isinstance(parent, dict) else range(len(parent))
    other = others[number % len(others)]
    parent[key], parent[other] = parent[other], parent[key]


DAMAGE = (drop, put_another, put_another, add_unknown, insert_text, cut_text, change_look, reorder, swap)
DAMAGES = st.lists(st.tuples(st.sampled_from(DAMAGE), st.integers(0, 999), st.integers(0, 999)), min_size=1, max_size=3)


def damaged(row, damages):
    row = copy.deepcopy(row)
    for damage, place, number in damages:
        if paths := places(row):
            *parents, key = paths[place % len(paths)]
            parent = row
            for step in parents:
                parent = parent[step]
            damage(parent, key, number)
    return row


# --- what a row must become ---


def stated(row, name):
    """An optional text as it is shown."""
    return (row.get(name) or "").strip()


def choice_is_right(item, row, form, task, *, choices, gold, question, explanation="", lecture="", hint=""):
    options = item.details["options"]
    assert sorted(options) == sorted(text.strip() for text in choices)
    assert options[ascii_uppercase.index(item.answer)] == gold.strip()
    lettered = "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, options, strict=False))
    assert f"Question: {question.strip()}\n\n{lettered}\n\n" in item.prompt
    if form.lecture and lecture:
        assert f"Background: {lecture}\n\n" in item.prompt
    if form.hint and hint:
        assert f"Context: {hint}\n\n" in item.prompt
    if form.as_released:
        return
    grades = task.grade(item.completion, item)
    assert (grades["exact"], grades["form"]) == (1, 1) and grades["rule"] != "none"
    reasons = " ".join(explanation.split()) if form.reasoning and form.answer != "letter" else ""
    if form.answer == "json":
        expected = ({"reasoning": reasons} if reasons else {}) | {"answer": item.answer}
        assert json.loads(item.completion) == expected
    elif reasons:
        assert item.completion == f"Reasoning: {reasons}\nAnswer: {item.answer}"
    else:
        assert item.completion in (item.answer, f"Answer: {item.answer}")


def check_cos_e(item, row, form, task):
    assert item.id == row["id"] and row["answer"] in row["choices"]
    choice_is_right(
        item, row, form, task, choices=row["choices"], gold=row["answer"], question=row["question"],
        explanation=stated(row, "abstractive_explanation"),
    )  # fmt: skip


def check_scienceqa(item, row, form, task):
    assert type(row["answer"]) is int and row["answer"] >= 0
    choice_is_right(
        item, row, form, task, choices=row["choices"], gold=row["choices"][row["answer"]], question=row["question"],
        explanation=stated(row, "solution"), lecture=stated(row, "lecture"), hint=stated(row, "hint"),
    )  # fmt: skip


def check_medmcqa(item, row, form, task):
    assert item.id == row["id"] and type(row["cop"]) is int
    choice_is_right(
        item, row, form, task, choices=[row[f"op{letter}"] for letter in "abcd"], gold=row["op" + "abcd"[row["cop"]]],
        question=row["question"], explanation=stated(row, "exp"),
    )  # fmt: skip


def check_gpqa(item, row, form, task):
    wrong = [row[f"Incorrect Answer {number}"] for number in (1, 2, 3)]
    assert row["Correct Answer"].strip() not in [text.strip() for text in wrong]
    choice_is_right(
        item, row, form, task, choices=[row["Correct Answer"], *wrong], gold=row["Correct Answer"],
        question=row["Question"], explanation=stated(row, "Explanation"),
    )  # fmt: skip


def check_gsm8k(item, row, form, task):
    number = row["answer"].rpartition("####")[2].strip()
    number = number.replace(",", "").replace("$", "").replace("−", "-").rstrip(".%")
    assert Decimal(item.answer) == Decimal(number)
    assert re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", item.answer)
    assert f"Question: {row['question'].strip()}\n\n" in item.prompt
    assert task.grade(item.completion, item) == {"exact": 1, "form": 1}
    if form.answer == "json":
        assert json.loads(item.completion)["answer"] == item.answer
    else:
        assert item.completion.splitlines()[-1] == f"#### {item.answer}"


def unix(text):
    return text.replace("\r\n", "\n").strip("\n").rstrip()


def check_mbpp(item, row, form, task):
    assert item.id == f"mbpp-{row['task_id']}" and item.answer == unix(row["code"])
    assert item.details["tests"] == [unix(test) for test in row["test_list"]]
    setup = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
    assert [line for line in item.details["setup"].split("\n") if line] == [
        line for text in setup for line in unix(text.strip()).split("\n") if line
    ]
    functions = [
        node.name for node in ast.parse(item.answer).body if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef)
    ]
    assert item.details["name"] in functions
    assert item.prompt.startswith(unix(row["prompt"] if "prompt" in row else row["text"]))
    assert all(test in item.prompt for test in item.details["tests"])
    if not form.as_released:
        assert item.completion == f"```python\n{item.answer}\n```"
        if "```" not in item.answer:
            assert task.parse(item.completion, item) == item.answer


def check_humaneval(item, row, form, task):
    assert item.id == row["task_id"] and item.details["name"] == row["entry_point"].strip()
    assert item.answer == (row["prompt"] + row["canonical_solution"]).strip("\n").rstrip()
    assert item.details["test"] == row["test"] and row["prompt"].strip() in item.prompt
    if "```" not in item.answer:
        assert task.parse(item.completion, item) == item.answer


def same_arguments(value):
    """Numbers by value, text without outer white space."""
    if isinstance(value, dict):
        return {key: same_arguments(part) for key, part in value.items()}
    if isinstance(value, list):
        return [same_arguments(part) for part in value]
    return value.strip() if isinstance(value, str) else value


def check_tooluse(item, row, form, task):
    expected = []
    for call in row["golden_answer"]:
        arguments = same_arguments(json.loads(call["Action_Input"]))
        arguments = {key: value for key, value in arguments.items() if value is not None and value != ""}
        expected.append({"Action": call["Action"].strip(), "Action_Input": arguments})
    assert json.loads(item.answer) == expected
    assert item.question == f"{row['name'].strip()}: {row['instruction'].strip()}"
    # In the free form a name of several lines or in code marks cannot be written: such a gold reply is graded as wrong.
    unfit = [name for name, _ in item.details["calls"] if re.search(r"[\n\r]|^[*`]|[*`]$", name)]
    names_fit = form.answer == "json" or not unfit
    if names_fit and not (form.as_released and form.answer == "json" and len(expected) > 1):
        assert task.grade(item.completion, item) == {"exact": 1, "form": 1, "action": 1, "arguments": 1}
    if form.answer == "free":
        assert item.prompt == row["prompt"]


def check_jsonl(item, row, form, task):
    reference = row["reference"] if "reference" in row else row["completion"]
    assert item.completion == reference and item.answer == (row.get("answer") or reference)
    assert item.negative == row.get("negative") and item.context == row.get("privileged_context")
    chat = row.get("messages") or [{"role": "user", "content": row.get("prompt")}]
    said = [{"role": message["role"], "content": message["content"]} for message in chat]
    assert [*item.earlier, {"role": "user", "content": item.prompt}] == said
    assert {message["role"] for message in item.earlier} <= {"system", "user", "assistant"}
    dialogue = [message["content"] for message in said if message["role"] != "system"]
    assert all(text in item.question for text in dialogue) if len(dialogue) > 1 else item.question == ""
    if item.answer == reference:
        assert task.grade(item.completion, item) == {"exact": 1}


def check_short_answers(item, row, form, task):
    assert item.answer == row["answer"] and item.prompt.startswith(f"{row['question']} ")
    assert task.grade(item.completion, item)["exact"] == 1


def is_left_out(task, row):
    """Whether a row is one of those that a task passes over."""
    if task.name == "scienceqa":
        return row.get("has_image") is True or row.get("image") is not None
    if task.name != "tooluse":
        return False
    calls = [(call["Action"].strip(), as_json(call["Action_Input"])) for call in row["golden_answer"] if is_call(call)]
    if None in (arguments for _, arguments in calls):
        return True
    response = "\n".join(row["golden_response"]).strip()
    return response and tooluse.react_calls(response) != calls


def is_call(call):
    return isinstance(call, dict) and all(isinstance(call.get(name), str) for name in ("Action", "Action_Input"))


def as_json(text):
    """A JSON value; None for what no model could write: not JSON, or half characters."""
    try:
        value = json.loads(text, parse_constant=lambda constant: json.loads("no JSON"))
        json.dumps(value, ensure_ascii=False).encode()
    except ValueError:
        return None
    return value


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from (*strings(key), *strings(part))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from strings(part)


def check(item, row, form, task):
    globals()[f"check_{task.name}"](item, row, form, task)
    for text in strings([*item._replace(details=dict(item.details)), identity(item)]):
        text.encode()  # tokenizers and hashes read bytes
    assert item.prompt.strip() and item.completion.strip() and item.id and identity(item)


def message_of(error, place):
    """The error's text, one short line that names its place."""
    message = str(error)
    message.encode()
    is_short_line = "\n" not in message and len(message) <= LONGEST_MESSAGE
    assert is_short_line and place in message, f"{len(message)} characters: {message[:LONGEST_MESSAGE]}"
    return message


# --- rows ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def form_of(task):
    flag = st.booleans()
    return st.builds(
        Form, answer=st.sampled_from(task.answers), reasoning=flag, lecture=flag, hint=flag,
        option_seed=st.integers(0, 3), as_released=st.sampled_from([False, False, True]),
    )  # fmt: skip


def read_or_refused(task, row, form, path=None):
    """Makes the item of a damaged row, through a file (as a user's rows come) where one is given, and checks it."""
    where = "rows.jsonl, line 2" if path is None else f"{path}, line 2"
    if task.skip(Row(where, row)):
        assert is_left_out(task, row)
        return
    try:
        if path is None:
            item = task.make(Row(where, row), 0, form)
        else:
            [item] = load_items(task, "test", place=Place(file=write(path, "", row)), form=form).items
    except UserError as error:
        message = message_of(error, where)
        assert re.search(r"field '|fields 'reference'|both 'prompt'", message), message
    else:
        check(item, row, form, task)


@pytest.mark.parametrize("name", POOLS)
def test_a_damaged_row_is_read_rightly_or_refused(name, folder):
    task, path = get_task(name), folder / f"{name}.jsonl"

    @CHECKS
    @given(st.integers(0, len(POOLS[name]) - 1), DAMAGES, form_of(task), st.integers(0, 3))
    def damage(number, damages, form, way):
        row = damaged(POOLS[name][number], damages)
        assume(json.dumps(row) != json.dumps(POOLS[name][number]))
        read_or_refused(task, row, form, path if way == 0 else None)

    damage()


@pytest.mark.parametrize("name", POOLS)
def test_every_value_in_every_place_is_read_rightly_or_refused(name):
    """Chance seldom puts a truth value where an index belongs: every single replacement once."""
    task = get_task(name)
    for whole in POOLS[name][:2]:
        for *parents, key in places(whole):
            for value in VALUES:
                row = copy.deepcopy(whole)
                functools.reduce(operator.getitem, parents, row)[key] = copy.deepcopy(value)
                try:
                    read_or_refused(task, row, Form())
                except Exception as error:
                    raise AssertionError(f"{[*parents, key]} = {value!r:.60}") from error


@pytest.mark.parametrize("name", POOLS)
def test_an_undamaged_row_is_read_rightly(name):
    """So that the checks above do not only ever see refusals."""
    task = get_task(name)
    for row in POOLS[name]:
        for answer in task.answers:
            if not task.skip(Row("rows.jsonl, line 1", row)):
                check(task.make(Row("rows.jsonl, line 1", row), 0, Form(answer=answer)), row, Form(answer=answer), task)


DEEP_DEFAULTS = ["-" * 900 + "1", "not " * 900 + "1", "1 + " * 900 + "1", "[" * 400 + "]" * 400]


@pytest.mark.parametrize("default", DEEP_DEFAULTS, ids=["minus", "not", "plus", "list"])
def test_code_that_is_nested_too_deeply_is_refused(default):
    """A test of its own: under hypothesis Python lets a stack grow further than it does for a user."""
    row = Row("rows.jsonl, line 4", ROWS["mbpp"] | {"code": f"def add_one(x={default}):\n    return x"})
    with pytest.raises(UserError) as error:
        get_task("mbpp").make(row, 0, Form())
    assert "field 'code'" in message_of(error.value, "rows.jsonl, line 4")


@pytest.mark.parametrize("name", ["cos_e", "gsm8k"])
@pytest.mark.parametrize("text", ["```json\n" + "\n" * 50_000, "```" + " " * 50_000 + "\n" * 50_000, "```\n" * 20_000])
def test_a_reply_that_repeats_itself_is_read_in_time(name, text):
    """A model that goes on with line breaks must not stop the evaluation: the time may not grow with their cube."""
    task = get_task(name)
    item = task.make(Row("rows.jsonl, line 1", ROWS[name]), 0, Form(answer="json"))
    assert task.parse(text, item) is None


# --- replies to both scorers, ours and the release's ---

PIECES = (
    "Answer:", "ANSWER:", "the answer is ", "final ", "A", "B", "E", "a", "(", ")", "**", "_", "<", '"answer"', '{"',
    "}", '{"answer": "B"}', '{"code": "x"}', '{"tool_calls": [', '{"Action": "x", "Action_Input": {}}', "]", "[", ",",
    "/", "-", "or ", "```", "```python\n", "```json\n", "#### ", "$", "1,234", ".5", "9", "1e999", "٣", "Action",
    " Input", "Action Input:", "\nAction: x\nAction Input: {", "Thought", ":", "\n", " ", "\r\n", "\t", "\0", "\ud800",
    "def f(x):\n    return x", "ß", "ſ",
)  # fmt: skip
# A model that repeats itself, to the end of what it may write.
REPEATED = (*PIECES, "Answer: A-", '"answer" ', '\nAction: a\nAction Input: {"a":', "```x\n", "x```\n", "Action \n")
STARTS = ("", "Answer:", "Answer: A", "Action: a\nAction Input: ", '"answer":')
SCORED = [name for name in POOLS if get_task(name).released]


@pytest.fixture
def scored(monkeypatch):
    """The items of a task and its two scorers; what code does is not looked at here."""
    monkeypatch.setattr(code_reply, "verdict", lambda program: Outcome("pass", ""))

    def items_and_scorers(name):
        task = get_task(name)
        items = [task.make(Row("line 1", ROWS[name]), 0, Form(answer=answer)) for answer in task.answers]
        return items, (task.grade, task.released)

    return items_and_scorers


def is_grade(grades):
    numbers = [value for value in grades.values() if not isinstance(value, str)]
    return "exact" in grades and "form" in grades and all(0 <= number <= 1 for number in numbers)


@pytest.mark.parametrize("name", SCORED)
def test_any_reply_is_scored(name, scored):
    items, scorers = scored(name)

    @CHECKS
    @given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join))
    def score(text):
        assert all(is_grade(scorer(text, item)) for item in items for scorer in scorers)

    score()


@pytest.mark.parametrize("name", SCORED)
def test_a_long_reply_is_scored_in_time(name, scored):
    items, scorers = scored(name)
    for piece in REPEATED:
        for text in [start + piece * (100_000 // len(piece)) for start in STARTS]:
            for item, scorer in itertools.product(items, scorers):
                begin = time.process_time()
                assert is_grade(scorer(text, item))
                assert time.process_time() - begin < 2.0, (text[:40], scorer)


# --- files ---


def whole_file(suffix):
    rows = [ROWS["cos_e"] | {"id": f"a{number}"} for number in range(6)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="parquet needs the extra [hub]")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), file := io.BytesIO())
        return file.getvalue()
    return gzip.compress(text, mtime=0) if suffix == "jsonl.gz" else text


def flip_bit(data, place, number):
    data[place] ^= 1 << number % 8


def cut_off(data, place, number):
    del data[place:]


def cut_out(data, place, number):
    del data[place : place + 1 + number % 20]


def insert_bytes(data, place, number):
    data[place:place] = (b"\n", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"}{", b"\xed\xa0\x80", b"[" * 5000)[
        number % 8
    ]


def repeat(data, place, number):
    data[place:place] = data[place : place + number]


BYTE_DAMAGES = st.lists(
    st.tuples(
        st.sampled_from([flip_bit, flip_bit, cut_off, cut_out, insert_bytes, repeat]),
        st.integers(0, 9999),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_a_damaged_file_gives_rows_or_is_refused(suffix, folder):
    whole, path, task = whole_file(suffix), folder / f"damaged.{suffix}", get_task("cos_e")

    # The same files each time: pyarrow is C++, which damage that nobody has tried might bring down as a whole.
    @settings(CHECKS, derandomize=True, max_examples=600)
    @given(BYTE_DAMAGES)
    def damage(damages):
        data = bytearray(whole)
        for change, place, number in damages:
            if data:
                change(data, place % len(data), number)
        assume(data != whole)
        path.write_bytes(data)
        try:
            items = load_items(task, "test", place=Place(file=path)).items
        except UserError as error:
            message_of(error, str(path))
        else:
            rows = {row.fields["id"]: row.fields for row in read_rows(path)}
            assert [item.id for item in items] == list(rows)
            for item in items:
                check(item, rows[item.id], Form(), task)

    damage()


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_a_whole_file_is_read(suffix, folder):
    path = folder / f"whole.{suffix}"
    path.write_bytes(whole_file(suffix))
    assert len(load_items(get_task("cos_e"), "test", place=Place(file=path)).items) == 6
