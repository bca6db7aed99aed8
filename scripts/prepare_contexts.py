"""Makes what the auxiliary views need before training: the instructions that the model induces from solved items.

The options are those of training, with `--limit N` to stop after N new instructions (whole calls of them); `--dry-run`
says what is still to be made. Interrupted or limited, the same command goes on, and so does training.

    python scripts/prepare_contexts.py --config FILE [--limit N] [--section.option=value ...]
"""

import sys

from preparing import run

from unisd_jax.inputs import Inputs
from unisd_jax.made_once import induced_instructions
from unisd_jax.preparation import context_messages


def make(inputs: Inputs, items: list, read_only: bool, limit: int | None) -> str:
    """The instructions, and all contexts once to see that they can be made; returns what to say."""
    options = inputs.config.teacher.contexts
    if options.num_auxiliary_contexts == 0:
        return "nothing to make: teacher.contexts.num_auxiliary_contexts is 0"
    if options.method == "induction":
        induced_instructions(inputs.config, items, inputs.chat, inputs.sampler, read_only=read_only, limit=limit)
    contexts = context_messages(inputs.config, inputs.task, items, inputs.chat, inputs.sampler, read_only=read_only)
    kept = "kept in the cache" if options.method == "induction" else "made anew at every start, in seconds"
    return f"ready: {len(contexts)} items with {options.num_auxiliary_contexts} contexts by {options.method}, {kept}"


if __name__ == "__main__":
    sys.exit(run(None, "python scripts/prepare_contexts.py", make))
