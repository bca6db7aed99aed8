"""The answer in a JSON reply: what the tasks that ask for one share."""

import json
import re
from typing import Any

_FENCED = re.compile(r"```(?:json)?[ \t]*\r?\n(.*?)\n[ \t]*```", re.DOTALL)


def answer(text: str) -> Any:
    """The field `answer` of a reply that is a JSON object, or whose only fenced block is one; else None."""
    blocks = _FENCED.findall(text)
    try:
        value = json.loads(blocks[0] if len(blocks) == 1 else text)
    except (ValueError, RecursionError):
        return None
    return value.get("answer") if isinstance(value, dict) else None
