"""The examples for several processes, one after the other, in one process group: `torchrun several_processes.py MODEL ROWS.jsonl`.

printed.json has what they print.
"""

import ast
import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import ranks_loop
import tensor_parallel
import torch
import torch.distributed as dist
import trainer_launch

warnings.simplefilter("ignore")
torch.set_num_threads(1)
BOUNDS = (4, 9, 4, 12)  # shortest, longest, iterations, tokens of a response at most
CALLS = {
    "ddp": lambda model, rows: ranks_loop.main(model, rows, "ddp", *BOUNDS),
    "fsdp2": lambda model, rows: ranks_loop.main(model, rows, "fsdp2", *BOUNDS),
    "tensor_parallel": lambda model, rows: tensor_parallel.main(model, rows, *BOUNDS),
    "trainer": lambda model, rows: trainer_launch.main(model, rows, *BOUNDS),
}

dist.init_process_group("gloo")
destroy = dist.destroy_process_group
for name in (
    "init_process_group",
    "destroy_process_group",
):  # a second group would take the first one's keys of the store
    setattr(dist, name, lambda *arguments: None)
printed = {}
for name, call in CALLS.items():
    with contextlib.redirect_stdout(io.StringIO()) as text:
        call(*sys.argv[1:])
    if os.environ["RANK"] == "0":
        printed[name] = ast.literal_eval("{" + text.getvalue().rpartition("{")[2])
if printed:
    Path("printed.json").write_text(json.dumps(printed), encoding="utf-8")
destroy()  # threads of a group that ends with its process may abort it
