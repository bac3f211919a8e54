"""RELIABILITY.md out of trust/*.json: python tests/trust --page"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from goals import GOALS, RECORDS, ROOT
from parts import Goal
from records import read

PAGE = ROOT / "RELIABILITY.md"
HEAD = """# How far it can be trusted

What was tried, how often, and the worst that came of it. `make trust` counts it anew, in an hour on two cores (ended midway, it goes on
where it was), and writes `trust/*.json` and this page; `make test` runs a slice. A worst case is a share of what is allowed: above 1 is a
failure. Every case is seeded: `python tests/trust --only G1` counts one goal again. What a configuration, a checkpoint or a reward of a
stranger may do is in [SECURITY.md](SECURITY.md).
"""


def number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _ran(parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: part for name, part in parts.items() if not part["skipped"]}


def _row(goal: Goal, parts: dict[str, dict[str, Any]]) -> list[str]:
    ran = _ran(parts)
    if not ran:
        reasons = "; ".join(dict.fromkeys(part["skipped"] for part in parts.values()))
        return [goal.key, goal.claim, f"not run{': ' * bool(reasons)}{reasons}", "", "", "", ""]
    cases, wanted = (sum(part[name] for part in ran.values()) for name in ("cases", "wanted"))
    failed = sum(part["failed"] for part in ran.values())
    measured = {name: part for name, part in ran.items() if part["worst"] is not None}
    worst = ""
    if measured:
        name = max(measured, key=lambda name: measured[name]["worst"])
        worst = f"{measured[name]['worst']:.3f} ({name}, {measured[name]['worst_case']})"
    left = len(parts) - len(ran)
    count = number(cases) + (f" of {number(wanted)}" if cases < wanted else "")
    count += f", {left} part{'s' * (left > 1)} not run" if left else ""
    seeds = ", ".join(sorted({str(part["seed"]) for part in ran.values()}))
    made = "; ".join(sorted({f"{part['date']}, {part['commit']}" for part in ran.values()}))
    return [
        goal.key,
        goal.claim,
        count,
        number(failed),
        worst,
        seeds,
        made,
    ]


def _table(header: list[str], rows: list[list[str]], align: str = "") -> list[str]:
    rules = ["---:" if index < len(align) and align[index] == "r" else "---" for index in range(len(header))]
    return [f"| {' | '.join(map(cell, row))} |" for row in (header, rules, *rows)]


def _details(goal: Goal, parts: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["", f"## {goal.key}: {goal.claim}", "", f"Allowed: {goal.allowed}. Elsewhere: {goal.beyond}.", ""]
    if not parts:
        return [*lines, "Not run."]
    rows = []
    for name, part in parts.items():
        what = [f"{title}: {number(value)}" for title, value in part["figures"].items()]
        count = "not run" if part["skipped"] else number(part["cases"])
        count += f" of {number(part['wanted'])}" if not part["skipped"] and part["cases"] < part["wanted"] else ""
        worst = "" if part["worst"] is None else f"{part['worst']:.3f}, {part['worst_case']}"
        rows.append(
            [name, count, "" if part["skipped"] else number(part["failed"]), worst, part["skipped"] or "; ".join(what)]
        )
    lines += _table(["part", "cases", "failed", "worst", "figures"], rows, " rr")
    for name, part in parts.items():
        lines += [f"\n- FAILED, {name}: {text}" for text in part["failures"]]
    machines = sorted({part["machine"] for part in parts.values()})
    seconds = sum(part["seconds"] for part in parts.values())
    return [*lines, "", f"{'; '.join(machines)}. {seconds / 60:.1f} minutes of a core."]


def page(records: Path = RECORDS) -> str:
    found = {goal.key: read(records / f"{goal.key}.json").get("parts", {}) for goal in GOALS}
    header = ["", "what holds", "cases", "failed", "worst, share of what is allowed", "seed", "date, commit"]
    lines = [HEAD, *_table(header, [_row(goal, found[goal.key]) for goal in GOALS], "  rr")]
    for goal in GOALS:
        lines += _details(goal, found[goal.key])
    return "\n".join(lines) + "\n"
