"""Programs on several ranks: a process imports one of them, and each rank is a fork of it, which finds its place as under torchrun.

python rank_forks.py MODULE WORLD [ARGUMENT ...]: each rank calls MODULE.main(ARGUMENT, ...). One that ends badly ends the others.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys

from forks import forked


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(module: str, world: int, *arguments: object, seconds: float = 240) -> None:
    """Run it until all ranks have ended well; AssertionError where one has not. One rank alone has no place in the environment."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    if world > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    command = [sys.executable, __file__, module, str(world), *map(str, arguments)]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            assert process.wait(timeout=seconds) == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _rank(module: str, rank: int, world: int, arguments: list[str]) -> int:
    """-> its process."""

    def act() -> None:
        if world > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        importlib.import_module(module).main(*arguments)

    return forked(act)


if __name__ == "__main__":
    name, size, *words = sys.argv[1:]
    importlib.import_module(name)
    processes = {_rank(name, rank, int(size), words) for rank in range(int(size))}
    failed = 0
    while processes:
        ended, status = os.wait()
        processes.discard(ended)
        if status:
            failed = 1
            for process in processes:
                os.kill(process, signal.SIGKILL)
    sys.exit(failed)
