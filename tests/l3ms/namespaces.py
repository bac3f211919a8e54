"""A process with file systems of its own, for tests of what a full disk does."""

import subprocess

import pytest


def in_a_namespace(*command: str) -> list[str]:
    """The command where it may mount; skips where that is not allowed."""
    prefix = ["unshare", "--map-root-user", "--mount"]
    try:
        allowed = subprocess.run([*prefix, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if allowed.returncode:
        pytest.skip(f"cannot mount a small file system: {allowed.stderr.decode().strip()}")
    return [*prefix, *command]
