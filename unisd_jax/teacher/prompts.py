"""What the student and the teacher are asked: chat messages of each view.

`turns` puts a demonstration before the question as an earlier exchange, which small chat models follow. `inline` puts
it inside the user message together with what to do with it. A wrong demonstration goes through the same function as a
good one: a contrast of the two must find no difference of form to hold on to. (Where the data have a privileged context
in place of the good one, there is such a difference, and only `negative`s of the data's own make sense.)
"""

from collections.abc import Sequence
from typing import Literal

Message = dict[str, str]
Placement = Literal["turns", "inline"]
Condition = Literal["gold", "self", "none"]


def student_messages(question: str, earlier: Sequence[Message] = ()) -> list[Message]:
    """The question alone, after what was said `earlier` in its conversation."""
    return [*earlier, _user(question)]


def teacher_messages(
    question: str, demonstration: str, *, condition: Condition, placement: Placement, earlier: Sequence[Message] = ()
) -> list[Message]:
    """The question together with a response to it; without one (`condition` "none") the student's own prompt.

    `gold` and `self` say where the response comes from, the data or the model, and are laid out alike. The negative
    view is this function with a wrong response (the release formats the two differently: its defect A12).

    Raises:
      ValueError: an unknown condition or placement.
    """
    if condition == "none":
        return student_messages(question, earlier)
    if condition not in ("gold", "self"):
        raise ValueError(f"condition is {condition!r}; expected gold or none, or self for the model's own response")
    if placement == "turns":
        return [*earlier, _user(question), _assistant(demonstration), _user(question)]
    if placement == "inline":
        content = (
            f"{question}\n\nHere is one good response to this question:\n{demonstration}\n\n"
            "Read it closely, then give your own response to the question."
        )
        return [*earlier, _user(content)]
    raise ValueError(f"placement is {placement!r}; expected turns or inline")


def privileged_messages(question: str, context: str, earlier: Sequence[Message] = ()) -> list[Message]:
    """The question together with what only the teacher may know of it: a hint, a document, feedback.

    Always inline: such a text is no turn of a conversation.
    """
    content = f"{question}\n\nThis may help you with the question:\n{context}\n\nGive your own response to it."
    return [*earlier, _user(content)]


def auxiliary_messages(
    question: str, examples: Sequence[tuple[str, str]], *, placement: Placement, earlier: Sequence[Message] = ()
) -> list[Message]:
    """The question together with solved examples of other questions, never its own solution (UniSD section 2.2).

    The same layout for every task and every way of choosing the examples; the release wraps its teacher's prompt,
    solution included, for one combination (defects D-14 and A9).

    Args:
      question: what is asked.
      examples: (question, good response) of other items, nearest first.
      placement: `turns`, earlier exchanges; `inline`, one user message that marks them as reference only.
      earlier: the messages before the question; the examples follow a system message and precede the rest.

    Raises:
      ValueError: no example, or an unknown placement.
    """
    if not examples:
        raise ValueError("examples is empty; expected at least one solved example of another question")
    if placement == "turns":
        system = [message for message in earlier if message["role"] == "system"]
        exchanges = [message for asked, response in examples for message in (_user(asked), _assistant(response))]
        return [*system, *exchanges, *earlier[len(system) :], _user(question)]
    if placement == "inline":
        blocks = [
            f"[Example {number}: question]\n{asked}\n\n[Example {number}: response]\n{response}"
            for number, (asked, response) in enumerate(examples, start=1)
        ]
        content = "\n\n".join(
            [
                "The following examples are for reference only. Each one responds to another question: leave those "
                "questions alone, and carry none of their answers over.",
                *blocks,
                f"[Your question: respond to this one only]\n{question}",
            ]
        )
        return [*earlier, _user(content)]
    raise ValueError(f"placement is {placement!r}; expected turns or inline")


def induction_messages(question: str, instruction: str, earlier: Sequence[Message] = ()) -> list[Message]:
    """The question below general guidance; no mention of a solution, as there is none (the release's defect A14)."""
    return [*earlier, _user(f"Guidance for questions of this kind:\n{instruction}\n\n{question}")]


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
