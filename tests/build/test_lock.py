"""The locked packages: pip installs no file but those whose hashes are there, and looks for no package that is not (`--no-deps`)."""

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "requirements.lock").read_text()
TORCH = [line for line in (ROOT / "torch.lock").read_text().splitlines() if line and not line.startswith("#")]


def locked():
    """Name -> its line and the lines of its hashes."""
    blocks = re.split(r"\n(?=[A-Za-z])", "\n" + re.sub(r"^#.*\n", "", LOCK, flags=re.MULTILINE).strip())
    return {canonicalize_name(block.partition("==")[0]): block for block in blocks if block.strip()}


def test_every_package_has_one_version_and_the_hashes_of_its_files():
    found = locked()
    assert len(found) > 80
    for name, block in found.items():
        line, *hashes = (part.rstrip(" \\") for part in block.strip().split("\n"))
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!-]+( ?; .+)?", line), line
        assert hashes, f"{name}: no hashes; `make lock` writes them"
        assert all(re.fullmatch(r" +--hash=sha256:[0-9a-f]{64}", text) for text in hashes), name
        assert len(set(hashes)) == len(hashes)
    assert "torch" not in found  # its files are not the same everywhere
    assert [Requirement(line).name for line in TORCH] == ["torch"]
    assert all(spec.operator == "==" for spec in Requirement(TORCH[0]).specifier)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the lock is for Python 3.11 or newer")
def test_nothing_is_missing_that_a_locked_package_needs():
    """Of those that are installed here in the version that is locked."""
    found = locked()
    checked = 0
    for name, block in [*found.items(), ("torch", TORCH[0])]:
        version = re.search(r"==([^\s;]+)", block)
        try:
            here = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if version is None or here.version.partition("+")[0] != version[1]:
            continue
        checked += 1
        for requirement in map(Requirement, here.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed = canonicalize_name(requirement.name)
                cuda = name == "torch" and needed.startswith(("nvidia-", "cuda-"))  # torch's own choice
                assert needed in found or needed == "torch" or cuda, f"{name} needs {needed}"
                if needed in found and (pin := re.search(r"==([^\s;]+)", found[needed])):
                    assert requirement.specifier.contains(pin[1], prereleases=True), f"{name} needs {requirement}"
    assert checked > 60


def test_no_other_place_says_which_packages_are_installed():
    makefile = (ROOT / "Makefile").read_text()
    assert "--require-hashes --no-deps -r requirements.lock" in makefile
    assert "torch==" not in makefile
