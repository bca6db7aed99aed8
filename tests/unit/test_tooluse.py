"""ToolUse: rows to items in both forms, calls out of replies, their comparison, and wrong replies by rule."""

import json

import pytest
from task_rows import TOOLUSE, load, real, without, write

from unisd_jax.data.loading import load_items
from unisd_jax.data.sources import Place
from unisd_jax.data.tasks import Form, tooluse
from unisd_jax.errors import UserError
from unisd_jax.teacher.corruption_tools import tool_mutations
from unisd_jax.teacher.negative_prompts import Problem
from unisd_jax.teacher.negatives import rule_negatives

FORMS = [Form(), Form(answer="json"), Form(answer="json", reasoning=False)]
FILES = [("tooluse/train_small", 102), ("tooluse/validation", 2), ("tooluse/test", 40)]

TWO = TOOLUSE | {
    "instruction": "Warn Lea if it freezes in Oslo.",
    "golden_answer": [
        {"Action": "forecast", "Action_Input": '{"city":"Oslo", "unit": ""}'},
        {"Action": "sendNote", "Action_Input": '{"to": "Léa", "tags": [], "when": {"hour": 7, "day": 1.0}}'},
    ],
    "golden_response": [""],
}
PARTIAL = [{"Action": "forecast", "Action_Input": {"city": "Oslo"}}]


def items(tmp_path, *rows, **form):
    return load("tooluse", write(tmp_path / "rows.jsonl", *rows), **form)


def call(text, name="forecast"):
    return [{"Action": name, "Action_Input": text}]


def react(*calls):
    return "\n".join(f"Thought: so.\nAction: {name}\nAction Input: {text}" for name, text in calls)


def structured(*calls):
    return json.dumps({"tool_calls": [{"Action": name, "Action_Input": arguments} for name, arguments in calls]})


# --- rows ---


def test_the_published_prompt_and_reply_are_kept(tmp_path):
    [item] = items(tmp_path, TOOLUSE)
    assert item.prompt == TOOLUSE["prompt"]
    assert item.completion == "\n".join(TOOLUSE["golden_response"])
    assert item.answer == '[{"Action": "forecast", "Action_Input": {"city": "Oslo", "days": 3}}]'
    assert item.question == f"Weather Desk: {TOOLUSE['instruction']}"
    assert item.details == {
        "calls": [("forecast", {"city": "Oslo", "days": 3})], "format": "free", "name": "Weather Desk",
        "written": [("forecast", '{"city": "Oslo", "days": 3}')],
    }  # fmt: skip


@pytest.mark.parametrize("response", [[], [""], [" ", "\n"]])
def test_a_missing_reply_is_made_of_the_calls_as_they_are_written(tmp_path, response):
    [item] = items(tmp_path, TWO | {"golden_response": response})
    assert item.completion == (
        'Action: forecast\nAction Input: {"city":"Oslo", "unit": ""}\n'
        'Action: sendNote\nAction Input: {"to": "Léa", "tags": [], "when": {"hour": 7, "day": 1.0}}'
    )


@pytest.mark.parametrize("reasoning", [True, False])
def test_instruction_and_gold_agree_in_json(tmp_path, reasoning):
    [item] = items(tmp_path, TOOLUSE, answer="json", reasoning=reasoning)
    before, after = TOOLUSE["prompt"].split("Use the following format:")[0], "\n\nBegin!\n\nQuestion: What will"
    assert item.prompt.startswith(before) and after in item.prompt
    assert "Use the following format" not in item.prompt and "Action Input:" not in item.prompt
    [shape] = [json.loads(line) for line in item.prompt.splitlines() if line.startswith("{")]
    [asked], [given] = shape["tool_calls"], json.loads(item.completion)["tool_calls"]
    assert list(asked) == list(given) == ["Thought"] * reasoning + ["Action", "Action_Input"]
    if reasoning:
        assert given["Thought"] == "The forecast of three days is asked for."


def test_all_calls_are_kept_in_json_unless_as_released(tmp_path):
    [item] = items(tmp_path, TWO, answer="json")
    assert item.completion == (
        '{"tool_calls": [{"Action": "forecast", "Action_Input": {"city": "Oslo", "unit": ""}}, '
        '{"Action": "sendNote", "Action_Input": {"to": "Léa", "tags": [], "when": {"hour": 7, "day": 1.0}}}]}'
    )
    [released] = items(tmp_path, TWO, answer="json", as_released=True)
    assert [call["Action"] for call in json.loads(released.completion)["tool_calls"]] == ["forecast"]
    assert (released.answer, released.id) == (item.answer, item.id)


