"""One run on a GPU that is here for minutes: build, check, measure, race. `python bench/gpu_run.py --output FOLDER [--wheels FOLDER]`

Each step has seconds of its own and is a process of its own, so that one which hangs, is killed or leaves the device unusable costs itself
alone; what it found before that is in FOLDER/run.json at once, all output in FOLDER/log. The results are FOLDER/<device>.json
and .md, as bench/results has them. Wanted are Python and torch; `--wheels` brings what else there is, such as peers, without a network.
`--rehearse` does all of it on a CPU, tiny, in a minute or two, and says what was not the real thing. `gpu_steps.py` has what is measured,
`gpu_profile.py` what the time goes to.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_report import Outcome, summary, table

ROOT = Path(__file__).resolve().parents[1]
MARK = "@record "  # begins a line of a step's output that is a measurement, as JSON
SECONDS = 540.0  # a rehearsal keeps the same clock, and takes a minute of an idle core
STALL = 75.0  # seconds without a line, after which a contestant of the race is hung: the slowest compile for a minute
LEAST = 15.0  # seconds that a race needs to begin again
EXTRA = 0.5  # of its seconds that a step may have more, where others left some
PIP = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target"]
SITE = "import os, site; site.addsitedir(os.path.dirname(__file__))"  # reads .pth files
PYTEST = [
    "-m",
    "pytest",
    "tests/gpu",
    "-q",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:benchmark",
    "--tb=short",
    "--maxfail=40",
]
TOOLS = {
    "memcheck": "compute-sanitizer --tool memcheck --error-exitcode 7",
    "ncu": "ncu --clock-control none -k regex:softmax -c 6 --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy",
}
_STEPS = [sys.executable, "-W", "ignore", str(ROOT / "bench" / "gpu_steps.py")]


@dataclass(frozen=True)
class Step:
    name: str
    seconds: float
    instead: str  # what a rehearsal does in its place
    beside: bool = False  # begins together with the step before it
    stretches: bool = False  # has all the time that others left, and that those after it do not need


STEPS = (
    Step("wheels", 10, "those that are named are installed"),
    Step("versions", 25, "of a CPU"),
    Step("build", 60, "the native CPU library that is here, or one built now"),
    Step("products", 60, "tiny, by the CPU", beside=True),
    Step("smoke", 30, "backend cpp, and Triton's kernels in its interpreter"),
    Step("tests", 95, "collected and skipped"),
    Step("row kernel", 15, "in Triton's interpreter"),
    Step("cluster", 15, "nothing"),
    Step("profile", 20, "by the CPU's clock"),
    Step("workspaces", 40, "tiny, by the CPU"),
    Step("race", 165, "tiny, by the CPU, without who compiles itself", stretches=True),
    Step("memcheck", 30, "nothing"),
    Step("ncu", 20, "nothing"),
    Step("results", 15, "of a CPU", stretches=True),
)
NAMES = [step.name for step in STEPS]


class Clock:
    """Shares what is left among the steps that are left: less for each where time is short, more where others left some."""

    def __init__(self, total: float, now: Callable[[], float] = time.monotonic):
        self.now, self.end = now, now() + total

    @property
    def left(self) -> float:
        return max(self.end - self.now(), 0.0)

    def allowed(self, step: Step, later: Sequence[Step] = ()) -> float:
        own, *others = (each.seconds for each in (step, *later) if each is step or not each.beside)
        spare = self.left - own - sum(others)
        if spare < 0:
            return own * self.left / (own + sum(others))
        return own + (spare if step.stretches else min(spare, EXTRA * own))


class Run:
    def __init__(self, output: Path, clock: Clock, given: argparse.Namespace):
        self.output, self.clock, self.given = output, clock, given
        output.mkdir(parents=True, exist_ok=True)
        (output / "log").write_text("")
        self.lock = threading.Lock()
        self.records: list[dict[str, Any]] = []
        self.outcomes: list[Outcome] = []
        self.children: set[subprocess.Popen[str]] = set()
        self.site = Path(tempfile.mkdtemp(prefix="gpu-run-")) / "site-packages"  # how QuACK knows what is installed
        self.site.mkdir()
        weakref.finalize(self, shutil.rmtree, self.site.parent, ignore_errors=True)
        (self.site / "sitecustomize.py").write_text(SITE)
        path = [self.site, ROOT, ROOT / "python", *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONUNBUFFERED": "1"}

    def say(self, text: str) -> None:
        with self.lock, (self.output / "log").open("a", encoding="utf-8", errors="replace") as log:
            print(text, flush=True)
            print(text, file=log)

    def keep(self, **record: Any) -> None:
        with self.lock:
            self.records.append(record)
            self._save()

    def _save(self) -> None:
        steps, partial = [vars(outcome) for outcome in self.outcomes], self.output / ".run.json"
        kept = {"rehearsal": self.given.rehearse, "steps": steps, "records": self.records}
        partial.write_text(json.dumps(kept, indent=1))
        partial.replace(self.output / "run.json")

    def process(
        self, name: str, command: Sequence[str], seconds: float, stall: float = math.inf, **variables: str
    ) -> Outcome:
        """A command to its end, or to the end of its time; its group of processes ends with it."""
        start = heard = time.monotonic()
        at: dict[str, Any] | None = None
        try:
            child = subprocess.Popen(
                command, cwd=ROOT, env=self.environment | variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Outcome(name, f"failed: {error}", good=False)

        def listen() -> None:
            nonlocal heard, at
            assert child.stdout
            with child.stdout as lines:
                for line in lines:
                    heard = time.monotonic()
                    if not line.startswith(MARK):
                        self.say(f"[{name}] {line.rstrip()}")
                        continue
                    with contextlib.suppress(ValueError):  # of a line that was cut off
                        record = json.loads(line[len(MARK) :])
                        if "at" in record:
                            at = record
                        else:
                            self.keep(step=name, **record)

        self.children.add(child)
        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        ended = None
        try:
            while child.poll() is None and ended is None:
                if time.monotonic() - start > seconds:
                    ended = f"ended after its {seconds:.0f} s"
                elif time.monotonic() - heard > stall:
                    ended = f"ended: silent for {stall:.0f} s"
                else:
                    time.sleep(0.05)
        finally:
            _end(child)
            self.children.discard(child)
        listener.join(3)
        code = child.returncode
        failed = f"failed: exit code {code}" if code > 0 else f"killed by signal {-code}"
        status = ended or (failed if code else "done")
        return Outcome(name, status, time.monotonic() - start, status == "done", at=at)

    def own(self, name: str, seconds: float, *options: str, stall: float = math.inf, **variables: str) -> Outcome:
        """A step of `gpu_steps.py`."""
        command = [*_STEPS, name, "--output", str(self.output), "--until", f"{time.time() + seconds:.1f}", *options]
        rehearse = ["--rehearse"] if self.given.rehearse else []
        return self.process(name, [*command, *rehearse], seconds, stall, **variables)

    def race(self, seconds: float) -> Outcome:
        """The race; who hangs or leaves the device unusable is left out of the rest of it, which goes on where it was."""
        end, out, first, total = self.clock.now() + seconds, {}, 0, 0.0
        while True:
            left = end - self.clock.now()
            options = ["--first", str(first), "--without", json.dumps(out), "--contestants", self.given.contestants]
            found = self.own("race", left, *options, stall=STALL)
            total += found.seconds
            at = found.at or {}
            if found.good or not at or end - self.clock.now() < LEAST:
                break
            first = at["at"] if at["contestant"] else at["at"] + 1
            if at["contestant"]:
                out[at["contestant"]] = f"{found.status}, at work on {at['case']}"
            self.say(f"[race] {found.status} at {at['contestant'] or 'float64'}; goes on without it")
        status = f"{found.status}; left out: {', '.join(out)}" if out else found.status
        return Outcome("race", status, total, found.good)

    def step(self, step: Step, seconds: float) -> Outcome:
        python, rehearse, name = sys.executable, self.given.rehearse, step.name
        if name == "wheels":
            wheels = sorted(map(str, self.given.wheels.glob("*.whl"))) if self.given.wheels else []
            if not wheels:
                return Outcome(name, "skipped: none are carried")
            return self.process(name, [python, *PIP, str(self.site), *wheels], seconds)
        if name == "build":
            if rehearse and '"cpu"' in _built():
                return self.process(name, [python, "-m", "l3m_kernels"], seconds)
            capability = next((record["capability"] for record in self.records if "capability" in record), "9.0")
            variables = {"L3M_BUILD": "cpu" if rehearse else "cuda", "TORCH_CUDA_ARCH_LIST": capability}
            return self.process(name, [python, "setup.py", "build_ext", "--inplace"], seconds, **variables)
        if name == "tests":
            workers = "-n0" if rehearse else "-n12 --dist worksteal"
            chosen = ["-k", "not sanitizer and not compiled"]
            return self.process(name, [python, *PYTEST, *workers.split(), *chosen], seconds, OMP_NUM_THREADS="1")
        if name == "race":
            return self.race(seconds)
        if name == "cluster":
            if rehearse or not _has_cluster():
                return Outcome(name, "skipped: needs a GPU" if rehearse else "skipped: this tree has no such kernel")
            return self.own("row kernel", seconds, L3M_ROW_KERNEL="cluster")
        if name == "profile":
            return self.process(
                name, [python, str(ROOT / "bench" / "gpu_profile.py"), *["--rehearse"] * rehearse], seconds
            )
        if name == "workspaces":
            kernels = "two_pass,cluster" if _has_cluster() and not rehearse else "auto"
            return self.own(name, seconds, "--row-kernels", kernels)
        if name in TOOLS:
            tool, *options = TOOLS[name].split()
            found = shutil.which(tool)
            if rehearse or found is None:
                return Outcome(name, "skipped: needs a GPU" if rehearse else f"skipped: {tool} is not on PATH")
            if name == "ncu":
                return self.process(name, [found, *options, *_STEPS, "row kernel", "--rounds", "1"], seconds)
            checked = [found, *options, python, "tests/gpu/sanitizer_cases.py", "1"]
            return self.process(name, checked, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        interpreted = rehearse and name in ("smoke", "row kernel")
        return self.own(name, seconds, TRITON_INTERPRET="1" if interpreted else "0")

    def all(self, steps: Sequence[Step]) -> bool:
        """Every step, whatever becomes of the others; whether all are done or had a reason not to be."""
        index, names = 0, [step.name for step in steps]
        try:
            while index < len(steps):
                together = [steps[index], *(step for step in steps[index + 1 : index + 2] if step.beside)]
                seconds = self.clock.allowed(together[0], steps[index + 1 :])
                threads = [threading.Thread(target=self._one, args=(step, seconds)) for step in together]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                # Of two that are begun together either may end first
                self.outcomes.sort(key=lambda outcome: names.index(outcome.name))
                index += len(together)
                if stop := next((record["stop"] for record in self.records if "stop" in record), None):
                    self.outcomes.append(Outcome("the rest", f"not begun: {stop}", good=False))
                    break
        finally:
            for child in list(self.children):  # of a run that is ended from outside
                _end(child)
            self._save()
            self.say(summary(self.records))
            self.say(table(self.outcomes))
        return all(outcome.good for outcome in self.outcomes)

    def _one(self, step: Step, seconds: float) -> None:
        self.say(f"==== {step.name}: up to {seconds:.0f} s of {self.clock.left:.0f} s")
        try:
            outcome = self.step(step, seconds)
        except Exception as error:  # of this file: the other steps go on
            outcome = Outcome(step.name, f"failed: {type(error).__name__}: {error}", good=False)
        outcome.name, outcome.instead = step.name, step.instead if self.given.rehearse else ""
        with self.lock:
            self.outcomes.append(outcome)
            self._save()


def _end(child: subprocess.Popen[str]) -> None:
    """With all that it began: first asked, so that pytest tells what failed so far, and in the end not asked."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(3)


