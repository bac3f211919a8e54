"""Whether a checkpoint can be gone on with. Its manifest says that the files are those that were written; here is looked at what they say,
since a manifest can be written again: wrong types, places that no run can be at, weights that are missing or of another shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import TrainerState

from l3ms.regular_files import read_regular
from l3ms.training import checkpoints
from l3ms.training.state_trees import load_tree

TREES = ("optimizer", "scheduler", "scaler", "random*", "watch*", "rollout*")  # names of `save_tree`
MOMENTS = (
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "momentum_buffer",
    "sum",
)  # of torch's optimizers: one number per weight
READ = ("l3m/", "constraints/", "time/", "memory/")  # in names of numbers of the log that a report is made of
TAKEN = 1 << 12  # rows per iteration: it may have been another number before, or in a training before this one
PLACE = ("taken", "rows", "seed", "world")


class CheckpointError(ValueError):
    """A checkpoint cannot be gone on with."""


def unreadable(folder: Path, taken: int) -> str | None:
    """What is wrong with the contents of `folder`, None where nothing is. `taken`: rows per iteration for constraints."""
    try:
        step = int(folder.name.rpartition("-")[2]) if checkpoints.NAME.fullmatch(folder.name) else None
        state = _check_state(_json(folder / "trainer_state.json"), step)
        if (folder / "l3m.json").exists():
            _check_progress(_json(folder / "l3m.json"), folder, state.global_step, taken)
        for path in sorted(folder.glob("*.safetensors")):
            shapes(path)
        for name in TREES:
            for path in sorted(folder.glob(f"{name}.json")):
                _check_tree(load_tree(folder, path.stem), path)
    except CheckpointError as error:
        return str(error)
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
        SafetensorError,
    ) as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def misfit(folder: Path, model: Any) -> str | None:
    """What of the weights in `folder` does not fit `model`; None where all do, and where they are not in safetensors files."""
    paths = sorted([*folder.glob("model.safetensors"), *folder.glob("model-*-of-*.safetensors")])
    if not paths or hasattr(model, "peft_config"):
        return None
    found = {name: shape for path in paths for name, shape in shapes(path).items()}
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    what = paths[0].name if len(paths) == 1 else "model.safetensors.index.json"
    for name in sorted(found.keys() & wanted.keys()):
        if found[name] != wanted[name]:
            return f"{what} has {found[name]} numbers as {name}, the model {wanted[name]}"
    strange = sorted(found.keys() - wanted.keys())
    if strange:
        return f"{what} has {strange[0]}, which the model has not"
    # of tensors that are one and the same the file has one
    kept = {value.data_ptr() for name, value in model.state_dict().items() if name in found and value.numel()}
    for name, value in model.state_dict().items():
        if name not in found and value.numel() and value.data_ptr() not in kept:
            return f"{what} has no {name}"
    return None


def shapes(path: Path) -> dict[str, list[int]]:
    """Of the tensors in a safetensors file, from its header."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _json(path: Path) -> Any:
    try:
        return json.loads(read_regular(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _check_state(values: Any, step: int | None) -> TrainerState:
    """transformers' state: where the run is, and its log."""

    def check(right: bool, what: str) -> None:
        if not right:
            raise CheckpointError(f"trainer_state.json: {what}")

    check(isinstance(values, dict), "is no mapping")
    try:
        state = TrainerState(**values)
    except TypeError as error:
        raise CheckpointError(f"trainer_state.json: {error}") from None
    check(_counts(state.global_step) and step in (None, state.global_step), f"global_step is {state.global_step!r:.40}")
    check(_counts(state.max_steps) and state.max_steps >= state.global_step, f"max_steps is {state.max_steps!r:.40}")
    check(state.epoch is None or (_real(state.epoch) and 0 <= state.epoch < 1e15), f"epoch is {state.epoch!r:.40}")
    check(_counts(state.train_batch_size), f"train_batch_size is {state.train_batch_size!r:.40}")
    check(
        isinstance(state.stateful_callbacks, dict) and "TrainerControl" in state.stateful_callbacks,
        "it has no TrainerControl",
    )
    check(isinstance(state.log_history, list), "log_history is no list")
    for row in state.log_history:
        check(isinstance(row, dict) and _counts(row.get("step")), f"log_history holds {row!r:.60}")
        read = {name: value for name, value in row.items() if name in ("loss", "epoch") or name.startswith(READ)}
        wrong = [name for name, value in read.items() if not (value is None or isinstance(value, str) or _real(value))]
        check(not wrong, f"log_history holds a {wrong[:1]} that is no number")
    return state


def _check_progress(values: Any, folder: Path, step: int, taken: int) -> None:
    """`l3m.json`: a place further on than the run can be would be gone to, for ever."""
    places = [place for place in (values["prompts"], *values.get("data", {}).values()) if place is not None]
    for place in places:
        if not _counts(place["taken"]) or place["taken"] > step * max(taken, TAKEN):
            raise CheckpointError(f"l3m.json: {place['taken']!r:.40} prompts cannot be taken in {step} iterations")
        for name in PLACE:
            if name in place and not _counts(place[name]):
                raise CheckpointError(f"l3m.json: {name} is {place[name]!r:.40}")
    for name, count in values.get("sampling", {}).items():
        if not _counts(count) or count > (step if name == "left_out" else 1 << 53):
            raise CheckpointError(f"l3m.json: {name} is {count!r:.40}, after {step} iterations")
    averaged = values["averaged"]
    if not _counts(averaged) or averaged > step:
        raise CheckpointError(f"l3m.json: averaged is {averaged!r:.40}, after {step} iterations")
    if averaged and not (folder / "l3m_average.safetensors").exists():
        raise CheckpointError("l3m_average.safetensors is missing")


def _check_tree(tree: Any, path: Path) -> None:
    kind: type = list if path.stem.startswith("watch") else Mapping
    if not isinstance(tree, kind):
        raise CheckpointError(f"{path.name} holds a {type(tree).__name__}")
    if path.stem.startswith("random"):
        name, _, place, *_ = tree["numpy"]
        if name != "MT19937" or not _counts(place) or place > 624:  # NumPy would read behind its table
            raise CheckpointError(f"{path.name} is no state of NumPy's generator")


def unlike(fresh: Any, found: Any, name: str) -> str | None:
    """Where state that is to be loaded is of another kind than that of something new: text for a number, another shape."""
    if fresh is None:  # a setting that is left open
        return None
    if isinstance(fresh, Tensor):
        right = isinstance(found, Tensor) and (found.shape == fresh.shape or not fresh.numel())
    elif isinstance(fresh, Mapping):
        if not isinstance(found, Mapping):
            return f"{name} is a {type(found).__name__}"
        pairs = [(fresh[key], found[key], f"{name}.{key}") for key in fresh.keys() & found.keys()]
        return next((wrong for pair in pairs if (wrong := unlike(*pair)) is not None), None)
    elif isinstance(fresh, (list, tuple)):
        if not isinstance(found, (list, tuple)):
            return f"{name} is a {type(found).__name__}"
        pairs = [(a, b, f"{name}.{i}") for i, (a, b) in enumerate(zip(fresh, found, strict=False))]
        return next((wrong for pair in pairs if (wrong := unlike(*pair)) is not None), None)
    elif isinstance(fresh, (int, float)):
        right = isinstance(found, float) or (isinstance(found, int) and -(2**63) <= found < 2**63)
    else:
        right = type(fresh) is type(found) or not isinstance(fresh, str)
    return None if right else f"{name} is {found!r:.40}"


def misfit_of_optimizer(optimizer: Any, found: Any) -> str | None:
    """The same of an optimizer, with what it keeps of each parameter: nothing of it is there in a new one."""
    fresh = optimizer.state_dict()
    wrong = unlike({**fresh, "state": {}}, found, "optimizer")
    if wrong is not None:
        return wrong
    shaped = MOMENTS if _is_of_torch(optimizer) else ()  # others keep factors or projections by these names
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, entries in found["state"].items():
        if not _counts(key) or key >= len(parameters) or not isinstance(entries, Mapping):
            return f"optimizer.state has {key!r:.40}"
        for name, value in entries.items():
            if not (value is None or isinstance(value, Tensor) or _real(value)):
                return f"optimizer.state.{key}.{name} is {value!r:.40}"
            if name in shaped and (not isinstance(value, Tensor) or value.shape != parameters[key].shape):
                return f"optimizer.state.{key}.{name} is not of its parameter's shape"
    return None


def _is_of_torch(optimizer: Any) -> bool:
    inner = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper
    base = getattr(inner, "base", inner)
    return all(type(part).__module__.startswith("torch.optim") for part in getattr(base, "parts", [base]))


def _counts(value: Any) -> bool:
    return type(value) is int and value >= 0


def _real(value: Any) -> bool:
    return type(value) in (int, float)
