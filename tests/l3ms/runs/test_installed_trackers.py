"""What wandb (offline), MLflow, trackio and TensorBoard have kept of a run, read back from their files. Skipped where it is not there."""

import importlib
import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_projects import l3ms

from l3ms.runs import executing

pytestmark = pytest.mark.filterwarnings("default")  # of packages that are not ours
PARAMETERS = {"train.iterations": 5, "constraints.0.name": "vowels", "logging.completions": 3, "seed": 0}


@pytest.fixture
def tracked(project, monkeypatch):
    """tracked(name, *arguments) -> the exit code of a run whose watch has figures that are NaN, with a table of 3 every 2 iterations."""
    path = project / "run.yaml"
    values = yaml.safe_load(path.read_text())
    values["constraints"] = [{"type": "function", "name": "vowels", "function": "rewards.py:vowels", "max": 0.3}]
    values["train"] = {**values["train"], "save_steps": 2}
    path.write_text(yaml.safe_dump(values))
    monkeypatch.chdir(project)
    for name in ("WANDB", "MLFLOW", "TRACKIO"):
        for key in [key for key in os.environ if key.startswith(f"{name}_") and key != "TRACKIO_DIR"]:
            monkeypatch.delenv(key)

    def run(name, *arguments):
        logging = ("--logging.report-to", name, "--logging.completions", 3, "--logging.completions-every", 2)
        return l3ms(path, "--allow-code", *logging, *arguments)

    return run


@pytest.fixture
def stopped(monkeypatch):
    """A half-step that is interrupted in iteration 4; where it is called again it is not."""
    half_step = executing.L3MTrainer.constraint_half_step
    calls = []

    def stop(self):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        half_step(self)

    monkeypatch.setattr(executing.L3MTrainer, "constraint_half_step", stop)


def log(out: Path) -> dict[int, dict[str, Any]]:
    """iteration -> what metrics.jsonl has of it."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row.pop("iteration"): row for row in rows if row.pop("seconds")}


def same(found: Any, wanted: float | None) -> bool:
    """metrics.jsonl has null for NaN."""
    if wanted is None:
        return found in ("NaN", None) or math.isnan(found)
    return found == pytest.approx(wanted, rel=1e-6)


def report(out: Path) -> dict[str, float]:
    found = json.loads((out / "report.json").read_text())
    figures = {f"report/{model}/length": found[model]["length"]["mean"] for model in ("last", "average")}
    return figures | {f"report/{model}/perplexity": found[model]["perplexity"] for model in ("last", "average")}


def known(out: Path, name: str) -> dict[str, str]:
    return json.loads((out / "trackers.json").read_text())[name]


# ---- wandb ----


@pytest.fixture
def offline(monkeypatch):
    wandb: Any = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # what it has read of the folder and the environment of another test
    yield
    wandb.teardown()


def records(file: Path) -> Iterator[bytes]:
    """Of an offline run: LevelDB's log, blocks of 32 KiB of parts (checksum, length, kind: whole, first, middle or last)."""
    data, at, record = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (rest := 32768 - at % 32768) < 7:
            at += rest
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def of_wandb(folder: Path) -> dict[str, Any]:
    """What is in the file of an offline run."""
    importlib.import_module("wandb").teardown()  # its process has written all
    module: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    [file] = folder.glob("*.wandb")
    found: dict[str, Any] = {"history": [], "config": {}, "summary": {}}

    def values(items: Any) -> dict[str, Any]:
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    for data in records(file):
        record = module.Record()
        record.ParseFromString(data)
        match record.WhichOneof("record_type"):
            case "history":
                found["history"].append(values(record.history.item))
            case "config":
                found["config"] |= values(record.config.update)
            case "summary":
                found["summary"] |= values(record.summary.update)
            case "run":
                found["run"] = record.run
                found["config"] |= values(record.run.config.update)
            case "exit":
                found["exit"] = record.exit.exit_code
    return found


