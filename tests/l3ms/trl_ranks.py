"""One rank of `test_trl_ranks.py`, or all of it: trainers under constraints whose responses are scripted, started as torchrun does.

python rank_forks.py trl_ranks WORLD MODEL FOLDER ROWS [fsdp]; writes FOLDER/RANK.pt.
ROWS: of a batch, on each rank. fsdp: the model is split by FSDP2.
"""

import importlib
import os
from pathlib import Path
from typing import Any

import torch
import trl_runs
from transformers import AutoModelForCausalLM, AutoTokenizer

import l3ms
from l3ms.rollouts.engines import Response, as_engine

trl: Any = importlib.import_module("trl")
BATCH = 8  # of all ranks


def scripted(place: int, turn: int) -> list[int]:
    """The response at a place of a batch of all ranks, in a turn; some end, some are cut."""
    length = 1 + (5 * place + 3 * turn + place * turn) % 7
    return [*(3 + (place * 7 + turn * 3 + token) % 14 for token in range(length)), *([1] if place % 3 else [])]


def online(kind: str, base: Any, folder: Path, tokenizer: Any, model: Any, rows: int, **options: Any) -> Any:
    class Scripted(base):
        turn = 0

        def _generate_single_turn(self, prompt_ids, *rest, **named):
            self.turn += 1
            first = self.accelerator.process_index * len(prompt_ids)
            answers = [scripted(first + row, self.turn) for row in range(len(prompt_ids))]
            return (answers, None) if base is trl.GRPOTrainer else answers

    data = l3ms.DataNLL("general", general(), max=0.1, relative=True, batch_size=rows // 2)
    bounds = (l3ms.Length(max=3), l3ms.KL(max=0.1), data)
    trainer = trl_runs.make(
        kind, folder / kind, tokenizer, model, constraints=bounds, base=Scripted, per_device_train_batch_size=rows, **options
    )  # fmt: skip
    trainer.train()
    return trainer


def offline(kind: str, folder: Path, tokenizer: Any, model: Any, rows: int) -> Any:
    l3m = l3ms.L3MSettings(constraint_batch_size=rows, max_new_tokens=16)
    data = l3ms.DataNLL("general", general(), max=1.0, batch_size=rows // 2)
    bounds = (l3ms.Length(max=3), l3ms.KL(max=0.1), data)
    trainer = trl_runs.make(
        kind, folder / kind, tokenizer, model, constraints=bounds, per_device_train_batch_size=rows, l3m=l3m
    )
    calls = []

    def sample(prompts, *, max_new_tokens, end, **options):
        """By the prompt alone, which is one word; what is cut is full."""
        calls.append(1)
        found = [scripted(prompt[-1], len(calls)) for prompt in prompts]
        full = [ids if ids[-1] in end else (ids * max_new_tokens)[:max_new_tokens] for ids in found]
        return [Response(ids, ids[-1] in end, None) for ids in full]

    trainer.engine = as_engine(sample)
    trainer.train()
    return trainer


def general() -> list[dict[str, Any]]:
    return [{"input_ids": [3 + n, 4, 5 + n, 1], "labels": [-100, 4, 5 + n, 1]} for n in range(BATCH // 2)]


def whole(parameter: torch.Tensor) -> torch.Tensor:
    value: Any = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()


def found(trainer: Any) -> dict[str, Any]:
    return {
        "weights": [whole(parameter) for parameter in trainer.policy.parameters()],
        "l3m": trainer.l3m_optimizer.metrics(),
        "log": [line for line in trainer.state.log_history if "loss" in line],
        "sampled": trainer.fewer_samples.sampled_tokens,
    }


def runs(model: str, folder: Path, rows: int) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(model)

    def policy():
        return AutoModelForCausalLM.from_pretrained(model)

    grpo = {"loss_type": "grpo", "beta": 0.1, "learning_rate": 0.02}
    return {
        "SFTTrainer": found(offline("SFTTrainer", folder, tokenizer, policy(), rows)),
        "DPOTrainer": found(offline("DPOTrainer", folder, tokenizer, policy(), rows)),
        "GRPOTrainer": found(online("GRPOTrainer", trl.GRPOTrainer, folder, tokenizer, policy(), rows, **grpo)),
        "RLOOTrainer": found(
            online("RLOOTrainer", trl.RLOOTrainer, folder, tokenizer, policy(), rows, learning_rate=0.02)
        ),
    }


def resumed(kind: str, model: str, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """What a run of four steps found, and what one that goes on from its second did; they sample by themselves."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    checkpoint, ended = str(folder / "first" / "checkpoint-2"), []
    for name in ("first", "again"):
        torch.manual_seed(3)
        policy = AutoModelForCausalLM.from_pretrained(model)
        bounds = (l3ms.Length(max=3), l3ms.KL(max=0.1))
        settings = {
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "optim": "adamw_torch",
            "learning_rate": 0.01,
        }
        trainer = trl_runs.make(kind, folder / name, tokenizer, policy, constraints=bounds, **settings, **options)
        trainer.train(resume_from_checkpoint=checkpoint if name == "again" else None)
        ended.append(found(trainer))
    return ended


def sharded(folder: Path, model: str, rows: int) -> dict[str, Any]:
    import peft

    plain = trl_runs.COMMON | {"fsdp": True}
    trl_runs.COMMON |= plain | {"fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
    whole = runs(model, folder, rows)
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    whole["resumed GRPOTrainer"] = resumed("GRPOTrainer", model, folder / "full", peft_config=lora)
    trl_runs.COMMON |= plain | {"fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    settings = l3ms.L3MSettings(constraint_batch_size=4, max_new_tokens=8)
    whole["resumed SFTTrainer"] = resumed("SFTTrainer", model, folder / "sharded", l3m=settings)
    return whole


def main(model, folder, rows, *how):
    torch.set_num_threads(1)
    if how:
        import fsdp_on_cpus

        fsdp_on_cpus.patch()
        ended = sharded(Path(folder), model, int(rows))
    else:
        ended = runs(model, Path(folder), int(rows))
    torch.save(ended, Path(folder) / f"{os.environ.get('RANK', '0')}.pt")
