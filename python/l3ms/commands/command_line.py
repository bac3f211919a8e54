"""The command `l3ms`.

Bad input ends with one line that names the field and exit code 2; a full disk with exit code 5; `--debug` shows the
traceback. torch and transformers are imported only by the commands that need them, so that `--help` is quick.
"""

from __future__ import annotations

import errno
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from l3ms.commands.bench import HELP as BENCH_HELP
from l3ms.commands.bench import bench
from l3ms.commands.verdicts import CERTIFY_HELP, CHECK_HELP, certify, check

BAD_INPUT, ENVIRONMENT, INTERRUPTED = 2, 5, 130

app = typer.Typer(
    name="l3ms",
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a language model on a task [bold]while it meets constraints[/bold] on its own responses.\n\n"
    "A constraint bounds the mean of a reward: the length of responses, or any function of yours. "
    "It is met by a logarithmic barrier: no penalty weights to tune, no second model in memory.",
    epilog="Start with [bold]l3ms demo[/bold] (minutes on a CPU, downloads nothing), then write a YAML file for "
    "[bold]l3ms train[/bold]: see [bold]l3ms train --help[/bold].",
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")]

TRAIN_HELP = """Run the constrained fine-tune that CONFIG describes.

[bold]A first CONFIG.yaml[/bold] (paths are relative to the file)

\b
    model: HuggingFaceTB/SmolLM2-135M-Instruct   # hub id, or a folder
    output: out/short
    data:
      train: train.jsonl   # lines of {"prompt", "completion"} or {"messages"}
    constraints:
      - {type: length, min: 50, max: 100}        # mean response, tokens
    train: {iterations: 200, learning_rate: 1e-5, batch_size: 8}

[bold]A reward of your own[/bold], f(prompts, completions, **kwargs) -> list of numbers, run with --allow-code:

\b
      - {type: function, name: polite, function: "my.py:polite", min: 0.8}

[bold]Other kinds[/bold]: the share of responses beyond a threshold, a classifier's score, the loss on other data, \
the divergence from the first weights, ready-made rewards.

\b
      - {type: length, name: long, threshold: 100, max: 0.05}
      - {type: reward_model, name: harmless, model: ./classifier, squash: tanh, min: 0.2}
      - {type: data_nll, name: general, data: {train: general.jsonl}, max: 2.1}
      - {type: kl, max: 5}
      - {type: reward, name: thanks, reward: contains, words: [thank you, thanks], min: 0.3}

[bold]Flags override the file[/bold]: every field has one, with dots between the levels.

\b
    l3ms train short.yaml --output out/shorter --constraints.0.max 60
    l3ms train short.yaml --train.learning-rate 3e-6 --train.lora.r 16

[bold]The run folder[/bold] gets config.yaml (resolved), metrics.jsonl, tensorboard/, model/ (last iterate), average/ \
(weights averaged over the last fifth: usually the ones you want), report.json and report.png, and until it ends \
checkpoints/, from which --resume goes on.
"""


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Debug = False,
) -> None:
    if version:
        typer.echo(f"l3ms {_version()}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _version() -> str:
    try:
        return metadata.version("l3m-kernels")
    except metadata.PackageNotFoundError:
        return "(run from a source tree that is not installed)"


@app.command(help=TRAIN_HELP)
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
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Allow importing the reward functions that CONFIG names.")
    ] = False,
    debug: Debug = False,
) -> None:
    from l3ms.config.run_config import ConfigError, load_config, parse_override

    if resume and overwrite:
        raise ConfigError("resume", "--resume goes on with a run and --overwrite replaces it: choose one")

    flags = {"model": model, "output": output, "train.iterations": iterations, "seed": seed}
    overrides: list[tuple[str, Any]] = [(field, value) for field, value in flags.items() if value is not None]
    overrides += [parse_override(flag, text) for flag, text in context.obj or []]
    settings = load_config(config, overrides)

    from l3ms.runs.executing import execute

    try:
        execute(settings, overwrite=overwrite, resume=resume, allow_code=allow_code)
    except KeyboardInterrupt as stop:
        raise _Interrupted(f"interrupted; {stop}" if str(stop) else "interrupted") from None


@app.command()
def demo(
    minimum: Annotated[float, typer.Option("--min", help="Lower bound on the mean response, tokens.")] = 12,
    maximum: Annotated[float, typer.Option("--max", help="Upper bound on the mean response, tokens.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data order, sampling and weights.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("out/demo"),
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Teach a small model to write docstrings of 12 to 16 tokens on average, on this machine, in a few minutes.

    Nothing is downloaded: the task is mined from the docstrings of the installed Python packages, and a small Llama \
    is pre-trained on them once and cached. Plain fine-tuning (SFT) and the constrained one (L3M) then start from the \
    same weights, and a table and a picture compare them.

    [bold]l3ms demo --min 40 --max 50 --output out/long[/bold]
    """
    from l3ms.demo.run import main as run_demo

    run_demo(min=minimum, max=maximum, seed=seed, output=output, overwrite=overwrite)


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Draw report.png again from a run's metrics.jsonl and report.json."""
    from l3ms.runs.report import plot_run

    typer.echo(plot_run(run))


app.command(help=CHECK_HELP)(check)
app.command(help=CERTIFY_HELP)(certify)
app.command(help=BENCH_HELP)(bench)


def main(arguments: list[str] | None = None) -> int:
    """Console entry: runs a command and returns the exit code, having said in one line what went wrong."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        overrides: list[tuple[str, str]] = []
        if next((word for word in arguments if not word.startswith("-")), "") == "train":
            arguments, overrides = split_overrides(arguments)
            if {"-h", "--help"} & set(arguments):
                _list_fields_in_help()
        code = app(arguments, prog_name="l3ms", standalone_mode=False, obj=overrides)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        return _fail(*_explain(error), debug)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code and says nothing
        return _fail("interrupted", INTERRUPTED, debug=False)
    return code if isinstance(code, int) else 0


def _list_fields_in_help() -> None:
    """End the help of `train` with every field and its default, from the models themselves."""
    from l3ms.config.run_config import list_fields

    rows = [f"    --{field.replace('_', '-'):38}{default}" for field, default in list_fields()]
    command = next(item for item in app.registered_commands if item.callback is train)
    command.help = f"{TRAIN_HELP}\n[bold]Every field and its default[/bold]\n\n\b\n" + "\n".join(rows)


def split_overrides(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Take `--section.field VALUE` and `--section.field=VALUE` (and whole sections) out of the arguments of `train`."""
    from l3ms.config.run_config import ConfigError, RunConfig

    named = {"model", "output", "seed"}  # real options of the command
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


class _Interrupted(Exception):
    """Ctrl-C, with what was kept; typer would drop the words of a KeyboardInterrupt."""


def _explain(error: Exception) -> tuple[str, int]:
    """(one line, exit code) for what a command raised."""
    if hasattr(error, "format_message"):  # wrong use of the command line, from typer
        return f"{error.format_message()} (see l3ms --help)", BAD_INPUT  # pyright: ignore[reportAttributeAccessIssue]
    text = str(error) or type(error).__name__
    if isinstance(error, _Interrupted):
        return text, INTERRUPTED
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return f"the disk is full: {text}", ENVIRONMENT
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {text}; smaller batch sizes or train.activation_checkpointing may help", ENVIRONMENT
    if isinstance(error, OSError):
        return text, ENVIRONMENT
    if isinstance(error, ValueError):
        return text, BAD_INPUT
    return f"{type(error).__name__}: {text} (--debug shows where)", 1


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"l3ms: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
