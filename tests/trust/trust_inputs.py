"""G13: malformed inputs; fuzzed configurations, data, command lines: refused in one line that names the field, or read as they are."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parts import Found, Part


def malformed(seeds: range) -> Found:
    """The cases of `bad_inputs`, each in a project of its own: the same every time."""
    import bad_inputs
    from strangers import Strangers

    return Strangers.here().all_of(seeds, bad_inputs.cases())


def _each(check: Callable[[int, Any], bool], seeds: range, reading: Callable[..., Any] | None = None) -> Found:
    """`check` says whether a case was read; AssertionError where it is neither refused as it must nor read as it is."""
    from dry_commands import dry

    found = Found()
    found.sums = {"read": 0.0}
    with dry(reading) as told:
        for seed in seeds:
            found.cases += 1
            try:
                found.sums["read"] += check(seed, told)
            except Exception as error:
                found.fail(f"seed {seed}: {type(error).__name__}: {error}")
    return found


def _both(found: Found) -> None:
    read = found.sums["read"]
    found.figures |= {"read": int(read), "refused": found.cases - int(read)}
    if not 0.02 < read / found.cases < 0.98:
        found.fail(f"{int(read)} of {found.cases} cases were read: not both happen")


def configurations(seeds: range) -> Found:
    import fuzzed_configs
    from dry_commands import attempt

    def check(seed: int, told: Any) -> bool:
        text, path = fuzzed_configs.case(seed)
        Path("run.yaml").write_bytes(text)
        went_on, line = attempt(["train", "run.yaml"], told)
        if went_on is not None:
            fuzzed_configs.check_meaning(text, went_on[1][0], Path.cwd())
            return True
        names = [str(part) for part in path or () if isinstance(part, str)]
        where = r"line \d+: |cannot be read|is not YAML|nested too deeply|is empty"
        assert not path or any(name in line for name in names) or re.search(where, line), f"{path} is not named: {line}"
        return False

    return _each(check, seeds)


def data(seeds: range) -> Found:
    import fuzzed_data
    from dry_commands import attempt

    def check(seed: int, told: Any) -> bool:
        case = fuzzed_data.case(seed)
        try:
            case.write(Path.cwd())
            went_on, line = attempt(["train", "run.yaml"], told)
            if went_on is not None:
                case.check(went_on[1][0])
                return True
            assert case.damaged, f"{case.name} is whole, and refused: {line}"
            assert line.startswith("l3ms: data."), line
            return False
        finally:
            Path(case.name).unlink(missing_ok=True)

    return _each(check, seeds, fuzzed_data.read)


def command_lines(seeds: range) -> Found:
    import fuzzed_commands
    from dry_commands import attempt

    def check(seed: int, told: Any) -> bool:
        case = fuzzed_commands.case(seed)
        case.write(Path.cwd())
        went_on, line = attempt(case.arguments, told)
        if went_on is not None:
            case.check(went_on)
        elif case.option:
            field = case.option.lstrip("-").replace("-", "_").rpartition(".")[2]
            assert case.option in line or field in line, f"{case.option} is not named: {line}"
        return went_on is not None

    return _each(check, seeds)


@functools.cache
def _malformed() -> int:
    import bad_inputs

    return len(bad_inputs.cases())


def parts() -> list[Part]:
    return [
        Part("malformed", malformed, _malformed(), slice=20, piece=400, seconds=70),
        Part("configurations", configurations, 10_000, slice=150, seconds=40, close=_both),
        Part("data", data, 8_000, slice=100, seconds=50, close=_both),
        Part("command lines", command_lines, 2_000, slice=100, seconds=8, close=_both),
    ]
