"""What somebody else may hand over: model folders, run folders and checkpoints that want code run, files read or overwritten, or a crash.

A case makes itself in a project (with `victim`, a file, and `precious/`, a folder) and is a command; the exit codes are those it may have.
"""

import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

REFUSED = (2, 3, 4, 5)
Case = tuple[str, Callable[[Path], list[str]], tuple[int, ...]]
TRAIN = ["train", "run.yaml"]
CODE = "import os; os.mkdir('canary')\n"
HUGE = "9" * 5000
JUNK: dict[str, bytes] = {
    "empty": b"", "cut": b'{"a": ', "a list": b"[]", "a number": b"3", "text": b'"x"', "null": b"null", "bytes": bytes(range(256)),
    "nested": b"[" * 100_000, "nested and closed": b"[" * 900 + b"]" * 900, "digits": HUGE.encode(), "utf-16": "{}".encode("utf-16"),
    "a mapping of nothing": b"{}",
}  # fmt: skip


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("canary",)


def pickled() -> bytes:
    return pickle.dumps({"model.norm.weight": Bomb()})


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def of_weights() -> Iterator[Case]:
    """Weights of the model: pickles, headers that lie."""

    def case(name: str, write: Callable[[Path], Any]) -> Case:
        def make(folder: Path) -> list[str]:
            write(folder / "base")
            return TRAIN

        return f"model: {name}", make, REFUSED

    def replaced(name: str, contents: bytes) -> Callable[[Path], Any]:
        def write(base: Path) -> None:
            (base / "model.safetensors").unlink()
            (base / name).write_bytes(contents)

        return write

    for name in (
        "pytorch_model.bin",
        "pytorch_model-00001-of-00001.bin",
        "adapter_model.bin",
        "tf_model.h5",
        "model.pt",
    ):
        yield case(f"a pickle as {name}", replaced(name, pickled()))
        yield case(f"bytes as {name}", replaced(name, b"junk" * 99))
    for name in ("model.ckpt.index", "flax_model.msgpack", "model.gguf", "consolidated.00.pth", "model.onnx"):
        yield case(f"a pickle as {name}", replaced(name, pickled()))
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    for target in (
        "pytorch_model.bin",
        "../victim",
        "/dev/zero",
        "/etc/passwd",
        "nowhere.safetensors",
        "",
        "precious",
        "\0",
    ):
        named = {**index, "weight_map": {"model.norm.weight": target}}
        for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            yield case(f"{name} names {target!r}", replaced(name, json.dumps(named).encode()))
    for kind, contents in JUNK.items():
        yield case(f"model.safetensors is {kind}", replaced("model.safetensors", contents))
        yield case(f"the index is {kind}", replaced("model.safetensors.index.json", contents))
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    headers: dict[str, Any] = {
        "no mapping": [], "no tensors": {}, "an unknown type": {"a": {**one, "dtype": "F7"}}, "a negative offset": {"a": {**one,
        "data_offsets": [-4, 0]}},
        "offsets beyond the end": {"a": {**one, "data_offsets": [0, 1 << 40]}}, "offsets turned round": {"a": {**one,
        "data_offsets": [4, 0]}},
        "a shape that does not fit": {"a": {**one, "shape": [1 << 40]}}, "a shape that overflows": {"a": {**one,
        "shape": [1 << 62, 1 << 62]}},
        "a negative shape": {"a": {**one, "shape": [-1]}}, "overlapping tensors": {"a": one, "b": one}, "a tensor that is text": {"a": "x"},
        "strange tensors alone": {"strange": one}, "metadata of numbers": {"__metadata__": {"a": 1}, "a": one},
        "no offsets": {"a": {"dtype": "F32", "shape": []}},
        "a hole": {"a": {**one, "data_offsets": [4, 8]}}, "an offset of text": {"a": {**one, "data_offsets": ["0", "4"]}},
    }  # fmt: skip
    for kind, header in headers.items():
        text = json.dumps(header).encode()
        yield case(
            f"a header with {kind}", replaced("model.safetensors", struct.pack("<Q", len(text)) + text + bytes(4))
        )
    for size in (0, 1, 1 << 20, 1 << 33, 1 << 63, (1 << 64) - 1):
        yield case(f"a header of {size} bytes", replaced("model.safetensors", struct.pack("<Q", size) + b"{}"))
    yield case("cut in half", lambda base: os.truncate(base / "model.safetensors", 3000))
    yield case("weights that are no numbers", _no_numbers)


def _no_numbers(base: Path) -> None:
    from safetensors.torch import load_file, save_file

    found = {name: value * float("nan") for name, value in load_file(base / "model.safetensors").items()}
    save_file(found, base / "model.safetensors", metadata={"format": "pt"})


