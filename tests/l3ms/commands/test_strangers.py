"""Bad input and hostile artefacts, all kinds: one line and an exit code that says so, nothing written, nothing run, nothing waited on.

`make test` runs a slice of them, `make test-full` all; a case that does not hold is named.
"""

import bad_inputs
import hostile_artefacts
import hostile_files
import hostile_models
import hostile_runs
import pytest
from strangers import Strangers

SLICE = 50  # every so many cases


def holds(cases):
    """-> how many were run."""
    found = {name: wrong for name, make, *codes in cases if (wrong := Strangers.here().wrong(make, *codes)) is not None}
    assert found == {}, f"{len(found)} of {len(cases)} cases"
    return len(cases)


KINDS = {
    "bad_inputs": bad_inputs.cases,
    "hostile_artefacts": hostile_artefacts.cases,
    "hostile_files": hostile_files.cases,
    "hostile_models": hostile_models.cases,
    "hostile_runs": hostile_runs.cases,
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hostile_runs"])  # whose slice is in tests/trust
def test_a_slice_is_refused(kind):
    assert holds(KINDS[kind]()[::SLICE]) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_are_refused(kind):
    assert holds(KINDS[kind]()) > 80


def test_there_are_as_many_kinds_as_were_promised():
    counts = {kind: len({name for name, *_ in cases()}) for kind, cases in KINDS.items()}
    assert counts["bad_inputs"] >= 449
    assert sum(counts.values()) - counts["bad_inputs"] >= 227


def sings(folder):
    (folder / "canary").mkdir()
    return ["plot", "nowhere"]


def writes_beside(folder):
    (folder.parent / "owned").touch()
    return ["plot", "nowhere"]


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda _: ["plot", "finished"], "exit 0: "),
        (sings, "the canary sang"),
        (writes_beside, "something was written outside the project"),
    ],
    ids=["a case that is not refused", "a canary", "a file beside the project"],
)
def test_what_does_not_hold_is_found(make, found):
    strangers = Strangers.here()
    try:
        assert strangers.wrong(make) == found
    finally:
        (strangers.template.parent / "owned").unlink(missing_ok=True)


def test_what_a_terminal_would_obey_is_found(monkeypatch):
    import refused

    monkeypatch.setattr(refused, "run", lambda _: (2, "", "l3ms: x: \x1b[2J\n"))
    assert "a terminal would obey" in str(Strangers.here().wrong(lambda _: ["plot", "nowhere"]))
