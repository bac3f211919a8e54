"""Runs of two ranks that fully_shard splits a model over, each of which writes its part of a checkpoint; forks of a process that has the
imports done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import checkpointed
import file_changes
import fsdp_on_cpus
import launches
import tiny_models
import torch
import trainer_ranks
from forks import ended, forked

RANKS = 2
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
STEPS = {"steps": 4, "save_steps": 2}


class Sharded:
    """The run that nobody interrupts, and how it is made again elsewhere."""

    def __init__(self) -> None:
        self.folder = checkpointed.temporary()
        self.model = self.folder / "model"
        tiny_models.tokenizer().save_pretrained(self.model)
        tiny_models.make_model(gain=0.3).save_pretrained(self.model)
        code, self.changes = self.train("whole", lambda *_: None)
        assert code == 0, self.errors("whole")
        self.weights = self.found("whole")

    def train(self, name: str, decide: Any) -> tuple[int, list[file_changes.Change]]:
        """From the newest checkpoint that is there. -> the larger exit code of the ranks, and what they went about to change"""
        place = self.folder / name
        place.mkdir(exist_ok=True)
        return file_changes.run(lambda: self._ranks(place), place / "run", decide)

    def found(self, name: str) -> list[list[torch.Tensor]]:
        return [torch.load(self.folder / name / f"{rank}.pt") for rank in range(RANKS)]

    def errors(self, name: str) -> str:
        return "; ".join((self.folder / name / f"{rank}.said").read_text()[-800:] for rank in range(RANKS))

    def _ranks(self, place: Path) -> int:
        port = launches.free_port()

        def rank(number: int) -> int:
            return forked(lambda: self._rank(place, number, port), place / f"{number}.said")

        return max(abs(ended(process)) for process in [rank(number) for number in range(RANKS)])

    def _rank(self, place: Path, rank: int, port: int) -> None:
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in where.items()})
        torch.set_num_threads(1)
        fsdp_on_cpus.patch()
        options: dict[str, Any] = json.loads(json.dumps(SHARDED))
        made = trainer_ranks.train(str(self.model), str(place / "run"), "warn", rollout=options, **STEPS)
        torch.save(made["final"], place / f"{rank}.pt")
