"""The code in a reply: what the tasks that run replies share."""

import ast
import re
import warnings

# A block begins and ends at the start of a line; a reply that was cut off has no end.
FENCE = re.compile(r"^(?P<indent>[ \t]*)```[^\n`]*\n(?P<code>.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


def extract(text: str) -> str | None:
    """The first fenced block of a reply, else all of it if that is Python; None if there is neither."""
    fence = FENCE.search(text)
    # A block inside a list is indented as a whole.
    code = re.sub(f"^{fence['indent']}", "", fence["code"], flags=re.MULTILINE) if fence else text
    code = code.rstrip().strip("\n")
    return code if code and (fence or parsed(code) is not None) else None


def parsed(source: str) -> ast.Module | None:
    """The syntax tree; None of what the parser does not accept."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of doubtful escapes in other people's strings
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
