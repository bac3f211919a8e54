"""TRL's two steps as a contestant: SFTTrainer's on the task batch, GRPOTrainer's on prompts, each through its own `training_step`.

A model of their own: that of the others has a fused head. GRPO samples groups for a prompt, so there are a quarter of the prompts, each
four times: as many responses. Its reward is of the length alone, and its gradient is not that of the constraint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from l3ms.benchmark.plain_loop import trained
from l3ms.config.train import LoraConfig
from l3ms.model.inside_adapters import inside_adapters
from l3ms.model.pretrained import load_whole
from l3ms.training.phases import Phases

WANTED = "trl==1.16.0"
GROUP = 4


def own_model(source: str, lora: LoraConfig | None) -> Any:
    """As the others', its head as it comes."""
    model = load_whole(AutoModelForCausalLM, source, dtype=torch.float32)
    if lora is None:
        return model
    import peft

    adapters = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type=peft.TaskType.CAUSAL_LM
    )
    return peft.get_peft_model(model, adapters)


class TrlSteps:
    def __init__(
        self, model: Any, tokenizer: Any, *, batch: int, max_new_tokens: int, phases: Phases, folder: Path, cpu: bool
    ):
        """ImportError where TRL is not installed."""
        from datasets import Dataset, disable_progress_bars
        from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # type: ignore[import-not-found]

        self.model, self.phases, self.group = model, phases, GROUP if batch % GROUP == 0 else batch
        common: dict[str, Any] = {
            "per_device_train_batch_size": batch, "max_steps": 1, "learning_rate": 0.0, "bf16": False, "gradient_checkpointing": False,
            "use_cpu": cpu, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        }  # fmt: skip
        disable_progress_bars()
        unused = Dataset.from_list([{"prompt": "a", "completion": "b"}] * batch)
        sft = SFTConfig(output_dir=str(folder / "sft"), completion_only_loss=True, **common)
        self.inner = inside_adapters(model)
        self.forwards: dict[Any, Any] = {}  # each trainer gives the model one of its own, and the last one stays
        self.sft = SFTTrainer(model, sft, train_dataset=unused, processing_class=tokenizer)
        self.forwards[self.sft] = self.inner.forward
        grpo = GRPOConfig(
            output_dir=str(folder / "grpo"), num_generations=self.group, max_completion_length=max_new_tokens, beta=0.0, **common
        )  # fmt: skip
        self.grpo = GRPOTrainer(
            model, cast(Any, self._lengths), args=grpo, train_dataset=unused.remove_columns("completion"), processing_class=tokenizer
        )  # fmt: skip
        self.forwards[self.grpo] = self.inner.forward
        for trainer in (self.sft, self.grpo):  # what train() sets before its loop
            trainer.current_gradient_accumulation_steps = 1
        self.grpo._generate = self._in_phase("sampling", self.grpo._generate)
        self.grpo._calculate_rewards = self._in_phase("rewards", self.grpo._calculate_rewards)
        self.parameters = trained(model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.5, 0.95), weight_decay=0.0)

    def iteration(self, task: Mapping[str, Tensor], prompts: Sequence[Any]) -> None:
        """
        Args:
            task: (B, L) input_ids, attention_mask, labels.
            prompts: of ours' responses.
        """
        with self.phases.inside("task"):
            self._train(self.sft, dict(task))
        self._step()
        groups = [{"prompt": prompt} for prompt in prompts[: len(prompts) // self.group] for _ in range(self.group)]
        with self.phases.inside("constraint"):
            self._train(self.grpo, groups)
        self._step()

    def _train(self, trainer: Any, batch: Any) -> None:
        self.inner.forward = self.forwards[trainer]
        trainer.training_step(self.model, batch, None)

    def _lengths(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        self.phases.sampled(sum(map(len, completion_ids)))
        return [-float(len(ids)) for ids in completion_ids]

    def _step(self) -> None:
        with self.phases.inside("optimizer"):
            clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _in_phase(self, name: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phases.inside(name):
                return function(*args, **kwargs)

        return timed
