"""Builds what the teacher's views need before training: induced instructions, negatives. Training then only reads it.

The options are those of training: `python scripts/prepare_teacher.py --config FILE [--section.option=value ...]`.
"""

import sys

from unisd_jax.config import parse_command_line
from unisd_jax.errors import UserError, report_error
from unisd_jax.experiment import build


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    try:
        command = parse_command_line(sys.argv[1:] if argv is None else argv, "python scripts/prepare_teacher.py")
        experiment = build(command.config)
    except (UserError, OSError) as error:
        return report_error(error)
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130
    print(f"ready: {len(experiment.train)} training items with every view of mode {command.config.mode}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
