"""A tracker of `logging.report_to`: transformers' callback for it, and what that leaves out.

That is: a new run or the one of before, the tags, a table of completions, the figures of the report, and an end that says how it came.
What a callback reads from the environment it is told there, while it begins.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from transformers.integrations import integration_utils

from l3ms.config.evaluate import LoggingConfig
from l3ms.config.yaml_reader import ConfigError

Outcome = Literal["finished", "interrupted", "failed"]


class Tracker:
    """One of those that transformers knows.

    Attributes:
        callback: transformers'.
        before: how the run of before is known there, of one that goes on; empty where a new one is begun.
    """

    project_variable: str | None = None
    goes_on = False  # whether a run can be gone on with

    def __init__(self, name: str, logging: LoggingConfig, run_name: str, before: Mapping[str, str]):
        self.name, self.logging, self.run_name = name, logging, run_name
        self.before = dict(before) if self.goes_on else {}
        self.callback: Any = self._made()

    def _made(self) -> Any:
        return transformers_callback(self.name)

    def environment(self) -> dict[str, str]:
        """What it is told while it begins."""
        project = self.logging.project
        return {self.project_variable: project} if self.project_variable and project else {}

    def begin(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        self.callback.on_init_end(args, state, control, **of_trainer)
        self.callback.on_train_begin(args, state, control, **of_trainer)

    def known(self) -> dict[str, str]:
        """How this run is known there; what `before` is, when it goes on."""
        return {}

    def line(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        """Of the log."""
        self.callback.on_log(args, state, control, **values)

    def table(self, columns: Sequence[str], rows: list[list[Any]], iteration: int) -> None:
        """Completions, where it has tables."""

    def summary(self, figures: Mapping[str, float], args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        """Of the report; where there is no summary they are of the last iteration."""
        self.line(args, state, control, logs=dict(figures), **of_trainer)

    def end(self, outcome: Outcome, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        self.callback.on_train_end(args, state, control, **of_trainer)


class Wandb(Tracker):
    goes_on = True

    def begin(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        """The run itself is begun here: what wandb reads of the environment it reads once in a process."""
        self._wandb = importlib.import_module("wandb")
        self._own = self._wandb.run is None  # else one that was begun by who calls us, who ends it
        if self._own:
            tags = [*os.environ.get("WANDB_TAGS", "").split(","), *self.logging.tags]
            options: dict[str, Any] = {"tags": list(dict.fromkeys(filter(None, tags)))} if any(tags) else {}
            if self.before and "WANDB_RUN_ID" not in os.environ:
                options |= {"id": self.before["id"], "resume": "allow"}
            project = self.logging.project or os.environ.get("WANDB_PROJECT", "huggingface")
            self._wandb.init(project=project, name=self.run_name, **options)
        super().begin(args, state, control, **of_trainer)

    def known(self) -> dict[str, str]:
        return {"id": self._wandb.run.id}

    def table(self, columns: Sequence[str], rows: list[list[Any]], iteration: int) -> None:
        table = self._wandb.Table(columns=list(columns), data=rows)
        self._wandb.log({"completions": table, "train/global_step": iteration})

    def summary(self, figures: Mapping[str, float], *_: Any, **__: Any) -> None:
        self._wandb.run.summary.update(dict(figures))

    def end(self, outcome: Outcome, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        if outcome == "finished":  # it may keep the model
            super().end(outcome, args, state, control, **of_trainer)
        if self._own:
            self._wandb.finish(exit_code={"finished": 0, "interrupted": 130}.get(outcome, 1))


class MLflow(Tracker):
    """And DagsHub, which is one."""

    project_variable, goes_on = "MLFLOW_EXPERIMENT_NAME", True

    def environment(self) -> dict[str, str]:
        told = super().environment()
        if self.logging.tags:
            tags = json.loads(os.environ.get("MLFLOW_TAGS") or "{}")
            told["MLFLOW_TAGS"] = json.dumps({**tags, **dict.fromkeys(self.logging.tags, "true")})
        if self.before and "MLFLOW_RUN_ID" not in os.environ:
            told["MLFLOW_RUN_ID"] = self.before["id"]
        return told

    def begin(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._own = self._mlflow.active_run() is None
        self.callback._ml_flow = _AtOnce(self._mlflow)
        if self.before:  # a parameter that is there already must not change: it stays what the run was begun with
            there = self._mlflow.MlflowClient().get_run(self.before["id"]).data.params
            every = args.to_dict
            args.to_dict = lambda: {name: value for name, value in every().items() if name not in there}
        super().begin(args, state, control, **of_trainer)

    def known(self) -> dict[str, str]:
        return {"id": self._mlflow.active_run().info.run_id}

    def table(self, columns: Sequence[str], rows: list[list[Any]], iteration: int) -> None:
        data = {column: [row[at] for row in rows] for at, column in enumerate(columns)}
        self._mlflow.log_table(data=data, artifact_file="completions.json")  # appends to what is there

    def summary(self, figures: Mapping[str, float], args: Any, state: Any, *_: Any, **__: Any) -> None:
        self._mlflow.log_metrics(dict(figures), step=state.global_step)

    def end(self, outcome: Outcome, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        if self._own:
            status = {"finished": "FINISHED", "interrupted": "KILLED"}.get(outcome, "FAILED")
            self._mlflow.end_run(status)
        self.callback._auto_end_run = (
            False  # as FINISHED, whatever came, and whichever run is active when it is collected
        )
        super().end(outcome, args, state, control, **of_trainer)


class _AtOnce:
    """MLflow without its queue, in which the first error ends all that follows, and is heard of by nobody."""

    def __init__(self, module: Any):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def log_params(self, params: dict[str, Any], **_: Any) -> Any:
        return self._module.log_params(params)

    def log_metrics(self, metrics: dict[str, float], step: int, **_: Any) -> Any:
        return self._module.log_metrics(metrics, step=step)


class Trackio(Tracker):
    goes_on = True

    def begin(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        self._trackio = importlib.import_module("trackio")
        self.callback._trackio = _NewOrKnown(self._trackio, "must" if self.before else "never")
        super().begin(args, state, control, **of_trainer)
        if self.before and self._run.id != self.before["id"]:
            self._trackio.finish()
            raise ValueError(
                f"another run of the name {self._run.name!r} has begun in its project since, and runs are gone on with "
                "by name: give logging.run_name a new one"
            )

    @property
    def _run(self) -> Any:
        return self._trackio.context_vars.current_run.get()

    def known(self) -> dict[str, str]:
        return {"id": self._run.id, "name": self._run.name}

    def line(self, args: Any, state: Any, control: Any, *, logs: dict[str, Any], **_: Any) -> None:
        """At its iteration: transformers' callback leaves it to trackio to count the lines."""
        self._log(integration_utils.rewrite_logs(logs), state.global_step)

    def table(self, columns: Sequence[str], rows: list[list[Any]], iteration: int) -> None:
        self._log({"completions": self._trackio.Table(columns=list(columns), data=rows)}, iteration)

    def summary(self, figures: Mapping[str, float], args: Any, state: Any, *_: Any, **__: Any) -> None:
        self._log(dict(figures), state.global_step)

    def _log(self, values: dict[str, Any], iteration: int) -> None:
        self._trackio.log({**values, "train/global_step": iteration}, step=iteration)


