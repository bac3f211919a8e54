"""`l3ms train`. torch is imported when the configuration has been read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l3ms.commands import launching
from l3ms.commands.ending import Interrupted
from l3ms.commands.options import AllowCode, Debug, Overwrite

HELP = """Run the constrained fine-tune that CONFIG describes.

[bold]A first CONFIG.yaml[/bold] (paths are relative to the file)

\b
    model: HuggingFaceTB/SmolLM2-135M-Instruct   # hub id, or a folder
    output: out/short
    data:
      train: train.jsonl   # lines of {"prompt", "completion"}, {"messages"} or {"text"}
    constraints:
      - {type: length, min: 50, max: 100}        # mean response, tokens
    train: {iterations: 200, learning_rate: 1e-5, batch_size: 8}

[bold]A reward of your own[/bold], f(prompts, completions, **kwargs) -> list of numbers, run with --allow-code:

\b
      - {type: function, name: polite, function: "my.py:polite", min: 0.8}

[bold]Other kinds[/bold]: a quantile, the share of responses beyond a threshold, a classifier's score, the loss on other data, \
the divergence from the first weights, ready-made rewards.

\b
      - {type: length, name: not-short, quantile: 0.05, min: 4}   # at most 5% of the responses below 4 tokens
      - {type: length, name: long, threshold: 100, max: 0.05}
      - {type: reward_model, name: harmless, model: ./classifier, squash: tanh, min: 0.2}
      - {type: data_nll, name: general, data: {train: general.jsonl}, max: 2.1}
      - {type: kl, max: 5}
      - {type: reward, name: thanks, reward: contains, words: [thank you, thanks], min: 0.3}

[bold]Data[/bold] may be several files, [a.jsonl, "more/*.jsonl.gz", b.csv]: JSON lines or arrays (also .gz), CSV, Parquet, or the name of \
a data set that `datasets` loads. Chat templates get the column `tools` and all that messages hold.

[bold]Flags override the file[/bold]: every field has one, with dots between the levels.

\b
    l3ms train short.yaml --output out/shorter --constraints.0.max 60
    l3ms train short.yaml --train.learning-rate 3e-6 --train.lora.r 16

[bold]Trackers[/bold]: wandb, mlflow, trackio, and whichever transformers knows, with the responses in tables.

\b
    l3ms train short.yaml --logging.report-to wandb --logging.project lengths --logging.tags "[first]"

[bold]The run folder[/bold] gets config.yaml (resolved), metrics.jsonl, tensorboard/, model/ (last iterate), average/ \
(weights averaged over the last fifth: usually the ones you want), report.json and report.png, and until it ends \
checkpoints/, from which --resume goes on.
""" + launching.HELP.format(command="train run.yaml")


def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the run.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a causal language model.")] = None,
    output: Annotated[str | None, typer.Option(help="Run folder (relative to where you are).")] = None,
    iterations: Annotated[int | None, typer.Option(help="Same as --train.iterations.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the data order, the sampling and the weights.")] = None,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in the output folder, or begin it: after a kill, the same again."
        ),
    ] = False,
    allow_code: AllowCode = False,
    debug: Debug = False,
) -> None:
    """Options to a configuration, and its run."""
    from l3ms.config.run_config import ConfigError, load_config, parse_override

    if resume and overwrite:
        raise ConfigError("resume", "--resume goes on with a run and --overwrite replaces it: choose one")

    flags = {"model": model, "output": output, "train.iterations": iterations, "seed": seed}
    overrides = [parse_override(flag, text) for flag, text in context.obj or []]
    if iterations is not None and (twice := {"train", "train.iterations"} & {field for field, _ in overrides}):
        raise ConfigError(
            "train.iterations", f"is given twice, by --iterations and by --{min(twice)}: leave one of them out"
        )
    settings = load_config(config, [(field, value) for field, value in flags.items() if value is not None] + overrides)

    from l3ms.runs import executing

    try:
        executing.train(settings, overwrite=overwrite, resume=resume, allow_code=allow_code)
    except KeyboardInterrupt as stop:
        raise Interrupted(f"interrupted; {stop}" if str(stop) else "interrupted") from None


def help_with_fields() -> str:
    """The help, and every field with its default, from the models themselves."""
    from l3ms.config.run_config import list_fields

    rows = [f"    --{field.replace('_', '-'):38}{default}" for field, default in list_fields()]
    return f"{HELP}\n[bold]Every field and its default[/bold]\n\n\b\n" + "\n".join(rows)


NAMED = frozenset({"model", "output", "seed"})  # fields that are options of the command


def split_overrides(arguments: list[str], named: frozenset[str] = NAMED) -> tuple[list[str], list[tuple[str, str]]]:
    """Take `--section.field VALUE` and `--section.field=VALUE` (and whole sections) out of the arguments, but for the `named` fields."""
    from l3ms.config.run_config import ConfigError, RunConfig

    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    queue = iter(arguments)
    for argument in queue:
        flag, equals, value = argument.partition("=")
        field = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or ("." not in field and (field in named or field not in RunConfig.model_fields)):
            rest.append(argument)
            continue
        if not equals:
            value = next(queue, "--")
            if value.startswith("--"):
                raise ConfigError(field, f"the flag {flag} needs a value")
        overrides.append((flag, value))
    return rest, overrides
