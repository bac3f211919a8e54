"""Without the extra `train`: kernels, optimizer and constraints work; whatever needs more says in one line which extra brings it."""

import re
import sys
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from l3ms.extras import REAL, TRAIN, missing

ROOT = Path(__file__).resolve().parents[2]
IMPORTED_AS = {"pyyaml": "yaml"}
PATHS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
# An environment with torch alone, as far as an import can see; torch may look for numpy by itself.
BARE = f"import sys; sys.modules.update(dict.fromkeys({sorted(TRAIN - {'numpy'})}))\n"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib comes with Python 3.11")
def test_the_extra_is_the_list_that_messages_go_by():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = {extra: {re.split("[>=;]", line)[0] for line in extras[extra]} for extra in ("train", "real")}
    assert {IMPORTED_AS.get(name, name) for name in names["train"]} == TRAIN
    assert names["real"] - {"l3m-kernels[train]"} == REAL
    assert {re.split("[>=;]", line)[0] for line in project["dependencies"]} == {"torch", "triton"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_what_is_installed_is_torch_and_what_torch_brings():
    """Triton is torch's own where it has CUDA, on Linux; the bound must let torch choose which."""
    torch, triton = (Requirement(line) for line in project()["dependencies"])
    assert (torch.name, triton.name) == ("torch", "triton")
    assert torch.marker is None
    assert triton.marker is not None
    assert triton.marker.evaluate({"sys_platform": "linux"})
    assert not triton.marker.evaluate({"sys_platform": "darwin"})
    assert all(bound.operator == ">=" for requirement in (torch, triton) for bound in requirement.specifier)


def packages(extra: str, extras: dict[str, list[str]], above: tuple[str, ...] = ()) -> list[Requirement]:
    """All that an extra installs, those that it names included."""
    assert extra in extras, f"{above[-1]} names {extra}, which is no extra"
    assert extra not in above, f"a circle of extras: {above}"
    found = []
    for requirement in map(Requirement, extras[extra]):
        if requirement.name == "l3m-kernels":
            assert not requirement.specifier
            for other in requirement.extras:
                found += packages(other, extras, (*above, extra))
        else:
            found.append(requirement)
    return found


def test_each_extra_alone_brings_what_it_needs():
    """Those that it builds on, once each and without a circle; and leaves torch to the user."""
    extras = project()["optional-dependencies"]
    for extra in extras:
        names = [requirement.name for requirement in packages(extra, extras)]
        assert len(names) == len(set(names)), f"{extra} names a package twice: {sorted(names)}"
        assert not {"torch", "triton", "l3m-kernels"} & set(names), extra
    for extra in ("real", "test", "bench", "experiments", "trl", "versus"):  # they import l3ms.L3MTrainer or run `l3ms`
        assert {"transformers", "typer"} <= {requirement.name for requirement in packages(extra, extras)}


def test_the_extras_admit_the_versions_that_are_tested():
    """The locked ones, and those that the Makefile installs beside them."""
    locks = "\n".join(path.read_text() for path in ROOT.glob("*.lock"))
    text = f"{locks}\n" + "\n".join((ROOT / "Makefile").read_text().split())
    tested = {
        canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE)
    }
    extras = project()["optional-dependencies"]
    checked = set()
    for requirement in [r for extra in extras for r in packages(extra, extras)] + list(
        map(Requirement, project()["dependencies"])
    ):
        if version := tested.get(canonicalize_name(requirement.name)):
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement} does not admit {version}"
            checked.add(requirement.name)
    assert {"torch", "transformers", "trl", "liger-kernel", "gguf", "vaderSentiment", "pytest", "ruff"} <= checked


def test_optimizer_and_constraints_work(python):
    code = """
import torch, l3ms
weight = torch.nn.Parameter(torch.randn(7, 4))
hidden, labels = torch.randn(2, 3, 4), torch.tensor([[1, 2, 3], [4, 5, -100]])
options = l3ms.L3MOptimizer(torch.optim.SGD([weight], lr=0.1), [l3ms.Length(max=2), l3ms.Constraint("even", min=0.5)])
l3ms.task_loss(hidden, weight, labels).backward(); options.step(); options.zero_grad()
out = options.constraint_loss(hidden, weight, labels, {"length": [2.0, 1.0], "even": [0.0, 1.0]})
out.loss.backward(); options.step(); assert options.metrics()["constraints/length/estimate"] == 1.5
assert l3ms.rewards.contains(["yes"])([""], ["oh yes"]) == [1.0]
"""
    done = python("-W", "error", "-c", BARE + code, cwd=ROOT.parent, **PATHS)
    assert done.returncode == 0, done.stderr


def test_the_lock_has_the_extras():
    locked = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "requirements.lock").read_text().splitlines()
    }
    assert {"pyyaml" if name == "yaml" else name for name in TRAIN | REAL} <= locked


def test_names_that_need_more_say_so(python):
    names = ["L3MTrainer", "rollout", "fuse_head", "KL", "Watch", "certify"]
    code = (
        f"{BARE}import l3ms\n"
        f"for name in {names}:\n"
        "    try: getattr(l3ms, name)\n"
        "    except ImportError as error: print(error)\n"
    )
    lines = python("-c", code, cwd=ROOT.parent, **PATHS).stdout.splitlines()
    assert len(lines) == len(names)
    for name, line in zip(names, lines, strict=True):
        assert re.fullmatch(
            rf'l3ms\.{name} needs \w+, which is not installed: pip install "\.\[train\]" in the source tree brings it',
            line,
        ), line


@pytest.mark.parametrize("arguments", [["train", "x.yaml"], [], ["--help"], ["certify", "run"]], ids=" ".join)
def test_the_command_says_so(python, arguments):
    run = f"from l3ms.__main__ import main; sys.exit(main({arguments}))"
    done = python("-c", BARE + run, cwd=ROOT.parent, **PATHS)
    assert done.returncode == 5
    assert done.stderr.count("\n") == 1
    assert 'needs typer, which is not installed: pip install ".[train]"' in done.stderr


def test_a_command_that_needs_more_than_its_options_says_so(python, tmp_path):
    """The command line is there, and a package that it comes to later is not."""
    (tmp_path / "run.yaml").write_text(
        "model: gpt2\noutput: out\ndata: {train: rows.jsonl}\nconstraints: [{type: length, max: 5}]\n"
    )
    code = "import sys; sys.modules['transformers'] = None\nfrom l3ms.__main__ import main; sys.exit(main(['train', 'run.yaml']))"
    done = python("-c", code, cwd=tmp_path, **PATHS)
    assert (done.returncode, done.stderr.count("\n")) == (5, 1), done.stderr
    assert "needs transformers, which is not installed" in done.stderr


def test_other_failures_are_not_explained_away():
    assert missing("it", ModuleNotFoundError("No module named 'mine'", name="mine")) is None
    assert missing("it", ValueError("no")) is None
