"""What was found, in files: a part's while it runs (out/trust), a goal's once a part ends (trust/*.json)."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import platform
import re
import subprocess
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from goals import GOALS, RECORDS, ROOT, parts_of
from parts import Found, Goal, Part, Skipped

from l3ms.benchmark.environment import cpu_name
from l3ms.runs.whole_files import write_json

NOT_YET = "not counted yet"
SOURCES = ("l3m_kernels", "csrc", "python", "cmake", "setup.py", "CMakeLists.txt", "tests/trust")  # what figures are of


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""


@functools.cache
def source() -> str:
    """Changes with what the figures are of: records of another source are begun anew."""
    digest = hashlib.sha256()
    for name in sorted(_git("ls-files", "--cached", "--others", "--exclude-standard", *SOURCES).split("\n")):
        path = ROOT / name
        if path.is_file():
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def origin() -> dict[str, str]:
    commit = _git("rev-parse", "--short=10", "HEAD") or "not a git checkout"
    changed = bool(_git("status", "--porcelain", *SOURCES))
    return {
        "commit": commit + " and changes" * changed,
        "source": source(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": f"{cpu_name()}, Python {platform.python_version()}, torch {torch.__version__}",
    }


def part_file(folder: Path, goal: Goal, part: Part) -> Path:
    return folder / goal.key / (re.sub(r"[^a-z0-9]+", "-", part.name.lower()).strip("-") + ".json")


def read(path: Path) -> dict[str, Any]:
    """Nothing where there is no such file, or one that was not written here."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def run_part(goal: Goal, part: Part, cases: int, seed: int, folder: Path) -> dict[str, Any]:
    """A part's pieces, from the first that is not there yet; written down after each."""
    path, identity = part_file(folder, goal, part), {"wanted": cases, "seed": seed, "source": source()}
    path.parent.mkdir(parents=True, exist_ok=True)
    record = read(path)
    if any(record.get(name) != value for name, value in identity.items()):
        record = {**origin(), **identity, "pieces": 0, "seconds": 0.0, "closed": False, **Found().to_json()}
    found, begun = Found.of(record), monotonic() - record["seconds"]
    pieces = part.pieces(cases, seed)
    for piece in pieces[record["pieces"] :]:
        try:
            found.add(part.run(piece))
        except Skipped as reason:
            found.skipped = str(reason)
            break
        record |= found.to_json() | {"pieces": record["pieces"] + 1, "seconds": round(monotonic() - begun, 1)}
        write_json(path, record)
    if not record["closed"]:
        if part.close and not found.skipped:
            part.close(found)
        record |= found.to_json() | {"closed": True, "seconds": round(monotonic() - begun, 1)}
        write_json(path, record)
    return record


def publish(folder: Path, records: Path = RECORDS) -> None:
    """From the parts' files to the goals'. Parts that are not there keep what the goal's file has of them."""
    for goal in GOALS:
        path = records / f"{goal.key}.json"
        before = read(path).get("parts", {})
        after = {}
        for part in (part for part in parts_of(goal) if part.cases):
            record = read(part_file(folder, goal, part)) or before.get(part.name)
            if not record and not part.asked:
                record = {
                    **origin(),
                    "wanted": part.cases,
                    "seed": 0,
                    "seconds": 0.0,
                    **Found(skipped=NOT_YET).to_json(),
                }
            if record:
                after[part.name] = {name: value for name, value in record.items() if name not in ("pieces", "sums")}
        if after != before and any(record["skipped"] != NOT_YET for record in after.values()):
            records.mkdir(exist_ok=True)
            write_json(path, {"goal": goal.key, "claim": goal.claim, "parts": after})
