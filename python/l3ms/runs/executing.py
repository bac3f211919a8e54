"""Execute a run that was loaded: train, sample fresh responses to held-out prompts, and leave the run folder."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from l3ms.config.constraints import ConstraintConfig
from l3ms.config.run_config import RunConfig
from l3ms.config.yaml_reader import ConfigError
from l3ms.ranks import lookout
from l3ms.ranks.group import is_first, of_first, world
from l3ms.runs import resuming
from l3ms.runs.arguments import make_optimizer, named_optimizer
from l3ms.runs.engines import try_engine
from l3ms.runs.evaluating import Samples, evaluator, examples, kept
from l3ms.runs.fingerprints import BASE, of_base
from l3ms.runs.folder import MetricsWriter, alone_in, prepare_output, save_weights, write_config
from l3ms.runs.joining import join, same_folder
from l3ms.runs.labels import is_mean_length, solver_label
from l3ms.runs.loading import Run, load_run
from l3ms.runs.models import try_model
from l3ms.runs.progress import ProgressCallback
from l3ms.runs.report import examples_table, plot_run, read_report, summary_table, write_report
from l3ms.runs.terminal import say
from l3ms.runs.trackers import Trackers
from l3ms.runs.whole_files import remove
from l3ms.training import checkpoints
from l3ms.training.checkpoint_contents import CheckpointError
from l3ms.training.phase_summary import summary
from l3ms.training.trainer import L3MTrainer
from l3ms.watching.watch import Watch


def train(
    config: RunConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    allow_code: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Load and execute the run that `config` describes, and return its report. `ConfigError` for bad input, before anything is written.

    With `resume`, a run of the same configuration in the folder goes on from its newest valid checkpoint, and is, on a CPU, bit for bit
    the one that was not interrupted; one that is finished stays as it is; without one the run begins.

    Of several processes (torchrun, `accelerate launch`) each calls this, and all return the report; rank 0 writes it, and speaks.
    """
    console = join(config, console or Console(), overwrite=overwrite, resume=resume, allow_code=allow_code)
    if resume and of_first(lambda: resuming.is_finished(config)):
        return of_first(lambda: _finished(Path(config.output), console))
    return execute(
        load_run(config, overwrite=overwrite, resume=resume, allow_code=allow_code, console=console), console
    )


def execute(run: Run, console: Console) -> dict[str, Any]:
    """What a run is: samples of its model, a training, samples of the last weights and of their average, a report."""
    transformers.set_seed(run.config.seed)  # whatever was drawn while it was loaded
    trackers = Trackers(run.config, begun=bool(run.begun), console=console)
    trainer, metrics = _trainer(run, trackers, console)
    try_model(trainer.model, run.tokenizer, run.train.rows[0], run.config.train.temperature)
    try_engine(run.engine, trainer.model, run.tokenizer, run.train.rows[0], run.config.train.temperature)
    with trackers.running(trainer), ExitStack() as until_it_ends:
        of_first(trackers.begin)
        of_first(lambda: until_it_ends.enter_context(alone_in(run.folder)))
        of_first(lambda: _begin_folder(run, trackers))  # the first that is written: what can be refused has been
        same_folder(run.folder)
        samples = _train_and_sample(run, trainer, metrics, console)
        return of_first(lambda: _end(run, trainer, metrics, samples, trackers, console))


def _train_and_sample(run: Run, trainer: L3MTrainer, metrics: MetricsWriter, console: Console) -> dict[str, Samples]:
    """All of a run between its configuration and its report."""
    lookout.doing(lambda: f"iteration {trainer.state.global_step + 1}, {trainer.phases.now}")
    sample = evaluator(run, console)
    samples: dict[str, Samples] = {}
    try:
        if run.config.evaluate.initial:
            place = run.folder / "checkpoints" / "initial.json"
            samples["initial"] = kept(place, run, lambda: sample(trainer.model, "before training"))
        _go_on(run, trainer, console)
        averaged = trainer.averaged_model()
        for name, model in (("model", trainer.whole_model()), ("average", averaged)):
            if is_first():
                save_weights(run.folder, name, model, run.tokenizer)
        lookout.doing(lambda: "sampling, after the training")
        samples["last"] = sample(trainer.model, "last iterate")
        # A sharded model's average is on the CPU: where the model is it is sampled faster
        samples["average"] = sample(trainer.take_average() if trainer.sharded else averaged, "averaged weights")
    except KeyboardInterrupt:
        if not is_first():
            raise
        metrics.flush()
        raise KeyboardInterrupt(_kept(run.folder, metrics)) from None
    finally:
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "close"):  # of this run: progress, event files
                callback.close()
    return samples


def _end(
    run: Run,
    trainer: L3MTrainer,
    metrics: MetricsWriter,
    samples: dict[str, Samples],
    trackers: Trackers,
    console: Console,
) -> dict[str, Any]:
    """The report and the picture, written and shown."""
    report = _report(run, trainer, metrics, samples)
    trackers.summarise(report)
    picture = write_report(run.folder, report, {key: found.lengths for key, found in samples.items()})
    remove(run.folder / "checkpoints")
    console.print(summary_table(report), examples_table(report["examples"], report))
    say(console, f"Report and picture: {picture.with_suffix('.json')}, {picture}")
    return report


