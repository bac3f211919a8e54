"""Copies of the sources, changed in some places, and the native part compiled from them: sanitizers, planted faults, mutants.

A copy stands in build/trust, so that a second call compiles only what has changed, and nothing where nothing has.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from filelock import FileLock
from goals import ROOT

BUILDS = ROOT / "build" / "trust"
FILES = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
FOLDERS = ("cmake", "csrc", "l3m_kernels")

Change = tuple[str, str, str]  # (file, old text, new text): the old one is in the file exactly once


def spot(text: str, file: str, old: str) -> int:
    """Where the only occurrence of a text in a file begins."""
    if (count := text.count(old)) != 1:
        raise ValueError(f"{file} has {count} times what a change wants to find once: {old!r}")
    return text.index(old)


def changed(file: str, changes: Sequence[Change], root: Path = ROOT) -> str:
    """The text of a file with those changes that are of it; each old text is looked for in the file as it is."""
    before = (root / file).read_text()
    spots = sorted(((spot(before, file, old), old, new) for name, old, new in changes if name == file), reverse=True)
    text, end = before, len(before)
    for begin, old, new in spots:
        if begin + len(old) > end:
            raise ValueError(f"{file}: two changes of one place: {old!r}")
        text, end = text[:begin] + new + text[begin + len(old) :], begin
    return text


def copy_sources(tree: Path, texts: Mapping[str, str]) -> None:
    """What a build reads; a file that is as before keeps its time, so that it is not compiled again."""
    wanted = {name: (ROOT / name).read_bytes() for name in FILES}
    for folder in FOLDERS:
        paths = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        wanted |= {str(path.relative_to(ROOT)): path.read_bytes() for path in paths if path.name[:3] != "_C."}
    wanted |= {name: text.encode() for name, text in texts.items()}
    wanted.pop("l3m_kernels/_build.json", None)
    for name, content in wanted.items():
        path = tree / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for folder in FOLDERS:
        for path in (tree / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and str(path.relative_to(tree)) not in wanted:
                path.unlink()


def _digest(tree: Path, settings: Mapping[str, str]) -> str:
    digest = hashlib.sha256(f"{sorted(settings.items())} {torch.__version__} {sys.version}".encode())
    for name in ("CMakeLists.txt", "setup.py", "cmake", "csrc"):
        paths = sorted((tree / name).rglob("*")) if (tree / name).is_dir() else [tree / name]
        for path in filter(Path.is_file, paths):
            digest.update(str(path.relative_to(tree)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def build(name: str, texts: Mapping[str, str] | None = None, **settings: str) -> Path:
    """-> a folder for PYTHONPATH with l3m_kernels and its native part, of the sources with some texts; `settings` are the environment's."""
    tree, site = BUILDS / name / "tree", BUILDS / name / "site"
    tree.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILDS / name / "lock"):
        copy_sources(tree, texts or {})
        digest, noted = _digest(tree, settings), BUILDS / name / "digest"
        if not noted.exists() or noted.read_text() != digest:
            noted.unlink(missing_ok=True)
            environment = {**os.environ, "L3M_BUILD": "cpu", "CMAKE_EXPORT_COMPILE_COMMANDS": "1", **settings}
            command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(site)]
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name} was not compiled: {(done.stdout + done.stderr)[-2000:]}")
            noted.write_text(digest)
        shutil.copytree(tree / "l3m_kernels", site / "l3m_kernels", dirs_exist_ok=True)
    return site


def compile_again(name: str, change: Change, folder: Path, only: str) -> Path:
    """-> a folder with the package of the build `name`, one file of it changed and compiled as it was there; of one that is compiled for
    several sets of instructions, that for `only`."""
    (objects,) = (BUILDS / name / "tree" / "build").glob("cmake-*")
    commands = json.loads((objects / "compile_commands.json").read_text())
    file = change[0]
    chosen = [each for each in commands if each["file"].endswith(file)]
    chosen = [each for each in chosen if f"L3M_ISA={only}" in each["command"] or "L3M_ISA" not in each["command"]]
    (command,) = (shlex.split(each["command"]) for each in chosen)
    source, made = folder / Path(file).name, folder / "changed.o"
    source.write_text(changed(file, [change]))
    output = command[command.index("-o") + 1]
    command = [str(made) if word == output else str(source) if word.endswith(file) else word for word in command]
    subprocess.run(command, cwd=objects, check=True, capture_output=True)
    others = [str(path) for path in objects.rglob("*.o") if path != objects / output]
    shutil.copytree(BUILDS / name / "site" / "l3m_kernels", folder / "l3m_kernels")
    (library,) = (folder / "l3m_kernels").glob("_C.*")
    sanitize = [word for word in command if word.startswith("-fsanitize=")]
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = [command[0], "-shared", *sanitize, *others, str(made), f"-L{torch_libraries}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*link, "-o", str(library)], cwd=objects, check=True, capture_output=True)
    return folder