class _NewOrKnown:
    """trackio, but for what of equally named runs `init` begins: transformers' callback goes on with whichever is there."""

    def __init__(self, module: Any, resume: str):
        self._module, self._resume = module, resume

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def init(self, **options: Any) -> Any:
        return self._module.init(**{**options, "resume": self._resume})


class TensorBoard(Tracker):
    """The event files of the run folder, with more in them: parameters, completions, figures."""

    def __init__(self, *args: Any, folder: Path):
        self.folder = folder
        super().__init__(*args)

    def _made(self) -> Any:
        from l3ms.runs.event_files import EventFiles

        return EventFiles(self.folder)

    def begin(self, *_: Any, **__: Any) -> None:
        """With the training: it must know from which iteration on."""

    def table(self, columns: Sequence[str], rows: list[list[Any]], iteration: int) -> None:
        cells = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in (columns, *rows)]
        lines = [f"| {' | '.join(row)} |" for row in (cells[0], ["---"] * len(columns), *cells[1:])]
        self.callback.tb_writer.add_text("completions", "\n".join(lines), iteration)

    def summary(self, figures: Mapping[str, float], args: Any, state: Any, *_: Any, **__: Any) -> None:
        for name, value in figures.items():
            self.callback.tb_writer.add_scalar(name, value, state.global_step)

    def end(self, *_: Any, **__: Any) -> None:
        self.callback.close()


