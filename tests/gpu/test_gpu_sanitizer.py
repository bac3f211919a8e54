"""compute-sanitizer over small calls of every backend: no access out of bounds, no race in shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from head_on_gpu import HEAD_BACKENDS

TOOL = shutil.which("compute-sanitizer")


@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.skipif(HEAD_BACKENDS == ["reference"], reason="no kernels of ours are here")
@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_clean(check):
    script = Path(__file__).with_name("sanitizer_cases.py")
    # Without the caching allocator every tensor is an allocation of its own, whose end the tool knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    filters = ["--kernel-regex", "kns=softmax", "--kernel-regex", "kns=barrier"] if check == "racecheck" else []
    command = [str(TOOL), "--tool", check, "--error-exitcode", "7", *filters, sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this machine")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
