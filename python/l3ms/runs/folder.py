"""The folder of a run: refused when it holds something, written piece by piece, each piece whole or not there.

config.yaml  metrics.jsonl  tensorboard/  trackers.json  checkpoints/  model/  average/  inputs.json  report.json  report.png
certificate.json
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from l3ms.config.yaml_reader import ConfigError, dump_yaml
from l3ms.ranks import lookout
from l3ms.regular_files import read_regular
from l3ms.runs.whole_files import finite, open_to_append, remove, write_whole

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

ARTEFACTS = (
    "config.yaml", "metrics.jsonl", "sft.jsonl", "tensorboard", "checkpoints", "sft", "model", "average", "report.json",
    "report.png", "certificate.json", "demo_inputs", "trackers.json", "emissions.csv", "inputs.json",
)  # fmt: skip
# Of a run that has begun, or a demo; the other names are such as people give to files of their own
SIGNS = ("metrics.jsonl", "sft.jsonl", "trackers.json", "demo_inputs", "checkpoints/inputs.json")


def check_output(
    folder: Path, *, overwrite: bool, going_on: bool = False, inputs: Mapping[str, str] | None = None
) -> None:
    """Raise `ConfigError` unless a run may be written to `folder`; writes nothing.

    `inputs` maps fields to paths the run reads: one that `--overwrite` would remove is refused.
    """
    try:
        _check_folder(folder, overwrite or going_on)
        for field, path in (inputs or {}).items():
            if any(Path(path).is_relative_to(folder / name) for name in ARTEFACTS):
                raise ConfigError("output", f"{folder} would be overwritten, but {field} is read from it ({path})")
        _check_run(folder, "resume" if going_on else "output", {"config.yaml"} if going_on else set())
        if folder.is_dir():
            with alone_in(folder):
                pass
    except OSError as error:  # a name that is too long, a folder that cannot be read
        raise ConfigError("output", f"{folder}: {error.strerror}") from None


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError("output", f"{folder} is not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        resume = ", --resume to go on with the run in it" if (folder / "checkpoints").is_dir() else ""
        raise ConfigError(
            "output", f"{folder} is not empty; choose another{resume}, or --overwrite to replace the run in it"
        )
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        raise ConfigError("output", f"{folder} cannot be created: {parent} is not a folder that can be written to")


def _check_run(folder: Path, field: str, own: Collection[str]) -> None:
    """What would be removed is a run's: some of it can be nothing else. `own`: what is known to be."""
    there = [name for name in ARTEFACTS if name not in own and os.path.lexists(folder / name)]
    if there and not any(os.path.lexists(folder / name) for name in SIGNS):
        raise ConfigError(
            field, f"{', '.join(there)} in {folder} would be removed, and nothing there says that a run made them: choose another "
            "folder, or remove them yourself"
        )  # fmt: skip


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """`folder`, made where there is none, is this process's until the block ends, or the process does.

    Raises `ConfigError` where it is another's. Where the file system has no locks it cannot be told.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    _held.add(place)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("output", f"a run in {folder} is going on in another process") from None
        except OSError:
            pass
        yield
    finally:
        if place in _held:
            _held.remove(place)
            os.close(place)


_held: set[int] = set()  # descriptors with locks: a forked process that outlives this one must not keep them


def _let_go() -> None:
    for place in _held:
        os.close(place)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def check_links(folder: Path) -> None:
    """Raise `ConfigError` where something of a run that is to go on is a link: it would be written to, or removed, elsewhere."""
    for name in ARTEFACTS:
        if (folder / name).is_symlink():
            raise ConfigError(
                "resume", f"{folder / name} is a link, and those are not followed in a run folder: put there what it leads to"
            )  # fmt: skip


def prepare_output(folder: Path, keep: Collection[str] = ()) -> None:
    """Create the folder; what an earlier run left in it goes but for `keep`, other files stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in set(ARTEFACTS) - set(keep):
        remove(folder / name)


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """`config.yaml` with every field resolved: `l3ms train FOLDER/config.yaml --output OTHER` is the same run again."""
    write_whole(folder / "config.yaml", dump_yaml(values))


def save_weights(folder: Path, name: str, model: Any, tokenizer: Any) -> None:
    """`folder/name` with safetensors weights and tokenizer; a full disk leaves no half of it."""
    partial = folder / f".{name}.partial"
    remove(partial)
    try:
        with lookout.clearing(lambda: remove(partial)):
            partial.mkdir()
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        partial.rename(folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class MetricsWriter(TrainerCallback):
    """`metrics.jsonl`: one object per iteration, `{"iteration", "seconds", "loss", "constraints/...", ...}`."""

    def __init__(self, path: Path):
        self.path = path
        self.iterations = 0
        self.seconds_before = 0.0
        self._row: dict[str, Any] = {}
        self._start = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        """Of a run that goes on the file has the lines that its checkpoint knows, others go, and the clock goes on."""
        if state.is_world_process_zero and state.global_step:
            self.seconds_before = _rewrite(self.path, state.log_history)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        if self._row and self._row["iteration"] != state.global_step:
            self.flush()
        seconds = round(time.monotonic() - self._start + self.seconds_before, 3)
        self._row |= {"iteration": state.global_step, "seconds": seconds, **logs}
        if control.should_save:  # a line is in the file before the checkpoint that has it
            self.flush()

    def on_step_begin(self, args, state, control, **kwargs):
        self.flush()

    def on_train_end(self, args, state, control, **kwargs):
        self.flush()

    def flush(self) -> None:
        """Append the iteration that was collected."""
        if self._row:
            line = json.dumps(finite(self._row), allow_nan=False)
            with open_to_append(self.path) as file:
                file.write(f"{line}\n".encode())
            self.iterations = self._row["iteration"]
            self._row = {}


def _rewrite(path: Path, log: Sequence[Mapping[str, Any]]) -> float:
    """Make the lines of `metrics.jsonl` those of `log`, an entry per iteration, each at the time it had. -> the time of the last."""
    times: dict[int, float] = {}
    for line in read_regular(path).decode("utf-8", "replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            times[row["iteration"]] = float(row["seconds"])
        except (ValueError, KeyError, TypeError, RecursionError):  # half a line, where the process was ended
            continue
    rows, seconds = [], 0.0
    for entry in log:
        if "loss" in entry:
            seconds = times.get(entry["step"], seconds)
            rest = {key: value for key, value in entry.items() if key != "step"}
            rows.append({"iteration": entry["step"], "seconds": seconds, **rest})
    write_whole(path, "".join(f"{json.dumps(finite(row), allow_nan=False)}\n" for row in rows))
    return seconds