def _go_on(run: Run, trainer: L3MTrainer, console: Console) -> None:
    """Train from the newest checkpoint that can be gone on from; from the beginning where there is none."""
    if not run.begun:
        trainer.train()
    for path in run.begun:
        try:
            trainer.train(resume_from_checkpoint=str(path))
            return
        except CheckpointError as error:
            say(console, f"{path} is not used: {error}")
    if run.begun:
        raise ConfigError("resume", f"no checkpoint in {run.folder} can be gone on from; --overwrite begins anew")


def _begin_folder(run: Run, trackers: Trackers) -> None:
    """The first that is written: the configuration, and what the run starts from."""
    names = (
        ("config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "trackers.json", "emissions.csv")
        if run.begun
        else ()
    )
    prepare_output(run.folder, keep=names)
    write_config(run.folder, run.config.model_dump())
    trackers.write()
    resuming.write_inputs(run.folder, inputs_with_base(run))


def inputs_with_base(run: Run) -> dict[str, Any]:
    """What a run was begun with, and, of one with adapters, what those are of."""
    base = of_base(run.model)
    return run.inputs if base is None else {**run.inputs, BASE: base}


def _trainer(run: Run, trackers: Trackers, console: Console) -> tuple[L3MTrainer, MetricsWriter]:
    """The trainer with the run's callbacks, and the one that writes the log."""
    config = run.config
    metrics = MetricsWriter(run.folder / "metrics.jsonl")
    title = solver_label({"solver": config.train.solver})
    progress = ProgressCallback(bounds(config), title=title, console=console)
    callbacks: list[Any] = [metrics, progress, trackers, resuming.SavedAsNow()]
    if config.watch is not None:
        callbacks.append(Watch(config.watch, held_out=run.held_out.rows))
    if config.logging.tensorboard and not trackers.event_files and is_first():
        from l3ms.runs.event_files import EventFiles

        callbacks.append(EventFiles(run.folder / "tensorboard"))
    place = run.arguments.output_dir
    with tempfile.TemporaryDirectory() as elsewhere:  # transformers makes the folder at once
        run.arguments.output_dir = elsewhere
        trainer = L3MTrainer(
            model=run.model,
            args=run.arguments,
            train_dataset=run.train.rows,
            constraints=run.constraints,
            processing_class=run.tokenizer,
            engine=run.engine,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=named_optimizer(config),
        )
    run.arguments.output_dir = place
    make_optimizer(trainer)
    for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(callback)
    return trainer, metrics


def _finished(folder: Path, console: Console) -> dict[str, Any]:
    say(console, f"The run in {folder} is finished.")
    if not (folder / "report.png").exists():  # ended while it was being drawn
        plot_run(folder)
    report = read_report(folder)
    remove(folder / "checkpoints")
    return report


def _kept(folder: Path, metrics: MetricsWriter) -> str:
    """What an interrupted run leaves."""
    found = next(iter(checkpoints.checkpoints(folder / "checkpoints")), None)  # --resume verifies it
    weights = [str(folder / name) for name in ("model", "average") if (folder / name).is_dir()]
    parts = [f"{metrics.iterations} iterations in {metrics.path}", " and ".join(weights) or "no weights yet"]
    return f"kept: {', '.join(parts)}; " + ("no checkpoint" if found is None else f"--resume goes on from {found}")


def bounds(config: RunConfig) -> list[dict[str, Any]]:
    """What the report says of each constraint."""

    def of(item: ConstraintConfig) -> dict[str, Any]:
        share = {key: getattr(item, key, None) for key in ("threshold", "quantile")}
        relative = {"relative": True} if getattr(item, "relative", False) else {}
        return {"name": item.name, "type": item.type, "min": item.min, "max": item.max, **share, **relative}

    return [of(item) for item in config.constraints]


def wanted(config: RunConfig) -> dict[str, Any]:
    """What a report says was wanted: `constraints`, and as `bounds` those on the mean length."""
    items = bounds(config)
    length = next((item for item in items if is_mean_length(item)), {})
    return {"bounds": {"min": length.get("min"), "max": length.get("max")}, "constraints": items}


def _report(run: Run, trainer: L3MTrainer, metrics: MetricsWriter, samples: dict[str, Samples]) -> dict[str, Any]:
    """What the run was, how it went, and what its models say."""
    logs = [row for row in trainer.state.log_history if "l3m/skipped_steps" in row]
    report = {
        "seed": run.config.seed,
        "seconds": round(time.monotonic() - run.started + metrics.seconds_before, 1),
        "iterations": trainer.state.global_step,
        "solver": run.config.train.solver,
        **wanted(run.config),
        "skipped_steps": int(logs[-1]["l3m/skipped_steps"]) if logs else 0,
        "mu_end": logs[-1].get("l3m/mu") if logs else None,
        "average_from": trainer.average_from,
        "time": summary(trainer.state.log_history),
        **{key: found.summary for key, found in samples.items()},
    }
    if world() > 1:
        report["processes"] = world()
    for watch in trainer.watches:
        report |= {"tripped": watch.tripped, "conflicts": watch.conflicts}
    report["examples"] = examples(samples)
    return report
