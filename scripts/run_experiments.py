"""Runs experiments: `python scripts/run_experiments.py agreement ema --seeds 0,1,2 [--section.option=value ...]`.

All caches, trainings, evaluations and the report that they take, on the devices that there are. What is finished is not
run again, what was stopped goes on; `--dry-run` says what would be done. docs/experiments.md explains it.
"""

import sys
from pathlib import Path

from unisd_jax.experiments.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(__file__).resolve()))
