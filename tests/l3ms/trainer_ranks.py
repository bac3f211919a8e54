"""One rank of `test_trainer_ranks.py`: trainers with a `Watch`, started as torchrun does, by variables of the environment.

python rank_forks.py trainer_ranks WORLD MODEL FOLDER RUNS; RUNS is a list in JSON of what `train` is given,
one run after the other; writes FOLDER/RANK.pt, the list of what they found.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsdp_on_cpus
import torch
from hacked import HACKED, NEVER_ENDS
from training_runs import rows, run
from transformers import AutoModelForCausalLM, AutoTokenizer

import l3ms
from l3ms.model.averaging import trained
from l3ms.model.sharding import is_part, whole
from l3ms.rollouts import shrinking
from l3ms.training import checkpoints

STEPS = 24


def watch(on_trip):
    back: dict[str, Any] = {"snapshot_every": 4, "max_rollbacks": 1} if on_trip == "rollback" else {}
    return l3ms.Watch(
        on_trip=on_trip, held_out=rows(9, seed=3), held_out_every=3, held_out_samples=9, every=2, window=4, humps_max=None,
        **back,
    )  # fmt: skip


def train(model, place, on_trip, steps=STEPS, save_steps=STEPS, rollout=None):
    """Resumes at a checkpoint that is there. `rollout`: further options; those of sampling get a constraint that is easily met."""
    watching, rollout = watch(on_trip), rollout or {}
    if rollout.pop("whole_batches", False):  # sharded ranks sample so, and draw other numbers than a batch that shrinks
        shrinking._may_shrink = lambda model: False
    trainer, recorder = run(
        Path(place), AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model),
        constraints=[l3ms.Length(max=16)] if "rollout_every" in rollout else [NEVER_ENDS, l3ms.Length(max=6)],
        start=False, ddp_backend="gloo",
        **{**HACKED, "max_steps": steps, "constraint_batch_size": 16, "learning_rate": 0.01, **rollout},
        save_strategy="steps", save_steps=save_steps, average_fraction=0.5,
    )  # fmt: skip
    trainer.add_callback(watching)
    trainer.train(resume_from_checkpoint=bool(checkpoints.checkpoints(Path(place))))
    trainer.save_model(str(Path(place) / "saved"))
    return {
        "final": [whole(parameter.detach()) for _, parameter in trained(trainer.policy)],
        "parts": [is_part(parameter) for _, parameter in trained(trainer.policy)],
        "average": [parameter.detach() for parameter in trainer.averaged_model().parameters()],
        "taken": len(recorder.rollouts),
        "tripped": watching.tripped,
        "tokens": sum(rollout.scored for rollout in {id(item): item for item in recorder.rollouts}.values()),
        "step": trainer.state.global_step,
        "completions": recorder.rollouts[0].completions,
        "log": trainer.state.log_history,
    }


def main(model, folder, runs):
    torch.set_num_threads(1)
    fsdp_on_cpus.patch()
    found = []
    for options in json.loads(runs):
        # a run of before, up to the step: what an interruption leaves
        if "after" in options:
            before, step = options.pop("after")
            if os.environ["RANK"] == "0":
                shutil.copytree(Path(before) / f"checkpoint-{step}", Path(options["place"]) / f"checkpoint-{step}")
            torch.distributed.barrier()
        found.append(train(model, **options))
    torch.save(found, Path(folder) / f"{os.environ['RANK']}.pt")
