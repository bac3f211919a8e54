"""`l3ms bench`: its options. torch is imported when they have been read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from l3ms.commands import bench_iteration
from l3ms.commands.options import Debug, wide_console

HELP = """Measure the fused head against what else there is, on the same tensors: time, memory, error.

Every contestant is checked against float64, then all take turns on inputs that are new in every round; memory is measured \
in a process of its own. Peers that are not installed, or need a GPU, are listed with the reason.

\b
    l3ms bench                                  # one case, a few minutes
    l3ms bench --shape 512,256,8000 --dtype fp32 --masked 0 --rounds 3
    l3ms bench --op no-grad --contestants cpp,eager,compile --plot a.png
    l3ms bench --scaling                        # time over rows, and over constraints
    l3ms bench --full --output bench/results    # everything: hours
    l3ms bench --device cuda --full             # on a GPU: in 8 minutes
    l3ms bench --op iteration                   # a whole iteration: ours, a plain loop, TRL's SFT and GRPO steps
    l3ms bench --op iteration --model real --yes --rounds 3

[bold]Peers[/bold]: pip install --no-deps liger-kernel cut-cross-entropy (they need nothing that is not here already); \
of iteration: pip install trl==1.16.0.
"""


def bench(
    op: Annotated[
        list[str] | None,
        typer.Option(help="weighted, log-likelihood, no-grad or frozen; may be repeated. Or iteration, by itself."),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="n,D,V", help="Rows, hidden size, vocabulary; may be repeated.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16 or fp32; may be repeated.")] = None,
    masked: Annotated[
        list[float] | None,
        typer.Option(help="Share of the rows that is not scored (prompts, padding); may be repeated."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    full: Annotated[bool, typer.Option("--full", help="All committed cases and the scaling tables.")] = False,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Time over rows and over constraints, instead of the cases.")
    ] = False,
    contestants: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Only these; wrong names list all.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Backend of l3m_kernels that ratios refer to; default: the one taken by itself.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=1, help="Time for all cases; who does not fit is left out and listed."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; slow contestants take part in fewer.")] = 5,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the inputs.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0: as many as torch takes.")] = 0,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory/--no-memory", help="Measure peak memory; without it nobody is left out for taking minutes."
        ),
    ] = True,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write results, versions and machine.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw time and memory.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for <device>.json, .md and .png.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="demo|real|NAME",
            help="Of iteration: the demos' (default: demo), a folder or a hub id.",
            show_default=False,
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Of --model real: download it without asking.")] = False,
    add: Annotated[bool, typer.Option("--add", help="Keep the other cases of the file in --output.")] = False,
    debug: Debug = False,
) -> None:
    """Options to a `Plan`, and its execution."""
    from l3ms.benchmark.device import missing
    from l3ms.benchmark.shapes import FULL, GPU_BUDGET, GPU_FULL, select_cases
    from l3ms.config.named_files import check_place, check_writable
    from l3ms.config.yaml_reader import ConfigError

    named = {"--op": op, "--shape": shape, "--dtype": dtype, "--masked": masked, "--scaling": scaling}
    if full and (extra := [option for option, value in named.items() if value]):
        raise ConfigError("--full", f"says which cases are measured; leave out {', '.join(extra)}")
    if scaling:
        _check_scaling(named, {"--plot": plot, "--budget": budget, "--no-memory": not memory})
    if add and output is None:
        raise ConfigError("--add", "needs --output: the folder whose file is added to")
    if device not in ("cpu", "cuda"):
        raise ConfigError("--device", f"must be cpu or cuda, got {device!r}")
    if device == "cuda" and (why := missing()):
        raise ConfigError("--device", f"cuda cannot be measured here: {why}")
    names = tuple(name for name in (contestants or "").replace(" ", "").split(",") if name)
    iteration = "iteration" in (op or [])
    if iteration:
        of_the_head = {key: value for key, value in named.items() if key != "--op"}
        of_the_head |= {"--backend": backend, "--plot": plot, "--budget": budget, "--no-memory": not memory}
        bench_iteration.check_options(op or [], of_the_head, names)
    elif model or yes:
        raise ConfigError("--model" if model else "--yes", "is of --op iteration")
    everything = FULL if device == "cpu" else GPU_FULL
    chosen = [] if iteration else op or []
    cases = everything if full else select_cases(chosen, shape or [], dtype or [], masked or [], device)
    for option, path, ending in (("--plot", plot, ".png"), ("--json", json, ".json")):
        if path is not None and path.suffix.lower() != ending:
            raise ConfigError(option, f"must be a {ending} file, got {path}")
        if path is not None:
            check_writable(option, path)
    if output is not None:
        check_place("--output", output)

    from l3ms.benchmark.run import Plan, execute, scaling_case

    plan = Plan(
        cases=() if scaling or iteration else cases,
        contestants=names,
        backend=backend,
        rounds=rounds,
        seed=seed,
        threads=threads,
        memory=memory,
        scaling=scaling_case(cases) if (full and device == "cpu") or scaling else None,
        scaling_rows=_rows(shape, cases),
        json=json,
        plot=plot,
        output=output,
        add=add,
        device=device,
        budget=GPU_BUDGET if budget is None and full and device == "cuda" else budget,
    )
    if iteration:
        bench_iteration.execute(plan, model or "demo", yes, wide_console())
        return
    execute(plan, wide_console())


def _check_scaling(named: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """ConfigError for what the two tables have no use for."""
    from l3ms.config.yaml_reader import ConfigError

    if extra := [option for option in ("--op", "--masked") if named[option]]:
        raise ConfigError("--scaling", f"measures weighted with all rows scored; leave out {', '.join(extra)}")
    if extra := [option for option, value in others.items() if value]:
        raise ConfigError("--scaling", f"takes no {', '.join(extra)}: those are of the cases")
    for option in ("--shape", "--dtype"):
        if len(named[option] or []) > 1:
            raise ConfigError(option, f"must be one with --scaling, got {' and '.join(named[option])}")


def _rows(shape: list[str] | None, cases) -> tuple[int, ...]:
    """Rows of the scaling table: the committed ones, up to those of --shape."""
    from l3ms.benchmark.shapes import SCALING_ROWS

    if not shape:
        return SCALING_ROWS
    most = cases[0].shape.rows
    return tuple(dict.fromkeys([*(rows for rows in SCALING_ROWS if rows < most), most]))
