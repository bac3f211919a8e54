"""Ranks are killed and stopped at random, and the run is resumed: is it, bit for bit, the one that nobody touched?

python killed_ranks.py RUN.yaml FOLDER [KILLS STOPS SEED WORLDS]; prints a line for each, and writes FOLDER/found.json.
"""

import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import launches
import yaml

TIMEOUT = 8  # seconds, of the runs in which a rank is stopped


def lines(out):
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def attempt(config, folder, world, number, picks):
    """One run that is hit once, in an iteration: what each rank said, and how long the others took to end."""
    out, rank = folder / "out", picks.randrange(world)
    at, pause = picks.randrange(iterations(config)), picks.uniform(0, 0.6)

    def until(launch):
        while lines(out) < at or not (out / "config.yaml").exists():
            launch.poll()
            if launch.codes:
                raise AssertionError(f"ended before iteration {at}: {launch.codes} {launch.errors()}")
            time.sleep(0.01)
        time.sleep(pause)

    return hit(config, folder, world, number, rank, until) | {"at": at}


def iterations(config):
    return yaml.safe_load(config.read_text())["train"]["iterations"]


def hit(config, folder, world, number, rank, until):
    """A run of `world` ranks, one of which is killed or stopped when `until(launch)` returns."""
    timeout = TIMEOUT if number == signal.SIGSTOP else 120
    arguments = ["train", config, "--output", folder / "out", "--train.timeout", timeout, "--overwrite"]
    launch = launches.Launch(world, arguments, folder / "said")
    try:
        until(launch)
        launch.poll()
        before = dict(launch.codes)
        hit = launch.signal(rank, number) if rank not in before else time.monotonic()
        codes = launch.wait(300, but=() if number == signal.SIGKILL else (rank,))
        took = {other: launch.ended[other] - hit for other in codes if other != rank}
    finally:
        launch.end()
    return {
        "world": world,
        "rank": rank,
        "signal": int(number),
        "before": before,
        "codes": codes,
        "seconds": took,
        "said": launch.errors(),
    }


def resume(config, folder, world):
    launch = launches.Launch(world, ["train", config, "--output", folder / "out", "--resume"], folder / "resumed")
    codes = launch.wait(300)
    launch.end()
    return codes, launch.errors()


def main(config, folder, kills, stops, seed, worlds):
    from resumed_runs import assert_same

    picks = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for world in worlds:
        place = folder / f"whole-{world}"
        launch = launches.Launch(world, ["train", config, "--output", place / "out"], place / "said")
        assert set(launch.wait(300).values()) == {0}, launch.errors()
    numbers = [signal.SIGKILL] * kills + [signal.SIGSTOP] * stops
    for index, number in enumerate(numbers):
        world = worlds[index % len(worlds)]
        place = folder / f"run-{index}"
        row = attempt(config, place, world, number, picks)
        row["resumed"], row["resumed said"] = resume(config, place, world)
        try:
            assert_same(place / "out", folder / f"whole-{world}" / "out")
            row["same"] = True
        except AssertionError as error:
            row["same"] = f"{type(error).__name__}: {error}"[:500]
        print(json.dumps(row), flush=True)
        found.append(row)
        if row["same"] is True:
            shutil.rmtree(place)
    (folder / "found.json").write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    launches.load()
    rest = sys.argv[3:] + ["20", "5", "0", "2,4"][len(sys.argv) - 3 :]
    kills, stops, seed = (int(text) for text in rest[:3])
    worlds = [int(text) for text in rest[3].split(",")]
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), kills, stops, seed, worlds)
