"""A tiny Llama with an adapter of each type of the installed peft."""

from dataclasses import fields
from typing import Any

import peft
import torch
from architectures import VOCABULARY, NotBuilt, build
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

ADAPTERS = tuple(sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING))

# options of peft's configurations -> values that fit a tiny model, and take out what is drawn
TINY: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj"],
    "r": 4,
    "num_virtual_tokens": 3,
    "encoder_hidden_size": 16,
    "token_indices": [5, 6, 7],
    "adapter_len": 3,
    "adapter_layers": 2,
    "block_size": 8,
    "n_frequency": 16,
    "num_vectors": 8,
    "vector_length": 8,
    "theta_d_length": 16,
    "group_size": 8,
    "xlora_dropout_p": 0.0,
    "shadow_dropout": 0.0,
    "oft_block_size": 8,
}
ODD: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"target_modules": None},
    "ADALORA": {"init_r": 6, "target_r": 4, "total_step": 10, "tinit": 1, "tfinal": 1},
    "CPT": {"cpt_token_ids": [5, 6, 7], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "OFT": {"r": 0},
    "POLY": {"r": 4, "n_tasks": 1},
    "PROMPT_TUNING": {},
    "SUPERTUNING": {"r": None, "sparsity": 0.5},
}


def adapted(kind: str, *, seed: int = 0) -> Any:
    """A PeftModel whose adapter says something.

    Raises:
        NotBuilt: and why.
    """
    base = build("llama")
    try:
        wanted: Any = next(c for k, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if k.value == kind)
        options = {item.name: TINY[item.name] for item in fields(wanted) if item.name in TINY}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = peft.get_peft_model(base, wanted(**{"task_type": "CAUSAL_LM", **options, **ODD.get(kind, {})}))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:  # at first most leave the model as it is
                        parameter.add_(torch.randn_like(parameter) * 0.05)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    assert model.get_base_model().config.vocab_size == VOCABULARY
    return model.eval()
