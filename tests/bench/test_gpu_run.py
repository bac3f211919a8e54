"""The run on a GPU, as far as a CPU can tell: a step that fails, hangs or is killed costs itself alone; time is kept."""

import argparse
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import gpu_run  # noqa: E402
from gpu_run import STEPS, Clock, Outcome, Run, Step, main  # noqa: E402

FOUND = 'print("@record " + json.dumps({"group": "g", "title": "t", "seconds": [0.5, 0.1, 0.2]}), flush=True)'


class Seconds:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.value = 1000.0

    def __call__(self) -> float:
        return self.value


def run_in(folder: Path, total: float = 60.0, kind: type[Run] = Run, **given) -> Run:
    return kind(folder, Clock(total), argparse.Namespace(**{"rehearse": False, "wheels": None} | given))


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import json, os, sys, time\n{code}"]


def kept(run: Run) -> dict:
    return json.loads((run.output / "run.json").read_text())


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (f"{FOUND}\nprint('hello')", "done"),
        (f"{FOUND}\nprint('hello'); sys.exit(3)", "failed: exit code 3"),
        (f"{FOUND}\nprint('hello', flush=True); os.kill(os.getpid(), 9)", "killed by signal 9"),
        (f"{FOUND}\nprint('hello', flush=True); time.sleep(60)", "ended after its 3 s"),
    ],
)
def test_what_a_step_found_stays_whatever_becomes_of_it(code, status, tmp_path, capsys):
    run = run_in(tmp_path)
    seconds = 3.0 if "sleep" in code else 20.0
    found = run.process("one", python(code), seconds)
    assert found.status == status
    assert found.good == (status == "done")
    assert [(record["step"], record["title"]) for record in kept(run)["records"]] == [("one", "t")]
    assert "[one] hello" in (tmp_path / "log").read_text()
    assert "[one] hello" in capsys.readouterr().out


def test_a_program_that_is_not_there(tmp_path):
    found = run_in(tmp_path).process("one", ["/no/such/program"], 5)
    assert not found.good
    assert "No such file" in found.status


def test_lines_that_were_cut_off_are_no_measurements(tmp_path):
    run = run_in(tmp_path)
    assert run.process("one", python("print('@record {\"group\": ')"), 20).good
    assert run.records == []


def test_what_a_step_began_ends_with_it(tmp_path):
    """The process of a process too, and one that does not listen."""
    code = (
        "import signal, subprocess\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('@record ' + json.dumps({'child': child.pid}), flush=True); time.sleep(60)"
    )
    run = run_in(tmp_path)
    start = time.monotonic()
    assert run.process("one", python(code), 3).status == "ended after its 3 s"
    assert time.monotonic() - start < 15
    (record,) = run.records
    for _ in range(100):
        state = Path(f"/proc/{record['child']}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of the step runs on")


def test_who_is_silent_is_ended(tmp_path):
    found = run_in(tmp_path).process("one", python("print('a', flush=True); time.sleep(60)"), 30, stall=1.0)
    assert found.status == "ended: silent for 1 s"


class Planted(Run):
    """Steps by name: their outcome, or what they raise."""

    found: dict[str, object]

    def step(self, step: Step, seconds: float) -> Outcome:
        result = self.found[step.name]
        if isinstance(result, Exception):
            raise result
        assert isinstance(result, Outcome)
        return result


