"""Folders of the cache that exist whole or not at all: written under another name, digests of all files last, then renamed.

A manifest.json in each holds `{..., "sha256": {file name: digest}}`. Whatever ends the process that writes one leaves a folder whose name
begins with a dot, which nobody takes for an entry.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def cache_folder() -> Path:
    """$L3M_CACHE, else $XDG_CACHE_HOME/l3m-kernels, else ~/.cache/l3m-kernels."""
    if os.environ.get("L3M_CACHE"):
        return Path(os.environ["L3M_CACHE"]).expanduser()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]).expanduser() / "l3m-kernels"
    return Path.home() / ".cache" / "l3m-kernels"


def store(entry: Path, write: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
    """`write` makes the folder that becomes `entry`; `facts` go into its manifest. Of two writers the first wins."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{entry.name}-", dir=entry.parent, ignore_cleanup_errors=True
    ) as temporary:
        written = Path(temporary) / "written"
        written.mkdir()
        write(written)
        names = sorted(path.name for path in written.iterdir())
        manifest = {**facts, "sha256": {name: sha256(written / name) for name in names}}
        (written / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        if entry.exists() and not is_whole(entry, *names):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker to remove it
                entry.rename(Path(temporary) / "damaged")
        try:
            written.rename(entry)
        except OSError:
            if not is_whole(entry, *names):
                raise


def is_whole(entry: Path, *names: str) -> bool:
    """Whether all files of the manifest, `names` among them, are there and as they were written."""
    try:
        digests = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        return digests.keys() >= set(names) and all(sha256(entry / name) == value for name, value in digests.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
