"""Builds what the teacher's views need before training: induced instructions, negatives. Training then only reads it.

The options are those of training: `python scripts/prepare_teacher.py --config FILE [--section.option=value ...]`; with
`--dry-run` it says what is still to be made.
"""

import sys

from unisd_jax.config import parse_command_line, to_yaml
from unisd_jax.errors import UserError, report_error
from unisd_jax.experiment import build
from unisd_jax.preparation import NotPrepared


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    try:
        command = parse_command_line(sys.argv[1:] if argv is None else argv, "python scripts/prepare_teacher.py")
        if command.print_config:
            print(to_yaml(command.config), end="")
            return 0
        experiment = build(command.config, read_only=command.dry_run)
    except NotPrepared as missing:
        print(f"{missing}; nothing was made")
        return 0
    except (UserError, OSError) as error:
        return report_error(error)
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130
    print(f"ready: {len(experiment.train)} training items with every view of mode {command.config.mode}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
