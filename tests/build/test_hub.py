"""What `make kernels-hub` uploads: a package that works under another name, beside the installed one, with imports that the Hub allows.

What the library `kernels` says of it is for hub/check.py, in an environment of its own.
"""

import ast
import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib comes with Python 3.11")

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("torch-cpu", "torch-cuda")


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub_build", ROOT / "hub" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(builder, tmp_path_factory) -> Path:
    return builder.build(tmp_path_factory.mktemp("hub"))


def metadata(repository: Path, variant: str) -> dict:
    return json.loads((repository / "build" / variant / "metadata.json").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_imports_are_relative_or_of_torch(repository, variant):
    """And lead to a file or to a name of one."""
    folder = repository / "build" / variant
    modules = {
        path.relative_to(folder).with_suffix("").as_posix().removesuffix("/__init__") for path in folder.rglob("*.py")
    }
    assert {"ops", "drop_in", "barrier", "triton_ops", "triton_ops/softmax_gradient", "parallel"} <= modules
    outside = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                outside |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                outside.add((node.module or "").partition(".")[0])
            elif isinstance(node, ast.ImportFrom):
                here = path.parents[node.level - 1].relative_to(folder).as_posix().removeprefix(".")
                assert node.module is None or f"{here}/{node.module}".lstrip("/").replace(".", "/") in modules, path
    assert outside - sys.stdlib_module_names == {"torch", "triton"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_digest_is_that_of_every_file(repository, variant):
    folder = repository / "build" / variant
    wanted = {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "metadata.json"
    }
    assert metadata(repository, variant)["digest"] == {"algorithm": "sha256", "files": wanted}


def test_the_id_is_of_the_contents_and_the_backend(builder, repository):
    ids = [metadata(repository, variant)["id"] for variant in VARIANTS]
    general = {"name": "l3m-kernels", "version": 0, "license": "Apache-2.0"}
    files = builder.sources(ROOT / "l3m_kernels")
    changed = json.loads(builder.variant("cpu", general, files | {"ops.py": "0"})["metadata.json"])["id"]
    assert len({*ids, changed}) == 3
    assert all(name.isidentifier() for name in ids)
    again = json.loads(builder.variant("cpu", general, builder.sources(ROOT / "l3m_kernels"))["metadata.json"])["id"]
    assert again == ids[0]


@pytest.mark.parametrize("line", ["import numpy", "from l3ms import L3MOptimizer", "import l3m_kernels.ops"])
def test_other_imports_are_refused(builder, line):
    with pytest.raises(ValueError, match=r"l3m_kernels/ops\.py imports \S+; the Hub allows the standard library"):
        builder.relative(f"def late():\n    {line}\n", "ops.py")


LOADED = """
import importlib.util, json, sys
from pathlib import Path
import numpy, torch

numpy.seterr(all="ignore")  # infinities are numbers to the kernels

def load(file, name):
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def results(kernels, backend):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=generator).requires_grad_() for s in ((11, 6), (19, 6), (19,))]
    targets = torch.randint(19, (11,), generator=generator)
    offsets, options = torch.tensor([0, 4, 11]), {"bias": leaves[2], "backend": backend}
    found = kernels.log_likelihood(leaves[0], leaves[1], targets, offsets, **options).token
    loss, _ = kernels.weighted_log_likelihood(leaves[0], leaves[1], targets, torch.tensor([0.5, -1.0]), offsets, **options)
    bounds = kernels.Bounds.of([(0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)])
    weights = kernels.barrier_weights(torch.tensor([[0.5], [0.7]]).double(), kernels.initial_state(1), bounds, 0.1, backend=backend)
    return [found, *torch.autograd.grad(found.sum(), leaves), loss, *torch.autograd.grad(loss, leaves), *weights]

repository = Path(sys.argv[1])
sys.modules["l3m_kernels"] = None  # the package by its own name cannot be imported
hub = {}
for variant in ("torch-cpu", "torch-cuda"):
    folder = repository / "build" / variant
    name = json.loads((folder / "metadata.json").read_text())["id"]
    hub[name] = load(folder / "__init__.py", name)
    older = load(folder / "l3m_kernels" / "__init__.py", name + "_older")
    assert older.log_likelihood is hub[name].log_likelihood and older.__all__ == hub[name].__all__
    assert not [row.missing for row in hub[name].backends().backends if row.name == "triton" and row.missing]
    assert "from the Hub" in hub[name].backends().native
del sys.modules["l3m_kernels"]
import l3m_kernels
assert set(l3m_kernels.__all__) | {"drop_in"} == set(older.__all__)
for backend in ("reference", "triton"):
    wanted = results(l3m_kernels, backend)
    for name, kernels in hub.items():
        assert kernels.ops._log_likelihood._qualname == f"{name}::log_likelihood"
        torch.testing.assert_close(results(kernels, backend), wanted, rtol=0, atol=0)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_it_works_under_other_names_beside_the_installed_package(repository):
    """Both variants and the package in one process: equal bits in plain torch and in Triton's interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", LOADED, str(repository)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "equal\n", done.stderr
