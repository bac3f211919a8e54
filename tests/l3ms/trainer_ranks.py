"""One rank of `test_trainer_ranks.py`: a trainer with a `Watch`, started as torchrun does, by variables of the environment.

python trainer_ranks.py MODEL FOLDER ON_TRIP [STEPS CHECKPOINT [ROLLOUT]]; writes FOLDER/RANK.pt, and resumes at a checkpoint that is
there. ROLLOUT: options of sampling in JSON, with a constraint that is easily met.
"""

import json
import os
import sys
from pathlib import Path

import torch
from hacked import HACKED, NEVER_ENDS
from training_runs import rows, run
from transformers import AutoModelForCausalLM, AutoTokenizer

import l3ms
from l3ms.training import checkpoints

STEPS = 24


def watch(on_trip):
    return l3ms.Watch(
        on_trip=on_trip, held_out=rows(9, seed=3), held_out_every=3, held_out_samples=9, every=2, window=4,
        snapshot_every=4, max_rollbacks=1, humps_max=None,
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, folder, on_trip, *rest = sys.argv[1:]
    steps, save_steps = map(int, rest[:2]) if rest else (STEPS, STEPS)
    rollout = json.loads(rest[2]) if rest[2:] else {}
    watching = watch(on_trip)
    trainer, recorder = run(
        Path(folder) / "run", AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model),
        constraints=[l3ms.Length(max=16)] if rollout else [NEVER_ENDS, l3ms.Length(max=6)], start=False, ddp_backend="gloo",
        **{**HACKED, "max_steps": steps, "constraint_batch_size": 16, "learning_rate": 0.01, **rollout},
        save_strategy="steps", save_steps=save_steps, average_fraction=0.5,
    )  # fmt: skip
    trainer.add_callback(watching)
    trainer.train(resume_from_checkpoint=bool(checkpoints.checkpoints(Path(folder) / "run")))
    found = {
        "final": [parameter.detach() for parameter in trainer.accelerator.unwrap_model(trainer.model).parameters()],
        "average": [parameter.detach() for parameter in trainer.averaged_model().parameters()],
        "taken": len(recorder.rollouts),
        "tripped": watching.tripped,
        "tokens": sum(rollout.scored for rollout in {id(item): item for item in recorder.rollouts}.values()),
        "step": trainer.state.global_step,
        "completions": recorder.rollouts[0].completions,
        "log": trainer.state.log_history,
    }
    torch.save(found, Path(folder) / f"{os.environ['RANK']}.pt")
