"""Files of somebody else around a run: planted where a command is run, hard links to what is precious, archives that unpack elsewhere."""

import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hostile_artefacts import CODE, REFUSED, TRAIN, Case, pickled
from hostile_models import QUICK, plant
from hostile_runs import ANY, RESUME


def of_planted_files() -> Iterator[Case]:
    """In the folder where a command is run, and in a run's."""
    planted = {
        "matplotlibrc": "backend: module://evil\nsavefig.directory: precious\n",
        ".env": "PYTHONSTARTUP=evil.py\nHF_ENDPOINT=http://evil\n",
        "sitecustomize.py": CODE, "usercustomize.py": CODE, "conftest.py": CODE, "setup.cfg": "[metadata]\nname=evil\n",
        "pyproject.toml": "[tool.x]\n",
        "wandb/settings": "[default]\nbase_url = http://evil\n", ".netrc": "machine x\n",
        "default_config.yaml": "!!python/object/apply:os.mkdir [canary]\n",
        "finished/evil.pth": "import evil\n", "finished/training_args.bin": "x", "finished/.l3ms": "x",
        "finished/model/pytorch_model.bin": "x",
    }  # fmt: skip
    for name, text in planted.items():
        for arguments in (
            ["plot", "finished"],
            ["check", "run.yaml", "--samples", "2"],
            ["certify", "finished", "--samples", "2"],
        ):

            def make(folder: Path, name: str = name, text: str = text, arguments: list[str] = arguments) -> list[str]:
                plant(folder)
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)
                return arguments

            yield f"planted {name}: {arguments[0]}", make, ANY

    def configured(run: str, arguments: list[str], **values: Any) -> Case:
        def make(folder: Path) -> list[str]:
            plant(folder)
            path = folder / run / "config.yaml"
            path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))
            return arguments

        return f"{run}/config.yaml with {values}: {arguments[0]}", make, ANY

    function = [{"type": "function", "name": "f", "function": "evil:f", "min": 1}]
    for values in ({"output": "precious"}, {"output": "/"}, {"output": "../outside"}, {"model": "precious"}, {"constraints": function},
                   {"trust_remote_code": True}, {"rollout": {"engine": "evil:f"}}, {"data": {"train": "/etc/passwd"}}):  # fmt: skip
        yield configured("finished", ["certify", "finished", "--samples", "2"], **values)
        yield configured("begun", RESUME, **values)
        yield configured("finished", ["plot", "finished"], **values)


def of_hard_links() -> Iterator[Case]:
    for name in (
        "report.json",
        "report.png",
        "metrics.jsonl",
        "config.yaml",
        "certificate.json",
        ".report.json.partial",
        ".report.png.partial",
    ):
        for run, arguments in (
            ("finished", ["plot", "finished"]),
            ("begun", RESUME),
            ("finished", [*TRAIN, "--output", "finished", "--overwrite", "--iterations", "1"]),
        ):

            def make(folder: Path, run: str = run, name: str = name, arguments: list[str] = arguments) -> list[str]:
                path = folder / run / name
                path.unlink(missing_ok=True)
                os.link(folder / "victim", path)
                return arguments

            yield f"{run}/{name} is the victim by a hard link: {arguments[-1]}", make, ANY


def of_archives() -> Iterator[Case]:
    def case(name: str, contents: bytes, codes: tuple[int, ...] = REFUSED) -> Case:
        def make(folder: Path) -> list[str]:
            (folder / name.partition(" ")[0]).write_bytes(contents)
            return [*TRAIN, *QUICK, "--data.train", f"./{name.partition(' ')[0]}"]

        return f"data: {name}", make, codes

    def zipped(member: str) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(member, "owned")
        return file.getvalue()

    def tarred(member: str) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            information = tarfile.TarInfo(member)
            information.size = 5
            archive.addfile(information, io.BytesIO(b"owned"))
        return file.getvalue()

    for member in ("../victim", "/tmp/l3ms-slipped", "x/../../victim"):
        for ending in ("zip", "jsonl.zip", "npz"):
            yield case(f"rows.{ending} with {member}", zipped(member))
        yield case(f"rows.tar.gz with {member}", tarred(member))
        yield case(f"rows.jsonl.gz that is a tar with {member}", tarred(member))
    rows = b"".join(json.dumps({"prompt": f"a b {i % 9}", "completion": "c"}).encode() + b"\n" for i in range(30))
    named = io.BytesIO()
    with gzip.GzipFile("../victim", "wb", fileobj=named) as file:
        file.write(rows)
    yield case("rows.jsonl.gz whose header names ../victim", named.getvalue(), ANY)
    for ending in ("parquet", "arrow"):
        yield case(f"rows.{ending} with a pickled type", _pickled_type(ending), ANY)


def _pickled_type(ending: str) -> bytes:
    """A column of pyarrow's extension type that was once made by unpickling what the file holds."""
    import pyarrow
    from pyarrow import parquet

    told = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickled()}
    fields = [
        pyarrow.field("prompt", pyarrow.string()),
        pyarrow.field("completion", pyarrow.string()),
        pyarrow.field("n", pyarrow.int64(), metadata=told),
    ]
    table = pyarrow.table([[f"a b {i}" for i in range(20)], ["c"] * 20, list(range(20))], schema=pyarrow.schema(fields))
    file = io.BytesIO()
    if ending == "parquet":
        parquet.write_table(table, file)
    else:
        with pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return file.getvalue()


def cases() -> list[Case]:
    return [*of_planted_files(), *of_hard_links(), *of_archives()]
