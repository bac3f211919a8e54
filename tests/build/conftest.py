"""Builds of a copy of the source tree, so that no test touches the tree it runs from."""

import ctypes
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "build"), str(ROOT / "tests" / "kernels")]  # `barrier_problems` is shared
FILES = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
FOLDERS = ("cmake", "csrc", "l3m_kernels", "python")
BUILD_WHEEL = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
# What `import torch` gives where the CUDA build of torch is installed, as far as a build can see.
CUDA_TORCH = "import torch; torch.version.cuda = '13.0'; "

Run = Callable[..., subprocess.CompletedProcess]


def run_python(
    *arguments: object, cwd: Path, python: object = sys.executable, **environment: object
) -> subprocess.CompletedProcess:
    """Runs an interpreter outside the source tree; `environment` is added to this process's, None removes a name."""
    merged = {**os.environ, "PYTHONPATH": "", "L3M_BUILD": "auto", **environment}
    return subprocess.run(
        [str(python), *map(str, arguments)],
        cwd=cwd,
        env={name: str(value) for name, value in merged.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="session")
def python() -> Run:
    return run_python


def copy_tree(folder: Path) -> Path:
    unwanted = shutil.ignore_patterns("__pycache__", "_C.*", "_build.json", "*.egg-info")
    folder.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build reads, never built."""
    return copy_tree(tmp_path / "tree")


def unpack(tree: Path, folder: Path) -> Path:
    """The one wheel of a tree's dist, unpacked: what an installation puts into site-packages."""
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def installed(tree: Path, tmp_path: Path) -> Callable[[], Path]:
    """-> the folder that the tree's wheel is installed into."""
    return lambda: unpack(tree, tmp_path / "site")


def path_without_nvcc(folder: Path) -> Path:
    """A PATH of links to everything on this one's but nvcc."""
    folder.mkdir()
    for directory in os.get_exec_path():
        for program in Path(directory).iterdir() if Path(directory).is_dir() else ():
            link = folder / program.name
            if program.name != "nvcc" and not link.exists() and program.exists():
                link.symlink_to(program)
    return folder


@pytest.fixture
def no_nvcc(tmp_path: Path) -> Path:
    return path_without_nvcc(tmp_path / "bin")


@pytest.fixture(scope="session")
def native_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that a machine with a CUDA build of torch, no nvcc and no GPU makes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # what the processes of one run share
    tree = folder / "native" / "tree"
    with FileLock(folder / "native.lock"):
        if not tree.parent.exists():
            tree.parent.mkdir()
            path = path_without_nvcc(tree.parent / "bin")
            code = CUDA_TORCH + BUILD_WHEEL
            done = run_python(
                "-c", code, cwd=copy_tree(tree), L3M_BUILD="auto", PATH=path, CUDA_HOME=None, CUDA_PATH=None
            )
            (tree.parent / "log").write_text(done.stdout + done.stderr)
    wheels = list((tree / "dist").glob("*.whl"))
    assert wheels, (tree.parent / "log").read_text()
    return wheels[0]


@pytest.fixture
def wheel_site(native_wheel: Path, tmp_path: Path) -> Path:
    """What that wheel installs."""
    return unpack(native_wheel.parents[1], tmp_path / "site")


@pytest.fixture
def native_site(tmp_path: Path) -> Path:
    """A copy of the package with its native part, as `pip install -e .` has compiled it in this tree."""
    if not list((ROOT / "l3m_kernels").glob("_C*.so")):
        pytest.skip("the native part is not built here")
    for source in (ROOT / "l3m_kernels", ROOT / "python" / "l3ms"):
        shutil.copytree(source, tmp_path / "site" / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "site"


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA sources on the host, built once for all processes of a run."""
    import rows_on_host

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda-on-host"
    with FileLock(f"{folder}.lock"):
        if not (folder / "kernels.so").exists():
            folder.mkdir(exist_ok=True)
            rows_on_host.build(folder)
    return ctypes.CDLL(str(folder / "kernels.so"))
