"""A folder of a stranger as the current one: what is planted there is not imported by the command, nor by the libraries under it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MODULES = (
    "typer",
    "torch",
    "yaml",
    "numpy",
    "matplotlib",
    "pydantic",
    "sitecustomize",
    "usercustomize",
    "evil",
    "l3ms",
)


def plot(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    path = {"PYTHONPATH": f"{ROOT / 'python'}:{ROOT}", "MPLCONFIGDIR": str(folder.parent / "matplotlib")}
    command = [sys.executable, *options, "-m", "l3ms", "plot", "run"]
    return subprocess.run(command, cwd=folder, env=os.environ | path, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="python -P came with Python 3.11")
def test_modules_and_settings_in_the_current_folder_are_not_run(tmp_path):
    folder = tmp_path / "strange"
    (folder / "run").mkdir(parents=True)
    for name in MODULES:
        (folder / f"{name}.py").write_text("import os; os.makedirs('canary', exist_ok=True); raise SystemExit(9)\n")
    (folder / "matplotlibrc").write_text("backend: module://evil\n")
    rows = [{"iteration": i, "seconds": i, "loss": 1.0 / i} for i in (1, 2, 3)]
    (folder / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "run" / "report.json").write_text("{}")
    done = plot(folder, "-P")  # as the command l3ms, which has not the current folder on its path
    assert (done.returncode, done.stdout.split()) == (0, ["run/report.png"]), done.stderr
    assert not (folder / "canary").exists()
    assert (folder / "run" / "report.png").stat().st_size > 1000
    assert plot(folder).returncode == 9  # as SECURITY.md says of `python -m`
    assert (folder / "canary").exists()
