"""What a run starts from, as digests: whole weights, token rows with all their columns, tokenizer, code of rewards. By them `--resume`
finds out other contents under the same name.

SHA-256 of 135 million float32 parameters takes half a second where the processor has instructions for it, two where not.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from l3ms.config.constraints import FunctionConfig
from l3ms.config.run_config import RunConfig
from l3ms.constraints.constraint import Constraint
from l3ms.constraints.data_nll import DataNLL
from l3ms.constraints.divergence import KL
from l3ms.constraints.reward_model import RewardModel
from l3ms.regular_files import read_regular

FORMAT = 2
BASE = "model.base"  # by which `inputs.json` has the model that adapters are of
BLOCK = 1 << 24  # elements that are copied at a time
PLAIN = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, bytes)  # whose repr is their value


def fingerprints(
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    rows: Mapping[str, Sequence[dict[str, Any]]],
    constraints: Iterable[Constraint],
) -> dict[str, Any]:
    """By field. `rows`: the token rows of the run itself, both sides; those of data constraints are found here."""
    found: dict[str, Any] = {"format": FORMAT, "model": of_model(model), "tokenizer": of_tokenizer(tokenizer)}
    found |= {field: of_rows(part) for field, part in rows.items()}
    return found | of_constraints(config, constraints)


def of_constraints(config: RunConfig, constraints: Iterable[Constraint]) -> dict[str, str]:
    """By field, of what the constraints read and of the code that samples."""
    found: dict[str, str] = {}
    if config.rollout.code is not None:
        found["rollout.engine"] = hashlib.sha256(_source(config.rollout.code)).hexdigest()
    for index, (section, item) in enumerate(zip(config.constraints, constraints, strict=True)):
        field = f"constraints.{index}"
        if isinstance(item, (DataNLL, KL)) and item.reference_model is not None:
            found[f"{field}.reference"] = of_model(item.reference_model)
        if isinstance(item, DataNLL):
            found[f"{field}.data.train"] = of_rows(list(item.loader))
            found[f"{field}.data.evaluation"] = of_rows(list(item.held_out or []))
        elif isinstance(item, RewardModel):
            score: Any = item.function
            found[f"{field}.model"] = f"{of_model(score.model)} {of_tokenizer(score.tokenizer)}"
        elif isinstance(section, FunctionConfig):
            found[f"{field}.function"] = hashlib.sha256(_source(section.function)).hexdigest()
    return found


def of_model(model: Any, but: Iterable[str] = ()) -> str:
    """Of all parameters and the buffers that are saved, `but` for some: names, shapes, types and every bit."""
    digest = hashlib.sha256()
    kept = model.state_dict().keys() - set(but)  # without buffers that are made anew each time
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in kept:
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in tensor.detach().reshape(-1).split(BLOCK):
            digest.update(_bytes(part))
    return digest.hexdigest()


def of_base(model: Any) -> str | None:
    """Of a model with LoRA all that its adapters are not; None of one without."""
    adapters = [name for name, _ in model.named_parameters() if "lora_" in name]
    return of_model(model, but=adapters) if adapters else None


def of_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of every column: rewards see them."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=_value).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def of_tokenizer(tokenizer: Any) -> str:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if hasattr(backend, "to_str") else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps([text, special, template], sort_keys=True).encode()).hexdigest()


def _bytes(flat: Tensor) -> Any:
    return flat.cpu().contiguous().view(torch.uint8).numpy()


def _value(value: Any) -> Any:
    """What JSON does not have, of a `datasets` row; of what is not known the type: an address is another one each time."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return f"{type(value).__name__} {value!r}" if isinstance(value, PLAIN) else type(value).__name__


def _source(spec: str) -> bytes:
    """The contents of the file of `file.py:name` or `module:name`, not of what it imports; nothing where there is no file."""
    source = spec.rpartition(":")[0]
    try:
        return read_regular(source if source.endswith(".py") else sys.modules[source].__file__ or "")
    except (OSError, KeyError, AttributeError):
        return b""


# ---- of 0.1.0, which looked at less ----


def fingerprints_of_0_1(model: Any, rows: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, str]:
    """Of the beginning of each parameter, and of tokens alone. `rows`: of training."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().reshape(-1)[:256].double().cpu().numpy().tobytes())
    return {"model": digest.hexdigest(), **{field: _of_tokens(part) for field, part in rows.items()}}


def _of_tokens(rows: Sequence[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for name in ("input_ids", "labels"):
            digest.update(torch.tensor([len(row[name]), *row[name]], dtype=torch.int32).numpy().tobytes())
    return digest.hexdigest()
