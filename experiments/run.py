"""`python experiments/run.py NAME`: run an experiment, see README.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.command import run

if __name__ == "__main__":
    sys.exit(run())
