"""The ranks of `test_tensor_parallel.py`: python rank_forks.py tensor_parallel_ranks 2 FOLDER; writes FOLDER/RANK.pt.

Tiny models are saved, and loaded with `tp_plan="auto"` as a user does, and beside that whole, as on one process.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

import l3ms

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
SPECIAL = {"vocab_size": 17, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
MODELS = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {"final_logit_softcapping": 5.0, "head_dim": 8, "query_pre_attn_scalar": 8},
    ),  # a cap, and tied
}

IDS = torch.randint(3, 17, (3, 9), generator=torch.Generator().manual_seed(1))
LABELS = IDS.clone()
LABELS[0, 5:] = LABELS[2, :3] = -100
WEIGHTS = torch.tensor([0.3, -0.2, 0.7])


def of(model):
    """What a step and sampling come to."""
    model.zero_grad()
    found = model(input_ids=IDS, labels=LABELS, seq_weight=WEIGHTS, temperature=0.7)
    found.loss.backward()
    whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t  # noqa: E731
    return {
        "loss": found.loss.detach(),
        "token": found.token.detach(),
        "gradients": {name: whole(p.grad) for name, p in model.named_parameters()},
        "sampled": model.generate(IDS[:, :4], max_new_tokens=5, do_sample=False),
    }


def save(kind, path, **options):
    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind}Config")(**SIZES, **SPECIAL, **options, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(path)


def load(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of tp_plan, which will be called something else
        return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


def run(folder):
    found = {}
    for name in MODELS:
        parallel, whole = load(folder / name, tp_plan="auto"), load(folder / name)
        for model in (parallel, whole):
            l3ms.fuse_head(model)
        weight = parallel.lm_head.weight
        found[name] = {
            "parallel": of(parallel),
            "whole": of(whole),
            "layout": [str(weight.placements), tuple(weight.to_local().shape), str(weight.grad.placements)],
            "tied": weight is parallel.get_input_embeddings().weight,
        }
        try:
            from peft import LoraConfig, get_peft_model

            l3ms.fuse_head(get_peft_model(parallel, LoraConfig(r=2, target_modules=["lm_head"])))
        except ValueError as error:
            found[name]["adapter"] = str(error)
    return found


def main(path):
    torch.set_num_threads(1)
    folder = Path(path)
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        for name, (kind, options) in MODELS.items():
            save(kind, folder / name, **options)
    dist.barrier()
    torch.save(run(folder), folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
