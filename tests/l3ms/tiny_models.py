"""Tiny tokenizers and models that tests of several rooms make. Heavy packages are imported when one is made."""

from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}

WORDS = ("a", "b", "c", "d", "e", "f", "def", "name", "(", ")", "user", "assistant", "system", ":")
CHAT = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"


def tokenizer() -> Any:
    """Words to ids: <pad> 0, <eos> 1, <unk> 2, then WORDS; with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<pad>", "<eos>", "<unk>", *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=CHAT
    )


def make_model(kind: str = "Llama", *, vocab_size: int = 17, seed: int = 0, gain: float = 1.0, **config: Any) -> Any:
    """A tiny random causal LM in float32."""
    import transformers

    sizes = dict(SIZES)
    if kind == "GPT2":
        sizes = {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "n_positions": 64}
        sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    if kind == "Gemma2":
        sizes |= {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_implementation": "eager"}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    settings = getattr(transformers, f"{kind}Config")(**{**sizes, "vocab_size": vocab_size, **special, **config})
    name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, name)(settings)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # larger than at an initialisation: distributions far from uniform
                    parameter.normal_(0.0, 0.3 * gain)
    return model
