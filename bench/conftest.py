"""What the suites of the head share: a race per case, of which pytest-benchmark times ours, and a table of all at the end."""

from collections.abc import Callable
from dataclasses import asdict

import pytest

from l3ms.benchmark.contestants import contestants
from l3ms.benchmark.race import TOLERANCE, Race
from l3ms.benchmark.results import CaseResult, gather
from l3ms.benchmark.run import enter_memory, measure_memory, ours_of
from l3ms.benchmark.shapes import TINY, Case
from l3ms.benchmark.tables import case_grid, markdown

ROUNDS = 5
FOUND = pytest.StashKey[list[CaseResult]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tiny", action="store_true", help="shapes of milliseconds and nothing compiled: do the suites run?"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore"))  # of peers; ours has its tests


@pytest.fixture
def play(benchmark, request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """play(case): check everyone against float64, then let the others have their turn before each round of ours."""

    def run(case: Case) -> None:
        entrants = list(contestants().values())
        if request.config.getoption("--tiny"):
            case = case._replace(shape=TINY)
            entrants = [entrant for entrant in entrants if not entrant.compiled]
        race = Race(case, entrants)
        peaks = {} if request.config.getoption("--tiny") else measure_memory(race, seed=0)
        race.check()
        for name, entry in race.entries.items():
            assert entry.contestant.kind != "ours" or (entry.error or 0.0) <= TOLERANCE[case.dtype], (name, entry.error)
        ours = ours_of(race, None)
        assert ours is not None
        entry, drawn = race.entries[ours], 0

        def others():
            nonlocal drawn
            drawn += 1
            batch = race.source.draw(drawn)
            for name in race.running:
                if name != ours and drawn <= race.rounds_of(name, ROUNDS):
                    race.clock(name, batch)
            return (batch,), {}

        benchmark.group = str(case)
        assert entry.run is not None
        benchmark.pedantic(entry.run, setup=others, rounds=ROUNDS)
        entry.seconds = list(benchmark.stats.stats.data)
        result = gather(race, ours)
        enter_memory(result, peaks)
        benchmark.extra_info["result"] = asdict(result)
        request.config.stash[FOUND].append(result)

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for result in config.stash[FOUND]:
        grid = case_grid(result)
        terminalreporter.section(grid.title)
        terminalreporter.write_line(markdown(grid))
        for note in grid.notes:
            terminalreporter.write_line(note)
