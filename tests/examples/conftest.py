"""A checkpoint and a folder of a user's, as the tests of the command line have them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "l3ms"))

from cli_projects import checkpoint, project  # noqa: F401