def test_ids_do_not_depend_on_the_slice_or_the_form(tmp_path):
    bare = without(TOOLUSE, "upstream_index")
    rows = [bare, bare, bare | {"prompt": "?"}, TOOLUSE, TWO]  # the last two have one number, the first two one text
    path = write(tmp_path / "rows.jsonl", *rows)
    ids = [item.id for item in load("tooluse", path)]
    assert len(set(ids)) == 5
    loaded = load_items(tooluse.TASK, "train", place=Place(file=path), split="train[3:]", form=Form(answer="json"))
    assert [item.id for item in loaded.items] == ids[3:]
    sliced = load_items(tooluse.TASK, "train", place=Place(file=path), split="train[1:2]")
    assert [item.id for item in sliced.items] == ids[1:2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "field 'prompt' is empty"),
        ({"name": None}, "field 'name' is a NoneType, expected a string"),
        ({"instruction": 3}, "field 'instruction' is a int"),
        ({"golden_answer": None}, "field 'golden_answer' is a NoneType, expected a list"),
        ({"golden_answer": []}, "field 'golden_answer' is empty, expected at least one call"),
        ({"golden_answer": [PARTIAL]}, r"field 'golden_answer\[0\]' is a list, expected an object with 'Action'"),
        ({"golden_answer": call("{}", " ")}, r"golden_answer\[0\]: field 'Action' is empty"),
        ({"golden_answer": call("{}") + [{}]}, r"golden_answer\[1\]: field 'Action' is missing"),
        ({"golden_answer": PARTIAL}, r"golden_answer\[0\]: field 'Action_Input' is a dict, expected a string"),
        ({"golden_answer": call("")}, r"golden_answer\[0\]: field 'Action_Input' is empty"),
        ({"golden_answer": call("[1, 2]")}, r"golden_answer\[0\]: field 'Action_Input' is the JSON of a list, exp"),
        ({"golden_answer": call("null")}, r"golden_answer\[0\]: field 'Action_Input' is the JSON of a NoneType"),
        ({"golden_response": "Action: x"}, "field 'golden_response' is a str, expected a list"),
        ({"golden_response": ["", None]}, r"field 'golden_response\[1\]' is a NoneType, expected a string"),
        ({"golden_response": ["\ud800"]}, r"field 'golden_response\[0\]' is not text \(a lone surrogate"),
        ({"prompt": "Begin!"}, "field 'prompt' is without 'Use the following format:', expected .*answer=json"),
        ({"prompt": "Begin! Use the following format:"}, "field 'prompt' is without 'Begin!'"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, change, message):
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2(: |, ){message}"):
        items(tmp_path, TOOLUSE, TOOLUSE | {"upstream_index": 1} | change, answer="json")


@pytest.mark.parametrize("name", ["prompt", "name", "instruction", "golden_answer", "golden_response"])
def test_fields_that_are_needed(tmp_path, name):
    with pytest.raises(UserError, match=rf"line 1: field '{name}' is missing"):
        items(tmp_path, without(TOOLUSE, name))
    assert items(tmp_path, without(TOOLUSE, "description", "nl_documentation", "source", "upstream_index"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"golden_answer": call('{"id": ${id from search}}')}, "with a gold call whose input is not JSON"),
        ({"golden_answer": call("junk")}, "with a gold call whose input is not JSON"),
        ({"golden_answer": call('{"x": NaN}')}, "with a gold call whose input is not JSON"),
        ({"golden_answer": call(r'{"x": "\ud800"}')}, "with a gold call whose input is not JSON"),
        ({"golden_answer": call('{"x":' * 100_000)}, "with a gold call whose input is not JSON"),
        ({"golden_answer": call('{"city": "Rome"}')}, "whose golden_response and golden_answer differ"),
        ({"golden_response": ["I would call it."]}, "whose golden_response and golden_answer differ"),
    ],
)
def test_rows_that_no_reply_is_right_for_are_left_out_and_counted(tmp_path, change, reason):
    path = write(tmp_path / "rows.jsonl", TOOLUSE, TOOLUSE | change)
    loaded = load_items(tooluse.TASK, "test", place=Place(file=path))
    assert len(loaded.items) == 1 and f"1 left out: {reason}" in loaded.note


