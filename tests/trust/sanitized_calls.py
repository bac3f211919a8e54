"""Random calls of the native head, for `trust_sanitizers`: python sanitized_calls.py FIRST COUNT SHARE_OF_LARGE_ONES

Prints each seed before its call, so that the last one is known if the process is ended, and then what was found, as JSON.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "kernels")]

from parts import each  # noqa: E402
from test_cpp_fuzz import fuzz  # noqa: E402

if __name__ == "__main__":
    first, count, large = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])

    def call(seed: int) -> float:
        print(seed, flush=True)
        return fuzz(seed, large)

    print(json.dumps(each(call, range(first, first + count)).to_json()), flush=True)
