"""A command on several processes (torchrun, `accelerate launch`): one line and one exit code for all, whichever of them it comes from."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from l3ms.commands.ending import BAD_INPUT, ENVIRONMENT, INTERRUPTED, broken_off, explain
from l3ms.ranks.launched import Launched, launched

TOGETHER = ("train", "check", "certify")  # commands of which each process does a part
HELP = """
[bold]On several processes[/bold] of one machine or more, data parallel (DDP), each with `batch_size` and `constraint_batch_size` rows \
of its own:

\\b
    torchrun --nproc-per-node 4 -m l3ms {command}
    accelerate launch --multi-gpu --num-processes 4 -m l3ms {command}     # on CPUs too; with --cpu it starts one process
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 -m l3ms {command}

Machines share the folder of the run. Rank 0 writes and speaks; a run begins where all have the same packages, configuration, weights and \
data. What ends one process ends all, with its one line and exit code; one that is killed, or silent for train.timeout seconds, is named \
(exit 5). Launchers have an exit code of their own, 1 for any other than 0.
"""


def place_of(arguments: Sequence[str], command: str) -> Launched | None:
    """Where this process is among those that run the command together; None where it runs alone, or needs nobody.

    Raises:
        ValueError: the command is one for one process, or the environment does not say which process this is.
    """
    place = launched()
    if place is None or command not in TOGETHER or {"-h", "--help"} & set(arguments):
        if place is not None and command and command not in TOGETHER and not {"-h", "--help"} & set(arguments):
            raise ValueError(
                f"WORLD_SIZE: l3ms {command} is for one process, got {place.world}: start it without a launcher"
            )
        return None
    return place


def silent() -> bool:
    """Whether another process says what is the same on all."""
    return os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"


def together(place: Launched, run: Callable[[], int], *, debug: bool) -> int:
    """The exit code of `run` on all processes. What one of them raises ends them all."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of connections that end with a process, which is said here
    if place.rank:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    from l3ms.ranks import group, lookout

    try:
        watching = lookout.begin(place)
    except Exception as error:
        where = f"{place.address}:{place.port}"
        reason = " ".join(str(error).split())[:200]
        print(f"l3ms: rank {place.rank}: {place.holder} cannot be reached at {where}: {reason}", file=sys.stderr)
        return ENVIRONMENT
    try:
        code = watching.finish(run())
        group.leave()
        return code
    except KeyboardInterrupt:
        watching.fail("interrupted", INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
            sys.stderr.flush()
        elsewhere = group.is_elsewhere(error)
        line, code = explain(error)
        watching.fail(broken_off(line) if elsewhere else line, code, elsewhere=elsewhere)
    return BAD_INPUT