# --- replies ---

OSLO = {"city": "Oslo", "days": 3}
TEXT = '{"city": "Oslo", "days": 3}'


@pytest.mark.parametrize(
    "text",
    [
        f"Action: forecast\nAction Input: {TEXT}",
        f"I think so.\nAction 1: forecast\nAction 1 Input: {TEXT}",
        f"Action: forecast\n\nAction Input 1:\n{TEXT}",
        f"**Thought:** hm\n**Action:** forecast\n**Action Input:** {TEXT}",
        f"**Action**: `forecast`\n**Action Input**: `{TEXT}`",
        f"- Action: forecast  \r\n- Action_Input: {TEXT}\r\n",
        f"Action: forecast\nAction Input:\n```json\n{TEXT}\n```\nDone.",
        f'Action: forecast\nAction Input: "{TEXT}"',
        f"Action: forecast\nAction Input: {TEXT}\nObservation: {{'sun': true}} Action: none\nThought: I know it.",
        f"Action: forecast\nAction Input: {TEXT}}}",
        'Action: forecast\nAction Input: {\n  "days": 3.0,\n  "city": " Oslo ",\n  "unit": null\n}',
        'Action: forecast\nAction Input: {"city": "Oslo", "days": 3, "note": ""}',
    ],
)
def test_calls_in_lines(tmp_path, text):
    [item] = items(tmp_path, TOOLUSE)
    assert set(tooluse.grade(text, item).values()) == {1.0}
    assert tooluse.parse(text, item) == item.answer


@pytest.mark.parametrize(
    "text",
    [
        structured(("forecast", OSLO)),
        f"\n{structured((' forecast', OSLO))} ",
        f"Here:\n```json\n{structured(('forecast', OSLO))}\n```\nDone.",
        f"```\n{structured(('forecast', OSLO))}",
        '{"tool_calls": [{"Thought": 3, "Action": "forecast", "Action_Input": {"days": 3, "city": "Oslo"}}], "x": 1}',
    ],
)
def test_calls_in_json(tmp_path, text):
    [item] = items(tmp_path, TOOLUSE, answer="json")
    assert set(tooluse.grade(text, item).values()) == {1.0}
    assert tooluse.parse(text, item) == item.answer


@pytest.mark.parametrize(
    ("answer", "text", "action"),
    [
        ("free", "", 0),
        ("free", "The forecast is sunny.", 0),
        ("free", structured(("forecast", OSLO)), 0),  # the other form is not the form that was asked for
        ("free", f"action: forecast\naction input: {TEXT}", 0),
        ("free", f"Action:\nAction Input: {TEXT}", 0),
        ("free", "Action: forecast", 1),
        ("free", "Action: forecast\nAction Input: Oslo", 1),
        ("free", "Action: forecast\nAction Input: {'city': 'Oslo'}", 1),
        ("free", 'Action: forecast\nAction Input: {"city": "Oslo", "days": 3', 1),
        ("free", 'Action: forecast\nAction Input: {"days": NaN}', 1),
        ("free", "Action: forecast\nAction Input: " + '{"a":' * 100_000, 1),
        ("free", "Action: forecast\nAction Input: " + '{"a":' * 3000 + "1" + "}" * 3000, 1),
        ("free", f"Action: forecast\nThe input is this.\nAction Input: {TEXT}", 1),
        ("json", "", 0),
        ("json", react(("forecast", TEXT)), 0),
        ("json", "[1]", 0),
        ("json", "{}", 0),
        ("json", '{"tool_calls": []}', 0),
        ("json", '{"tool_calls": {"Action": "forecast", "Action_Input": {}}}', 0),
        ("json", '{"tool_calls": ["forecast"]}', 0),
        ("json", '{"tool_calls": [{"Action": 3, "Action_Input": {}}]}', 0),
        ("json", '{"tool_calls": [{"Action": "forecast"}]}', 1),
        ("json", '{"tool_calls": [{"Action": "forecast", "Action_Input": [1]}]}', 1),
        ("json", structured(("forecast", TEXT)), 1),  # the input as a text
        ("json", structured(("forecast", OSLO)) + " Done.", 0),
        ("json", f"```\n{structured(('forecast', OSLO))}\n```\n```\n```", 0),
        ("json", '{"tool_calls": [{"Action": "\\ud800", "Action_Input": {}}]}', 0),
        ("json", "[" * 100_000, 0),
        ("json", '{"tool_calls": [{"Action": "forecast", "Action_Input": ' + '{"a":' * 3000 + "1" + "}" * 3002, 0),
    ],
)
def test_replies_that_cannot_be_read(tmp_path, answer, text, action):
    [item] = items(tmp_path, TOOLUSE, answer=answer)
    assert tooluse.parse(text, item) is None
    grades = tooluse.grade(text, item)
    assert (grades["exact"], grades["form"], grades["arguments"]) == (0, 0, 0)
    # JSON that is nested too deeply is read by some versions of Python, and refused later.
    assert grades["action"] == action or "3000" in text


