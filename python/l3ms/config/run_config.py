"""The YAML of `l3ms train`, as frozen pydantic models.

`load_config(path, overrides)` reads the file, applies `--train.learning-rate 1e-5` style overrides, resolves paths and
returns a `RunConfig`. Whatever is wrong comes out as one `ConfigError` that names the full dotted field. Paths written
in the file are relative to the file's folder; paths given by a flag are relative to the current folder.
"""

from __future__ import annotations

import copy
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from l3ms.config.constraints import ConstraintConfig, DataNLLConfig, FunctionConfig, LengthConfig
from l3ms.config.data import DataConfig
from l3ms.config.errors import explain, models_in, together, type_of
from l3ms.config.evaluate import EvaluateConfig, LoggingConfig
from l3ms.config.rollout import RolloutConfig, wrong_rollout
from l3ms.config.sections import Section, Text
from l3ms.config.train import TrainConfig
from l3ms.config.watch import WatchConfig
from l3ms.config.yaml_reader import ConfigError, parse_yaml, read_yaml, unnameable

# Suffixes of files, not of names on a hub
LOCAL = {".jsonl", ".ndjson", ".json", ".gz", ".csv", ".tsv", ".parquet", ".py", ".gguf"}
ALWAYS = ("output", "rollout.folder")  # paths, also those where nothing is yet

__all__ = ["ConfigError", "DataConfig", "RunConfig", "load_config"]


class RunConfig(Section):
    """Everything that fixes a run."""

    model: Text  # folder, or hub id of a causal language model
    output: Text  # run folder
    data: DataConfig
    constraints: list[ConstraintConfig] = Field([])
    train: TrainConfig = TrainConfig()
    rollout: RolloutConfig = RolloutConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    watch: WatchConfig | None = WatchConfig()  # null: the run is not watched
    logging: LoggingConfig = LoggingConfig()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    trust_remote_code: bool = False

    @property
    def runs_code(self) -> dict[str, str]:
        """Field -> what it would import: everything in this file that runs somebody's code, for `--allow-code`."""
        items = enumerate(self.constraints)
        code = {f"constraints.{i}.function": item.function for i, item in items if isinstance(item, FunctionConfig)}
        code |= {} if self.rollout.code is None else {"rollout.engine": self.rollout.code}
        return code | ({"trust_remote_code": f"the code of {self.model}"} if self.trust_remote_code else {})


def load_config(path: str | Path, overrides: list[tuple[str, Any]] | None = None) -> RunConfig:
    """Read, override, resolve and validate; `overrides` are (dotted field, value) pairs, as from `parse_override`.

    Raises `ConfigError` naming the field (or the file).
    """
    path = Path(path)
    values = _resolve_paths(read_yaml(path), path.resolve().parent)
    for field, value in overrides or []:
        _assign(values, field, _from_here(field, value))
    values = {key: value for key, value in values.items() if value is not None or key not in ("model", "output")}
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise explain(error, RunConfig) from None
    wrong = list(_wrong_across(config))
    if wrong:
        raise together(wrong)
    return config


def parse_override(flag: str, text: str) -> tuple[str, Any]:
    """`--train.learning-rate`, `1e-5` -> (`train.learning_rate`, 1e-05): YAML if it can be read so, else text."""
    field = flag.removeprefix("--").replace("-", "_")
    if why := unnameable(text):  # of bytes that are no UTF-8
        raise ConfigError(field, f"{why}: {text!r:.80}")
    try:
        return field, parse_yaml(text)
    except ConfigError:
        return field, text


