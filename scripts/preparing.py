"""What prepare_contexts.py and prepare_negatives.py have in common: options, items, messages."""

import sys
from collections.abc import Callable

from unisd_jax.config import parse_command_line, to_yaml
from unisd_jax.errors import ConfigError, UserError, report_error
from unisd_jax.inputs import Inputs, read_inputs
from unisd_jax.interrupt import INTERRUPTED
from unisd_jax.made_once import NotPrepared, Paused, sound_items

Make = Callable[[Inputs, list, bool, int | None], str]


def run(argv: list[str] | None, prog: str, make: Make) -> int:
    """Reads `--limit N` and the options of training, calls `make(inputs, items, read_only, limit)`, prints its line."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        limit = _take_limit(words)
        command = parse_command_line(words, prog)
        if command.print_config:
            print(to_yaml(command.config), end="")
            return 0
        inputs = read_inputs(command.config)
        items = sound_items(command.config, inputs.task, inputs.train, read_only=command.dry_run)
        print(make(inputs, items, command.dry_run, limit))
    except NotPrepared as missing:
        print(f"{missing}; nothing was made")
    except Paused as paused:
        print(paused)
    except (UserError, OSError) as error:
        return report_error(error)
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return INTERRUPTED
    return 0


def _take_limit(words: list[str]) -> int | None:
    """The number after `--limit`, which is taken out of `words`."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name != "--limit":
            continue
        taken = 1 if equals else 2
        value = value if equals else "".join(words[place + 1 : place + 2])
        if not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"--limit is {value!r}, expected how many new records to make, at least 1")
        del words[place : place + taken]
        return int(value)
    return None
