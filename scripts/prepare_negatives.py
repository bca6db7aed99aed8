"""Makes the wrong replies of the contrast before training, each checked by the task's own grading.

The options are those of training, with `--limit N` to stop after N more items (whole calls of them); `--dry-run` says
what is still to be made. Interrupted or limited, the same command goes on, and so does training.

    python scripts/prepare_negatives.py --config FILE [--limit N] [--section.option=value ...]
"""

import sys

from preparing import run

from unisd_jax.inputs import Inputs
from unisd_jax.made_once import item_negatives


def make(inputs: Inputs, items: list, read_only: bool, limit: int | None) -> str:
    """The negatives of the training items; returns what to say."""
    found = item_negatives(
        inputs.config, inputs.task, items, inputs.chat, inputs.sampler, read_only=read_only, limit=limit
    )
    covered, source = sum(reply is not None for reply in found), inputs.config.teacher.negatives.source
    return f"ready: {covered} of {len(items)} items have a wrong reply (teacher.negatives.source={source})"


if __name__ == "__main__":
    sys.exit(run(None, "python scripts/prepare_negatives.py", make))
