"""GGUF files, which are for inference, to checkpoints that can be trained.

transformers reads a GGUF file, and refuses to save what it has read, as the model still counts as quantised. So its weights go into a new
model of the same shape: all of them, or an error.
"""

import importlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from l3ms.model.pretrained import load_tokenizer, load_whole

QUANTISED = ("quantization_config", "_name_or_path", "_model_name_or_path")  # what the new configuration has not
NEEDED = ("gguf",)  # beyond what the extra `train` brings: the extra `real`


def check_converter() -> None:
    """Raise `ModuleNotFoundError` where a package is missing that `convert` needs: transformers says it in other words, and later."""
    for name in NEEDED:
        importlib.import_module(name)


def convert(source: str | Path, folder: str | Path) -> None:
    """Write to `folder` a checkpoint of a GGUF file: float32 weights, configuration, generation settings, tokenizer (padding on the left).

    Weights of 4 bits become numbers, not better ones: the checkpoint is what the file is, and not what it was made of.

    Raises:
        ModuleNotFoundError: a package of the extra `real` is missing.
        ValueError, RuntimeError: a file that cannot be read, or some of whose weights the model has no place for.
    """
    check_converter()
    source = Path(source)
    options: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = load_tokenizer(AutoTokenizer, source.parent, padding_side="left", **options)
    read = load_whole(AutoModelForCausalLM, source.parent, dtype=torch.float32, **options)
    values = {name: value for name, value in read.config.to_dict().items() if name not in QUANTISED}
    with torch.random.fork_rng(devices=[]):
        model = type(read)(type(read.config)(**values))
    model.load_state_dict(read.state_dict(), strict=True)
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
