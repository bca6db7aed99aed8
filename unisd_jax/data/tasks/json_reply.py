"""The answer in a JSON reply: what the tasks that ask for one share."""

import json
import re
from typing import Any

# A block without an end takes the rest, so that no reply is searched again from each of its fences.
_FENCED = re.compile(r"```(?:json)?[ \t]*\r?\n(?:(.*?)\n[ \t]*```|.*)", re.DOTALL)


def answer(text: str) -> Any:
    """The field `answer` of a reply that is a JSON object, or whose only fenced block is one; else None."""
    blocks = [block[1] for block in _FENCED.finditer(text) if block[1] is not None]
    try:
        value = json.loads(blocks[0] if len(blocks) == 1 else text)
    except (ValueError, RecursionError):
        return None
    return value.get("answer") if isinstance(value, dict) else None