class Comet(Tracker):
    project_variable = "COMET_PROJECT_NAME"

    def begin(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        super().begin(args, state, control, **of_trainer)
        if self.logging.tags:
            importlib.import_module("comet_ml").get_running_experiment().add_tags(self.logging.tags)


class ClearML(Tracker):
    project_variable = "CLEARML_PROJECT"

    def environment(self) -> dict[str, str]:
        upload = os.environ.get("CLEARML_LOG_MODEL", "FALSE")  # as transformers says it is, and is not
        return {"CLEARML_TASK": self.run_name, "CLEARML_LOG_MODEL": upload, **super().environment()}

    def begin(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        super().begin(args, state, control, **of_trainer)
        task = importlib.import_module("clearml").Task.current_task()
        task.connect(dict(args.run_parameters), name="run")  # of the arguments it is shown the fields alone
        if self.logging.tags:
            task.add_tags(self.logging.tags)


class SwanLab(Tracker):
    def begin(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        """The run itself is begun here: transformers' callback asks for one in a way that newer ones answer with an error."""
        self._swanlab = importlib.import_module("swanlab")
        try:
            self._own = self._swanlab.get_run() is None
        except RuntimeError:
            self._own = True
        if self._own:
            options = {"project": self.logging.project, "tags": self.logging.tags}
            given = {name: value for name, value in options.items() if value}
            self._swanlab.init(experiment_name=self.run_name, **given)
        super().begin(args, state, control, **of_trainer)

    def end(self, outcome: Outcome, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        super().end(outcome, args, state, control, **of_trainer)
        if self._own:
            ends = {"finished": {}, "interrupted": {"state": "aborted"}}
            self._swanlab.finish(**ends.get(outcome, {"state": "crashed", "error": "the run has failed"}))


class Neptune(Tracker):
    def _made(self) -> Any:
        options = {"project": self.logging.project, "tags": self.logging.tags or None, "name": self.run_name}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that transformers will have no callback for it one day
            return transformers_callback(self.name, **{name: value for name, value in options.items() if value})


class CodeCarbon(Tracker):
    """emissions.csv, in the run folder."""

    project_variable = "CODECARBON_PROJECT_NAME"

    def begin(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        args.output_dir = str(Path(args.output_dir).parent)  # the folder of the checkpoints goes when the run has ended
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        super().begin(args, state, control, **of_trainer)


class DVCLive(Tracker):
    def line(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        self.callback.live.step = state.global_step  # it counts the lines
        super().line(args, state, control, **values)


KINDS: Mapping[str, type[Tracker]] = MappingProxyType(
    {
        "wandb": Wandb, "mlflow": MLflow, "dagshub": MLflow, "trackio": Trackio, "tensorboard": TensorBoard,
        "comet_ml": Comet, "clearml": ClearML, "swanlab": SwanLab, "neptune": Neptune, "codecarbon": CodeCarbon,
        "dvclive": DVCLive,
    }
)  # fmt: skip


def transformers_callback(name: str, **options: Any) -> Any:
    """Raises `ConfigError` where the package is missing, or this transformers does not know it; transformers says what to install."""
    kind = integration_utils.INTEGRATION_TO_CALLBACK.get(name)
    if kind is None:
        raise ConfigError("logging.report_to", f"the transformers installed here knows no {name}: install a newer one")
    try:
        return kind(**options)
    except Exception as error:  # of a package of somebody else, when it is imported
        raise ConfigError("logging.report_to", f"{name} cannot be used here: {error or type(error).__name__}") from None
