"""Which process of several this is, as torchrun, `accelerate launch`, or whoever sets torch's variables of the environment, says it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

STARTED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")  # by MPI, or by srun
WAY_OUT = "start the processes with torchrun or accelerate launch"


class Launched(NamedTuple):
    """One of `world` processes; where all meet."""

    rank: int
    world: int
    local_rank: int  # among those of this machine
    address: str
    port: int
    agent: bool  # the launcher holds the store at this address; otherwise rank 0 does
    attempt: str  # of the launcher, which may start all again

    @property
    def holder(self) -> str:
        return "the launcher" if self.agent else "rank 0"


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """None where this process is alone.

    Raises:
        ValueError: it is one of several, and which one or where they meet is not said.
    """
    world = _number(environment, "WORLD_SIZE", 1)
    if world < 2:
        for name in STARTED if "WORLD_SIZE" not in environment else ():
            if _number(environment, name, 1) > 1:
                raise ValueError(
                    f"{name} is {environment[name]} and WORLD_SIZE is not set: {WAY_OUT}; WORLD_SIZE=1 for runs of their own"
                )
        return None
    rank = _number(environment, "RANK", None)
    if not 0 <= rank < world:
        raise ValueError(f"RANK must be at least 0 and below WORLD_SIZE ({world}), got {rank}: {WAY_OUT}")
    address = environment.get("MASTER_ADDR")
    if not address:
        raise ValueError(f"WORLD_SIZE is {world} and MASTER_ADDR is not set: {WAY_OUT}")
    return Launched(
        rank,
        world,
        _number(environment, "LOCAL_RANK", rank),
        address,
        _number(environment, "MASTER_PORT", None),
        environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        f"{environment.get('TORCHELASTIC_RUN_ID', '')}/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}",
    )


def _number(environment: Mapping[str, str], name: str, default: int | None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        wanted = f"{name} is {text!r}, wanted a number" if text else f"{name} is not set"
        raise ValueError(f"{wanted}: {WAY_OUT}")
    return int(text)
