"""The compiled part: loaded where it fits the running torch, refused, once and with a reason, where it does not."""

import json
import os
from pathlib import Path

import pytest
import setuptools
import torch

from l3m_kernels import _native

REPORT = "import l3m_kernels; print(l3m_kernels.backends())"
USE = """
import l3m_kernels, torch
rewards = torch.tensor([[1.0], [3.0], [8.0]], dtype=torch.float64)
bounds = l3m_kernels.Bounds.of([(0, 1.0, 2.0, 1.0, 0.0, 0.0, 0.0)])
for backend in ("cpp", "reference"):
    result = l3m_kernels.barrier_weights(rewards, l3m_kernels.initial_state(1), bounds, 0.1, backend=backend)
    print([field.tolist() for field in result])
torch.manual_seed(0)
hidden, weight, targets = torch.randn(9, 6), torch.randn(50, 6), torch.randint(50, (9,))
batch = (hidden, weight, targets, torch.tensor([0, 4, 9]))
for backend in ("cpp", "reference"):
    print(l3m_kernels.log_likelihood(*batch, backend=backend).sequence.tolist())
print(l3m_kernels.__file__)
print(l3m_kernels.backends())
"""


def doctor(site: Path, **changes: object) -> None:
    """Changes what the package in `site` believes to have been built against."""
    path = site / "l3m_kernels" / "_build.json"
    record = json.loads(path.read_text())
    record["torch"].update(changes)
    path.write_text(json.dumps(record))


@pytest.mark.slow  # as all that takes the wheel: a minute
def test_cuda_torch_without_nvcc_compiles_the_cpu_part(wheel_site):
    record = json.loads((wheel_site / "l3m_kernels" / "_build.json").read_text())
    assert record["torch"]["cuda"] == "13.0"
    assert record["built"] == ["cpu"]
    assert record["missing"]["cuda"] == "nvcc was not found in CUDA_HOME or on PATH (torch has CUDA 13.0)"


@pytest.mark.slow
def test_installed_wheel_runs_from_elsewhere(python, native_wheel, tmp_path):
    """Another virtual environment, another folder. Its torch is this environment's, by a .pth file."""
    environment = tmp_path / "environment"
    assert python("-m", "venv", "--without-pip", environment, cwd=tmp_path).returncode == 0
    packages = next(environment.glob("lib/python*/site-packages"))
    (packages / "shared.pth").write_text(str(Path(setuptools.__file__).parents[1]))
    inner = environment / "bin" / "python"
    pip = ("-m", "pip", "--python", inner, "install", "--no-index", "--no-deps", native_wheel)
    done = python(*pip, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    done = python("-W", "error", "-c", USE, cwd=tmp_path, python=inner)
    assert done.returncode == 0, done.stderr
    cpp, reference, cpp_head, reference_head, file, *report = done.stdout.splitlines()
    assert cpp == reference
    assert json.loads(cpp_head) == pytest.approx(json.loads(reference_head), rel=1e-6)
    assert file.startswith(str(packages))
    for op in ("barrier_weights", "log_likelihood"):
        assert any(f" {op}: cpp on cpu" in line for line in report)
    version = python(environment / "bin" / "l3ms", "--version", cwd=tmp_path, python=inner)
    assert version.returncode == 0, version.stderr


@pytest.mark.slow
def test_wheel_names_no_folder_of_the_build_machine(wheel_site):
    """An rpath or a debug path would be one."""
    (library,) = (wheel_site / "l3m_kernels").glob("_C*.so")
    assert os.fsencode(Path(setuptools.__file__).parents[1]) not in library.read_bytes()


def test_build_info(python, native_site):
    use = "import json, torch; from l3m_kernels import _C; print(json.dumps([_C.build_info(), torch.__version__]))"
    done = python("-c", use, cwd=native_site, PYTHONPATH=native_site)
    assert done.returncode == 0, done.stderr
    info, version = json.loads(done.stdout)
    record = json.loads((native_site / "l3m_kernels" / "_build.json").read_text())
    assert info == {
        "torch": version.partition("+")[0],
        "compiler": record["compiler"],
        "cpp_standard": record["torch"]["cpp_standard"],
        "cxx11_abi": record["torch"]["cxx11_abi"],
    }


def test_other_torch_at_run_time_is_refused_once(python, native_site):
    doctor(native_site, version="2.99.1")
    code = f"{REPORT}; {REPORT}; import sys; assert 'l3m_kernels._C' not in sys.modules"
    done = python("-W", "always", "-c", code, cwd=native_site.parent, PYTHONPATH=native_site)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    for text in (done.stderr, done.stdout):
        assert "built against torch 2.99.1" in text
        assert f"running torch {torch.__version__.partition('+')[0]}" in text
        assert "pip install --no-build-isolation --no-deps ." in text
    assert "barrier_weights: reference on cpu" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [({"git_version": "0" * 40}, "git 000000000000"), ({"cxx11_abi": False}, "ABI off")],
    ids=["git", "abi"],
)
def test_other_torch_of_the_same_version_is_refused(native_site, monkeypatch, change, message):
    doctor(native_site, **change)
    monkeypatch.setattr(_native, "FOLDER", native_site / "l3m_kernels")
    with pytest.warns(RuntimeWarning, match=message):
        status = _native.load.__wrapped__()
    assert status.module is None
    assert message in status.reason


def test_cuda_build_of_the_same_release_is_accepted(python, native_site):
    doctor(native_site, version=torch.__version__.partition("+")[0] + "+cu130")
    done = python("-W", "error", "-c", REPORT, cwd=native_site.parent, PYTHONPATH=native_site)
    assert "barrier_weights: cpp on cpu" in done.stdout, done.stderr


def test_library_that_does_not_load_is_refused_once(python, native_site):
    (library,) = (native_site / "l3m_kernels").glob("_C*.so")
    library.write_bytes(b"not a library")
    done = python("-W", "always", "-c", REPORT, cwd=native_site.parent, PYTHONPATH=native_site)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "l3m_kernels._C does not load" in done.stdout


def test_source_tree_that_was_never_installed_works_and_says_so(python, tree):
    done = python("-W", "error", "-m", "l3m_kernels", cwd=tree)
    assert done.returncode == 0, done.stderr
    assert f"never installed; to build it: {_native.INSTALL} -e {tree}" in done.stdout


def test_missing_triton_is_a_line_in_the_report(python, native_site):
    block = "import sys; sys.modules['triton'] = None; "
    done = python("-W", "error", "-c", block + REPORT, cwd=native_site.parent, PYTHONPATH=native_site)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.split()[:1] == ["triton"])
    assert "not available" in line
