"""The code in a reply: what the tasks that run replies share."""

import ast
import functools
import re
import warnings
from collections.abc import Callable

from unisd_jax.data.tasks.base import Grade
from unisd_jax.sandbox import Outcome, run_python

# A block begins and ends at the start of a line; a reply that was cut off has no end.
FENCE = re.compile(r"^(?P<indent>[ \t]*)```[^\n`]*\n(?P<code>.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


def extract(text: str) -> str | None:
    """The first fenced block of a reply, else all of it if that is Python; None if there is neither."""
    fence = FENCE.search(text)
    # A block inside a list is indented as a whole.
    code = re.sub(f"^{fence['indent']}", "", fence["code"], flags=re.MULTILINE) if fence else text
    code = code.rstrip().strip("\n")
    return code if code and (fence or parsed(code) is not None) else None


def grade(text: str, program: Callable[[str], str]) -> Grade:
    """Score one reply, whose code runs in the sandbox with its tests as `program(code)`.

    Returns:
      exact: the tests pass.
      form: the reply has a fenced block.
      outcome: how the program ended, see `sandbox.Kind`; "no_code" for a reply without any.
    """
    code = extract(text)
    outcome = "no_code" if code is None else verdict(program(code)).kind
    return {"exact": float(outcome == "pass"), "form": float(FENCE.search(text) is not None), "outcome": outcome}


@functools.lru_cache(maxsize=4096)
def verdict(program: str) -> Outcome:
    """How a program ends in the sandbox.

    It is remembered: our score of a reply and the release's rest on one run, so that a program which only passes at
    times, or is late on a busy machine, does not look like a difference between the two.
    """
    return run_python(program)


def parsed(source: str) -> ast.Module | None:
    """The syntax tree; None of what the parser does not accept."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of doubtful escapes in other people's strings
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