@pytest.mark.parametrize(
    ("given", "gold", "share"),
    [
        ("junk", '{"a": 1}', 0),
        ("{}", '{"a": "None"}', 0),
        ('{"a": 5.0}', '{"a": 5}', 1),
        ('{"a": 5.25}', '{"a": 5.250}', 1),
        ('{"a": "5"}', '{"a": 5}', 0),
        ('{"a": true}', '{"a": "true"}', 0),
        ('{"a": true}', '{"a": 1}', 0),
        ('{"a": false}', '{"a": 0}', 0),
        ('{"a": [true]}', '{"a": [1.0]}', 0),
        ('{"a": 1, "zz": 2}', '{"a": "1"}', 0),
        ('{"a": 1, "zz": 2}', '{"a": 1}', 0.5),
        ('{"b": 1}', '{"a": 1}', 0),
        ('{"x": 1}', '{"a": ""}', 0),
        ('{"a": 1}', '{"a": ""}', 0),
        ("{}", '{"a": "", "b": null}', 1),
        ('{"a": 0}', '{"a": null}', 0),
        ('{"x": 1}', "{}", 0),
        ("{}", "{}", 1),
        ('{"a": {"y": [1, 2], "x": "1 "}}', '{"a": {"x": "1", "y": [1.0, 2]}}', 1),
        ('{"a": [2, 1]}', '{"a": [1, 2]}', 0),
        ('{"a": "Wild"}', '{"a": "wild"}', 0),
        ('{"a": " wild\\n", "b": 2, "c": 3}', '{"c": 4, "b": 2, "a": "wild"}', 2 / 3),
    ],
)
@pytest.mark.parametrize("answer", ["free", "json"])
def test_arguments_are_compared_as_json(tmp_path, given, gold, share, answer):
    row = TOOLUSE | {"golden_answer": call(gold, "go"), "golden_response": [""]}
    [item] = items(tmp_path, row, answer=answer)
    arguments = given if answer == "free" or given == "junk" else json.loads(given)
    reply = react(("go", given)) if answer == "free" else structured(("go", arguments))
    assert tooluse.grade(reply, item) == {
        "exact": float(share == 1), "form": float(given != "junk"), "action": 1.0, "arguments": pytest.approx(share),
    }  # fmt: skip


NOTE = '{"to": "Léa", "when": {"day": 1, "hour": 7}, "tags": []}'
CITY = '{"city": "Oslo"}'


@pytest.mark.parametrize(
    ("calls", "exact", "action", "arguments"),
    [
        ([("forecast", CITY), ("sendNote", NOTE)], 1, 1, 1),
        ([("sendNote", NOTE), ("forecast", CITY)], 0, 0, 0),
        ([("forecast", CITY)], 0, 0, 1 / 2),
        ([("forecast", CITY), ("sendNote", NOTE), ("forecast", CITY)], 0, 0, 2 / 3),
        ([("forecast", CITY), ("sendMail", NOTE)], 0, 0, 1 / 2),  # right arguments of a wrong tool
        ([("forecast", CITY), ("sendNote", NOTE.replace("7", "8"))], 0, 1, (1 + 2 / 3) / 2),
        ([("Forecast", CITY), ("sendNote", NOTE)], 0, 0, 1 / 2),
    ],
)
def test_several_calls(tmp_path, calls, exact, action, arguments):
    expected = {"exact": exact, "form": 1, "action": action, "arguments": pytest.approx(arguments)}
    [item] = items(tmp_path, TWO)
    assert tooluse.grade(react(*calls), item) == expected
    assert tooluse.grade(react(*calls) + "\nObservation: foo", item) == expected
    [item] = items(tmp_path, TWO, answer="json")
    assert tooluse.grade(structured(*[(name, json.loads(text)) for name, text in calls]), item) == expected


