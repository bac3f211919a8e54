"""Counts how far the project can be trusted: `python tests/trust`, seeded, goes on where it was ended.

Writes trust/*.json and RELIABILITY.md. `--only G1,G6` counts some goals, `--slice` what `make test` does, `--page` writes the page alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / folder) for folder in ("kernels", "l3ms"))]

from goals import GOALS, ROOT, parts_of  # noqa: E402
from parts import Goal, Part  # noqa: E402
from records import part_file, publish, read, run_part, source  # noqa: E402
from reliability_page import PAGE, page  # noqa: E402

from l3ms.runs.whole_files import write_whole  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="G1,...", help="these goals alone")
    parser.add_argument(
        "--parts", default="", metavar="NAME,...", help="these parts alone, by the names that they are printed with"
    )
    parser.add_argument("--here", action="store_true", help="in this process, and the figures stay in --folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--slice", action="store_true", help="the few cases of `make test`")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases, for a shorter run")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "out" / "trust", help="what is found, while it is counted"
    )
    parser.add_argument("--page", action="store_true", help="RELIABILITY.md from the figures that are there")
    given = parser.parse_args()
    keys = [goal.key for goal in GOALS]
    given.goals = [goal for goal in GOALS if goal.key in (given.only.split(",") if given.only else keys)]
    if unknown := set(filter(None, given.only.split(","))) - set(keys):
        parser.error(f"--only: must be of {', '.join(keys)}, got {', '.join(sorted(unknown))}")
    if given.seed < 0 or given.jobs < 1 or not 0 < given.share <= 1:
        parser.error("--seed must be 0 or more, --jobs 1 or more, --share above 0 and at most 1")
    return given


def wanted(part: Part, given: argparse.Namespace) -> int:
    return part.slice if given.slice else min(part.cases, max(1, round(part.cases * given.share)))


def in_a_process(goal: Goal, part: Part, given: argparse.Namespace, lock: threading.Lock) -> bool:
    """Whether it found no failure."""
    count = wanted(part, given)
    command = [sys.executable, str(HERE), "--only", goal.key, "--parts", part.name, "--here", "--seed", str(given.seed)]
    command += ["--share", str(given.share), "--folder", str(given.folder), *["--slice"] * given.slice]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **part.environment}
    begun = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=part.limit)
        problem = "" if done.returncode == 0 else f"exit code {done.returncode}: {_last(done.stdout + done.stderr)}"
    except subprocess.TimeoutExpired:
        problem = f"ended after {part.limit:g} s"
    record = read(part_file(given.folder, goal, part))
    good = not problem and record.get("failed") == 0
    with lock:
        if not given.slice and given.share == 1:
            publish(given.folder)
        said = (
            record.get("skipped") or f"{record.get('cases', 0):,} of {count:,} cases, {record.get('failed', 0)} failed"
        )
        print(f"{goal.key} {part.name}: {problem or said}, {time.monotonic() - begun:.0f} s", flush=True)
        for text in record.get("failures", []):
            print(f"    {text}", flush=True)
    return good or bool(record.get("skipped"))


def _last(text: str) -> str:
    return next((line.strip() for line in reversed(text.split("\n")) if line.strip()), "it said nothing")[:300]


def main() -> int:
    given = arguments()
    if given.page:
        write_whole(PAGE, page())
        return 0
    names = set(filter(None, given.parts.split(",")))
    chosen = [(goal, part) for goal in given.goals for part in parts_of(goal) if wanted(part, given)]
    if unknown := names - {part.name for _, part in chosen}:
        print(f"--parts: there is no part {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    chosen = [pair for pair in chosen if (pair[1].name in names if names else not pair[1].asked)]
    if given.here:
        for goal, part in chosen:
            run_part(goal, part, wanted(part, given), given.seed, given.folder)
        return 0
    print(f"{len(chosen)} parts of {len({goal.key for goal, _ in chosen})} goals, source {source()}", flush=True)
    chosen.sort(key=lambda pair: -pair[1].seconds)
    lock = threading.Lock()
    with ThreadPoolExecutor(given.jobs) as pool:
        good = list(pool.map(lambda pair: in_a_process(pair[0], pair[1], given, lock), chosen))
    if not given.slice and given.share == 1:
        write_whole(PAGE, page())
        print(f"{PAGE.relative_to(ROOT)} is written")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
