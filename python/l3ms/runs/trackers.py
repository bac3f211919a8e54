"""The trackers of a run: begun before its first file is written, given each line of its log, and ended with the figures of its report.

Rank 0 has them. One that cannot begin ends the run before it begins; one that fails later is warned of, and the training goes on.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from l3ms.config.errors import blame
from l3ms.config.evaluate import LoggingConfig
from l3ms.config.run_config import RunConfig
from l3ms.config.yaml_reader import ConfigError
from l3ms.model.random_numbers import undrawn
from l3ms.ranks.group import is_first
from l3ms.regular_files import read_regular
from l3ms.runs.resuming import fields
from l3ms.runs.terminal import say
from l3ms.runs.tracker_kinds import KINDS, Outcome, TensorBoard, Tracker, transformers_callback
from l3ms.runs.whole_files import write_json

logger = logging.getLogger(__name__)

KNOWN = "trackers.json"  # in the run folder: how the run is known to each
PATIENCE = 10  # failures in a row after which a tracker is left alone: each may have waited for a server
MODELS = ("initial", "last", "average")


def check(config: RunConfig) -> None:
    """Raise `ConfigError` where a tracker is not installed, or cannot be told what the configuration has for it. Writes nothing."""
    for name in names_of(config.logging):
        if name != "tensorboard":
            transformers_callback(name)


def names_of(wanted: LoggingConfig) -> list[str]:
    """The trackers by name; of "all" those that are installed."""
    if wanted.trackers != ["all"]:
        return wanted.trackers
    names = [
        name
        for name in integration_utils.get_available_reporting_integrations()
        if not (name == "tensorboard" and not wanted.tensorboard)
    ]
    if "dagshub" in names:  # it is an MLflow
        names.remove("mlflow")
    if wrong := wanted.wrong(names):
        raise blame("logging", type(wanted).model_fields, wrong)
    return names


class Trackers(TrainerCallback):
    """All of one run; none on other ranks than the first.

    Args:
        begun: the run goes on: with the same one in each tracker that can.
    """

    def __init__(self, config: RunConfig, *, begun: bool, console: Console):
        self.config, self.console = config, console
        self.folder = Path(config.output)
        self.run_name = config.logging.run_name or self.folder.name
        self._goes_on = begun
        self._failed: dict[str, int] = {}  # calls that did
        self._in_a_row: dict[str, int] = {}
        self._left_alone: set[str] = set()
        self._table_at = 0
        names = names_of(config.logging) if is_first() else []
        self._before = self._known_before() if begun and names else {}
        # Inside Kubeflow the Trainer has its callback in any case
        self.trackers = [self._tracker(name, self._before.get(name, {})) for name in names if name != "kubeflow"]
        self._begun: list[Tracker] = []

    def _tracker(self, name: str, before: Mapping[str, str]) -> Tracker:
        told = (name, self.config.logging, self.run_name, before)
        if name == "tensorboard":
            return TensorBoard(*told, folder=self.folder / "tensorboard")
        return KINDS.get(name, Tracker)(*told)

    @property
    def event_files(self) -> bool:
        """Whether one of them writes TensorBoard's."""
        return any(isinstance(tracker, TensorBoard) for tracker in self.trackers)

    def _known_before(self) -> dict[str, dict[str, str]]:
        try:
            found = json.loads(read_regular(self.folder / KNOWN))
            return {
                name: known
                for name, known in found.items()
                if known and all(isinstance(value, str) for value in known.values())
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, RecursionError):
            raise ConfigError(
                "logging.report_to", f"{self.folder / KNOWN} cannot be read, which says how trackers know the run; without "
                "the file new runs are begun there"
            ) from None  # fmt: skip

    # ---- begin and end ----

    @contextmanager
    def running(self, trainer: Any) -> Iterator[None]:
        """From before the first file to the report. Whatever ends the run, each tracker is told how."""
        outcome: Outcome = "failed"
        self.trainer = trainer
        self.args = _with(trainer.args, _parameters(self.config), run_name=self.run_name)
        if self.config.logging.project is not None:
            self.args.project = self.config.logging.project
        try:
            yield
            outcome = "finished"
        except KeyboardInterrupt:
            outcome = "interrupted"
            raise
        finally:
            self._end(outcome)

    def begin(self) -> None:
        """Before anything is written. Raises `ConfigError` for one that does not begin: not logged in, no server."""
        state, control = self.trainer.state, self.trainer.control
        for tracker in self.trackers:
            try:
                with _environment(tracker.environment()), undrawn(self.trainer.policy.device):
                    tracker.begin(copy.copy(self.args), state, control, **self._of_trainer())
            except Exception as error:
                raise ConfigError("logging.report_to", f"{tracker.name} does not begin: {_line(error)}") from error
            self._begun.append(tracker)

    def write(self) -> None:
        """Into the run folder, how this run is known to each; said of a run that goes on."""
        known = {tracker.name: found for tracker in self.trackers if (found := tracker.known())}
        if known:
            write_json(self.folder / KNOWN, {**self._before, **known})
        for tracker in self.trackers:
            if self._goes_on and not isinstance(tracker, TensorBoard):
                said = f"goes on with its run {tracker.before['id']}" if tracker.before else "begins a new run"
                say(self.console, f"{tracker.name} {said}")

    def summarise(self, report: Mapping[str, Any]) -> None:
        """What the models of the run came to."""
        found = dict(_figures(report))
        state, control = self.trainer.state, self.trainer.control
        self._each(lambda tracker: tracker.summary(found, self.args, state, control, **self._of_trainer()))

    def _end(self, outcome: Outcome) -> None:
        state, control = self.trainer.state, self.trainer.control
        self._left_alone.clear()
        self._each(lambda tracker: tracker.end(outcome, self.args, state, control, **self._of_trainer()))
        self._begun = []
        for name, count in self._failed.items():
            if count > 1:
                logger.warning(
                    "%s has failed %d times: what it shows of the run is not whole; metrics.jsonl is", name, count
                )

    def _of_trainer(self) -> dict[str, Any]:
        return {"model": self.trainer.model, "processing_class": self.trainer.processing_class}

    # ---- while the run goes on ----

    def _each(self, call: Callable[[Tracker], None]) -> None:
        """An error of one is a warning, its first: it ends no training."""
        for tracker in self._begun:
            name = tracker.name
            if name in self._left_alone:
                continue
            try:
                with undrawn(self.trainer.policy.device):
                    call(tracker)
                self._in_a_row[name] = 0
            except Exception as error:
                self._in_a_row[name] = self._in_a_row.get(name, 0) + 1
                self._failed[name] = self._failed.get(name, 0) + 1
                if self._failed[name] == 1:
                    logger.warning("%s has failed, and the run goes on without it: %s", name, _line(error))
                if self._in_a_row[name] == PATIENCE:
                    self._left_alone.add(name)
                    logger.warning("%s has failed %d times in a row, and is given no more", name, PATIENCE)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The others have begun."""
        self._table_at = state.global_step
        for tracker in self.trackers:
            if isinstance(tracker, TensorBoard):
                tracker.callback.on_train_begin(self.args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Any, **kwargs: Any) -> None:
        self._each(lambda tracker: tracker.line(self.args, state, control, logs=dict(logs), **kwargs))
        wanted = self.config.logging
        due = state.global_step == state.max_steps or state.global_step >= self._table_at
        rollout = self.trainer.last_rollout
        if (
            not self._begun
            or "loss" not in logs
            or not wanted.completions
            or not due
            or not self.trainer.sampled
            or rollout is None
        ):
            return
        self._table_at = state.global_step + wanted.completions_every
        columns, rows = _completions(rollout, self.trainer.last_rewards, wanted.completions, state.global_step)
        self._each(lambda tracker: tracker.table(columns, rows, state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._each(lambda tracker: tracker.callback.on_step_end(self.args, state, control, **kwargs))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._each(lambda tracker: tracker.callback.on_save(self.args, state, control, **kwargs))


@contextmanager
def _environment(told: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _parameters(config: RunConfig) -> dict[str, Any]:
    """Of a run: its fields, by the names that the file and the flags have for them."""
    return dict(fields(config.model_dump(mode="json"), leave_out=()))


def _with(args: Any, parameters: Mapping[str, Any], **changed: Any) -> Any:
    """A copy of the trainer's arguments that shows `parameters` too, to whoever asks for all of them."""
    shown = copy.copy(args)
    for name, value in changed.items():
        setattr(shown, name, value)
    own = shown.to_dict
    shown.to_dict = lambda: {**own(), **parameters}
    shown.run_parameters = parameters
    return shown


