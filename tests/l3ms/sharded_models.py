"""Tiny models that fully_shard splits, and what the tests of them share."""

import contextlib
import types

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import l3ms
from l3ms.model.batches import Collator

VOCABULARY = 19  # in 2 parts of unlike sizes


def model(*, tied=False, dtype=torch.float32, seed=0):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(seed)
    made = LlamaForCausalLM(config)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.4)
    return made.to(dtype)  # type: ignore[arg-type]


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard(made, how="layers", **options):
    """In place. "accelerate": with the head and what is before it in a unit of their own, as accelerate does."""
    options = {"mesh": mesh(), **options}
    if how == "offloaded":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    layers = made.get_decoder().layers if not hasattr(made, "peft_config") else made.get_base_model().model.layers
    if how != "root":
        for layer in layers:
            fully_shard(layer, **options)
    if how == "head":
        fully_shard(made.lm_head, **options)
    if how == "accelerate":
        tied = made.lm_head.weight is made.model.embed_tokens.weight
        first = [made.model.embed_tokens] if tied else []
        if not tied:
            fully_shard(made.model.embed_tokens, **options)
        fully_shard([made.model.norm, *first, made.lm_head], reshard_after_forward=False, **options)
    return fully_shard(made, **options)


class Tokenizer:
    """What a rollout takes of one."""

    eos_token_id, pad_token_id, all_special_ids, added_tokens_decoder, chat_template = 1, 0, (0, 1), {}, None

    def __len__(self):
        return VOCABULARY

    def batch_decode(self, rows, skip_special_tokens=True):
        return [" ".join(map(str, row)) for row in rows]


def prompts(rank, count):
    generator = torch.Generator().manual_seed(100 + rank)
    return [torch.randint(3, VOCABULARY, (1 + n % 4,), generator=generator).tolist() for n in range(count)]


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in range(count):
        prompt = torch.randint(3, VOCABULARY, (1 + n % 3,), generator=generator).tolist()
        answer = [*torch.randint(3, VOCABULARY, (1 + n % 5,), generator=generator).tolist(), 1]
        made.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return made


def batch_of(rank):
    return Collator(0)(rows(6, seed=rank)), torch.linspace(-0.7, 1.1, 6) * (1 + rank)


def sampled(made, count, rank, **options):
    asked = prompts(rank, count)
    found = l3ms.rollout(
        made, Tokenizer(), [f"p{n}" for n in range(count)], prompt_ids=asked, max_new_tokens=9, **{"seed": 5, **options}
    )
    return found.completion_ids()


@contextlib.contextmanager
def replaced(module: types.ModuleType, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