def test_wandb_offline(tracked, project, offline):
    assert tracked("wandb", "--logging.tags", "[short, v 2]", "--logging.project", "lengths") == 0
    out = project / "out"
    [folder] = (project / "wandb").glob("offline-run-*")
    found = of_wandb(folder)
    run = found["run"]
    assert (run.display_name, run.project, list(run.tags)) == ("out", "lengths", ["short", "v 2"])
    assert run.run_id == known(out, "wandb")["id"]
    assert {name: found["config"][name] for name in PARAMETERS} == PARAMETERS
    lines = {line["train/global_step"]: line for line in found["history"] if "train/loss" in line}
    rows = log(out)
    assert lines.keys() == rows.keys() == {1, 2, 3, 4, 5}
    for iteration, row in rows.items():
        assert all(same(lines[iteration][f"train/{name}"], value) for name, value in row.items())
    assert {name: found["summary"][name] for name in report(out)} == pytest.approx(report(out))
    tables = [line for line in found["history"] if "completions/_type" in line or "completions" in line]
    assert [line["train/global_step"] for line in tables] == [1, 3, 5]
    files = sorted((folder / "files" / "media" / "table").glob("completions*.json"))
    assert len(files) == 3
    table = json.loads(files[0].read_text())
    assert table["columns"] == ["iteration", "prompt", "completion", "tokens", "ended", "reward/vowels"]
    assert len(table["data"]) == 3
    assert found["exit"] == 0


def test_wandb_offline_is_interrupted_and_goes_on(tracked, project, offline, stopped):
    assert tracked("wandb") == 130
    assert tracked("wandb", "--resume") == 0
    runs = [of_wandb(folder) for folder in sorted((project / "wandb").glob("offline-run-*"))]
    assert [run["exit"] for run in runs] == [130, 0]
    assert len({run["run"].run_id for run in runs}) == 1
    steps = [[line["train/global_step"] for line in run["history"] if "train/loss" in line] for run in runs]
    assert steps == [[1, 2, 3], [3, 4, 5]]


# ---- MLflow ----


def of_mlflow(project: Path, out: Path) -> Any:
    client = importlib.import_module("mlflow").MlflowClient(tracking_uri=(project / "mlruns").as_uri())
    return client, client.get_run(known(out, "mlflow")["id"])


@pytest.fixture
def file_store(project, monkeypatch):
    mlflow: Any = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((project / "mlruns").as_uri())
    mlflow.set_experiment("Default")  # not that of another test
    yield mlflow
    mlflow.set_tracking_uri(None)


def test_mlflow(tracked, project, file_store):
    mlflow = file_store
    assert tracked("mlflow", "--logging.tags", "[short, v 2]", "--logging.project", "lengths") == 0
    out = project / "out"
    client, run = of_mlflow(project, out)
    assert (run.info.run_name, run.info.status) == ("out", "FINISHED")
    assert client.get_experiment(run.info.experiment_id).name == "lengths"
    assert {"short", "v 2"} <= run.data.tags.keys()
    assert {name: run.data.params[name] for name in PARAMETERS} == {n: str(value) for n, value in PARAMETERS.items()}
    rows = log(out)
    for name in rows[1]:
        points = {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)}
        assert points.keys() == {step for step, row in rows.items() if name in row}
        assert all(same(points[step], rows[step][name]) for step in points)
    assert {name: run.data.metrics[name] for name in report(out)} == pytest.approx(report(out))
    table = mlflow.load_table("completions.json", run_ids=[run.info.run_id])
    assert list(table["iteration"]) == [1, 1, 1, 3, 3, 3, 5, 5, 5]
    assert list(table.columns)[:5] == ["iteration", "prompt", "completion", "tokens", "ended"]