def _completions(
    rollout: Any, rewards: Mapping[str, list[Any]], count: int, iteration: int
) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows) of the first `count` responses: of a conversation all turns."""
    names = [name for name, values in rewards.items() if len(values) == len(rollout.prompts)]
    ended = rollout.ended.tolist()
    rows = [
        [
            iteration, _text(prompt), _text(rollout.completions[row]), rollout.host_lengths[row], ended[row],
            *(rewards[name][row] for name in names),
        ]
        for row, prompt in enumerate(rollout.prompts[:count])
    ]  # fmt: skip
    return ["iteration", "prompt", "completion", "tokens", "ended", *(f"reward/{name}" for name in names)], rows


def _text(turns: Any) -> str:
    if isinstance(turns, str):
        return turns
    return "\n".join(f"{turn.get('role')}: {turn.get('content') or ''}" for turn in turns)


def _figures(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """`report/<model>/<figure>` of the models, and what the run has taken."""
    for model in MODELS:
        found = report.get(model) or {}
        figures = {
            "length": found.get("length", {}).get("mean"),
            "ended": found.get("ended"),
            "perplexity": found.get("perplexity"),
        }
        figures |= {
            f"constraints/{name}": value.get("mean") for name, value in (found.get("constraints") or {}).items()
        }
        yield from ((f"report/{model}/{name}", value) for name, value in figures.items() if _finite(value))
    yield from ((f"report/{name}", report[name]) for name in ("seconds", "skipped_steps") if _finite(report.get(name)))


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:500]
