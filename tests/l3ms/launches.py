"""`l3ms` on several processes, many times over: torch and transformers are imported once, and each process is a fork that runs one command.

As a program, under torchrun, `launches.py PLAN.json` forks its own rank; `Launch` forks all of them, as somebody does who sets torch's
variables by hand. PLAN is {"commands": [[ARGUMENTS, ENVIRONMENT], ...], "folder"}; rank R's exit code and
output of command N are in folder/N-R.json. ARGUMENTS of each rank may be its own.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from forks import forked
from rank_forks import free_port


def load():
    """What a process of a run needs, before it is forked; nothing of it starts a thread."""
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command sets it, before it imports torch
    import matplotlib.pyplot  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    import l3ms.commands.command_line
    import l3ms.runs.executing
    import l3ms.verdicts.certifying
    import l3ms.verdicts.checking  # noqa: F401

    torch.set_num_threads(1)


def fork(arguments, place, output):
    """Run `l3ms ARGUMENTS` in a process of its own, whose environment has `place` as well. -> its id"""

    def command():
        os.environ.update({name: str(value) for name, value in place.items()})
        import broken_ranks

        from l3ms.commands.command_line import main

        broken_ranks.apply()
        return main([str(word) for word in arguments])

    return forked(command, Path(f"{output}.err"), Path(f"{output}.out"), failed=99)


class Launch:
    """`world` processes that were started by hand with the same arguments, or each with its own."""

    def __init__(self, world, arguments, folder, environment=()):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        shared = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **dict(environment)}
        each = arguments if isinstance(arguments[0], list) else [arguments] * world
        self.codes = {}
        self.ended = {}
        self.processes = {
            rank: fork(each[rank], {**shared, "RANK": rank, "LOCAL_RANK": rank}, self.folder / str(rank))
            for rank in range(world)
        }

    def wait(self, seconds, but=()):
        """Until all have ended, `but` for some; -> by rank the exit codes, negative for a signal, as far as there are any."""
        begin = time.monotonic()
        while time.monotonic() - begin < seconds and self.processes.keys() - self.codes.keys() - set(but):
            self.poll()
            time.sleep(0.05)
        return dict(self.codes)

    def poll(self):
        for rank, process in self.processes.items():
            if rank not in self.codes and (found := os.waitpid(process, os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(found[1])
                self.ended[rank] = time.monotonic()

    def signal(self, rank, number):
        os.kill(self.processes[rank], number)
        return time.monotonic()

    def end(self):
        self.poll()
        for rank in self.processes.keys() - self.codes.keys():
            self.signal(rank, signal.SIGKILL)
        self.wait(10)

    def errors(self):
        """What all have written to stderr."""
        return "".join((self.folder / f"{rank}.err").read_text() for rank in self.processes)


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text())
    rank = int(os.environ["RANK"])
    load()
    for number, (arguments, environment) in enumerate(plan["commands"]):
        if isinstance(arguments[0], list):  # each rank its own
            arguments = arguments[rank]
        output = Path(plan["folder"]) / f"{number}-{rank}"
        # of the launcher's store each command has keys of its own, as when torchrun starts all again
        _, status = os.waitpid(fork(arguments, {**environment, "TORCHELASTIC_RESTART_COUNT": number}, output), 0)
        texts = {end: Path(f"{output}.{end}").read_text() for end in ("out", "err")}
        found = {"code": os.waitstatus_to_exitcode(status), **texts}
        Path(f"{output}.json").write_text(json.dumps(found))
