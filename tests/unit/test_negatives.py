"""Wrong replies are wrong, different from each other, and have the form of the good reply."""

import ast
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisd_jax.errors import UserError
from unisd_jax.teacher.corruption import corruptions
from unisd_jax.teacher.corruption_code import code_mutations
from unisd_jax.teacher.negative_prompts import Problem
from unisd_jax.teacher.negatives import CALL_SIZE, in_form, model_negatives, require_coverage, rule_negatives

CODE = '''def total(numbers, start=0):
    """Adds up; an empty list gives `start`."""
    if not numbers:  # edge case
        return start
    result = start
    for index in range(len(numbers)):
        result = result + numbers[index]  # one by one
    return result
'''
TESTS = "assert total([1, 2]) == 3\nassert total([], 5) == 5\nassert total([4], 1) == 5\nassert total([]) == 0"
CALL = 'Thought: I need the weather.\nAction: getWeather\nAction Input: {"city": "Oslo", "days": 3, "metric": true}'
OTHER_CALL = 'Thought: A song.\nAction: findSong\nAction Input: {"artist": "Grieg", "limit": 5}'
STRUCTURED = '{"tool_calls": [{"Thought": "Weather.", "Action": "getWeather", "Action_Input": {"city": "Oslo"}}]}'


def fails_tests(code):
    """Whether trusted code of this file fails `TESTS`."""
    code = code.replace("```python\n", "").replace("```", "")
    scope = {}
    try:
        exec(code, scope)
        exec(TESTS, scope)
    except Exception:
        return True
    return False


def every(completion, answer, family, peers=(), seed=0):
    return corruptions(completion, answer, family=family, peers=peers, rng=random.Random(seed))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("Reasoning: It flies.\nAnswer: B", "Reasoning: It flies.\nAnswer: {}"),
        ("**Answer:** (B) because", "**Answer:** ({}) because"),
        ("Answer: B\nNo, think again.\nFinal answer: b.", "Answer: B\nNo, think again.\nFinal answer: {}."),
        ('{"reasoning": "B flies", "answer": "B"}', '{{"reasoning": "B flies", "answer": "{}"}}'),
        ("B", "{}"),
        (" (B).\n", " ({}).\n"),
    ],
)
def test_a_choice_gets_each_wrong_letter_where_the_right_one_stood(completion, expected):
    letters = "acd" if "b." in completion else "ACD"
    assert every(completion, "B", "choice", "ABCD") == [expected.format(letter) for letter in letters]


@pytest.mark.parametrize("completion", ["Answer: blue", "It is B, I think.", "Answer: A", ""])
def test_a_choice_without_its_letter_is_left_alone(completion):
    assert every(completion, "B", "choice", "ABCD") == []


@pytest.mark.parametrize("wrap", ["{}", "```python\n{}```", "Here it is:\n```python\n{}```\nDone."])
def test_code_keeps_everything_but_one_place(wrap):
    good = wrap.format(CODE)
    mutants = every(good, "", "code")
    assert len(mutants) == len(set(mutants)) == 9
    before, after = wrap.split("{}")
    for mutant in mutants:
        assert mutant != good and mutant.startswith(before) and mutant.endswith(after)
        ast.parse(mutant.removeprefix(before).removesuffix(after))
        changed = [pair for pair in zip(good.split("\n"), mutant.split("\n"), strict=True) if len(set(pair)) == 2]
        assert len(changed) == 1, "one line"
        assert "# edge case" in mutant and "# one by one" in mutant, "comments are kept"


def test_every_kind_of_bug_is_there():
    off_by_one, operators, edge_cases, returns = code_mutations(CODE)
    assert any("range(len(numbers) - 1)" in mutant for mutant in off_by_one)
    assert any("start=1" in mutant for mutant in off_by_one)
    assert any("result - numbers[index]" in mutant for mutant in operators)
    assert any("if False:  # edge case" in mutant for mutant in edge_cases)
    assert any(mutant.endswith("return numbers\n") for mutant in returns)
    assert sum(map(fails_tests, [*operators, *returns])) == len(operators) + len(returns)


@pytest.mark.parametrize(
    ("code", "mutant"),
    [
        ("x = (a +\n     (b))\n", "x = (a -\n     (b))\n"),
        ("ok = a not  in b", "ok = a in b"),
        ("ok = a in b", "ok = a not in b"),
        ("ok = é < b and c", "ok = é <= b and c"),
        ("ok = é < b and c", "ok = é < b or c"),
        ("x **= y", "x *= y"),
        ("x = a if n == 0 else b", "x = a if False else b"),
        ("def f(a):\r\n    return a > b\r\n", "def f(a):\r\n    return not (a > b)\r\n"),
        ("def f(a):\n    return True", "def f(a):\n    return False"),
        ("x = [1, 0]", "x = [1, (-1)]"),
        ("for i in range(1, n, 2): pass", "for i in range(1, n - 1, 2): pass"),
    ],
)
def test_single_bugs(code, mutant):
    assert mutant in every(code, "", "code")


