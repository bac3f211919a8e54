"""`l3ms certify`. torch is imported when its options have been read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from l3ms.commands import launching
from l3ms.commands.options import AllowCode, Debug, wide_console

HELP = """Say whether a run meets its constraints: from fresh responses to held-out prompts, with a stated probability of error.

Each bound gets a one-sided confidence bound of the mean, and with all of them together no verdict is wrong with probability 1 - delta.

\b
    SATISFIED     the confidence bound is within the bound   exit 0, if all are
    VIOLATED      the opposite one is beyond it              exit 3, if any is
    INCONCLUSIVE  neither: it says how many more samples     exit 4

\b
    l3ms certify out/short
    l3ms certify out/short --samples 4096 --delta 0.01 --prompts more.jsonl
    l3ms certify out/short --prices             # and what each bound costs the task

[bold]How bounds are made[/bold] is fixed before sampling: Clopper-Pearson for values of 0 and 1 (chance constraints), empirical Bernstein \
where the range of the values is known and narrow enough for the number of samples, Student's t otherwise. The first two hold for any \
number of samples, the last one as it grows. The range of a length is [1, train.max_new_tokens]; --range declares that of a reward.

More samples than held-out prompts are several responses per prompt; they do not count as independent, \
unless all are of one prompt: the certificate is then of this prompt alone.
""" + launching.HELP.format(command="certify out/run")


def certify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)],
    weights: Annotated[str, typer.Option(help="average or last.")] = "average",
    samples: Annotated[
        int | None,
        typer.Option(help="Responses; default: one to each held-out prompt, at most 1024.", show_default=False),
    ] = None,
    delta: Annotated[float, typer.Option(help="Probability that any verdict is wrong, at most.")] = 0.05,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Prompts, instead of the run's held-out rows.", show_default=False),
    ] = None,
    method: Annotated[str, typer.Option(help="auto, bernstein or t.")] = "auto",
    reward_range: Annotated[
        list[str] | None,
        typer.Option("--range", metavar="NAME=LOW,HIGH", help="Range of a constraint's values; may be repeated."),
    ] = None,
    prices: Annotated[
        bool, typer.Option("--prices", help="What each bound costs the task, from probe gradients.")
    ] = False,
    probes: Annotated[
        int | None,
        typer.Option(min=32, help="Responses, and task rows, for the prices; default: 512.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    engine: Annotated[
        str | None,
        typer.Option(help="transformers: the model samples itself; default: the run's own.", show_default=False),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The certificate; default: RUN/certificate.json.", show_default=False),
    ] = None,
    allow_code: AllowCode = False,
    debug: Debug = False,
) -> int:
    """Options to `CertifyOptions`; the exit code says the verdict."""
    from l3ms.verdicts.certifying import EXIT_CODES
    from l3ms.verdicts.certifying import certify as execute
    from l3ms.verdicts.options import CertifyOptions

    options = CertifyOptions(
        weights=weights, samples=samples, delta=delta, prompts=prompts, seed=seed, method=method,
        ranges=_ranges(reward_range or []), json=json, allow_code=allow_code, prices=prices, probes=probes,
        engine=engine,
    )  # fmt: skip
    return EXIT_CODES[execute(run, options, console=wide_console())["verdict"]]


def _ranges(texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    from l3ms.config.yaml_reader import ConfigError

    found: dict[str, tuple[float, float]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        try:
            low, high = (float(value) for value in values.split(","))
        except ValueError:
            raise ConfigError("--range", f"wanted NAME=LOW,HIGH, got {text!r}") from None
        if name in found:
            raise ConfigError("--range", f"{name!r} has two of them, wanted one")
        found[name] = (low, high)
    return found
