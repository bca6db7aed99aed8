"""What the student and the teacher are asked: chat messages of each view.

`turns` puts the demonstration before the question as an earlier exchange, which small chat models follow. `inline`
puts it inside the user message together with the request to study it.
"""

from typing import Literal

Message = dict[str, str]
Placement = Literal["turns", "inline"]
Condition = Literal["gold", "none"]


def student_messages(question: str) -> list[Message]:
    """The question alone."""
    return [{"role": "user", "content": question}]


def teacher_messages(question: str, demonstration: str, *, condition: Condition, placement: Placement) -> list[Message]:
    """The question together with a worked solution; without one (`condition` "none") the student's own prompt.

    Raises:
      ValueError: an unknown condition or placement.
    """
    if condition == "none":
        return student_messages(question)
    if condition != "gold":
        raise ValueError(f"condition is {condition!r}; expected gold or none")
    if placement == "turns":
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": demonstration},
            {"role": "user", "content": question},
        ]
    if placement == "inline":
        content = (
            f"{question}\n\nHere is one good response to this question:\n{demonstration}\n\n"
            "Read it closely, then give your own response to the question."
        )
        return [{"role": "user", "content": content}]
    raise ValueError(f"placement is {placement!r}; expected turns or inline")
