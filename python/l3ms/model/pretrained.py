"""Models and tokenizers of a folder or a hub: the one place that calls `from_pretrained`. What they hold is data: none of it is run.

Code that comes with a checkpoint runs only with `trust_remote_code`. Never, asked for or not, are weights unpickled, files waited on that
are no files, and kernels fetched from a hub because a config.json names what needs them.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from l3ms.regular_files import check_folder, is_regular, read_regular

PICKLES = {"pytorch_model": "model", "adapter_model": "adapter_model"}  # name of weights as a pickle -> as safetensors
UNPICKLED = (
    "and those are never loaded: save it again as safetensors (save_pretrained does, from a model that you trust)"
)
INDEX, ADAPTER = "model.safetensors.index.json", "adapter_config.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
NAMING_FILES = (CONFIG, GENERATION, "tokenizer_config.json", INDEX, ADAPTER)
# Attention and experts of which nothing is fetched
OF_TORCH = ("eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")
COMPUTED = ("attn_implementation", "experts_implementation")
QUANTISED_BY_KERNELS = ("eetq", "fbgemm_fp8", "fp8", "metal", "mxfp4", "mxfp8", "nvfp4")
MOST_SIZE, MOST_LAYERS = 1 << 62, 10_000  # a larger one is built for ever, or ends the process
MOST_BYTES = 64 << 20  # of a JSON that is read here; a config.json has a few thousand


def load_pretrained(
    kind: Any, source: Any, *, trust_remote_code: bool = False, **options: Any
) -> tuple[Any, list[str]]:
    """`kind.from_pretrained(source, ...)` of a model's class: (the model, names of its weights that `source` has not and that are random).

    Weights are from safetensors alone. Raises `ValueError` for what is refused here, and whatever transformers, the hub client and
    safetensors raise.
    """
    check_source(source)
    with warnings.catch_warnings():  # of tensors without elements: they are refused in words, or right
        warnings.simplefilter("ignore")
        model, found = kind.from_pretrained(
            source, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True, **options
        )
    return model, sorted(found["missing_keys"])


def load_whole(kind: Any, source: Any, **options: Any) -> Any:
    """The model of `load_pretrained`; `ValueError` where some of its weights are missing."""
    model, missing = load_pretrained(kind, source, **options)
    if missing:
        raise ValueError(f"its weights are not whole: there is no {', '.join(missing[:3])}")
    return model


def load_tokenizer(kind: Any, source: Any, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The same of a tokenizer's class."""
    check_source(source)
    tokenizer = kind.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    longest = getattr(tokenizer, "model_max_length", 1)
    if isinstance(longest, bool) or not isinstance(longest, (int, float)):
        raise ValueError(f"tokenizer_config.json: model_max_length must be a number of tokens, got {longest!r:.80}")
    return tokenizer


