"""GSM8K and the two other multiple-choice sets: rows to items, replies to numbers and letters."""

import json

import pytest
from task_rows import GPQA, GSM8K, MEDMCQA, load, real, without, write

from unisd_jax.data.tasks import Item, gsm8k
from unisd_jax.errors import UserError

FREE, JSON = (Item("x", "?", "", "1234.5", details={"format": form}) for form in ("free", "json"))


def test_the_calculators_notes_are_left_out_unless_as_released(tmp_path):
    path = write(tmp_path / "rows.jsonl", GSM8K)
    [item] = load("gsm8k", path)
    assert item.completion == "There are 12 * 3 = 36 pens.\n#### 36" and item.answer == "36"
    assert "<<12*3=36>>" in load("gsm8k", path, as_released=True)[0].completion
    [item] = load("gsm8k", path, reasoning=False)
    assert item.completion == "#### 36" and "step by step" not in item.prompt
    [item] = load("gsm8k", path, answer="json")
    assert json.loads(item.completion) == {"reasoning": "There are 12 * 3 = 36 pens.", "answer": "36"}
    assert gsm8k.grade(item.completion, item) == {"exact": 1.0, "form": 1.0}


@pytest.mark.parametrize("answer", ["It is 36.", "36", "steps\n####", "steps\n#### many", "#### 12,34", "#### 3 4"])
def test_a_solution_without_a_number_is_refused(answer, tmp_path):
    path = write(tmp_path / "rows.jsonl", GSM8K | {"answer": answer})
    with pytest.raises(UserError, match="rows.jsonl, line 1: field 'answer' is .* expected the solution, then '####'"):
        load("gsm8k", path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so\n#### 1,234.50", "1234.5"), ("#### $18 dollars", "18"), ("#### -3.", "-3"), ("#### −3", "-3"),
        ("#### 50%", "50"), ("#### 5\n#### 6", "6"), ("#### .5", "0.5"), ("#### 007", "7"), ("#### -0", "0"),
        ("#### none", None), ("The answer is 7", None), ("7", None), ("", None), ("5 ####", None),
        ("#### **12**", "12"), ("#### 1e3", "1"), ("#### " + "9" * 40, "9" * 40),
    ],
)  # fmt: skip
def test_the_number_after_the_last_mark(text, value):
    assert gsm8k.parse(text, FREE) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"answer": "1,234.5"}', "1234.5"), ('{"answer": 1234.5}', "1234.5"), ('{"answer": 7}', "7"),
        ('```json\n{"reasoning": "x", "answer": 8}\n```', "8"), ('{"answer": true}', None), ('{"answer": null}', None),
        ('{"answer": "seven"}', None), ("[7]", None), ("#### 7", None), ('{"answer": NaN}', None), ("7", None),
        ('{"answer": 1e999}', None), ('{"answer": "' + "7" * 40 + '"}', "7" * 40), ('{"answer": ' + "7" * 9999, None),
    ],
)  # fmt: skip
def test_the_answer_of_a_json_reply(text, value):
    assert gsm8k.parse(text, JSON) == value


@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1219)])
def test_real_gold_is_right_in_both_forms(split, count):
    for form in ({}, {"reasoning": False}, {"answer": "json"}):
        items = load("gsm8k", real(f"gsm8k/{split}"), **form)
        assert len(items) == count
        assert all(gsm8k.grade(item.completion, item)["exact"] == 1 for item in items)


def test_medmcqa_and_gpqa_items(tmp_path):
    [item] = load("medmcqa", write(tmp_path / "rows.jsonl", MEDMCQA))
    assert item.details["options"]["ABCD".index(item.answer)] == "Vitamin C" and item.id == "m-1"
    assert item.completion.startswith("Reasoning: Scurvy is")
    [item] = load("gpqa", write(tmp_path / "rows.jsonl", GPQA))
    assert item.details["options"]["ABCD".index(item.answer)] == "two" and item.id == "gpqa-rec1"
    with pytest.raises(UserError, match="field 'Incorrect Answer 2' is the right answer too"):
        load("gpqa", write(tmp_path / "rows.jsonl", GPQA | {"Incorrect Answer 2": "two"}))
    [item] = load("gpqa", write(tmp_path / "rows.jsonl", without(GPQA, "Record ID")))
    assert item.id == "gpqa-at-0"


def test_real_medmcqa():
    rows = load("medmcqa", real("medmcqa/validation"))
    assert len(rows) == 4083 and len({item.id for item in rows}) == 4083
