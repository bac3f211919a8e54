"""Run folders and checkpoints of somebody else: links that lead out of them, logs and reports that are none, state that no run can be in.

The project has `finished`, a run with weights, log and report, and `begun`, of begun.yaml, with checkpoint-2 and checkpoint-3.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bad_inputs import PLACES
from hostile_artefacts import HUGE, JUNK, REFUSED, Case, pickled

ANY = (0, *REFUSED)
NAMES = (
    "config.yaml", "metrics.jsonl", "sft.jsonl", "tensorboard", "checkpoints", "sft", "model", "average", "report.json", "report.png",
    "certificate.json", "demo_inputs", "trackers.json", "emissions.csv", "inputs.json",
)  # fmt: skip
PARTIAL = (".report.partial.png", ".report.png.partial", ".report.json.partial", ".config.yaml.partial", ".metrics.jsonl.partial",
           ".certificate.json.partial", ".model.partial", ".average.partial")  # fmt: skip
RESUME = ["train", "begun.yaml", "--resume"]


def of_links() -> Iterator[Case]:
    """Links where the commands write and remove, to a file, a folder, and the place of a file that is not there."""

    def case(run: str, name: str, target: str, arguments: list[str]) -> Case:
        def make(folder: Path) -> list[str]:
            path = folder / run / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(folder / target)
            return arguments

        return f"{run}/{name} -> {target}: {arguments[0]} {arguments[-1]}", make, ANY

    for target in ("victim", "precious", "precious/new"):
        for name in (*NAMES, *PARTIAL):
            yield case("finished", name, target, ["train", "run.yaml", "--output", "finished", "--overwrite"])
            yield case("begun", name, target, RESUME)
        for name in (
            "report.png",
            ".report.partial.png",
            ".report.png.partial",
            "metrics.jsonl",
            "report.json",
            "sft.jsonl",
        ):
            yield case("finished", name, target, ["plot", "finished"])
        for name in ("certificate.json", ".certificate.json.partial", "average", "inputs.json"):
            yield case("finished", name, target, ["certify", "finished"])
        for name in (
            ".checkpoint.partial",
            "checkpoint-4",
            "checkpoint-3",
            "checkpoint-2",
            "inputs.json",
            ".inputs.json.partial",
        ):
            yield case("begun/checkpoints", name, target, RESUME)
        for name in ("model.safetensors", "trainer_state.json", "optimizer.json", "manifest.json"):
            yield case("begun/checkpoints/checkpoint-3", name, target, RESUME)


def of_files() -> Iterator[Case]:
    """What is read of a run folder: junk, special files, values of wrong types."""

    def case(name: str, contents: bytes | str, arguments: list[str], codes: tuple[int, ...] = ANY) -> Case:
        def make(folder: Path) -> list[str]:
            path = folder / name
            path.unlink(missing_ok=True)
            if isinstance(contents, bytes):
                path.write_bytes(contents)
            else:
                PLACES[contents](path)
            return arguments

        return f"{name} is {contents[:30]!r}", make, codes

    for kind in ("a FIFO", "a socket", "a loop of links", "a link to a device", "a link to a FIFO", "a folder"):
        for name in ("metrics.jsonl", "report.json", "sft.jsonl"):
            yield case(f"finished/{name}", kind, ["plot", "finished"])
        for name in ("config.yaml", "inputs.json"):
            yield case(f"finished/{name}", kind, ["certify", "finished"], REFUSED)
        yield case("begun/config.yaml", kind, RESUME, ANY if kind in ("a loop of links", "a folder") else REFUSED)
        yield case("begun/metrics.jsonl", kind, RESUME)
        yield case("begun/checkpoints/inputs.json", kind, RESUME, REFUSED)
    for contents in JUNK.values():
        yield case("finished/report.json", contents, ["plot", "finished"])
        for name in ("config.yaml", "inputs.json"):
            yield case(f"finished/{name}", contents, ["certify", "finished"], REFUSED)
        yield case("begun/checkpoints/inputs.json", contents, RESUME, REFUSED)
        yield case("begun/config.yaml", contents, RESUME, REFUSED)
        yield case("begun/metrics.jsonl", contents, RESUME)
        if contents not in (JUNK["cut"], JUNK["nested"], JUNK["nested and closed"]):
            yield case("finished/metrics.jsonl", contents, ["plot", "finished"])
    line = {"iteration": 1, "loss": 1.0}
    rows: list[Any] = [
        {"loss": "x"}, {"iteration": "x"}, {"iteration": None}, {"iteration": [1]}, {"loss": {}}, {"iteration": 1e308, "loss": 1e308},
        {"loss": 1e400}, {"l3m/mu": "x"}, {"constraints/length/estimate": "x"}, {"constraints/length/lambda": [1]}, {"grad_norm": "x"},
    ]  # fmt: skip
    for row in rows:
        text = "\n".join([json.dumps(line), json.dumps(line | row), json.dumps(line)])
        yield case("finished/metrics.jsonl", text.encode(), ["plot", "finished"])
    reports: list[Any] = [
        {"constraints": "x"}, {"constraints": [1]}, {"constraints": [{}]}, {"constraints": [{"name": 1}]}, {"bounds": "x"},
        {"bounds": {"min": "x"}},
        {"average": 3}, {"average": {"length": "x"}}, {"average": {"length": {"histogram": "x"}}},
        {"average": {"length": {"histogram": [-1, 1]}}},
        {"average": {"length": {"histogram": [1e308] * 3}}}, {"solver": 3}, {"average_from": "x"}, {"average_from": 1e308},
        {"constraints": [{"name": "length", "min": 1e308, "max": -1e308}]}, {"constraints": [{"name": "\ud800"}]},
        {"constraints": [{"name": "$\\frac{"}]}, {"initial": {"constraints": {"length": {"mean": "x", "ci95": [1, 2]}}}},
    ]  # fmt: skip
    for report in reports:
        yield case("finished/report.json", json.dumps(report).encode(), ["plot", "finished"])


def seal(folder: Path) -> None:
    """A manifest for what is in a checkpoint now."""
    from l3ms.training.checkpoints import MANIFEST, _files, _sha256

    files = {path.relative_to(folder).as_posix(): path for path in _files(folder) if path.name != MANIFEST}
    described = {name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in files.items()}
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": described}))


def of_checkpoints() -> Iterator[Case]:
    """State in the newest checkpoint that is none, under a manifest that fits: the one before it is taken, or one line."""

    def case(name: str, write: Callable[[Path], Any], sealed: bool = True) -> Case:
        def make(folder: Path) -> list[str]:
            newest = folder / "begun" / "checkpoints" / "checkpoint-3"
            write(newest)
            if sealed:
                seal(newest)
            return RESUME

        return f"checkpoint-3: {name}", make, ANY

    files = (
        "trainer_state.json",
        "l3m.json",
        "optimizer.json",
        "scheduler.json",
        "random.json",
        "watch.json",
        "training_args.json",
    )
    for name in files:
        for kind, contents in JUNK.items():
            yield case(f"{name} is {kind}", lambda folder, n=name, c=contents: (folder / n).write_bytes(c))
        yield case(f"{name} is missing", lambda folder, n=name: (folder / n).unlink())
    for kind, contents in JUNK.items():
        yield case(
            f"the manifest is {kind}", lambda folder, c=contents: (folder / "manifest.json").write_bytes(c), False
        )
        for name in ("model.safetensors", "optimizer.safetensors", "l3m_average.safetensors", "config.json"):
            yield case(f"{name} is {kind}", lambda folder, n=name, c=contents: (folder / n).write_bytes(c))
    for where in ("../victim", "/etc/passwd", "x\0y", "trainer_state.json"):
        item = {"bytes": 1, "sha256": "0"}
        text = json.dumps({"files": {where: item}})
        yield case(
            f"the manifest names {where!r}", lambda folder, t=text: (folder / "manifest.json").write_text(t), False
        )

    def changed(name: str, key: str, value: Any) -> Case:
        def write(folder: Path) -> None:
            values = json.loads((folder / name).read_text())
            here = values
            *above, last = key.split(".")
            for part in above:
                here = here[part]
            if value is None:
                here.pop(last, None)
            else:
                here[last] = value
            (folder / name).write_text(json.dumps(values))

        return case(f"{name}: {key} is {value!r:.30}", write)

    for key in (
        "global_step",
        "max_steps",
        "log_history",
        "epoch",
        "stateful_callbacks",
        "train_batch_size",
        "best_metric",
    ):
        for value in (None, "x", -1, 10**400, [1], {"TrainerControl": {"args": {"x": 1}}}):
            if (key, value) == ("best_metric", None):
                continue
            yield changed("trainer_state.json", key, value)
    for key in (
        "prompts",
        "prompts.taken",
        "prompts.rows",
        "averaged",
        "data",
        "sampling",
        "sampling.left_out",
        "sampling.sampled_tokens",
    ):
        for value in (None, "x", -1, 10**18, 10**400, [1]):
            yield changed("l3m.json", key, value)
    for name in ("optimizer.json", "scheduler.json", "random.json", "watch.json"):
        for tree in ({"dict": [["state", 1]]}, {"tensor": "0"}, {"tensor": "99"}, {"tuple": [1]}, {"dict": []}, {"dict": 3},
        {"evil": 1}, [],
                     [{"dict": []}], {"dict": [[{"dict": []}, 1]]}):  # fmt: skip
            yield case(f"{name} is {tree}", lambda folder, n=name, t=tree: (folder / n).write_text(json.dumps(t)))
        yield case(f"{name} of words", lambda folder, n=name: _words(folder / n))
        yield case(f"{name} of huge numbers", lambda folder, n=name: _numbers(folder / n, HUGE[:400]))
        yield case(f"{name} of negative numbers", lambda folder, n=name: _numbers(folder / n, "-1"))
    for name in (
        "pytorch_model.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "scaler.pt",
        "training_args.bin",
    ):
        yield case(f"a pickle as {name}", lambda folder, n=name: (folder / n).write_bytes(pickled()))
        yield case(f"{name} alone", lambda folder, n=name: _alone(folder, n))
    for kind in ("a FIFO", "a socket", "a link to a device", "a loop of links"):
        for name in ("strange", "trainer_state.json", "manifest.json"):
            yield case(f"{name} is {kind}", lambda folder, n=name, k=kind: _special(folder / n, k), False)
    yield case("weights of another shape", lambda folder: _weights(folder, lambda value: value[:1]))
    yield case("weights under other names", lambda folder: _weights(folder, None))


def _words(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(), parse_int=lambda _: "x", parse_float=lambda _: "x")))


def _numbers(path: Path, text: str) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(), parse_int=lambda _: int(text))))


def _alone(folder: Path, name: str) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / name).write_bytes(pickled())


def _special(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    PLACES[kind](path)


def _weights(folder: Path, change: Callable[[Any], Any] | None) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    found = {n if change else f"strange.{n}": (change or (lambda v: v))(value) for n, value in load_file(path).items()}
    save_file(found, path, metadata={"format": "pt"})


def cases() -> list[Case]:
    return [*of_links(), *of_files(), *of_checkpoints()]