def test_one_call_that_cannot_be_read_spoils_the_reply(tmp_path):
    [item] = items(tmp_path, TWO)
    text = react(("forecast", CITY), ("sendNote", "to Lea"))
    assert tooluse.parse(text, item) is None
    assert tooluse.grade(text, item) == {"exact": 0, "form": 0, "action": 1, "arguments": 1 / 2}


@pytest.mark.parametrize("text", ["Action: go" + " " * 50_000, "\n" * 50_000 + "Action: go\n" + " \n*" * 30_000])
def test_long_white_space_is_read_quickly(tmp_path, text):
    assert tooluse.grade(text, items(tmp_path, TOOLUSE)[0])["form"] == 0
    assert tooluse.grade("```" + text, items(tmp_path, TOOLUSE, answer="json")[0])["form"] == 0


# --- wrong replies by rule ---


def test_changes_keep_the_rest_as_it_is_written():
    good = (
        'Action: go\nAction Input: {"to":"L\\u00e9a",\n "how" : {"to": "x"}, "at": [1,2]}\n'
        'Action: end\nAction Input: {"at":1}'
    )
    peer = 'Action: stop\nAction Input: {"why": "late", "at": [3], "how": {"by": "bus"}}'
    actions, values, names, missing = tool_mutations(good, [peer])
    assert actions == [good.replace("Action: go", "Action: stop"), good.replace("Action: end", "Action: stop")]
    assert values == [
        good.replace('"L\\u00e9a"', '"late"'),
        good.replace('{"to": "x"}', '{"by": "bus"}'),
        good.replace("[1,2]", "[3]"),
        good.replace('"at":1', '"at":2'),
        good.replace('"at":1', '"at":0'),
    ]
    assert good.replace('"to":"L', '"why":"L') in names and good.replace('"at":1', '"how":1') in names
    assert missing == [
        good.replace('"to":"L\\u00e9a",\n ', ""),
        good.replace('"how" : {"to": "x"}, ', ""),
        good.replace(', "at": [1,2]', ""),
        good.replace('{"at":1}', "{}"),
    ]


def test_an_input_that_is_no_json_is_left_alone():
    assert tool_mutations('Action: go\nAction Input: {"at": soon}', []) == [[], [], [], []]
    assert tool_mutations("Action: go\nAction Input: " + '{"a":' * 100_000, []) == [[], [], [], []]


# --- the real data ---


@pytest.mark.parametrize(("file", "count"), FILES)
@pytest.mark.parametrize("form", FORMS)
def test_real_gold_replies_are_right(file, count, form):
    loaded = load_items(tooluse.TASK, "train", place=Place(file=real(file)), form=form).items
    assert len({item.id for item in loaded}) == len(loaded) == count
    for item in loaded:
        assert set(tooluse.grade(item.completion, item).values()) == {1.0}
        assert tooluse.parse(item.completion, item) == item.answer
        assert set(tooluse.grade(in_the_other_form(item), item).values()) == {0.0}


def in_the_other_form(item):
    calls = [(name, json.dumps(arguments)) for name, arguments in item.details["calls"]]
    return react(*calls) if item.details["format"] == "json" else structured(*item.details["calls"])


@pytest.mark.parametrize("form", FORMS)
def test_real_rows_have_four_wrong_replies_each(form):
    loaded = load_items(tooluse.TASK, "train", place=Place(file=real("tooluse/train_small")), form=form).items
    problems = [Problem(item.id, item.prompt, item.completion, item.answer) for item in loaded]
    made = rule_negatives(
        problems, family="tools", per_item=4, seed=0,
        is_wrong=lambda number, text: tooluse.grade(text, loaded[number])["exact"] < 1,
    )  # fmt: skip
    for item, replies in zip(loaded, made, strict=True):
        assert len(set(replies)) == 4
        assert all(tooluse.grade(reply, item)["form"] == 1 for reply in replies)
