"""The user's own data: one row per question, with `prompt` or `messages`, and `reference`, the good reply.

| field | |
|---|---|
| `prompt` | the user message; or `messages`: a chat that ends with one, a list of {"role", "content"} |
| `reference` | the gold reply and demonstration; `completion` is read too |
| `answer` | what a reply is compared with; the reference if it is not given |
| `negative` | a wrong reply, for the contrast |
| `example` | what other items are shown as this one's good reply, in place of the reference |
| `privileged_context` | what only the teacher sees, in place of the reference: a hint, a document, feedback |
| `id` | any string; `line-<number>` if it is not given |
"""

from unisd_jax.data.rows import Row
from unisd_jax.data.tasks.base import Form, Item, Message, Task
from unisd_jax.errors import UserError


def make(row: Row, position: int, form: Form) -> Item:
    """The item of a row; other fields are ignored.

    Raises:
      UserError: a field is not as it should be; the message names file, line and field.
    """
    earlier, prompt = _conversation(row)
    reference = _reference(row)
    return Item(
        _optional(row, "id") or f"line-{row.number}",
        prompt,
        reference,
        _optional(row, "answer") or reference,
        _optional(row, "negative"),
        question=_dialogue(earlier, prompt),
        earlier=earlier,
        context=_optional(row, "privileged_context"),
        example=_optional(row, "example"),
        same="\n".join([*(message["content"] for message in earlier), prompt]) if earlier else "",
    )


def grade(text: str, item: Item) -> dict[str, float]:
    """`exact`: the reply is the item's answer, white space around both aside."""
    return {"exact": float(text.strip() == item.answer.strip())}


def _conversation(row: Row) -> tuple[tuple[Message, ...], str]:
    if "messages" not in row.fields:
        return (), row.text("prompt")
    if "prompt" in row.fields:
        raise UserError(f"{row.where}: has both 'prompt' and 'messages', expected one of them")
    messages = [_message(row, place) for place in range(len(row.value("messages", list)))]
    if not messages or messages[-1]["role"] != "user":
        raise row.wrong("messages", "without a user message at its end", "a chat that ends with the question")
    return tuple(messages[:-1]), messages[-1]["content"]


def _message(row: Row, place: int) -> Message:
    found, name = row.fields["messages"][place], f"messages[{place}]"
    if not isinstance(found, dict):
        raise row.wrong(name, f"a {type(found).__name__}", "an object with 'role' and 'content'")
    message = Row(f"{row.where}, {name}", found)
    role = message.text("role")
    if role not in ("user", "assistant") and (role != "system" or place > 0):
        raise message.wrong("role", repr(role), "'user' or 'assistant', or 'system' for the first message")
    return {"role": role, "content": message.text("content")}


def _dialogue(earlier: tuple[Message, ...], prompt: str) -> str:
    """The whole exchange where there was one before the prompt, which alone may ask nothing; else empty."""
    said = [message for message in earlier if message["role"] != "system"]
    whole = [*said, {"role": "user", "content": prompt}]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in whole) if said else ""


def _reference(row: Row) -> str:
    names = [name for name in ("reference", "completion") if name in row.fields]
    texts = {row.text(name) for name in names} or {row.text("reference")}
    if len(texts) > 1:
        raise UserError(f"{row.where}: fields 'reference' and 'completion' differ, expected one of them")
    return texts.pop()


def _optional(row: Row, name: str) -> str | None:
    return None if row.fields.get(name) is None else row.text(name)


# An `answer` may be less than the whole reference, which the grade would then call wrong.
TASK = Task("jsonl", make, grade, sound_gold=False)