@pytest.mark.parametrize(
    "text", ["x = '%s' % name", "x = f'{1 + 2}'", "x = (a  # plus +\n  + b)", "x = True", "not python"]
)
def test_what_is_not_worth_or_not_safe_to_change(text):
    assert every(text, "", "code") == []


@pytest.mark.parametrize(
    ("completion", "answer", "peers", "expected"),
    [
        ('{"answer": "birds"}', "birds", ['a "b"'], ['{"answer": "a \\"b\\""}']),
        ("He", "He", ["Li", "he"], ["Li"]),
        ("In Paris. So: Paris", "Paris", ["Rome"], ["In Paris. So: Rome", "In Rome. So: Rome"]),
        ("It is the hen", "he", ["Li"], []),
        ("No idea", "yes", ["Li"], []),
        ("", "", ["Li"], []),
    ],
)
def test_a_text_gets_another_items_answer_in_place_of_its_own(completion, answer, peers, expected):
    assert every(completion, answer, "text", peers) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (
            "3 + 4 = 7\n#### 7",
            "7",
            {"3 + 4 = 7\n#### 6", "3 + 4 = 7\n#### 8", "3 + 4 = 7\n#### 9", "3 + 4 = 7\n#### 17"},
        ),
        ("about 1,000 m", "1000", {"about 1,001 m", "about 999 m", "about 1,002 m", "about 1,010 m"}),
        ("3.95", "3.95", {"3.96", "3.94", "3.97", "4.05"}),
        ("0", "0", {"1", "2", "10"}),
    ],
)
def test_a_number_gets_a_little_larger_or_smaller(completion, answer, expected):
    assert set(every(completion, answer, "text")) == expected


def test_similar_answers_are_lent_first():
    replies = every("Wednesday", "Wednesday", "text", ["12", "birds", "Monday", "a long answer", "usually"])
    assert replies[0] == "Monday"


def test_tools_get_another_action_or_a_wrong_argument():
    replies = every(CALL, CALL, "tools", [OTHER_CALL])
    assert CALL.replace("getWeather", "findSong") in replies
    assert CALL.replace("Oslo", "Grieg") in replies
    assert CALL.replace("3", "4") in replies and CALL.replace("3", "2") in replies
    assert CALL.replace("true", "false") in replies
    assert CALL.replace('"city"', '"artist"') in replies
    assert CALL.replace('"city": "Oslo", ', "") in replies
    assert CALL.replace(', "metric": true', "") in replies
    assert CALL.replace('"days": 3, ', "") in replies
    for reply in replies:
        thought, action, arguments = reply.split("\n")
        assert thought == "Thought: I need the weather." and action.startswith("Action: ")
        json.loads(arguments.removeprefix("Action Input: "))


def test_tools_in_json_stay_json():
    replies = every(STRUCTURED, "", "tools", [OTHER_CALL, STRUCTURED])
    assert STRUCTURED.replace("getWeather", "findSong") in replies
    assert STRUCTURED.replace('{"city": "Oslo"}', "{}") in replies
    assert all(json.loads(reply)["tool_calls"][0].keys() == {"Thought", "Action", "Action_Input"} for reply in replies)


@settings(deadline=None)
@given(
    completion=st.text(st.sampled_from('AB12.,: \n"{}()+=<`xyif'), max_size=40),
    answer=st.sampled_from(["A", "1", "12", "x", ""]),
    family=st.sampled_from(["text", "choice", "code", "tools"]),
    seed=st.integers(0, 3),
)
def test_changes_of_any_text_are_different_and_repeatable(completion, answer, family, seed):
    peers = ("A", "B", "7", 'Action: go\nAction Input: {"x": 1}')
    replies = every(completion, answer, family, peers, seed)
    assert replies == every(completion, answer, family, peers, seed)
    assert len(replies) == len(set(replies)) and completion not in replies
    assert all(reply.strip() for reply in replies)


