"""Tiny tokenizers and models, made here: nothing is downloaded. Heavy packages are imported where a test asks for them."""

import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # modules that tests of several rooms share

from cli_projects import checkpoint, project  # noqa: F401  (fixtures)
from tiny_models import SIZES, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """Words to ids: <pad> 0, <eos> 1, <unk> 2, then WORDS; with a chat template."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def make_model():
    """make_model("Llama", vocab_size=..., seed=..., gain=..., **config) -> a tiny random causal LM in float32."""
    import transformers

    def make(kind: str = "Llama", *, vocab_size: int = 17, seed: int = 0, gain: float = 1.0, **config):
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

    return make


@pytest.fixture
def train(tmp_path, tokenizer):
    """train(model, **options) -> an `L3MTrainer` after a few iterations, and the recorder of what it did."""
    import training_runs

    return functools.partial(training_runs.run, tmp_path, tokenizer)
