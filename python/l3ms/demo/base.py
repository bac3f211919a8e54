"""The demo's starting point: a byte-level BPE tokenizer and a 1.07M-parameter Llama, trained here in about a minute, then cached.

The model is pre-trained on the docstring corpus as running text (`def f(a):`, newline, docstring, blank line, next one), packed
into blocks. It never sees the end-of-sequence token, nor a held-out pair: the task itself, answer a signature and stop, is left
to the fine-tune.
"""

import dataclasses
import hashlib
import json
import logging
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from l3ms.demo import corpus
from l3ms.demo.cached_folders import cache_folder, is_whole, store
from l3ms.demo.corpus import Pair
from l3ms.model.pretrained import load_tokenizer, load_whole

VERSION = 1  # raise it when the same recipe would give another base
PAD_TOKEN, END_TOKEN = SPECIAL_TOKENS = ("<|pad|>", "<|end|>")

Progress = Callable[[str, int, int, str], None]  # (stage, done, total, note)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What determines the base besides the installed packages. The defaults are the demo's."""

    vocab_size: int = 2048
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 352
    max_positions: int = 256
    steps: int = 700
    batch_size: int = 8  # blocks a step
    block: int = 128  # tokens
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    seed: int = 0
    max_files: int | None = None  # mine this many files only (for tests)

    def __post_init__(self) -> None:
        for name in (
            "layers",
            "heads",
            "intermediate_size",
            "max_positions",
            "steps",
            "batch_size",
            "block",
            "warmup_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted at least 1, got {getattr(self, name)}")
        if self.vocab_size < 258:
            raise ValueError(f"vocab_size: wanted at least 258 (256 bytes, pad and end), got {self.vocab_size}")
        if self.hidden_size < 1 or self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size: wanted a multiple of 2 * heads = {2 * self.heads}, got {self.hidden_size}")


class Base(NamedTuple):
    """The model (fp32, CPU, eval mode), its tokenizer (padding on the left), and the two sides of the data."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    train_pairs: list[Pair]
    held_out_pairs: list[Pair]
    from_cache: bool


def prepare(
    progress: Progress | None = None, cache_dir: str | Path | None = None, recipe: Recipe | None = None
) -> Base:
    """The base from the cache, or built (and cached) when there is no valid entry for this recipe and these packages.

    `progress(stage, done, total, note)` reports the stages "mining docstrings" (bytes), "training the tokenizer" (texts) and
    "pre-training" (steps; the note holds the loss). A cache that cannot be written is a warning, not an error.
    """
    recipe = recipe or Recipe()
    report = progress or (lambda stage, done, total, note: None)
    files = corpus.sources(max_files=recipe.max_files)
    folder = Path(cache_dir) if cache_dir is not None else cache_folder()
    entry = folder / f"demo-base-{_key(recipe, files)}"
    cached = _load(entry)
    if cached is not None:
        return cached

    pairs = corpus.mine(lambda done, total: report("mining docstrings", done, total, ""), files=files)
    train, held_out = corpus.split(pairs)
    if not train or not held_out:
        raise ValueError(f"the demo needs docstrings to learn from: {len(files)} Python files gave {len(pairs)} pairs")
    report("training the tokenizer", 0, len(train), "")
    tokenizer = train_tokenizer(train, recipe)
    report("training the tokenizer", len(train), len(train), "")
    model = pretrain(train, tokenizer, recipe, report)
    base = Base(model, tokenizer, train, held_out, from_cache=False)
    try:
        _store(base, recipe, entry)
    except OSError as error:
        _log.warning("the demo's base could not be cached in %s: %s", folder, error)
    return base


def text(pair: Pair) -> str:
    """A pair as the running text of pre-training."""
    return f"{pair.prompt}{pair.response}\n\n"


def train_tokenizer(pairs: list[Pair], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text can be written, nothing is unknown. Pad and end are tokens of their own."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text(pair) for pair in pairs), trainer, length=len(pairs))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        padding_side="left",
        model_max_length=recipe.max_positions,
        clean_up_tokenization_spaces=False,
    )


def new_config(recipe: Recipe) -> LlamaConfig:
    """The model's shape; pad and end are the tokenizer's first two tokens."""
    return LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=recipe.intermediate_size,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=SPECIAL_TOKENS.index(PAD_TOKEN),
        eos_token_id=SPECIAL_TOKENS.index(END_TOKEN),
    )


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """A freshly initialised model; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(new_config(recipe))


def pretrain(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerFast, recipe: Recipe, report: Progress
) -> LlamaForCausalLM:
    """Next-token training on packed blocks: Adam, linear warm-up, linear decay to zero, clipped at norm 1."""
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.randperm(len(pairs), generator=generator).tolist()
    encoded = tokenizer([text(pairs[index]) for index in order])["input_ids"]
    stream = torch.tensor([token for ids in encoded for token in ids])
    if len(stream) < recipe.block:
        raise ValueError(f"block: wanted at most the {len(stream)} tokens of the corpus, got {recipe.block}")
    blocks = stream[: len(stream) // recipe.block * recipe.block].view(-1, recipe.block)

    model = new_model(recipe).train()
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / recipe.warmup_steps, 1 - step / recipe.steps)
    )
    smoothed = float("nan")
    for step in range(recipe.steps):
        rows = torch.arange(step * recipe.batch_size, (step + 1) * recipe.batch_size) % len(blocks)
        batch = blocks[rows]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        smoothed = loss.item() if step == 0 else 0.95 * smoothed + 0.05 * loss.item()
        report("pre-training", step + 1, recipe.steps, f"loss {smoothed:.2f}")
    return model.eval()


def _key(recipe: Recipe, files: list[corpus.Source]) -> str:
    """Hash of everything that determines the base: recipes, the files mined, and the libraries that do the arithmetic."""
    facts = {
        "version": VERSION,
        "recipe": dataclasses.asdict(recipe),
        "corpus": corpus.fingerprint(files),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "machine": platform.machine(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


_PAIRS = "pairs.json"  # {"train": [[prompt, response], ...], "held_out": [...]}


def _store(base: Base, recipe: Recipe, entry: Path) -> None:
    def write(folder: Path) -> None:
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        pairs = {"train": base.train_pairs, "held_out": base.held_out_pairs}
        (folder / _PAIRS).write_text(json.dumps(pairs), encoding="utf-8")

    store(entry, write, {"recipe": dataclasses.asdict(recipe)})


def _load(entry: Path) -> Base | None:
    """The base in `entry`; None where there is none, or part of it is missing or damaged."""
    if not entry.exists():
        return None
    if not is_whole(entry, _PAIRS):
        _log.warning("the demo's cache entry %s is damaged and will be rebuilt", entry)
        return None
    model = load_whole(LlamaForCausalLM, entry, local_files_only=True).eval()
    tokenizer = load_tokenizer(PreTrainedTokenizerFast, entry, local_files_only=True)
    pairs = json.loads((entry / _PAIRS).read_text(encoding="utf-8"))
    train, held_out = ([Pair(*pair) for pair in pairs[side]] for side in ("train", "held_out"))
    return Base(model, tokenizer, train, held_out, from_cache=True)
