"""The plan of the house: what may import what, counted wherever an import stands, under TYPE_CHECKING and in functions too.

Floors: l3ms -> l3m_kernels -> { reference | triton_ops | _C }, and these three never import each other. In `l3ms`: FLOORS.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"l3m_kernels": ROOT / "l3m_kernels", "l3ms": ROOT / "python" / "l3ms"}
# The rooms of l3ms, the lowest floor first; a room imports from floors below its own only.
FLOORS = (
    ("ranks",),
    ("model",),
    ("rollouts",),
    ("constraints",),
    ("barrier", "measuring", "config"),
    ("watching",),
    ("training",),
    ("runs",),
    ("verdicts",),
    ("demo", "benchmark"),
    ("commands",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Beside the rooms: the public list and the command, which any room may be behind, what they say where a package is missing,
# and how a file is opened that somebody else names.
DOORS = {"__init__", "__main__", "earlier", "extras", "regular_files", "rewards"}
GROUND_OF_ROOMS = {
    "l3ms",
    "l3ms.earlier",
    "l3ms.extras",
    "l3ms.regular_files",
}  # of DOORS, what rooms may import: they import no room before they are asked
# The ground floor of the kernels: each backend is the modules it consists of. `reference` is both the oracle and the chunked functions.
GROUND = {
    "reference": ("l3m_kernels.reference", "l3m_kernels.chunked", "l3m_kernels.trend"),
    "triton": ("l3m_kernels.triton_ops",),
    "native": ("l3m_kernels._C", "l3m_kernels._native", "l3m_kernels._native_head"),
}
# Public names that need torch alone.
LIGHT = (
    "Constraint",
    "DataNLL",
    "DualAscent",
    "ExponentialDecay",
    "L3MOptimizer",
    "Length",
    "Rollout",
    "rewards",
    "sequence_nll",
    "task_loss",
)
MOST_LINES = 350  # "about 300"
# path from the root: why it is one file all the same
LONGER = {"tests/l3ms/demo/test_corpus.py": "corpus and base are tested on one tree of packages"}


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file."""
    folder = PACKAGES[package]
    names = {path: (package, *path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py")}
    return {".".join(name).removesuffix(".__init__"): path for path, name in names.items()}


def imports(name: str, path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever it stands; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            if node.level:
                here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                parent = ".".join([*here[: len(here) - node.level + 1], *parent.split(".")]).rstrip(".")
            yield parent
            yield from (f"{parent}.{alias.name}" for alias in node.names)


def within(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def graph() -> dict[str, set[str]]:
    """Of l3ms and l3m_kernels together: module -> modules that it imports. `from a import b` counts as a alone where b is no module."""
    files = {name: path for package in PACKAGES for name, path in modules(package).items()}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        named = set(imports(name, path)) & files.keys()
        packages = {target for target in named if any(other.startswith(f"{target}.") for other in named)}
        found[name] = named - packages - {name}  # of a package whose module is meant, the module
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one module (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for target in edges[name]:
            if target not in order:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], order[target])
        if lowest[name] == order[name]:
            part = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(part) > 1:
                found.append(sorted(part))

    for name in edges:
        if name not in order:
            visit(name)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]


def test_there_is_no_circle():
    rooms = {
        name: targets for name, targets in graph().items() if name not in {f"l3ms.{door}" for door in DOORS} | {"l3ms"}
    }
    edges = {name: targets & rooms.keys() for name, targets in rooms.items()}
    assert sum(map(len, edges.values())) > 200
    assert circles(edges) == []


def test_a_room_imports_from_the_floors_below_it():
    wrong = []
    for name, targets in graph().items():
        parts = name.split(".")
        if parts[0] != "l3ms" or len(parts) < 2 or parts[1] in DOORS:
            continue
        assert parts[1] in FLOOR, f"{name} stands in no room of FLOORS"
        for target in targets:
            package, _, inside = target.partition(".")
            room = inside.partition(".")[0]
            if package == "l3m_kernels" or room == parts[1] or target in GROUND_OF_ROOMS:
                continue
            if room in DOORS or FLOOR[room] >= FLOOR[parts[1]]:
                wrong.append((name, target))
    assert wrong == []


def test_every_room_says_what_it_is_for_and_its_tests_mirror_it():
    folders = {path.name for path in PACKAGES["l3ms"].iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == FLOOR.keys()
    assert {path.stem for path in PACKAGES["l3ms"].glob("*.py")} == DOORS
    for room in FLOOR:
        opening = ast.get_docstring(ast.parse((PACKAGES["l3ms"] / room / "__init__.py").read_text()))
        assert opening, room
    tests = ROOT / "tests" / "l3ms"
    assert {path.parent.name for path in tests.glob("*/test_*.py")} <= FLOOR.keys()


def test_light_names_need_torch_alone():
    code = (
        "import sys, l3ms\n"
        f"for name in {LIGHT}: getattr(l3ms, name)\n"
        "from l3ms.extras import TRAIN\n"
        "loaded = {name.partition('.')[0] for name in sys.modules} & TRAIN - {'numpy'}\n"  # torch takes numpy where it is
        "sys.exit(f'{loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_kernels_do_not_know_the_training_library():
    upward = [
        (name, found)
        for name, path in modules("l3m_kernels").items()
        for found in imports(name, path)
        if within(found, ("l3ms",))
    ]
    assert upward == []


@pytest.mark.parametrize("backend", GROUND)
def test_backends_import_nothing_of_the_package_but_themselves(backend):
    own = GROUND[backend]
    strangers = [
        (name, found)
        for name, path in modules("l3m_kernels").items()
        if within(name, own)
        for found in imports(name, path)
        if found.startswith("l3m_kernels.") and not within(found, own)
    ]
    assert strangers == []


def test_training_library_uses_the_public_names_only():
    """Not the backends behind l3m_kernels' contract."""
    public = {
        f"l3m_kernels.{element.value}"
        for node in ast.parse((PACKAGES["l3m_kernels"] / "__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        for element in getattr(node.value, "elts", ())
    }
    private = [
        (name, found)
        for name, path in modules("l3ms").items()
        for found in imports(name, path)
        if found.startswith("l3m_kernels.") and found not in public | {"l3m_kernels.__version__"}
    ]
    assert public
    assert private == []


def test_no_module_is_a_drawer():
    names = {path.name for package in PACKAGES for path in modules(package).values()}
    assert not names & {"utils.py", "helpers.py", "common.py", "misc.py"}


def test_files_are_short():
    folders = [*PACKAGES.values(), ROOT / "csrc", ROOT / "tests", ROOT / "bench"]
    files = [
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
    ]
    long = {
        str(path.relative_to(ROOT)): count
        for path in files
        if (count := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert long.keys() == LONGER.keys(), f"longer than {MOST_LINES} lines, without a reason in LONGER: {long}"