def test_a_step_that_fails_does_not_stop_the_others(tmp_path, capsys):
    run = run_in(tmp_path, kind=Planted)
    run.found = {  # pyright: ignore[reportAttributeAccessIssue]
        "a": ValueError("a slip of this file"),
        "b": Outcome("b", "failed: exit code 1", 2.0, good=False),
        "c": Outcome("c", "skipped: for a reason"),
        "d": Outcome("d", "done", 1.0),
    }
    run.keep(group="products", title="NT", seconds=[0.004, 0.002, 0.003], flops=3e12, bytes=6e9, memory=1 << 20)
    run.keep(group="products", title="NN", reason="out of memory")
    steps = [Step(name, 5, "tiny", beside=name == "c") for name in "abcd"]
    assert not run.all(steps)
    assert [step["status"] for step in kept(run)["steps"]] == [
        "failed: ValueError: a slip of this file", "failed: exit code 1", "skipped: for a reason", "done",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "products: NT  3.000 ms  1e+03 TFLOP/s  2000 GB/s  1 MiB" in said
    assert "products: NN  out of memory" in said
    assert said.rstrip().endswith("NOT DONE: a, b")
    assert "not the real thing" not in said


def test_a_rehearsal_says_what_was_not_the_real_thing(tmp_path, capsys):
    run = run_in(tmp_path, kind=Planted, rehearse=True)
    run.found = {"a": Outcome("a", "done", 1.0)}  # pyright: ignore[reportAttributeAccessIssue]
    assert run.all([Step("a", 5, "tiny, by the CPU")])
    assert "done  (not the real thing: tiny, by the CPU)" in capsys.readouterr().out
    assert kept(run)["rehearsal"] is True


def test_nothing_more_is_begun_where_there_is_no_device(tmp_path, capsys):
    class Without(Run):
        def step(self, step: Step, seconds: float) -> Outcome:
            self.keep(stop="torch finds no CUDA device here")
            return Outcome(step.name, "failed: exit code 1", good=False)

    run = run_in(tmp_path, kind=Without)
    assert not run.all([Step("versions", 5, ""), Step("race", 5, "")])
    assert [outcome.name for outcome in run.outcomes] == ["versions", "the rest"]
    assert "not begun: torch finds no CUDA device here" in capsys.readouterr().out


def test_a_step_that_is_ended_may_say_what_it_has(tmp_path):
    """pytest tells what failed so far when it is interrupted."""
    # a process that was begun in the background may have inherited that it is not to be interrupted
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "try: time.sleep(60)\nexcept KeyboardInterrupt: print('so far: 3 failed', flush=True)"
    run_in(tmp_path).process("tests", python(code), 3)
    assert "so far: 3 failed" in (tmp_path / "log").read_text()


def test_steps_beside_each_other_run_at_the_same_time(tmp_path):
    barrier = threading.Barrier(2, timeout=20)

    class Meeting(Run):
        def step(self, step: Step, seconds: float) -> Outcome:
            barrier.wait()
            return Outcome(step.name, "done")

    assert run_in(tmp_path, kind=Meeting).all([Step("a", 5, ""), Step("b", 5, "", beside=True)])


# ---- time --------------------------------------------------------------------------------------------------------


def test_the_steps_fit_the_time():
    assert sum(step.seconds for step in STEPS if not step.beside) <= gpu_run.SECONDS


def test_time_that_is_short_is_shared_and_time_that_is_left_goes_to_the_race():
    now = Seconds()
    first, second = Step("a", 10, ""), Step("b", 30, "", beside=True)
    race, last = Step("race", 40, "", stretches=True), Step("c", 20, "")
    clock = Clock(100, now=now)
    assert clock.allowed(first, [second, race, last]) == 15  # 30 are left over; the one beside it is not counted
    assert clock.allowed(race, [last]) == 80  # all but the last one's
    now.value += 65
    assert clock.left == 35
    assert clock.allowed(race, [last]) == pytest.approx(35 * 40 / 60)
    now.value += 100
    assert clock.left == 0
    assert clock.allowed(last) == 0


def test_a_run_keeps_its_time(tmp_path):
    """Steps that would take all they are given, one after the other: together not more than there is."""
    now = Seconds()

    class Greedy(Run):
        def step(self, step: Step, seconds: float) -> Outcome:
            now.value += 1.1 * seconds  # as a process that is slow to end
            return Outcome(step.name, "done", seconds)

    run = Greedy(tmp_path, Clock(540, now=now), argparse.Namespace(rehearse=False))
    run.all([step for step in STEPS if not step.beside])
    assert now.value - 1000 <= 540 * 1.1


# ---- the race ----------------------------------------------------------------------------------------------------


def raced(tmp_path, *outcomes: Outcome, seconds: float = 200.0) -> tuple[Outcome, list[dict]]:
    """What the race comes to where its processes end as `outcomes`, after their seconds, and what each was asked for."""
    now, asked, left = Seconds(), [], list(outcomes)

    class Rehearsed(Run):
        def own(self, name: str, seconds: float, *options: str, stall: float = 0.0, **variables: str) -> Outcome:
            asked.append(dict(zip(options[::2], options[1::2], strict=True)))
            now.value += left[0].seconds
            return left.pop(0)

    run = Rehearsed(tmp_path, Clock(500, now=now), argparse.Namespace(rehearse=False, contestants=""))
    return run.race(seconds), asked


def at(index: int, name: str | None) -> dict:
    return {"at": index, "case": f"case {index}", "contestant": name}


def test_a_race_goes_on_without_who_hung(tmp_path):
    hung = Outcome("race", "ended: silent for 75 s", 90.0, False, at=at(1, "quack"))
    lost = Outcome("race", "failed: exit code 70", 10.0, False, at=at(3, None))
    found, asked = raced(tmp_path, hung, lost, Outcome("race", "done", 5.0, True, at=at(7, "cuda")))
    assert found.good
    assert found.status == "done; left out: quack"
    assert found.seconds == 105.0
    assert [each["--first"] for each in asked] == ["0", "1", "4"], "the case where nobody is to blame is left out"
    assert json.loads(asked[1]["--without"]) == {"quack": "ended: silent for 75 s, at work on case 1"}


def test_a_race_that_cannot_begin_or_has_no_time_ends(tmp_path):
    found, asked = raced(tmp_path, Outcome("race", "failed: exit code 1", 3.0, False))
    assert (found.good, len(asked)) == (False, 1)
    hung = Outcome("race", "ended: silent for 75 s", 190.0, False, at=at(0, "quack"))
    found, asked = raced(tmp_path, hung)
    assert (found.good, len(asked)) == (False, 1)


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output: names the folder"),
        (["--output", "o", "--wheels", "no-such-folder"], "--wheels: no such folder: no-such-folder"),
        (["--output", "o", "--steps", "race,smoek"], "got smoek"),
        (["--output", "o", "--seconds", "-3"], "--seconds: must be a positive number, got -3"),
        (["--output", "o", "--seconds", "nan"], "--seconds: must be a positive number, got nan"),
    ],
)
def test_arguments_that_are_none(arguments, message, monkeypatch, capsys):
    monkeypatch.delenv("OUT", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_some_of_the_steps(tmp_path, capsys):
    assert main(["--output", str(tmp_path), "--rehearse", "--steps", "wheels,memcheck"]) == 0
    steps = json.loads((tmp_path / "run.json").read_text())["steps"]
    assert [(step["name"], step["status"]) for step in steps] == [
        ("wheels", "skipped: none are carried"), ("memcheck", "skipped: needs a GPU"),
    ]  # fmt: skip


def test_a_run_that_is_ended_from_outside_ends_its_steps_and_prints_what_it_has(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "gpu_run.py"), "--rehearse", "--output", str(tmp_path)]
    run = run_in(tmp_path / "outer")
    ender: list[threading.Timer] = []

    def end() -> None:
        for child in run.children:
            os.kill(child.pid, signal.SIGTERM)

    ender.append(threading.Timer(2.5, end))
    ender[0].start()
    found = run.process("run", command, 40)
    assert found.status == "failed: exit code 143"
    assert "wheels " in (tmp_path / "outer" / "log").read_text()
    assert "steps" in json.loads((tmp_path / "run.json").read_text())
