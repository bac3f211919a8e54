"""The kernels for Hugging Face's Kernel Hub: `python hub/build.py` writes build/hub/l3m-kernels, a kernel repository to be uploaded.

    build.toml, README.md, LICENSE
    torch-ext/l3m_kernels/       the sources in kernel-builder's layout
    build/torch-cpu, torch-cuda  what the library `kernels` loads: the same, an id, metadata.json with the digest of every file

The Hub loads a package from a path, under a name of that version, and several versions into one process. So imports become relative, and
ops are registered under the id, which is made of what the sources say. Triton and plain torch are taken along, what is compiled is not.
"""

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "l3m_kernels"
STARTS = ("", "drop_in", "triton_ops")  # what is taken along is what these import
ALLOWED = sys.stdlib_module_names | {"torch", "triton"}  # triton comes with torch where it is needed
NOT_COMPILED = "a kernel from the Hub has what Triton and torch compute"

# What older versions of `kernels` load: the same module, once.
COMPAT = """import importlib.util
import sys
from pathlib import Path

if "{id}" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("{id}", Path(__file__).resolve().parents[1] / "__init__.py")
    sys.modules["{id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{id}"])
globals().update({{name: value for name, value in vars(sys.modules["{id}"]).items() if not name.startswith("__")}})
__all__ = sys.modules["{id}"].__all__
"""
# kernel-builder writes a module of this name and these functions too.
OPS = """import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
"""


def sources(package: Path) -> dict[str, str]:
    """Path in the package -> its text as it is on the Hub, for every module that STARTS import, and what says that nothing is compiled."""
    found = {"_build.json": json.dumps({"built": [], "missing": {"cpu": NOT_COMPILED}}) + "\n"}
    waiting = list(STARTS)
    while waiting:
        name = waiting.pop()
        path = next((path for path in _files_of(name) if (package / path).exists()), None)
        if path is None or path in found:  # a name of a module, or one that is taken along
            continue
        text = (package / path).read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (module := node.module or "").partition(".")[0] == PACKAGE:
                inside = module.removeprefix(PACKAGE).lstrip(".")
                waiting += [inside, *(f"{inside}.{alias.name}".lstrip(".") for alias in node.names)]
        found[path] = relative(text, path)
    return dict(sorted(found.items()))


def _files_of(name: str) -> tuple[str, str]:
    path = name.replace(".", "/")
    return f"{path}/__init__.py".lstrip("/"), f"{path}.py"


def relative(text: str, path: str) -> str:
    """A module that imports its package by dots, and registers and finds its ops by `_ops`.

    Raises:
        ValueError: it imports something that the Hub does not allow.
    """
    dots = "." * len(Path(path).parts)
    text = re.sub(rf"^(\s*)from {PACKAGE} import", rf"\1from {dots} import", text, flags=re.MULTILINE)
    text = re.sub(rf"^(\s*)from {PACKAGE}\.", rf"\1from {dots}", text, flags=re.MULTILINE)
    text, registered = re.subn(rf'"{PACKAGE}::(\w+)"', r'_ops.add_op_namespace_prefix("\1")', text)
    text, called = re.subn(rf"\b(torch\.)?ops\.{PACKAGE}\b", "_ops.ops", text)
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    if registered or called:
        lines = text.splitlines(keepends=True)
        lines.insert(imports[-1].end_lineno or 0, f"from {dots} import _ops\n")
        text = "".join(lines)
    if path == "__init__.py":
        text += '\nfrom . import drop_in  # noqa: E402\n\n__all__ += ["drop_in"]\n'
    for node in ast.walk(ast.parse(text)):
        absolute = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            absolute = [node.module or ""]
        for name in absolute:
            if name.partition(".")[0] not in ALLOWED:
                raise ValueError(
                    f"{PACKAGE}/{path} imports {name}; the Hub allows the standard library, torch, Triton and its own modules"
                )
    return text


def write(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def variant(backend: str, general: dict, files: dict[str, str]) -> dict[str, str]:
    """Path -> text of a build variant, with its metadata.json."""
    content = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:10]
    name = general["name"].replace("-", "_")
    identity = f"_{name}_{backend}_{content}"
    made = files | {"_ops.py": OPS.format(id=identity), f"{name}/__init__.py": COMPAT.format(id=identity)}
    hashes = {path: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for path, text in made.items()}
    metadata = {
        "id": identity,
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": dict(sorted(hashes.items()))},
    }
    return made | {"metadata.json": json.dumps(metadata, indent=2) + "\n"}


def build(output: Path) -> Path:
    """Writes the kernel repository anew -> its folder."""
    described = (ROOT / "hub" / "build.toml").read_text()
    general = tomllib.loads(described)["general"]
    folder = output / general["name"]
    files = sources(ROOT / PACKAGE)
    shutil.rmtree(folder, ignore_errors=True)
    texts = {"README.md": (ROOT / "hub" / "README.md").read_text(), "LICENSE": (ROOT / "LICENSE").read_text()}
    write(folder, texts | {"build.toml": described})
    write(folder / "torch-ext" / PACKAGE, files)
    for backend in general["backends"]:
        write(folder / "build" / f"torch-{backend}", variant(backend, general, files))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "hub", help="the repository becomes a folder in it"
    )
    print(build(parser.parse_args().output))
