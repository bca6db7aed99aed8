"""HumanEval: Python functions to complete from signature and docstring, graded by hidden tests (Chen et al. 2021).

For evaluation only: it is a test set, and its tests are not shown.
"""

import re

from unisd_jax.data.rows import Row
from unisd_jax.data.tasks import code_reply
from unisd_jax.data.tasks import released as release
from unisd_jax.data.tasks.base import Form, Grade, Item, Source, Task

RULES = """Complete the function above, by these rules:
- Reply with one fenced block, opened by ```python and closed by ```, and with nothing else: no explanation, no tests, \
no example of use.
- The block holds the whole function, from its signature and docstring on, and whatever it needs: imports and helpers.
- The names of the function and of its parameters stay as they are."""


def make(row: Row, position: int, form: Form) -> Item:
    """The item of a hub's row: `task_id`, `prompt` (the stub), `canonical_solution`, `test`, `entry_point`.

    Raises:
      UserError: a field is not as it should be; the message names file, line and field.
    """
    stub, name, test = row.text("prompt"), row.text("entry_point").strip(), row.text("test")
    code = (stub + row.text("canonical_solution")).strip("\n").rstrip()
    _check(row, "canonical_solution", code, name)
    _check(row, "test", test, "check")
    return Item(
        row.text("task_id"),
        f"{stub.strip()}\n\n{RULES}",
        f"```python\n{code}\n```",
        code,
        details={"stub": stub, "test": test, "name": name},
        question=stub.strip(),
    )


def grade(text: str, item: Item) -> Grade:
    """Score one reply.

    Returns:
      exact, form, outcome: see `code_reply.grade`; the code runs as it is, as in the release.
      exact_with_stub: it passes as it is or after the stub, as in the authors' harness, where the imports and helpers
        of the stub need not be repeated and the function's body alone will do.
    """
    code, stub = parse(text, item), item.details["stub"]
    alone = code_reply.grade(text, lambda code: program(code, item))
    completes = alone["exact"] == 1 or (
        code is not None
        and stub.strip() not in code
        and code_reply.verdict(program(f"{stub.rstrip()}\n{code}", item)).kind == "pass"
    )
    return alone | {"exact_with_stub": float(completes)}


def released(text: str, item: Item) -> Grade:
    """Score one reply as the release does: without the stub (its defect A3)."""
    return release.grade_code(text, lambda code: _released_program(code, item))


def parse(text: str, item: Item) -> str | None:
    """The code of the reply, see `code_reply.extract`."""
    return code_reply.extract(text)


def program(code: str, item: Item) -> str:
    """What the sandbox runs."""
    return f"{code}\n{item.details['test']}\ncheck({item.details['name']})\n"


def _released_program(code: str, item: Item) -> str:
    """`program`, but the tests are not called if their own text has such a call (spec 3.4)."""
    is_called = f"check({item.details['name']})" in item.details["test"]
    return f"{code}\n{item.details['test']}\n" if is_called else program(code, item)


def _check(row: Row, field: str, source: str, name: str) -> None:
    """Refuses a field unless it is code that defines `name`."""
    if code_reply.parsed(source) is None:
        raise row.wrong(field, f"not Python ({row.fields[field][:60]!r})", "code that can be parsed")
    if not re.search(rf"^(?:async )?def {re.escape(name)}\s*\(", source, re.MULTILINE):
        raise row.wrong(field, f"without the function {name!r}", "code that defines it at its top level")


SOURCE = Source(
    "openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544", {"test": 164}, {"": ("humaneval",)}
)
TASK = Task("humaneval", make, grade, parse, "code", source=SOURCE, train=None, test="test", released=released)