def reason(error: BaseException) -> str:
    """What a loader raised, in one line; many of them raise without a word."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def is_installed(implementation: str) -> bool:
    """Whether attention or experts are computed by torch, or by the package of a flash attention that is here, with a device for it.

    Where it is not, and the package `kernels` is, transformers fetches a kernel from a hub.
    """
    from transformers import utils

    found = re.fullmatch(r"flash_attention_(\d+)", implementation)
    return implementation in OF_TORCH or (
        found is not None and bool(getattr(utils, f"is_flash_attn_{found[1]}_available", bool)())
    )


def check_source(source: Any) -> None:
    """Raise `ValueError` where a folder, or the one that its adapters are of, holds weights as a pickle, or what is no regular file."""
    folder, seen = Path(source), set()
    while os.path.isdir(folder) and folder not in seen:
        seen.add(folder)
        try:
            check_folder(folder)
        except OSError as error:
            raise ValueError(f"{error.filename} {error.strerror}") from None
        for name, safe in PICKLES.items():
            pickled = [*folder.glob(f"{name}*.bin"), *folder.glob(f"{name}*.bin.index.json")]
            if pickled and not [*folder.glob(f"{safe}*.safetensors")]:
                raise ValueError(f"{pickled[0]} is a pickle, {UNPICKLED}")
        for name in NAMING_FILES:
            values = _read(folder / name)
            if not isinstance(values, dict) and os.path.lexists(folder / name):
                raise ValueError(f"{folder / name} is no JSON object that can be read")
            _check_named(folder, name, values)
        adapter = _read(folder / ADAPTER)
        base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
        folder = Path(os.path.abspath(base)) if isinstance(base, str) else Path("\0")
    if not seen:
        _check_named(folder, CONFIG, _of_hub(source))


def _check_named(folder: Path, name: str, values: Any) -> None:
    """Of a JSON in a folder: what it makes transformers read or fetch."""
    if name == ADAPTER and isinstance(values, dict) and values.get("megatron_config"):
        raise ValueError(
            f"{name} has a megatron_config, for which peft imports the module that megatron_core names: remove it"
        )
    if name in (CONFIG, GENERATION) and (taken := _taken(values, _methods(name))):
        raise ValueError(
            f"{name} has {taken!r:.80}, which is a method of transformers' configuration and no setting: remove it from there"
        )
    try:
        found = list(_texts(values))
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    for key, value in found:
        if isinstance(value, int):
            if name == CONFIG and abs(value) > (MOST_LAYERS if "layer" in key else MOST_SIZE):
                raise ValueError(f"{name}: {key} is {value:.3g}, which no model has")
            continue
        fetched = key.endswith(COMPUTED) and not is_installed(value)  # and not the cache's, static or hybrid
        if fetched or (key.endswith("_implementation") and ("/" in value or ":" in value)):
            raise ValueError(f"{name} wants {key} {value!r}, code from a hub or not installed: remove it from there")
        if key == "quant_method" and value in QUANTISED_BY_KERNELS and _has_kernels():
            raise ValueError(
                f"{name} wants {key} {value!r}, for which transformers fetches code from a hub while the package kernels is installed: "
                "uninstall that, or save the model dequantized"
            )
        if value.endswith(".bin") and (name == INDEX or key == "transformers_weights"):
            raise ValueError(f"{name} names {value!r}, which is a pickle, {UNPICKLED}")
        path = folder / value
        if "/" in value and os.path.exists(path) and not os.path.isdir(path) and not is_regular(path):
            raise ValueError(f"{name} names {value!r}, which is not a regular file")


def _has_kernels() -> bool:
    from transformers.utils import import_utils

    return bool(import_utils.is_kernels_available())


@functools.cache
def _methods(name: str) -> frozenset[str]:
    """What a configuration does: a key of that name in its JSON would stand in the way, also after the training, when it is saved."""
    from transformers import GenerationConfig, PreTrainedConfig

    kind = GenerationConfig if name == GENERATION else PreTrainedConfig
    return frozenset(key for key in dir(kind) if callable(getattr(kind, key, None)))


def _taken(values: Any, methods: Collection[str]) -> str | None:
    """The first key among `methods`, of the configuration or of one in it."""
    inner = [item for key, item in values.items() if key.endswith("_config")] if isinstance(values, dict) else []
    here = next((key for key in values if key in methods), None) if isinstance(values, dict) else None
    return here or next((found for item in inner if (found := _taken(item, methods))), None)


def _of_hub(source: Any) -> Any:
    """The config.json of a model on a hub."""
    from transformers import PreTrainedConfig

    try:
        return PreTrainedConfig.get_config_dict(source)[0]
    except Exception:  # there is none, or no hub: from_pretrained says it
        return None


def _read(path: Path) -> Any:
    """A JSON file; None where it cannot be read: whoever needs it says so."""
    try:
        return json.loads(read_regular(path, MOST_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _texts(values: Any, name: str = "") -> Iterator[tuple[str, str | int]]:
    """(the key that it is under, text or integer) of all that is in a JSON."""
    if isinstance(values, (str, int)):
        yield name, values
    elif isinstance(values, dict):
        for key, value in values.items():
            yield from _texts(value, name if name.endswith("_implementation") else key)
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value, name)
