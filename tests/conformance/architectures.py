"""Tiny models of every causal-LM architecture of the installed transformers, from its own default configuration.

A configuration's sizes are found by their names (`SIZES`), whatever the architecture; lists with an entry per layer get one layer of each
kind. `ODD` holds what a few architectures want besides, each by its model type.
"""

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

VOCABULARY = 96
PAD, EOS, BOS = 0, 1, 2
HIDDEN, HEADS, HEAD = 32, 4, 8

# A tiny value, and names of a size in the configurations of transformers. Windows are shorter than the sequences that are compared, so that
# they cut.
SIZES = f"""
{VOCABULARY} vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size unpadded_vocab_size
{HIDDEN} hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size output_embedding_size lru_width
{HIDDEN} adapter_in_dim hidden_size_global word_embed_proj_dim attention_hidden_size pronunciation_embed_dim shape_embed_dim
{HIDDEN} router_hidden_size ple_embed_dim adapter_input_size adapter_out_dim
48 intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim moe_intermediate_size shared_expert_intermediate_size dim_ff dff
48 d_inner ffn_hidden_size expert_ffn_hidden_size shared_intermediate_size shared_experts_intermediate_size
48 intermediate_size_mlp n_inner dense_intermediate_size moe_shared_expert_intermediate_size feed_forward_size
{HEADS} num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads num_kv_heads
{HEADS} swa_num_attention_heads num_encoder_attention_heads num_decoder_attention_heads linear_num_heads linear_num_value_heads
{HEADS} index_n_heads n_mamba_heads
4 num_experts n_routed_experts num_local_experts moe_num_experts hc_lowrank mamba_dt_rank time_step_rank rotary_dim
4 local_attn_chunk_length lsh_attn_chunk_length index_topk_blocks index_block_size prompt_length zero_expert_num max_patches
2 num_key_value_heads swa_num_key_value_heads linear_num_key_heads encoder_layers decoder_layers num_encoder_layers
2 num_decoder_layers num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts n_group num_expert_group n_groups
2 mamba_n_groups o_groups num_layers_per_stack heads_per_ngram gated_norm_rank
1 topk_group n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers num_codebooks
1 moe_layer_start_index num_nextn_predict_layers num_mtp_modules num_query_groups
{HEAD} head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim dim_head d_head attention_head_dim index_head_dim linear_head_dim
{HEAD} linear_key_head_dim kv_channels linear_value_head_dim attention_head_size swa_head_dim mamba_d_head mamba_head_dim
{HEAD} query_pre_attn_scalar kv_lora_rank q_lora_rank o_lora_rank d_rel hidden_size_per_layer_input laurel_rank adapter_rank
{HEAD} mamba_d_state state_size ssm_state_size prompt_mid_dim block_size mamba_chunk_size chunk_size rel_extent moe_latent_size
64 max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length max_target_positions
64 max_source_positions original_max_position_embeddings index_topk
5 sliding_window sliding_window_size attention_window_size attention_chunk_size window_size local_attention keep_window_size
500 encoder_hash_byte_group_vocab ngram_vocab_size_base
"""
TINY = {name: int(value) for value, *names in map(str.split, SIZES.strip().splitlines()) for name in names}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")  # lists with an entry per layer
SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}

UNSET = {
    "head_dim": HEAD,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}

# what an architecture wants besides: its own rules between sizes
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": HEAD, "mamba_n_groups": 1}
ODD: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "num_hidden_layers": 2, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 48, "moe_top_k": 2},
    },
    "doge": {"keep_window_size": 64},  # a longer sequence is cut to the best keys, later ones among them
    "dots3_note": {"num_key_value_heads": HEADS},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "flint": {"output_router_logits": False},  # its own forward fails with it
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 48, "activation_sparsity_pattern": [0.5, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "hrm_text": {"num_layers_per_stack": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (8, 24), "attn_layers": ["local", "lsh"]},
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
}


# Settings that decide about a verdict, for the page: what is right so may not be right otherwise.
SETTINGS = {
    "bert, roberta and other encoders": "`is_decoder=True`; without it they see later tokens, and are refused",
    "xlm": "`causal=True`; without it it sees later tokens, and is refused",
    "doge": "`keep_window_size` above the length of the sequences. With 5, below it, its next-token probabilities depended on later "
    "tokens. Its default is 2048: longer sequences are not tried by `fuse_head`, and would not be noticed",
    "flint": "without `output_router_logits`, with which its own forward fails",
    "all others with it": "`output_router_logits=True`, and router losses weighted by 0.5",
    "all": "sequences of up to 24 tokens, windows of 5: caches and windows of real sizes are not filled",
}


class NotBuilt(Exception):
    """The architecture cannot be built small, or does not run by itself."""


def tiny_config(kind: str, **given: Any) -> Any:
    """The configuration of an architecture, small; `given` goes over everything."""
    config_class = CONFIG_MAPPING[kind]
    return config_class(**{**_shrunk(config_class), **given})


def _shrunk(config_class: Any) -> dict[str, Any]:
    default = config_class()
    found: dict[str, Any] = {}
    values = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    lists = {name: list(dict.fromkeys(values[name])) for name in KINDS if values.get(name)}
    layers = max([2, *map(len, lists.values())])
    for name, value in values.items():
        if name in config_class.sub_configs:
            found[name] = None if value is None else _shrunk(type(value))
        elif name in lists:
            found[name] = [lists[name][i % len(lists[name])] for i in range(layers)]
        elif name in LAYERS:
            found[name] = layers
        elif name in SPECIAL:
            found[name] = SPECIAL[name]
        elif isinstance(value, int) and not isinstance(value, bool):
            if (size := TINY.get(name, TINY.get(name.removeprefix("swa_")))) is not None:
                found[name] = min(value, size)
            elif name.endswith("_token_id") and value >= VOCABULARY:
                found[name] = BOS
        elif value is None and name in UNSET:
            found[name] = UNSET[name]
        elif isinstance(value, float) and ("dropout" in name or "jitter" in name or name.endswith(("_pdrop", "_prob"))):
            found[name] = 0.0
        elif isinstance(value, float) and ("aux_loss" in name or "z_loss" in name):
            found[name] = 0.5  # far above what is taken for rounding
    if "output_router_logits" in values:
        found["output_router_logits"] = True  # its loss is then a part of the model's own
    if "is_decoder" in values:
        found["is_decoder"] = True  # the encoders look at later tokens without it
    if "kv_lora_rank" in values:  # latent attention has keys for each head
        found["num_key_value_heads"] = HEADS
    return {**found, **ODD.get(config_class.model_type, {})}


def build(kind: str, *, seed: int = 0, **given: Any) -> Any:
    """A tiny causal LM in float32, with weights that make its distributions far from uniform.

    Raises:
        NotBuilt: and why.
    """
    try:
        config = tiny_config(kind, **given)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(transformers, ARCHITECTURES[kind])(_own(config, ARCHITECTURES[kind]))
            _spread(model)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    return model.eval()


def _own(config: Any, name: str) -> Any:
    """The part of a configuration that the class of the causal LM is made of."""
    wanted = getattr(transformers, name).config_class
    parts = [config, *(getattr(config, part, None) for part in config.sub_configs)]
    return next((part for part in parts if isinstance(part, wanted)), config)


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2:
            weight.normal_(0.0, 0.2)
            padding = getattr(module, "padding_idx", None)
            if padding is not None and padding < len(weight):
                weight[padding] = 0.0
