"""What a build does where it cannot compile: `auto` gives a package that works and says why; an explicit choice fails and says why."""

import json
from pathlib import Path

import pytest
import setuptools

BUILD_WHEEL = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
NO_COMPILER = "/nonexistent/c++"


def built_record(site: Path) -> dict:
    return json.loads((site / "l3m_kernels" / "_build.json").read_text())


def assert_works_without_native(python, site: Path, *reasons: str) -> None:
    """The package imports, computes, and its report has the reasons and the command that adds what is missing."""
    assert not list((site / "l3m_kernels").glob("_C*"))
    use = "import l3m_kernels as k; print(float(k.barrier_multiplier(-0.5, 0.1))); print(k.backends())"
    done = python("-W", "error", "-c", use, cwd=site.parent, PYTHONPATH=site)
    assert done.returncode == 0, done.stderr
    multiplier, report = done.stdout.split("\n", 1)
    assert float(multiplier) == pytest.approx(0.2)
    for reason in (*reasons, "pip install --no-build-isolation --no-deps ."):
        assert reason in report
    assert str(site) not in report, "the command must name the source tree, not where the package is installed"


@pytest.mark.slow
def test_isolated_build_does_not_see_torch(python, tree, installed, tmp_path):
    isolated = tmp_path / "isolated"
    isolated.mkdir()
    packages = Path(setuptools.__file__).parents[1]
    for found in (*packages.glob("setuptools*"), packages / "_distutils_hack"):
        (isolated / found.name).symlink_to(found)
    done = python("-S", "-c", BUILD_WHEEL, cwd=tree, PYTHONPATH=isolated)
    assert done.returncode == 0, done.stderr
    site = installed()
    record = built_record(site)
    assert record["torch"] is None
    assert record["built"] == []
    assert_works_without_native(python, site, "torch was not importable at build time")


def test_missing_compiler_degrades(python, tree, installed):
    done = python("-c", BUILD_WHEEL, cwd=tree, CXX=NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert NO_COMPILER in done.stderr
    site = installed()
    assert NO_COMPILER in built_record(site)["missing"]["cpu"]
    assert_works_without_native(python, site, NO_COMPILER)


def test_missing_compiler_fails_when_native_code_was_asked_for(python, tree):
    done = python("-c", BUILD_WHEEL, cwd=tree, CXX=NO_COMPILER, L3M_BUILD="cpu")
    assert done.returncode != 0
    assert "L3M_BUILD=cpu" in done.stderr.splitlines()[-1]
    assert NO_COMPILER in done.stderr.splitlines()[-1]
    assert not list((tree / "dist").glob("*.whl"))


@pytest.mark.slow
def test_missing_cmake_degrades(python, tree, installed, tmp_path):
    hide = "import shutil; found = shutil.which; shutil.which = lambda name, **k: None if name == 'cmake' else found(name, **k); "
    done = python("-c", hide + BUILD_WHEEL, cwd=tree)
    assert done.returncode == 0, done.stderr
    assert_works_without_native(python, installed(), "cmake was not found")


def test_off_is_recorded(python, tree, installed):
    done = python("-c", BUILD_WHEEL, cwd=tree, L3M_BUILD="off")
    assert done.returncode == 0, done.stderr
    site = installed()
    assert built_record(site)["requested"] == "off"
    assert_works_without_native(python, site, "L3M_BUILD=off was set at build time")


def test_a_mode_that_is_none_fails(python, tree):
    done = python("-c", BUILD_WHEEL, cwd=tree, L3M_BUILD="gpu")
    assert done.returncode != 0
    assert "L3M_BUILD must be one of auto, off, cpu, cuda, got 'gpu'" in done.stderr.splitlines()[-1]


def test_a_build_that_degrades_leaves_no_stale_library(python, tree):
    stale = tree / "l3m_kernels" / "_C.stale.so"
    stale.touch()
    done = python("setup.py", "-q", "build_ext", "--inplace", cwd=tree, L3M_BUILD="off")
    assert done.returncode == 0, done.stderr
    assert not stale.exists()
    report = python("-m", "l3m_kernels", cwd=tree).stdout
    assert f"pip install --no-build-isolation --no-deps -e {tree}" in report


def test_cmake_never_looks_for_torch_itself(tree):
    code = [line.partition("#")[0] for line in (tree / "CMakeLists.txt").read_text().splitlines()]
    assert not any("find_package(Torch" in line for line in code)
    assert not any("march=native" in line for line in code)


@pytest.mark.slow
def test_the_reported_command_adds_the_native_part(python, tree, tmp_path):
    """pip over a package that was built without native code, in an environment that shares this one's packages."""
    environment = tmp_path / "environment"
    assert python("-m", "venv", "--without-pip", environment, cwd=tmp_path).returncode == 0
    packages = next(environment.glob("lib/python*/site-packages"))
    (packages / "shared.pth").write_text(str(Path(setuptools.__file__).parents[1]))
    inner = environment / "bin" / "python"
    for mode, expected in (("off", "L3M_BUILD=off was set"), (None, "built against torch")):
        install = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", ".")
        done = python(*install, cwd=tree, python=inner, L3M_BUILD=mode)
        assert done.returncode == 0, done.stderr
        assert expected in python("-m", "l3m_kernels", cwd=tmp_path, python=inner).stdout
