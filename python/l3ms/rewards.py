"""Ready-made rewards: `from l3ms.rewards import contains`. They live in `l3ms.constraints.rewards`."""

from l3ms.constraints.rewards import *  # noqa: F403
from l3ms.constraints.rewards import __all__ as __all__
