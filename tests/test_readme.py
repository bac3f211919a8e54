"""The README's code runs as it is written, and what it and PAPER.md name exists."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    """The code block that follows `<!-- test: name -->`."""
    found = re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no block {name!r}"
    return found[1]


def tiny_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<end>": 1, **{f"w{i}" * (1 + i % 3): i for i in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def test_custom_loop(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(
        vocab_size=60,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        max_position_embeddings=64,
        **sizes,  # type: ignore[arg-type]
    )
    tokenizer = tiny_tokenizer(60)
    ids = torch.randint(2, 60, (4, 12))
    labels = ids.masked_fill(torch.arange(12) < 2, -100)
    prompts = tokenizer.batch_decode(ids[:, :2])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "prompts": prompts}
    names: dict[str, Any] = {
        "model": LlamaForCausalLM(config),
        "tokenizer": tokenizer,
        "loader": [batch] * 3,
        "iterations": 3,
    }
    exec(block("custom-loop-functions"), names)
    before = names["model"].lm_head.weight.detach().clone()
    exec(block("custom-loop"), names)
    printed = capsys.readouterr().out
    for key in ("constraints/length/estimate", "constraints/short words/lambda", "l3m/mu"):
        assert printed.count(key) == 3
    assert names["opt"].constraint_steps == 3
    assert not torch.equal(before, names["model"].lm_head.weight)


def test_kernels_alone() -> None:
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(block("kernels"), names)
    logits = names["hidden"].double() @ names["weight"].double().t()
    token = torch.log_softmax(logits, -1).gather(1, names["targets"].clamp(min=0)[:, None])[:, 0]
    token = token.where(names["targets"] != -100, 0.0)
    torch.testing.assert_close(names["scores"].sequence.double(), torch.stack([token[:6].sum(), token[6:].sum()]))
    assert names["weight"].grad.abs().sum() > 0


def test_yaml_is_a_configuration() -> None:
    from l3ms.config.run_config import RunConfig

    text = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert text
    RunConfig.model_validate(yaml.safe_load(text[1].replace("1e-5", "0.00001")))


def test_links_and_commands_exist() -> None:
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / target).exists(), target
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    for goal in re.findall(r"`make (\w[\w-]*)", README):
        assert re.search(rf"^{goal}:", makefile, re.MULTILINE), goal


def test_symbols_of_the_paper_exist() -> None:
    root = Path(__file__).parents[1]
    references = re.findall(r"`([\w/]+\.(?:py|h)):([\w.]+)`", (root / "PAPER.md").read_text(encoding="utf-8"))
    assert len(references) >= 15
    for file, symbol in references:
        source = (root / file).read_text(encoding="utf-8")
        for part in symbol.split("."):
            assert re.search(rf"(def|class|double) {part}\b", source), f"{file}:{symbol}"
