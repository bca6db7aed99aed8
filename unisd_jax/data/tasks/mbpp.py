"""MBPP: short Python functions, graded by running the reply's code against the tests shown in the prompt.

Reads the rows of both published versions, the full one and the sanitized one (Austin et al. 2021).
"""

import ast
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from unisd_jax.data.tasks import jsonl
from unisd_jax.data.tasks.base import Item, Task
from unisd_jax.errors import UserError
from unisd_jax.sandbox import run_python

Function = ast.FunctionDef | ast.AsyncFunctionDef

# A block begins and ends at the start of a line; a reply that was cut off has no end.
_FENCE = re.compile(r"^(?P<indent>[ \t]*)```[^\n`]*\n(?P<code>.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


def load(split: str, path: Path | None) -> list[Item]:
    """The items of a file of the hub's rows: `task_id`, `text` or `prompt`, `code`, `test_list` and optional set-up.

    Raises:
      ConfigError: no file was given.
      UserError: the file or a row is malformed; the message names file, line and field.
    """
    rows = jsonl.read_rows("mbpp", split, path)
    return jsonl.distinct((row, _item(row)) for row in rows)


def grade(text: str, item: Item) -> dict[str, float]:
    """`exact`: the reply's code passes the tests in the sandbox; `form`: the reply has a fenced block."""
    code = parse(text, item)
    passed = code is not None and run_python(program(code, item)).kind == "pass"
    return {"exact": float(passed), "form": float(_FENCE.search(text) is not None)}


def parse(text: str, item: Item) -> str | None:
    """The code of the reply: its first fenced block, else all of it if that is Python; None if there is neither."""
    fence = _FENCE.search(text)
    # A block inside a list is indented as a whole.
    code = re.sub(f"^{fence['indent']}", "", fence["code"], flags=re.MULTILINE) if fence else text
    code = code.rstrip().strip("\n")
    return code if code and (fence or _tree(code) is not None) else None


def program(code: str, item: Item) -> str:
    """What the sandbox runs. The set-up follows the code: in some rows it uses a class that the solution defines."""
    return "\n".join([code, item.details["setup"], *item.details["tests"]]) + "\n"


def tested_function(code: ast.Module, tests: Sequence[ast.Module]) -> Function | None:
    """The function of the reference that the tests are about: the outermost one they call, else the last of the module.

    Solutions may begin with a helper or a class, so neither the first definition nor a name alone will do.
    """
    functions = {node.name: node for node in code.body if isinstance(node, Function)}
    for test in tests:
        for node in ast.walk(test):  # breadth first: outer calls before those in their arguments
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
                return functions[node.func.id]
    return list(functions.values())[-1] if functions else None


def _item(row: jsonl.Row) -> Item:
    tests = [_unix(test) for test in row.texts("test_list", at_least=1)]
    code, setup = _unix(row.text("code")), _setup(row)
    function = tested_function(_python(row, "code", code), [_python(row, "test_list", test) for test in tests])
    if function is None:
        raise UserError(f"{row.where}: field 'code' defines no function at its top level, expected the tested one")
    return Item(
        f"mbpp-{row.value('task_id', int)}",
        _prompt(row.text("prompt" if "prompt" in row.fields else "text"), function, setup, tests),
        f"```python\n{code}\n```",
        code,
        details={"tests": tests, "setup": setup, "name": function.name},
    )


def _prompt(problem: str, function: Function, setup: str, tests: Sequence[str]) -> str:
    keyword = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    parts = [
        _unix(problem),
        f"Define it with this signature:\n{keyword} {function.name}({ast.unparse(function.args)}):",
        "These tests, run after your code, must pass:\n" + "\n".join([*([setup] if setup else []), *tests]),
        "Reply with one fenced block, opened by ```python and closed by ```, that holds the complete solution with "
        "its imports, and with nothing else: no tests, no explanation.",
    ]
    return "\n\n".join(parts)


def _setup(row: jsonl.Row) -> str:
    """`test_imports`, a list, in the sanitized version; `test_setup_code`, a string, in the full one."""
    lines = row.texts("test_imports") if row.fields.get("test_imports") is not None else []
    return "\n".join(filter(None, [*map(_unix, lines), _unix(row.optional_text("test_setup_code"))]))


def _python(row: jsonl.Row, field: str, source: str) -> ast.Module:
    tree = _tree(source)
    if tree is None:
        raise UserError(f"{row.where}: field {field!r} is not Python: {source[:60]!r}")
    return tree


def _tree(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings(action="ignore"):  # of doubtful escapes in other people's strings
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _unix(text: str) -> str:
    """The full version has line ends of Windows."""
    return text.replace("\r\n", "\n").strip("\n").rstrip()


TASK = Task("mbpp", load, grade, parse, "code")
