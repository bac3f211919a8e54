"""Run folders as `l3ms train` and `l3ms certify` leave them, without a model."""

import json
from pathlib import Path

import pytest
import yaml

from experiments.cells import cell_folder, run_folder
from l3ms.runs.report import histogram


def leave_run(
    folder,
    mean=14.0,
    perplexity=11.0,
    solver="barrier",
    bounds=(12.0, 16.0),
    name="length",
    verdict=None,
    initial=False,
    sampled=None,
):
    """Write report.json, metrics.jsonl and, with a verdict, certificate.json. `sampled`: response tokens by iteration."""
    folder.mkdir(parents=True, exist_ok=True)
    reward = {} if name == "length" else {name: {"mean": mean, "ci95": [mean - 0.1, mean + 0.1], "samples": 8}}
    lengths = [round(14.0 if reward else mean) + step for step in (-2, -1, 0, 1, 2)]
    length = {
        "mean": sum(lengths) / 5,
        "ci95": [sum(lengths) / 5 - 0.5, sum(lengths) / 5 + 0.5],
        "p5": 3.0,
        "p50": 9.0,
        "p95": 20.0,
    }
    summary = {
        "length": {**length, "histogram": histogram(lengths)}, "ended": 0.99, "perplexity": perplexity, "samples": 5, "constraints": reward,
    }  # fmt: skip
    items = [] if bounds is None else [{"name": name, "min": bounds[0], "max": bounds[1]}]
    report = {"seed": 0, "seconds": 1.5, "iterations": 20, "solver": solver, "constraints": items, "mu_end": 0.3}
    report |= {"last": summary, "average": summary} | ({"initial": summary} if initial else {})
    (folder / "report.json").write_text(json.dumps(report))
    rows = []
    for step in range(1, 21):
        row = {"iteration": step, "loss": 3.0 - step / 20}
        if solver != "none":
            row |= {
                f"constraints/{name}/estimate": mean + 10 / step,
                f"constraints/{name}/stderr": 0.4,
                f"constraints/{name}/lambda": 1 / step,
            }
        if sampled is not None:  # tokens of the iterations, over and over; one of 0 is left out
            row |= {"l3m/sampled_tokens": sum(sampled[i % len(sampled)] for i in range(step))}
            row |= {"l3m/constraint_step": float(sampled[(step - 1) % len(sampled)] > 0)}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if verdict is not None:
        leave_certificate(folder / "certificate.json", verdict, name)


def leave_certificate(path, verdict, name="length"):
    certificate = {"verdict": verdict, "run": str(path.parent), "constraints": [{"name": name, "verdict": verdict}]}
    path.write_text(json.dumps(certificate))


class FakeCommand:
    """In the place of the processes: counts the calls, leaves what the real commands would, fails where it is told to."""

    def __init__(self, failing=(), certify_code=0):
        self.calls, self.failing, self.certify_code = [], set(failing), certify_code
        self.environments = []

    def __call__(self, words, log, environment):
        self.environments.append(environment)
        command = words[words.index("l3ms") + 1]
        folder = Path(words[words.index("--output") + 1] if command == "train" else words[words.index("certify") + 1])
        cell = "/".join(folder.parts[-3:-1])
        self.calls.append((command, cell))
        with log.open("a") as file:
            file.write(f"$ {' '.join(words)}\n")
            if (command, cell) in self.failing:
                file.write("l3ms: train.solver: no such solver\n")
                return 2
        if command == "train":
            leave_run(folder)
            return 0
        leave_certificate(folder / "certificate.json", "SATISFIED")
        return self.certify_code


@pytest.fixture
def finished():
    """`finished(folder, cell, **options)`: the cell's run folder as after its training; options as in `leave_run`."""

    def finish(folder, cell, **options):
        place = cell_folder(folder, cell)
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.yaml").write_text(yaml.safe_dump(dict(cell.config), sort_keys=False))
        leave_run(run_folder(folder, cell), **options)

    return finish


@pytest.fixture
def fake_command():
    return FakeCommand