def test_mlflow_is_interrupted_and_goes_on(tracked, project, file_store, stopped):
    assert tracked("mlflow") == 130
    assert of_mlflow(project, project / "out")[1].info.status == "KILLED"
    assert tracked("mlflow", "--resume", "--train.save-steps", 3, "--evaluate.samples", 18) == 0
    client, run = of_mlflow(project, project / "out")
    assert run.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(steps) == [1, 2, 3, 3, 4, 5]
    assert run.data.params["train.save_steps"] == "2"
    assert len(client.search_runs([run.info.experiment_id])) == 1


# ---- trackio ----


@pytest.fixture
def trackio_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))  # read where it is imported first
    pytest.importorskip("trackio", reason="trackio is not installed")


def stored() -> Any:
    return importlib.import_module("trackio.sqlite_storage").SQLiteStorage


def of_trackio(project_name: str, identity: str) -> list[dict[str, Any]]:
    [name] = [run["name"] for run in stored().get_run_records(project_name) if run["id"] == identity]
    return stored().get_logs(project_name, name, run_id=identity)


def test_trackio(tracked, project, trackio_folder):
    for output in ("out", "other/out"):  # equally named: two runs
        assert tracked("trackio", "--logging.project", "lengths", "--output", project / output) == 0
    out = project / "out"
    assert known(out, "trackio")["name"] == "out"
    assert len({run["id"] for run in stored().get_run_records("lengths")}) == 2
    found = of_trackio("lengths", known(out, "trackio")["id"])
    lines = {line["step"]: line for line in found if "train/loss" in line}
    rows = log(out)
    assert lines.keys() == rows.keys() == {1, 2, 3, 4, 5}
    for iteration, row in rows.items():
        assert all(same(lines[iteration][f"train/{name}"], value) for name, value in row.items())
    tables = {line["step"]: line["completions"] for line in found if "completions" in line}
    assert list(tables) == [1, 3, 5]
    assert tables[1]["_type"] == "trackio.table"
    assert list(tables[1]["_value"][0]) == ["iteration", "prompt", "completion", "tokens", "ended", "reward/vowels"]
    [figures] = [line for line in found if "report/last/length" in line]
    assert {name: figures[name] for name in report(out)} == pytest.approx(report(out))
    kept = stored().get_run_config("lengths", "out", run_id=known(out, "trackio")["id"])
    assert kept is not None
    assert {name: kept[name] for name in PARAMETERS} == PARAMETERS


def test_trackio_is_interrupted_and_goes_on(tracked, project, trackio_folder, stopped, capsys):
    project_name = f"of-{project.name}"
    assert tracked("trackio", "--logging.project", project_name) == 130
    identity = known(project / "out", "trackio")["id"]
    assert tracked("trackio", "--logging.project", project_name, "--resume") == 0
    assert known(project / "out", "trackio")["id"] == identity
    assert [line["step"] for line in of_trackio(project_name, identity) if "train/loss" in line] == [1, 2, 3, 3, 4, 5]


# ---- TensorBoard ----


def test_tensorboard(tracked, project):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert tracked("tensorboard", "--logging.tensorboard", "true", "--logging.tags", "[short]") == 0
    out = project / "out"
    [file] = (out / "tensorboard").iterdir()  # of one writer
    found = EventAccumulator(str(file))
    found.Reload()
    rows = log(out)
    assert [point.step for point in found.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    for name in rows[1]:
        points = {point.step: point.value for point in found.Scalars(f"train/{name}")}
        assert all(same(value, rows[step][name]) for step, value in points.items())
    assert {name: found.Scalars(name)[0].value for name in report(out)} == pytest.approx(report(out))
    tables = found.Tensors("completions/text_summary")
    assert [table.step for table in tables] == [1, 3, 5]
    assert tables[0].tensor_proto.string_val[0].decode().startswith("| iteration | prompt | completion |")
    [args] = found.Tensors("args/text_summary")
    shown = json.loads(args.tensor_proto.string_val[0])
    assert {name: shown[name] for name in PARAMETERS} == PARAMETERS
    assert (shown["run_name"], shown["logging.tags"]) == ("out", ["short"])
