"""The floors: l3ms -> l3m_kernels -> { reference | triton_ops | _C }, and these three never import each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"l3m_kernels": ROOT / "l3m_kernels", "l3ms": ROOT / "python" / "l3ms"}
# The ground floor: each backend is the modules it consists of. `reference` is both the oracle and the chunked functions.
GROUND = {
    "reference": ("l3m_kernels.reference", "l3m_kernels.chunked"),
    "triton": ("l3m_kernels.triton_ops",),
    "native": ("l3m_kernels._C", "l3m_kernels._native", "l3m_kernels._native_head"),
}
MOST_LINES = 350  # "about 300"
# path from the root: why it is one file all the same
LONGER = {"tests/l3ms/test_demo_corpus.py": "corpus and base are tested on one tree of packages"}


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
