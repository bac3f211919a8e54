"""G17: planted mutants. A mutant is killed where one of its tests fails; without it the same tests pass, which is looked at first."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from goals import ROOT
from mutants import SWITCH, Mutant, switched
from mutants_of_kernels import KERNELS
from mutants_of_native import CUDA, NATIVE
from mutants_of_training import TRAINING
from native_builds import build
from parts import Found, Part, Skipped

FOLDERS = ("l3m_kernels", "python", "tests", "csrc", "examples", "docs")
FILES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "CHANGELOG.md", "PAPER.md", "Makefile")
KERNEL_IMPORTS = ("pytest", "torch", "numpy", "torch.testing", "hypothesis", "mpmath")
TRAINING_IMPORTS = (
    *KERNEL_IMPORTS,
    "transformers",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "yaml",
    "pydantic",
)
LIMIT = 120.0  # seconds of one mutant's tests: a hang is a death too
WANTED = 0.95


class Forks:
    """A process that runs tests in forks of itself, see `mutant_forks`."""

    def __init__(self, imports: Sequence[str]):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        command = [sys.executable, str(Path(__file__).with_name("mutant_forks.py")), *imports]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True, bufsize=1)

    def run(self, **job: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("mutants: the process that runs the tests has ended")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@contextmanager
def copied(native: Path | None = None) -> Iterator[Path]:
    """A copy of the tree; with another native part where that is given."""
    with tempfile.TemporaryDirectory(prefix="l3m-mutants-") as folder:
        tree = Path(folder)
        for name in FOLDERS:
            shutil.copytree(ROOT / name, tree / name)
        for name in FILES:
            shutil.copy2(ROOT / name, tree / name)
        for library in () if native is None else native.glob("_C.*"):
            shutil.copy2(library, tree / "l3m_kernels" / library.name)
        yield tree


@contextmanager
def applied(tree: Path, mutant: Mutant) -> Iterator[None]:
    path = tree / mutant.file
    before, times = path.read_text(), path.stat()
    path.write_text(mutant.text())
    try:
        yield
    finally:
        path.write_text(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def judged(found: Found, mutant: Mutant, answer: Mapping[str, Any]) -> None:
    code = answer["code"]
    if code in (3, 4, 5):  # pytest's own: not what a mutant does
        found.fail(f"{mutant.name}: its tests cannot be run: {answer['said'][-300:]}")
    elif code == 0:
        found.figures[f"alive: {mutant.name}"] = mutant.file
        print(f"alive: {mutant.name}", flush=True)
    else:
        found.sums["killed"] = found.sums.get("killed", 0) + 1


def hunt(
    mutants: Sequence[Mutant], imports: Sequence[str], tree: Path, numbered: bool, seeds: range, **job: Any
) -> Found:
    """Those mutants whose numbers are among the seeds; `numbered`: they are all there, and chosen by their numbers, from 1."""
    found, forks = Found(), Forks(imports)
    chosen = [(seed % 10_000_000, mutants[seed % 10_000_000]) for seed in seeds]
    job = {"root": str(tree), "limit": LIMIT, **job}
    try:
        for tests in dict.fromkeys(mutant.tests for _, mutant in chosen):
            arguments = next(mutant.arguments for _, mutant in chosen if mutant.tests == tests)
            answer = forks.run(tests=arguments, environment=_environment(tests, 0), **{**job, "limit": 5 * LIMIT})
            if answer["code"] != 0:
                raise RuntimeError(f"without a mutant these tests fail: {tests}: {answer['said'][-1500:]}")
        for index, mutant in chosen:
            environment = {**_environment(mutant.tests, index + 1 if numbered else 0), "PYTHONDONTWRITEBYTECODE": "1"}
            arguments = ["-x", *mutant.arguments]
            if numbered:
                answer = forks.run(tests=arguments, environment=environment, **job)
            else:
                with applied(tree, mutant):
                    answer = forks.run(tests=arguments, environment=environment, **job)
            found.cases += 1
            judged(found, mutant, answer)
    finally:
        forks.close()
    return found


def _environment(tests: str, number: int) -> dict[str, str]:
    interpreted = {"TRITON_INTERPRET": "1"} if "triton" in tests else {}
    return {SWITCH: str(number), **interpreted}


def in_python(mutants: Sequence[Mutant], imports: Sequence[str]) -> Callable[[range], Found]:
    def run(seeds: range) -> Found:
        with copied() as tree:
            return hunt(mutants, imports, tree, False, seeds)

    return run


def in_cpp(seeds: range) -> Found:
    site = build("mutants", switched(NATIVE))
    with copied(site / "l3m_kernels") as tree:
        return hunt(NATIVE, KERNEL_IMPORTS, tree, True, seeds)


def in_cuda(seeds: range) -> Found:
    """The kernels' own source, compiled by the host's compiler: once, and given to the tests where they would compile it."""
    sys.path[:0] = [str(ROOT / "tests" / name) for name in ("build", "kernels")]
    import rows_on_host  # pyright: ignore[reportMissingImports]

    if rows_on_host.COMPILER is None:
        raise Skipped("no C++ compiler here")
    with copied() as tree, tempfile.TemporaryDirectory() as kernels:
        for name, text in switched(CUDA).items():
            (tree / name).write_text(text)
        rows_on_host.build(Path(kernels), csrc=tree / "csrc")
        path = [str(tree / "tests" / name) for name in ("build", "kernels", "trust")]
        return hunt(
            CUDA,
            KERNEL_IMPORTS,
            tree,
            True,
            seeds,
            path=path,
            plugin="prebuilt_kernels",
            variables={"L3M_KERNELS_ON_HOST": kernels},
        )


def texts(mutants: Sequence[Mutant]) -> Callable[[range], Found]:
    """Whether each is still there to be made, once."""

    def run(seeds: range) -> Found:
        found = Found()
        for seed in seeds:
            found.cases += 1
            try:
                mutants[seed % 10_000_000].check()
            except ValueError as error:
                found.fail(f"{mutants[seed % 10_000_000].name}: {error}")
        return found

    return run


def close(found: Found) -> None:
    share = found.sums.get("killed", 0) / max(found.cases, 1)
    found.figures["killed"] = f"{share:.1%}"
    if share < WANTED:
        found.fail(f"{share:.1%} are killed, wanted {WANTED:.0%}")


def parts() -> list[Part]:
    every = (*KERNELS, *TRAINING, *NATIVE, *CUDA)
    return [
        Part("what they change", texts(every), 0, slice=len(every), seconds=1),
        Part(
            "Python: kernels",
            in_python(KERNELS, KERNEL_IMPORTS),
            len(KERNELS),
            slice=2,
            piece=20,
            seconds=200,
            close=close,
        ),
        Part(
            "Python: training", in_python(TRAINING, TRAINING_IMPORTS), len(TRAINING), piece=20, seconds=300, close=close
        ),
        Part("C++", in_cpp, len(NATIVE), seconds=200, close=close),
        Part("CUDA on the host", in_cuda, len(CUDA), seconds=100, close=close),
    ]