def list_fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted field, default) of every field, as flags and file know them; a constraint's section is `constraints.N`, with the types
    that have the field where not all do."""
    for name, info in model.model_fields.items():
        sections = list(models_in(info.annotation))
        if name == "constraints":
            yield from _constraint_fields(sections)
        else:
            for section in sections[:1]:
                yield from list_fields(section, f"{prefix}{name}.")
        if not sections:
            default = (
                "required"
                if info.is_required()
                else yaml.safe_dump(info.get_default(call_default_factory=True), default_flow_style=True)
            )
            yield f"{prefix}{name}", default.removesuffix("...\n").strip()


def _constraint_fields(sections: list[type[BaseModel]]) -> Iterator[tuple[str, str]]:
    found: dict[str, dict[str, list[str]]] = {}  # field -> default -> types
    for section in sections:
        for field, default in list_fields(section):
            found.setdefault(field, {}).setdefault(default, []).append(type_of(section))
    for field, defaults in found.items():
        everywhere = [len(types) == len(sections) for types in defaults.values()] == [True]
        texts = [f"{default} ({', '.join(types)})" for default, types in defaults.items()]
        yield f"constraints.N.{field}", next(iter(defaults)) if everywhere else "; ".join(texts)


def _wrong_across(config: RunConfig) -> Iterator[ConfigError]:
    """What breaks rules that involve two sections."""
    if config.train.solver != "none" and all(item.monitor for item in config.constraints):
        only = " that is no monitor" if config.constraints else ""
        yield ConfigError(
            "constraints",
            f"solver {config.train.solver!r} needs at least one constraint{only}; or set train.solver: none",
        )
    if config.train.warmup is not None and config.train.warmup >= config.train.iterations:
        yield ConfigError(
            "train.warmup", f"must be below train.iterations ({config.train.iterations}), got {config.train.warmup}"
        )
    train = config.train
    settings = {"solver": train.solver, "half_steps": train.half_steps, "smoothing": train.smoothing}
    wrong = wrong_rollout(config.rollout, **settings) or _nothing_sampled(config) or _needless_weights(config)
    if wrong is not None:
        yield ConfigError(f"rollout.{wrong[0]}", wrong[1])
    seen: set[str] = set()
    for index, item in enumerate(config.constraints):
        if item.name in seen:
            yield ConfigError(f"constraints.{index}.name", f"{item.name!r} is used twice; names must differ")
        seen.add(item.name)
        if isinstance(item, LengthConfig):
            option = "min" if item.threshold is None else "threshold"
            value, longest = getattr(item, option), config.train.max_new_tokens
            # Of those that are cut at the limit a share can be bounded; a mean of all at the limit cannot
            mean = item.threshold is None and item.quantile is None
            if value is not None and (value > longest or (mean and value == longest)):
                wanted = "below" if mean else "at most"
                yield ConfigError(
                    f"constraints.{index}.{option}",
                    f"must be {wanted} train.max_new_tokens ({longest}), got {value:g}: no response can be that long",
                )


def _nothing_sampled(config: RunConfig) -> tuple[str, str] | None:
    """What is said of responses where no constraint that is trained on has any."""
    if config.train.solver == "none" or any(
        not isinstance(c, DataNLLConfig) and not c.monitor for c in config.constraints
    ):
        return None
    for name, default in (("reuse", 1), ("importance", "none")):
        if (value := getattr(config.rollout, name)) != default:
            return name, f"is about sampled responses, and no constraint is on any, got {value!r}"
    return None


def _needless_weights(config: RunConfig) -> tuple[str, str] | None:
    if config.rollout.importance == "truncate" and config.rollout.engine == "transformers":
        return "importance", (
            "is for an engine whose probabilities are not the model's, and engine is 'transformers', the model itself: leave it out"
        )
    return None


def _assign(values: dict[str, Any], field: str, value: Any) -> None:
    """Set `values` at the dotted path, creating sections; an index one past the end appends a constraint."""
    parts = field.split(".")
    here: Any = values
    for depth, part in enumerate(parts):
        where = ".".join(parts[: depth + 1])
        last = depth == len(parts) - 1
        if isinstance(here, list):
            if not part.isdecimal() or int(part) > len(here):
                raise ConfigError(where, f"wanted an index from 0 to {len(here)}")
            if int(part) == len(here):
                here.append({})
            key: Any = int(part)
        elif isinstance(here, dict):
            key = part
            if not last and here.get(key) is None:
                here[key] = [] if parts[depth + 1].isdecimal() else {}
        else:
            raise ConfigError(where, f"cannot set a field inside {here!r}")
        if last:
            here[key] = value
        else:
            here = here[key]


def _from_here(field: str, value: Any) -> Any:
    """The value of a flag, its paths from the current folder."""
    parts = field.split(".")
    found = copy.deepcopy(value)
    for part in reversed(parts):
        found = {part: found}
    found = _resolve_paths(found, Path.cwd())
    for part in parts:
        found = found[part]
    return found


def _resolve_paths(values: dict[str, Any], base: Path) -> dict[str, Any]:
    """Make the paths in `values` absolute, in place: those of `ALWAYS`, the others when they exist or look like a path."""

    def inside(section: Any, prefix: str, *names: str) -> None:
        if isinstance(section, dict):
            section.update(
                {name: _resolve(f"{prefix}{name}", section[name], base) for name in names if name in section}
            )

    inside(values, "", "output", "model")
    inside(values.get("data"), "data.", "train", "evaluation")
    inside(values.get("rollout"), "rollout.", "folder")
    _resolve_code(values.get("rollout"), "rollout.", "engine", base)
    constraints = values.get("constraints")
    numbered = enumerate(constraints) if isinstance(constraints, list) else ()
    for index, item in constraints.items() if isinstance(constraints, dict) else numbered:
        if not isinstance(item, dict):
            continue
        prefix = f"constraints.{index}."
        inside(item, prefix, "model", "reference")
        inside(item.get("data"), f"{prefix}data.", "train", "evaluation")
        _resolve_code(item, prefix, "function", base)
    return values


def _resolve_code(section: Any, prefix: str, name: str, base: Path) -> None:
    """`file.py:name` with the file's absolute path."""
    spec = section.get(name) if isinstance(section, dict) else None
    if isinstance(spec, str) and ":" in spec:
        source, _, what = spec.rpartition(":")
        if source.endswith(".py"):
            section[name] = f"{_resolve(f'{prefix}{name}', source, base)}:{what}"


def _resolve(field: str, text: Any, base: Path) -> Any:
    """The path that `text` is: absolute if it is of `ALWAYS`, exists, or looks like one. Refused by its field where no file can have it."""
    if isinstance(text, list):
        return [_resolve(f"{field}.{index}", item, base) for index, item in enumerate(text)]
    if isinstance(text, dict):
        return {index: _resolve(f"{field}.{index}", item, base) for index, item in text.items()}
    if not isinstance(text, str) or not text:
        return text
    if why := unnameable(text):
        raise ConfigError(field, f"{why}: {text!r:.80}")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        if field in ALWAYS:
            raise ConfigError(field, f"has no home folder of a user {text.partition('/')[0]!r:.80}") from None
        return text
    full = path if path.is_absolute() else base / path
    if ".data." in f".{field}" and glob.has_magic(text) and not os.path.lexists(full):
        return str(path) if path.is_absolute() else os.path.join(glob.escape(str(base)), path)
    looks_local = text.startswith((".", "~", "/")) or path.suffix in LOCAL
    if field not in ALWAYS and not looks_local and not os.path.exists(full):
        return text
    try:
        return str(full.resolve())
    except (
        OSError,
        RuntimeError,
    ) as error:  # a name that no file system takes; links in a circle (RuntimeError before Python 3.13)
        reason = getattr(error, "strerror", None) or "symbolic links that lead in a circle"
        raise ConfigError(field, f"is not a path that can be followed ({reason}): {text:.80}") from None