def _built() -> str:
    path = ROOT / "l3m_kernels" / "_build.json"
    return path.read_text() if path.exists() else ""


def _has_cluster() -> bool:
    return any("L3M_ROW_KERNEL" in path.read_text() for path in (ROOT / "csrc").glob("*.cpp"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=os.environ.get("OUT"), help="folder; default: $OUT")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install, for this run alone")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all, default {SECONDS:g}")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--steps", default="", metavar="NAME,...", help=f"only these of {', '.join(NAMES)}")
    parser.add_argument("--contestants", default="", metavar="NAME,...", help="of the race, only these")
    given = parser.parse_args(arguments)
    if given.output is None:
        parser.error("--output: names the folder for what is found (or $OUT does)")
    if given.wheels and not given.wheels.is_dir():
        parser.error(f"--wheels: no such folder: {given.wheels}")
    if not 0 < given.seconds < math.inf:
        parser.error(f"--seconds: must be a positive number, got {given.seconds:g}")
    chosen = given.steps.split(",") if given.steps else NAMES
    if unknown := set(chosen) - set(NAMES):
        parser.error(f"--steps: must be of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was begun is ended, and the table printed
    run = Run(Path(given.output).resolve(), Clock(given.seconds), given)
    return 0 if run.all([step for step in STEPS if step.name in chosen]) else 1


if __name__ == "__main__":
    sys.exit(main())