ANSWERS = ["birds", "He", "12", "Wednesday", "usually", "7"]
TEXTS = [Problem(str(n), f"question {n}", json.dumps({"answer": answer}), answer) for n, answer in enumerate(ANSWERS)]
CHOICES = [
    Problem(str(n), f"question {n}", f"Reasoning: so.\nAnswer: {answer}", answer, tuple("ABCD")[:size])
    for n, (answer, size) in enumerate([("A", 4), ("B", 2), ("C", 3)])
]
FUNCTIONS = [Problem("code", "Add up.", f"```python\n{CODE}```", CODE)]
CALLS = [Problem(str(n), "Call.", call, call) for n, call in enumerate([CALL, OTHER_CALL])]


def graded_text(number, text):
    return json.loads(text)["answer"].casefold() != ANSWERS[number].casefold()


def graded_choice(number, text):
    problem = CHOICES[number]
    return text.rsplit("Answer: ", 1)[1] in set(problem.options) - {problem.answer}


@pytest.mark.parametrize(
    ("problems", "family", "is_wrong", "counts"),
    [
        (TEXTS, "text", graded_text, [4] * 6),
        (CHOICES, "choice", graded_choice, [3, 1, 2]),
        (FUNCTIONS, "code", lambda number, text: fails_tests(text), [4]),
        (CALLS, "tools", lambda number, text: text != CALLS[number].completion, [4, 4]),
    ],
)
def test_rules_give_checked_replies(problems, family, is_wrong, counts):
    made = rule_negatives(problems, family=family, per_item=4, seed=0, is_wrong=is_wrong)
    assert [len(replies) for replies in made] == counts
    for number, replies in enumerate(made):
        assert len(set(replies)) == len(replies)
        assert all(is_wrong(number, reply) and reply != problems[number].completion for reply in replies)
    assert made == rule_negatives(problems, family=family, per_item=4, seed=0, is_wrong=is_wrong)
    require_coverage(made, 1.0)


def test_answers_of_the_nearest_questions_are_borrowed_first():
    def rank(number, count):
        return sorted(range(len(TEXTS)), key=lambda other: abs(other - number))[:count]

    made = rule_negatives(TEXTS, family="text", per_item=1, seed=0, is_wrong=graded_text, rank=rank)
    assert [made[number] for number in (0, 1, 4)] == [
        ['{"answer": "usually"}'],
        ['{"answer": "Wednesday"}'],
        ['{"answer": "birds"}'],
    ]


def test_what_the_task_calls_right_is_not_used():
    asked = []

    def is_wrong(number, text):
        asked.append(text)
        return False

    made = rule_negatives(FUNCTIONS, family="code", per_item=1, seed=0, is_wrong=is_wrong)
    assert made == [[]]
    assert len(asked) == 6, "and not tried for ever: each try runs the tests"
    with pytest.raises(UserError, match=r"0 of 1 items have a wrong reply \(0.0%\), expected at least 90.0%: choose"):
        require_coverage(made, 0.9)


def model_run(reply, problems=TEXTS, family="text", is_wrong=graded_text, keep=None, record=None, attempts=3):
    return model_negatives(
        problems,
        family=family,
        per_item=2,
        attempts=attempts,
        generate=reply,
        is_wrong=is_wrong,
        keep=keep or {},
        record=record or (lambda records: None),
    )


def test_a_model_is_asked_again_for_what_is_missing_only():
    calls = []

    def generate(conversations, call):
        calls.append(len(conversations))
        if call == 0:
            # Right, empty, of another form, twice the same.
            replies = [TEXTS[0].completion, "", "frogs", '{"answer": "", "x": 1}', '{"answer": "y"}', '{"answer": "y"}']
            return replies + [f'{{"answer": "wrong {row}"}}' for row in range(len(conversations) - 6)]
        return [f' {{"answer": "wrong {call}.{row}"}}\n' for row in range(len(conversations))]

    made = model_run(generate)
    assert calls == [12, 5]
    assert all(len(replies) == 2 for replies in made)
    assert made[0] == ['{"answer": "wrong 1.0"}', '{"answer": "wrong 1.1"}']
    assert made[2] == ['{"answer": "y"}', '{"answer": "wrong 1.4"}']


def test_an_item_for_which_nothing_passes_is_left_out():
    calls = []

    def generate(conversations, call):
        calls.append(call)
        return ["" for _ in conversations]

    made = model_run(generate)
    assert calls == [0, 1, 2] and made == [[]] * 6


MANY = [Problem(str(n), f"question {n}", '{"answer": "right"}', "right") for n in range(3 * CALL_SIZE)]


class Model:
    """Replies depend on call and row alone; some are bad. Stops at call `stop`."""

    def __init__(self, stop=None):
        self.stop, self.calls = stop, []

    def __call__(self, conversations, call):
        if call == self.stop:
            raise KeyboardInterrupt
        self.calls.append(call)
        replies = ["", '{"answer": "right"}', f'{{"answer": "wrong {call}"}}']
        return [replies[(call + row) % 3] for row in range(len(conversations))]


