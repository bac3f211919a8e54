"""Tiny sequence classifiers with random weights."""

import torch
import transformers

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}


def classifier(kind="Bert", *, seed=0, **config):
    sizes = SIZES | {"vocab_size": 17, "pad_token_id": 0, "max_position_embeddings": 32, **config}
    if kind != "Bert":
        sizes |= {"eos_token_id": 1, "bos_token_id": None, "num_key_value_heads": 2}
    settings = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(settings)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.4)
    return model.eval()
