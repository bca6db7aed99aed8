"""MBPP: short Python functions, graded by running the reply's code against the tests shown in the prompt.

Reads the rows of both published versions, the full one and the sanitized one (Austin et al. 2021).
"""

import ast
import re
from collections.abc import Sequence

from unisd_jax.data.rows import Row
from unisd_jax.data.tasks import code_reply
from unisd_jax.data.tasks import released as release
from unisd_jax.data.tasks.base import Form, Grade, Item, Source, Task

Function = ast.FunctionDef | ast.AsyncFunctionDef


def make(row: Row, position: int, form: Form) -> Item:
    """The item of a hub's row: `task_id`, `text` or `prompt`, `code`, `test_list` and optional set-up.

    Raises:
      UserError: a field is not as it should be; the message names file, line and field.
    """
    tests = [_unix(test) for test in row.texts("test_list", at_least=1)]
    code, setup = _unix(row.text("code")), _setup(row)
    tree, test_trees = _python(row, "code", code), [_python(row, "test_list", test) for test in tests]
    function = tested_function(tree, test_trees)
    if function is None:
        raise row.wrong("code", "without a function at its top level", "one that defines the tested function")
    shown = next(node for node in tree.body if isinstance(node, Function)) if form.as_released else function
    problem = _unix(row.text("prompt" if "prompt" in row.fields else "text"))
    return Item(
        f"mbpp-{row.value('task_id', int)}",
        _prompt(problem, _signature(row, shown), setup, tests),
        f"```python\n{_renamed(code, tests) if form.as_released else code}\n```",
        code,
        details={"tests": tests, "setup": setup, "name": function.name},
        question=f"{problem}\n\nThe function is called {function.name}.",
        same=problem,
    )


def grade(text: str, item: Item) -> Grade:
    """Score one reply, see `code_reply.grade`."""
    return code_reply.grade(text, lambda code: program(code, item))


def released(text: str, item: Item) -> Grade:
    """Score one reply as the release does; what is run for a reply's code is the same."""
    return release.grade_code(text, lambda code: program(code, item))


def parse(text: str, item: Item) -> str | None:
    """The code of the reply, see `code_reply.extract`."""
    return code_reply.extract(text)


def program(code: str, item: Item) -> str:
    """What the sandbox runs, in the order of the release: in some rows the set-up uses a class of the solution."""
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


def _prompt(problem: str, signature: str, setup: str, tests: Sequence[str]) -> str:
    parts = [
        problem,
        f"Define it with this signature:\n{signature}",
        "These tests, run after your code, must pass:\n" + "\n".join([*([setup] if setup else []), *tests]),
        "Reply with one fenced block, opened by ```python and closed by ```, that holds the complete solution with "
        "its imports, and with nothing else: no tests, no explanation.",
    ]
    return "\n\n".join(parts)


def _signature(row: Row, function: Function) -> str:
    keyword = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    try:
        return f"{keyword} {function.name}({ast.unparse(function.args)}):"
    except RecursionError:  # a default may be nested more deeply than can be written
        raise row.wrong(
            "code", f"nested too deeply where it defines {function.name!r}", "a signature that is plain"
        ) from None


def _renamed(code: str, tests: Sequence[str]) -> str:
    """The demonstration as the release repairs it (spec 1.3, A1): the first `def` gets the name that is tested.

    Its calls keep the old name, and a class's `__init__` may be what is renamed: broken code, for comparison only.
    """
    first, tested = re.search(r"\bdef\s+(\w+)\s*\(", code), _released_name(tests)
    if first is None or tested is None:
        return code
    return code[: first.start(1)] + tested + code[first.end(1) :]


def _released_name(tests: Sequence[str]) -> str | None:
    known = "math set sorted len list tuple str int float type isinstance round max min".split()
    for test in tests:
        outer, inner = re.match(r"assert\s+(\w+)\s*\(", test), re.match(r"assert\s+[\w.]+\(\s*(\w+)\s*\(", test)
        if outer and outer[1] not in known:
            return outer[1]
        if inner:
            return inner[1]
    return None


def _setup(row: Row) -> str:
    """`test_imports`, a list, in the sanitized version; `test_setup_code`, a string, in the full one."""
    lines = row.texts("test_imports") if row.fields.get("test_imports") is not None else []
    parts = [*(("test_imports", line) for line in lines), ("test_setup_code", row.optional_text("test_setup_code"))]
    for field, part in parts:
        _python(row, field, _unix(part))
    return "\n".join(filter(None, (_unix(part) for _, part in parts)))


def _python(row: Row, field: str, source: str) -> ast.Module:
    tree = code_reply.parsed(source)
    if tree is None:
        raise row.wrong(field, f"not Python ({source[:60]!r})", "code that can be parsed")
    return tree


def _unix(text: str) -> str:
    """The full version has line ends of Windows."""
    return text.replace("\r\n", "\n").strip("\n").rstrip()


# The published protocol (spec A2): trained on the full version, tested on the sanitized one.
SOURCE = Source(
    "google-research-datasets/mbpp",
    "4bb6404fdc6cacfda99d4ac4205087b89d32030c",
    {
        "full/train": 374, "full/validation": 90, "full/test": 500, "full/prompt": 10,
        "sanitized/train": 120, "sanitized/validation": 43, "sanitized/test": 257, "sanitized/prompt": 7,
    },
    {"full": ("mbpp", "full"), "sanitized": ("mbpp_sanitized", "sanitized")},
)  # fmt: skip
TASK = Task(
    "mbpp", make, grade, parse, "code", source=SOURCE, train="full/train", test="sanitized/test", released=released
)
