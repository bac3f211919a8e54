"""The command line of the fuzz tests: other seeds than those of the tests, for as long as one likes."""

import argparse
import sys
import time
from collections.abc import Callable


def main(fuzz: Callable[[int], float], about: str | None) -> None:
    """Run `fuzz` (seed -> worst error, as a share of what is allowed) on many seeds, print what came of it, exit 1 on a failure."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--first", type=int, default=100_000, metavar="SEED")
    parser.add_argument("--count", type=int, default=5_000)
    parser.add_argument("--minutes", type=float, default=60, help="stop after this many")
    arguments = parser.parse_args()
    started, worst, failures, done = time.monotonic(), (0.0, -1), [], 0
    for seed in range(arguments.first, arguments.first + arguments.count):
        if time.monotonic() - started > 60 * arguments.minutes:
            break
        try:
            worst = max(worst, (fuzz(seed), seed))
        except AssertionError as error:
            failures.append(seed)
            print(f"seed {seed}: {error}", flush=True)
        done += 1
    print(
        f"{done} calls from seed {arguments.first}: {len(failures)} failures, worst {worst[0]:.3f} of what is allowed (seed {worst[1]})"
    )
    sys.exit(bool(failures))
