"""Measures the paper's claims in miniature: `python scripts/make_claims.py`, or `make claims`; see docs/claims.md.

Trains a small model some sixty times for a few steps and scores what came out. What is made is kept: the same command
goes on where it was stopped. Any option of a configuration, as `--train.steps=4`, is one of all trainings.
"""

import sys
from pathlib import Path

from unisd_jax.claims.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(__file__).resolve().parents[1]))