def of_configs() -> Iterator[Case]:
    """config.json and tokenizer files of the model: code, kernels, numbers that no model has, other files' paths."""

    def case(name: str, file: str, **values: Any) -> Case:
        def make(folder: Path) -> list[str]:
            (folder / "base" / "evil.py").write_text(CODE + "class C: pass\n")
            (folder / "base" / "modeling_evil.py").write_text(CODE)
            (folder / "base" / "custom_generate").mkdir()
            (folder / "base" / "custom_generate" / "generate.py").write_text(CODE)
            os.mkfifo(folder / "fifo")
            change(folder / "base" / file, **values)
            return TRAIN

        return f"{file}: {name}", make, REFUSED

    for auto in ("AutoConfig", "AutoModelForCausalLM"):
        for code in ("evil.C", "evil--evil.C", "../evil.C", "someone/repo--evil.C", "evil", ""):
            yield case(f"auto_map {auto} {code!r}", "config.json", auto_map={auto: code}, model_type="strange")
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        for value in ("someone/kernel", "kernels-community/flash-attn", "a/b@main:run", "strange"):
            if value == "strange" and key == "experts_implementation":
                continue
            yield case(f"{key} {value}", "config.json", **{key: value})
    numbers = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "intermediate_size",
        "max_position_embeddings",
    )
    for key in numbers:
        for value in (-1, 0, 1.5, "x", [], 1 << 62, HUGE[:400]):
            if (key, value) in (("num_hidden_layers", 0), ("max_position_embeddings", 1 << 62)):  # there are such
                continue
            yield case(f"{key} {value!r:.20}", "config.json", **{key: value})
    for key, value in {
        "model_type": "strange", "dtype": "load", "num_key_value_heads": 3, "hidden_act": "os.system", "rms_norm_eps": "x",
        "transformers_weights": "pytorch_model.bin",
        "rope_parameters": {"rope_type": "strange"}, "head_dim": -2, "pad_token_id": 99,
    }.items():  # fmt: skip
        yield case(f"{key} {value!r}", "config.json", **{key: value})
    for path in ("/dev/zero", "/dev/null", "../fifo"):
        yield case(f"vocab_file {path}", "tokenizer_config.json", vocab_file=path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        for kind, contents in JUNK.items():
            if kind == "a mapping of nothing" and name != "config.json":
                continue

            def make(folder: Path, name: str = name, contents: bytes = contents) -> list[str]:
                (folder / "base" / name).write_bytes(contents)
                return TRAIN

            yield f"{name} is {kind}", make, REFUSED


def of_special_files() -> Iterator[Case]:
    from bad_inputs import PLACES

    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "extra.json",
    ):
        for kind in ("a FIFO", "a socket", "a loop of links", "a link to a device", "a link to a FIFO"):
            if kind == "a loop of links" and name in ("chat_template.jinja", "extra.json", "tokenizer_config.json"):
                continue
            for model in ("base", "classifier"):

                def make(folder: Path, name: str = name, kind: str = kind, model: str = model) -> list[str]:
                    (folder / model / name).unlink(missing_ok=True)
                    PLACES[kind](folder / model / name)
                    if model == "base":
                        return TRAIN
                    return [*TRAIN, "--constraints.0", "{type: reward_model, name: m, model: classifier, min: 0.1}"]

                yield f"{model}/{name} is {kind}", make, REFUSED


def of_code() -> Iterator[Case]:
    """Everything that would run code, without --allow-code."""
    reward = "{type: function, name: f, function: 'evil.py:f', min: 1}"

    def case(name: str, *arguments: str) -> Case:
        def make(folder: Path) -> list[str]:
            (folder / "evil.py").write_text(CODE + "def f(*a, **k): return []\n")
            (folder / "finished" / "average" / "evil.py").write_text(CODE)
            change(
                folder / "finished" / "average" / "config.json", auto_map={"AutoConfig": "evil.C"}, model_type="strange"
            )
            return list(arguments)

        return f"code: {name}", make, REFUSED

    for command in ("train", "check"):
        yield case(f"a reward file, {command}", command, "with_reward.yaml")
    yield case("a reward file by a flag", *TRAIN, "--constraints.0", reward)
    yield case("a module", *TRAIN, "--constraints.0", "{type: function, name: f, function: 'evil:f', min: 1}")
    yield case("trust_remote_code", *TRAIN, "--trust-remote-code", "true")
    yield case("a run folder's model", "certify", "finished")
    yield case("a run folder's model, last", "certify", "finished", "--weights", "last", "--prompts", "nowhere.jsonl")
    yield case("a data set's script", *TRAIN, "--data.train", "./evil.py")
    yield case("a folder with a script", *TRAIN, "--data.train", "./finished")
    for ending in ("pkl", "pandas", "pickle", "pt", "npy", "sql", "spark", "zip", "tar"):

        def make(folder: Path, ending: str = ending) -> list[str]:
            (folder / f"rows.{ending}").write_bytes(pickled())
            return [*TRAIN, "--data.train", f"./rows.{ending}"]

        yield f"code: data that is a pickle, .{ending}", make, REFUSED


def torch_archive() -> bytes:
    import io

    file = io.BytesIO()
    torch.save({"model.norm.weight": Bomb()}, file)
    return file.getvalue()


def of_archives() -> Iterator[Case]:
    for name in ("pytorch_model.bin", "adapter_model.bin"):

        def make(folder: Path, name: str = name) -> list[str]:
            (folder / "classifier" / "model.safetensors").unlink()
            (folder / "classifier" / name).write_bytes(torch_archive())
            return [*TRAIN, "--constraints.0", "{type: reward_model, name: m, model: classifier, min: 0.1}"]

        yield f"classifier: torch's archive as {name}", make, REFUSED

    def reference(folder: Path) -> list[str]:
        (folder / "other").mkdir()
        for path in (folder / "base").iterdir():
            (folder / "other" / path.name).write_bytes(path.read_bytes())
        (folder / "other" / "evil.py").write_text(CODE)
        change(folder / "other" / "config.json", auto_map={"AutoConfig": "evil.C"}, model_type="strange")
        return [
            *TRAIN,
            "--trust-remote-code",
            "true",
            "--allow-code",
            "--constraints.0",
            "{type: kl, reference: ./other, max: 5}",
        ]

    yield "a reference with code that was not announced", reference, REFUSED


def cases() -> list[Case]:
    return [*of_weights(), *of_configs(), *of_special_files(), *of_code(), *of_archives()]