def many_run(model, keep, record):
    return model_run(model, MANY, "text", lambda number, text: "right" not in text, keep, record)


@pytest.mark.parametrize("lost", [0, 2])
def test_a_stopped_run_goes_on_to_the_same_end(lost):
    model = Model()
    expected = many_run(model, {}, lambda records: None)
    assert model.calls == list(range(9)) and {len(replies) for replies in expected} == {1, 2}
    kept = {}
    with pytest.raises(KeyboardInterrupt):
        many_run(Model(stop=7), kept, kept.update)
    assert len(kept) == 2 * CALL_SIZE
    for name in list(kept)[len(kept) - lost :]:
        del kept[name]
    model = Model()
    assert many_run(model, kept, kept.update) == expected
    assert model.calls == (list(range(3, 9)) if lost else [6, 7, 8]), "what was complete is not asked for again"


def test_a_choice_is_any_wrong_option_of_the_question():
    """Wrong letters are asked for in turn; another wrong one will do, the right one and what is no option will not."""
    asked = []

    def generate(conversations, call):
        asked.append([messages[-1]["content"].split("chooses option ")[1][0] for messages in conversations])
        return [f"Reasoning: {row}.\nAnswer: {letter if call else 'Z'}" for row, letter in enumerate(asked[-1])]

    made = model_run(generate, CHOICES, "choice", graded_choice)
    assert asked[0] == asked[1], "nothing was accepted at first"
    for problem, replies in zip(CHOICES, made, strict=True):
        letters = [reply[-1] for reply in replies]
        assert problem.answer not in letters and set(letters) <= set(problem.options)


def test_the_form_is_shown_by_an_earlier_turn_with_another_items_wrong_reply():
    seen = []

    def generate(conversations, call):
        seen.extend(conversations)
        return [""] * len(conversations)

    model_run(generate)
    for example, reply, request in seen:
        assert [example["role"], reply["role"], request["role"]] == ["user", "assistant", "user"]
        assert example["content"] != request["content"]
        other = next(problem for problem in TEXTS if example["content"].startswith(problem.question))
        assert reply["content"] != other.completion and set(json.loads(reply["content"])) == {"answer"}
        own = next(problem for problem in TEXTS if request["content"].startswith(problem.question))
        assert own.completion not in example["content"] + request["content"]


def test_a_choice_without_a_wrong_option_is_not_asked_for():
    problem = Problem("1", "Which?", "Answer: A", "A", ("A",))
    made = model_run(lambda conversations, call: pytest.fail("asked"), [problem], "choice")
    assert made == [[]]


@pytest.mark.parametrize(
    ("family", "good", "reply", "expected"),
    [
        ("code", "```python\nx = 1\n```", "Sure!\n```python\nx = 2\n```\nDone.", "```python\nx = 2\n```"),
        ("code", "x = 1", "```python\nx = 2\n```", "x = 2"),
        ("code", "x = 1", "x = = 2", None),
        ("code", "x = 1", "  x = 1\n", None),
        ("text", '{"answer": "a"}', '```json\n{"answer": "b"}\n```', '{"answer": "b"}'),
        ("text", '{"answer": "a"}', '{"reply": "b"}', None),
        ("text", "It is a.", '{"answer": "b"}', None),
        ("text", "It is a.", " It is b. ", "It is b."),
        ("text", "It is a.", " \n", None),
        ("tools", CALL, CALL.replace("Oslo", "Rome"), CALL.replace("Oslo", "Rome")),
        ("tools", CALL, "Action: getWeather", None),
        ("choice", "Reasoning: so.\nAnswer: B", "Reasoning: no.\nAnswer: A", "Reasoning: no.\nAnswer: A"),
        ("choice", "Reasoning: so.\nAnswer: B", "Answer: A", None),
        ("choice", "Reasoning: so.\nAnswer: B", "Reasoning: no.\nAnswer: C", "Reasoning: no.\nAnswer: C"),
        ("choice", "Reasoning: so.\nAnswer: B", "Reasoning: no.\nAnswer: Z", None),
        ("choice", "Reasoning: so.\nAnswer: B", "Reasoning: no.\nA", None),
    ],
)
def test_a_reply_has_the_form_of_the_good_one_or_is_refused(family, good, reply, expected):
    problem = Problem("1", "Which?", good, "B", ("A", "B", "C"))
    assert in_form(reply, problem, family=family) == expected
