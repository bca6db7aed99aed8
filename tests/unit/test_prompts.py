"""The prompts of the teacher's views: who is shown what, in which form."""

import re

import pytest

from unisd_jax.teacher.induction import meta_messages
from unisd_jax.teacher.negative_prompts import MISTAKES, Problem, request_messages
from unisd_jax.teacher.prompts import auxiliary_messages, induction_messages, student_messages, teacher_messages

EXAMPLES = [("1+1?", "It is 2."), ("3+3?", "It is 6.")]


def contents(messages):
    return [message["content"] for message in messages]


@pytest.mark.parametrize("placement", ["turns", "inline"])
def test_a_demonstration_of_the_models_own_is_laid_out_like_a_gold_one(placement):
    gold, own = (
        teacher_messages("2+2?", "It is 4.", condition=condition, placement=placement) for condition in ("gold", "self")
    )
    assert gold == own


@pytest.mark.parametrize("placement", ["turns", "inline"])
def test_a_wrong_demonstration_differs_from_a_good_one_in_nothing_but_itself(placement):
    good, wrong = (
        teacher_messages("2+2?", reply, condition="gold", placement=placement) for reply in ("It is 4.", "It is 5.")
    )
    swapped = [message | {"content": message["content"].replace("It is 5.", "It is 4.")} for message in wrong]
    assert swapped == good != wrong


def test_other_items_examples_as_chat_turns():
    messages = auxiliary_messages("2+2?", EXAMPLES, placement="turns")
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert contents(messages) == ["1+1?", "It is 2.", "3+3?", "It is 6.", "2+2?"]


def test_other_items_examples_inside_the_user_message_are_marked_as_reference():
    (message,) = auxiliary_messages("2+2?", EXAMPLES, placement="inline")
    text = message["content"]
    positions = [text.index(part) for part in ("reference only", "1+1?", "It is 2.", "3+3?", "It is 6.", "2+2?")]
    assert message["role"] == "user" and positions == sorted(positions)
    assert text.endswith("2+2?"), "the question comes last, once"
    assert text.count("2+2?") == 1


@pytest.mark.parametrize(
    ("examples", "placement", "message"),
    [([], "turns", "examples is empty"), (EXAMPLES, "below", "placement is 'below'; expected turns or inline")],
)
def test_auxiliary_options_that_make_no_sense(examples, placement, message):
    with pytest.raises(ValueError, match=message):
        auxiliary_messages.__wrapped__("2+2?", examples, placement=placement)


def test_an_induced_instruction_comes_first_and_promises_no_solution():
    (message,) = induction_messages("2+2?", "Add the numbers.")
    text = message["content"]
    assert text.index("Add the numbers.") < text.index("2+2?")
    assert not re.search("solution|response|reference|example", text, re.IGNORECASE)


def test_the_student_is_shown_less_than_any_teacher():
    views = [
        teacher_messages("2+2?", "It is 4.", condition="gold", placement="inline"),
        auxiliary_messages("2+2?", EXAMPLES, placement="inline"),
        induction_messages("2+2?", "Add the numbers."),
    ]
    assert student_messages("2+2?") not in views
    assert all("2+2?" in view[-1]["content"] for view in views)


def test_the_meta_prompt_shows_every_example_and_asks_for_an_instruction():
    (message,) = meta_messages(EXAMPLES)
    text = message["content"]
    assert all(part in text for example in EXAMPLES for part in example)
    assert "do not do them again" in text and "three or four sentences" in text


@pytest.mark.parametrize("family", ["text", "choice", "code", "tools"])
def test_requests_for_wrong_replies_take_the_mistakes_in_turn_and_hold_no_solution(family):
    problem = Problem("1", "Which? A. one B. two C. three", "Answer: B", "B", ("A", "B", "C"))
    texts = [request_messages(problem, family=family, slot=slot)[0]["content"] for slot in range(5)]
    assert all(text.startswith(problem.question) and problem.completion not in text for text in texts)
    other = Problem("2", "Who?", "Answer: A", "A", ("A", "B"))
    before, reply, request = request_messages(problem, family=family, slot=1, example=(other, "Answer: C"))
    assert before["content"].startswith("Who?") and reply == {"role": "assistant", "content": "Answer: C"}
    assert request["content"] == texts[1]
    if family == "choice":
        assert [re.findall("chooses option (.)", text) for text in texts] == [["A"], ["C"], ["A"], ["C"], ["A"]]
    else:
        assert len(set(texts)) == 4 == len(MISTAKES[family]) and texts[0] == texts[4]


def test_a_choice_without_a_wrong_option_is_refused():
    with pytest.raises(ValueError, match="item 7 has options .*expected one that is wrong"):
        request_messages(Problem("7", "Which?", "Answer: A", "A", ("A",)), family="choice", slot=0)
