"""The embedded task, the user's own JSONL data, and the lookup of tasks by name."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from task_rows import ROWS, load

from unisd_jax.data.tasks import TASKS, Item, get_task, jsonl, short_answers
from unisd_jax.errors import ConfigError, UserError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_short_answers.py"
_spec = importlib.util.spec_from_file_location("make_short_answers", SCRIPT)
make_short_answers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_short_answers)


def embedded(split):
    return [json.loads(line) for line in short_answers.embedded_path(split).read_text(encoding="utf-8").splitlines()]


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


# --- the embedded data ---


def test_counts():
    train, test = embedded("train"), embedded("test")
    assert len(train) == 344
    assert len(test) == 200
    for items in (train, test):
        families = Counter(item["family"] for item in items)
        assert len(families) == 13
        assert max(families.values()) < 0.3 * len(items)
        assert min(families.values()) >= 9
        assert all(set(item) == {"id", "question", "answer", "entity", "family"} for item in items)


def test_test_entities_are_not_in_training():
    """Neither as what is asked about nor as an answer."""
    train, test = embedded("train"), embedded("test")
    assert {item["entity"].lower() for item in test}.isdisjoint(item["entity"].lower() for item in train)
    words = {word for item in train for word in re.findall(r"[a-z]+", f"{item['entity']} {item['answer']}".lower())}
    leaked = {item["entity"] for item in test if item["entity"].lower() in words}
    assert leaked == set()


def test_opposites_do_not_reveal_each_other():
    train = [item for item in embedded("train") if item["family"] == "opposite"]
    words = {word for item in train for word in (item["entity"], item["answer"])}
    assert len(words) == 2 * len(train)
    test = [item for item in embedded("test") if item["family"] == "opposite"]
    assert words.isdisjoint(word for item in test for word in (item["entity"], item["answer"]))


def test_no_prompt_and_no_id_twice():
    items = load("short_answers", side="train") + load("short_answers")
    assert len({item.prompt for item in items}) == len({item.id for item in items}) == len(items) == 544


def test_prompts_and_answers_are_short():
    for item in load("short_answers", side="train") + load("short_answers"):
        assert len(item.prompt) < 120
        assert len(item.answer.split()) <= 2
        assert item.answer == item.answer.strip() != ""


def test_item_states_the_form_and_its_gold_is_right():
    for item in load("short_answers"):
        assert item.prompt.endswith('Reply only with JSON: {"answer": "___"}')
        assert json.loads(item.completion) == {"answer": item.answer}
        assert short_answers.grade(item.completion, item) == {"exact": 1.0, "form": 1.0, "contains": 1.0}


def test_any_slice_mixes_the_families():
    for split in ("train", "test"):
        assert len({item["family"] for item in embedded(split)[:40]}) >= 9


def test_the_script_reproduces_the_committed_files():
    assert make_short_answers.main(["--check"]) == 0


def test_check_sees_a_changed_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_short_answers, "embedded_path", lambda split: tmp_path / f"{split}.jsonl")
    assert make_short_answers.main(["--check"]) == 1
    assert make_short_answers.main([]) == 0
    assert make_short_answers.main(["--check"]) == 0
    path = tmp_path / "test.jsonl"
    path.write_text(path.read_text("utf-8").replace("Europe", "Asia", 1), "utf-8")
    capsys.readouterr()
    assert make_short_answers.main(["--check"]) == 1
    assert "test.jsonl differs" in capsys.readouterr().out


def test_tables_refuse_an_entity_in_two_places(monkeypatch):
    monkeypatch.setattr(make_short_answers, "SYMBOLS", "hot:H")
    with pytest.raises(ValueError, match="hot"):
        make_short_answers.tables()


# --- grading ---

PARIS = Item("x", "Which city?", '{"answer": "Paris"}', "Paris")


@pytest.mark.parametrize(
    ("text", "exact", "form", "contains"),
    [
        ('{"answer": "Paris"}', 1, 1, 1),
        (' \n{"answer":"paris "}\n', 1, 1, 1),
        ('{"answer": "PARIS"}', 1, 1, 1),
        ('{"answer": "Rome"}', 0, 1, 0),
        ('{"answer": "Paris, France"}', 0, 1, 1),
        ('{"answer": ""}', 0, 1, 0),
        ('{"answer": "Paris"} That is the capital.', 0, 0, 1),
        ('Sure! {"answer": "Paris"}', 0, 0, 1),
        ('```json\n{"answer": "Paris"}\n```', 0, 0, 1),
        ("{'answer': 'Paris'}", 0, 0, 1),
        ('{"answer": "Paris", "note": "x"}', 0, 0, 1),
        ('{"answer": "Paris", "answer": "Paris"}', 0, 0, 1),
        ('{"Answer": "Paris"}', 0, 0, 1),
        ('{"answer": ["Paris"]}', 0, 0, 1),
        ('{"answer": {"answer": "Paris"}}', 0, 0, 1),
        ('[["answer", "Paris"]]', 0, 0, 1),
        ('{"answer": 5}', 0, 0, 0),
        ("{}", 0, 0, 0),
        ('{"answer": "Paris"', 0, 0, 1),
        ("The city is paris.", 0, 0, 1),
        ("Comparison of parishes", 0, 0, 0),
        ("", 0, 0, 0),
        ("[" * 100_000, 0, 0, 0),
    ],
)
def test_grade(text, exact, form, contains):
    assert short_answers.grade(text, PARIS) == {"exact": exact, "form": form, "contains": contains}


def test_contains_takes_the_answer_literally():
    assert short_answers.grade("a plus b", Item("x", "?", "", "a.*b"))["contains"] == 0
    assert short_answers.grade("it is a.*b!", Item("x", "?", "", "a.*b"))["contains"] == 1


# --- the same format from a file ---


def test_short_answers_from_a_file(tmp_path):
    path = write(
        tmp_path / "mine.jsonl", {"question": "1 + 1?", "answer": "zwölf"}, {"id": "b", "question": "q", "answer": "a"}
    )
    first, second = load("short_answers", path)
    prompt = '1 + 1? Reply only with JSON: {"answer": "___"}'
    assert first == Item("line-1", prompt, '{"answer": "zwölf"}', "zwölf", question="1 + 1?")
    assert second.id == "b"


def test_short_answers_file_is_checked(tmp_path):
    path = write(tmp_path / "mine.jsonl", {"question": "q"})
    with pytest.raises(UserError, match=r"mine\.jsonl, line 1: field 'answer' is missing"):
        load("short_answers", path)


def test_unknown_split():
    with pytest.raises(ConfigError, match="'validation', expected 'train' or 'test'"):
        short_answers.embedded_path("validation")


# --- the user's own data ---


def test_jsonl_items_and_defaults(tmp_path):
    lines = (
        {"prompt": "p", "completion": " c ", "extra": 1},
        "",
        {"prompt": "q", "completion": "d", "id": "z", "answer": "e"},
    )
    assert load("jsonl", write(tmp_path / "a.jsonl", *lines)) == [
        Item("line-1", "p", " c ", " c "),
        Item("z", "q", "d", "e"),
    ]


def test_jsonl_accepts_a_byte_order_mark_crlf_and_line_separators(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"prompt": "p\u2028q", "completion": "c"}\r\n{"prompt": "r", "completion": "d"}'.encode())
    assert [item.prompt for item in load("jsonl", path)] == ["p\u2028q", "r"]


GOOD = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no items"),
        (["", "  "], "holds no items"),
        ([GOOD, "{'prompt': 1}"], "line 2: not valid JSON"),
        ([GOOD, "", '{"prompt": "p", '], "line 3: not valid JSON"),
        (["[" * 100_000], "line 1: not valid JSON"),
        (["[1, 2]"], "line 1: found a JSON list, expected an object"),
        (["null"], "line 1: found a JSON NoneType, expected an object"),
        ([{"prompt": "p", "response": "c"}], "line 1: field 'reference' is missing.*'response'"),
        (["{}"], "line 1: field 'prompt' is missing.*none"),
        ([GOOD, {"prompt": 7, "completion": "c"}], "line 2: field 'prompt' is a int, expected a string"),
        ([{"prompt": "p", "completion": None}], "line 1: field 'completion' is a NoneType"),
        ([{"prompt": " ", "completion": "c"}], "line 1: field 'prompt' is empty"),
        ([{**GOOD, "answer": 3}], "line 1: field 'answer' is a int"),
        ([{**GOOD, "answer": ""}], "line 1: field 'answer' is empty"),
        ([{**GOOD, "id": 3}], "line 1: field 'id' is a int"),
        ([{**GOOD, "id": "a"}, GOOD, {**GOOD, "id": "a"}], "line 3: id 'a' was already used in an earlier line"),
        ([{**GOOD, "id": "line-2"}, GOOD], "line 2: id 'line-2' was already used in an earlier line"),
    ],
)
def test_jsonl_errors_name_the_file_and_line(tmp_path, lines, message):
    path = write(tmp_path / "data.jsonl", *lines)
    with pytest.raises(UserError, match=message) as caught:
        load("jsonl", path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_jsonl_missing_file_folder_and_bad_bytes(tmp_path):
    with pytest.raises(UserError, match="none.jsonl does not exist"):
        load("jsonl", tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        load("jsonl", tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "p", "completion": "c"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl, line 2: not UTF-8"):
        load("jsonl", tmp_path / "latin.jsonl")


def test_jsonl_needs_a_path():
    with pytest.raises(ConfigError, match=r"set data\.test_path"):
        load("jsonl")


@pytest.mark.parametrize(("text", "exact"), [("c", 1.0), (" c\n", 1.0), ("C", 0.0), ("c.", 0.0), ("", 0.0)])
def test_jsonl_grade(text, exact):
    assert jsonl.grade(text, Item("x", "p", "ignored", " c ")) == {"exact": exact}


# --- lookup ---


def test_get_task():
    assert list(TASKS) == list(ROWS)
    for name, task in TASKS.items():
        assert get_task(name) is task
        assert task.name == name


@pytest.mark.parametrize(("name", "near"), [("short_answer", "short_answers"), ("json", "jsonl"), ("", "'")])
def test_get_task_suggests_the_nearest_name(name, near):
    with pytest.raises(ConfigError, match=f"did you mean '?{near}"):
        get_task(name)


def test_answers_are_compared_inside_the_form():
    item = load("short_answers", side="train")[0]
    same = {
        short_answers.parse(text, item) for text in ('{"answer": "New  York"}', ' {"answer":"new york"}', "New York")
    }
    assert same == {"new york"}
    assert short_answers.parse("  ", item) is None and short_answers.parse("It is York.", item) == "it is york."
