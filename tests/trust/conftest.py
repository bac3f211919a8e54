"""Puts this folder on the path, and those whose cases it counts."""

import sys
from pathlib import Path

for folder in ("l3ms", "kernels", "trust"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
