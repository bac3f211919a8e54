"""`l3ms certify RUN`: fresh responses to held-out prompts, and a verdict on each constraint that holds with a stated probability.

The samples are new: their random stream is neither the training's nor that of the evaluation at its end. Everything that could be chosen to
please (prompts, number of samples, method of each bound) is fixed before the first one is drawn. A certificate holds for one look:
certifying again and again with new seeds until one pleases is as many looks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.console import Console

import l3m_kernels
from l3ms.config.run_config import RunConfig, load_config
from l3ms.config.yaml_reader import ConfigError
from l3ms.constraints.constraint import Constraint
from l3ms.measuring.evaluation import Evaluation, evaluate, prompt_key
from l3ms.runs.data import Encoded, Example, encode, load_examples, load_prompts
from l3ms.runs.executing import check_code
from l3ms.runs.loading import PLAIN, build_constraints, context_room, load_model
from l3ms.runs.progress import progress_bar
from l3ms.runs.whole_files import write_json
from l3ms.verdicts.certificates import Declared, Range, Verdict, declare, judge, known_range, together

if TYPE_CHECKING:
    from l3ms.verdicts.prices import Prices

FOLDERS = {"average": "average", "last": "model"}
EXIT_CODES = {"SATISFIED": 0, "VIOLATED": 3, "INCONCLUSIVE": 4}
MOST = 1024  # samples, where --samples does not say: every held-out prompt once, up to so many


@dataclass(frozen=True)
class CertifyOptions:
    """What `l3ms certify` was asked for."""

    weights: str = "average"  # or last
    samples: int | None = None
    delta: float = 0.05  # probability that any verdict is wrong
    prompts: Path | None = None  # JSONL, instead of the held-out rows of the run
    seed: int = 0
    method: str = "auto"
    ranges: Mapping[str, Range] | None = None  # of rewards, by constraint
    json: Path | None = None  # default: RUN/certificate.json
    allow_code: bool = False
    prices: bool = False
    probes: int = 512  # responses for the prices, and as many task rows

    def __post_init__(self) -> None:
        if self.weights not in FOLDERS:
            raise ConfigError("--weights", f"must be average or last, got {self.weights!r}")
        if not 1e-12 <= self.delta < 1:  # quantiles closer to 1 are beyond float64
            raise ConfigError("--delta", f"must be at least 1e-12 and below 1, got {self.delta:g}")
        if self.samples is not None and self.samples < 2:
            raise ConfigError("--samples", f"must be at least 2, got {self.samples}")
        if self.method not in ("auto", "bernstein", "t"):
            raise ConfigError("--method", f"must be auto, bernstein or t, got {self.method!r}")
        if self.prompts is not None and not self.prompts.is_file():
            raise ConfigError("--prompts", f"no such file: {self.prompts}")
        if self.prices and self.prompts is not None:
            raise ConfigError("--prices", "are those of the run's own task, on its held-out rows; leave out --prompts")
        if self.json is not None and not self.json.parent.is_dir():
            raise ConfigError("--json", f"no such folder: {self.json.parent}")
        if self.json is not None and self.json.is_dir():
            raise ConfigError("--json", f"is a folder: {self.json}")


@dataclass(frozen=True)
class Subject:
    """What is certified: a model of a run, its constraints, and rows it has not been trained on."""

    config: RunConfig
    folder: Path  # of the weights
    model: Any
    tokenizer: Any
    constraints: list[Constraint]
    held_out: Encoded
    notes: list[str]


def certify(
    run: str | Path, options: CertifyOptions | None = None, *, console: Console | None = None
) -> dict[str, Any]:
    """Sample, judge, print the table, write the certificate and return it; its "verdict" is that of all constraints together.

    Raises:
        ConfigError: `run` is no run folder, holds no constraint or no weights; an option is wrong. Nothing is written then.
    """
    start = time.monotonic()
    options, console, run = options or CertifyOptions(), console or Console(), Path(run)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    subject = load_subject(run, options, console)
    if options.prices:
        from l3ms.verdicts.probes import check_prices

        check_prices(subject)
    config, constraints = subject.config, subject.constraints
    rows, keys = draw(subject.held_out.rows, options.samples, stream(config.seed, options.seed, "prompts"))
    notes = [*subject.notes, *repeats(keys)]
    bounds = sum((c.min is not None) + (c.max is not None) for c in constraints)
    delta = options.delta / bounds
    declared = {item.name: _declare(item, config, options, keys, delta) for item in constraints}
    for note in notes:
        console.print(note, **PLAIN)

    with progress_bar(console, f"sampling {len(rows)} responses to held-out prompts") as advance:
        found = evaluate(
            subject.model, subject.tokenizer, rows, max_new_tokens=config.train.max_new_tokens,
            seed=stream(config.seed, options.seed, "responses"), temperature=config.train.temperature,
            batch_size=config.evaluate.batch_size, constraints=constraints, progress=advance,
        )  # fmt: skip
    verdicts = [_judge(item, found, declared[item.name], delta, keys) for item in constraints]
    prices = _prices(subject, verdicts, options, console) if options.prices else None
    certificate = {
        "format": 1,
        "verdict": together([item.verdict for item in verdicts if item.verdict is not None]),
        "run": str(run.resolve()),
        "weights": options.weights,
        "sha256": digest(subject.folder),
        "seed": options.seed,
        "delta": options.delta,
        "one_sided_bounds": bounds,
        "level_of_each": 1 - delta,
        "samples": len(rows),
        "prompts": len(set(keys)),
        "held_out_prompts": len({prompt_key(row) for row in subject.held_out.rows}),
        "max_new_tokens": config.train.max_new_tokens,
        "temperature": config.train.temperature,
        "length": found.summary["length"],
        "ended": found.summary["ended"],
        "perplexity": found.summary["perplexity"] if options.prompts is None else None,
        "constraints": [
            {**asdict(verdict), "type": type(item).__name__, "min": item.min, "max": item.max,
             "threshold": getattr(item, "threshold", None)}
            for item, verdict in zip(constraints, verdicts, strict=True)
        ],
        "notes": notes,
        "seconds": round(time.monotonic() - start, 1),
        "versions": versions(),
    }  # fmt: skip
    if prices is not None:
        certificate["prices"] = prices.as_dict()
    path = options.json or run / "certificate.json"
    write_json(path, certificate)
    from l3ms.verdicts.certificate_table import print_certificate

    print_certificate(certificate, verdicts, constraints, prices, console)
    console.print(f"Certificate: {path}", **PLAIN)
    return certificate


def load_subject(run: Path, options: CertifyOptions, console: Console) -> Subject:
    """Configuration, weights, constraints and held-out rows of a run folder."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(str(run), "is not a run folder: it has no config.yaml")
    config = load_config(run / "config.yaml")
    folder = run.resolve() / FOLDERS[options.weights]
    if not folder.is_dir():
        raise ConfigError("--weights", f"{run} has no {folder.name}/: the run has not come so far")
    if all(item.monitor for item in config.constraints):
        what = "monitors alone" if config.constraints else "none"
        raise ConfigError("constraints", f"{run} has {what}, so there is nothing to certify")
    names = {item.name for item in config.constraints}
    for name in options.ranges or {}:
        if name not in names:
            raise ConfigError("--range", f"no constraint is called {name!r}; there are {', '.join(sorted(names))}")
    check_code(config, options.allow_code)
    notes, train, held_out = _rows(config, options)
    # The adapters are in the folder
    loaded = config.model_copy(
        update={"model": str(folder), "train": config.train.model_copy(update={"lora": None})}, deep=True
    )
    tokenizer, model = load_model(loaded, console)
    # From the run's own configuration: a divergence is that from the model it started with
    constraints = build_constraints(config, console, tokenizer, model)
    if config.train.device == "auto" and torch.cuda.is_available():
        model = model.cuda()
    context, room = context_room(config, model)
    encoded = encode(
        held_out, tokenizer, max_length=min(config.data.max_length, context), max_prompt=room,
        chat_template=config.data.chat_template,
    )  # fmt: skip
    if not encoded.rows:
        field = "data.evaluation" if options.prompts is None else "--prompts"
        raise ConfigError(field, f"no prompt fits in {room} tokens")
    notes += encoded.notes("held-out prompts") + _overlap(train, held_out)
    return Subject(config, folder, model, tokenizer, constraints, encoded, notes)


def _rows(config: RunConfig, options: CertifyOptions) -> tuple[list[str], list[Example], list[Example]]:
    """(what is to be said, training rows, held-out rows); of prompts from a file, the run's own data may be gone."""
    if options.prompts is None:
        return [], *load_examples(config.data, seed=config.seed)
    prompts = load_prompts(config.data, "--prompts", options.prompts)
    try:
        return [], load_examples(config.data, seed=config.seed)[0], prompts
    except ConfigError as error:
        return [f"whether these prompts were trained on is not known: {error}"], [], prompts


def stream(*parts: Any) -> int:
    """A seed of its own for each use: training and evaluation take the run's seed as it is."""
    text = "/".join(["l3ms certify", *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def draw(rows: Sequence[dict[str, Any]], samples: int | None, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows in random order, the keys of their prompts): each row once, and all of them again where more samples are wanted."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(len(rows), MOST) if samples is None else samples
    drawn = [rows[i] for i in itertools.islice(itertools.cycle(order), count)]
    return drawn, [prompt_key(row) for row in drawn]


def repeats(keys: Sequence[str]) -> list[str]:
    """What is said where prompts are answered more than once."""
    different = len(set(keys))
    if different == len(keys):
        return []
    return [
        f"{len(keys)} samples of {different} different prompts: responses to one prompt are not independent, "
        f"so the bounds count {different} groups"
    ]


def digest(folder: Path) -> str:
    """sha256 of the weights' files, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def versions() -> dict[str, str]:
    return {
        "l3ms": l3m_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _overlap(train: Sequence[Example], held_out: Sequence[Example]) -> list[str]:
    trained = {json.dumps(example.prompt, sort_keys=True) for example in train}
    known = sum(json.dumps(example.prompt, sort_keys=True) in trained for example in held_out)
    return [f"{known} of {len(held_out)} prompts are in the training data: not held out"] if known else []


def _declare(
    constraint: Constraint, config: RunConfig, options: CertifyOptions, keys: Sequence[str], delta: float
) -> Declared:
    known, indicator = known_range(constraint, config.train.max_new_tokens, (options.ranges or {}).get(constraint.name))
    groups = len(set(keys))
    try:
        return declare(
            constraint,
            groups,
            delta,
            known=known,
            indicator=indicator,
            grouped=groups < len(keys),
            method=options.method,
        )
    except ValueError as error:
        raise ConfigError("--method", str(error)) from None


def _judge(constraint: Constraint, found: Evaluation, declared: Declared, delta: float, keys: Sequence[str]) -> Verdict:
    values = found.rewards.get(constraint.name, [])
    # Values of further data have rows of their own, each measured once
    groups = list(keys) if len(values) == len(keys) and not getattr(constraint, "data", False) else None
    return judge(constraint, values, delta, declared, groups)


def _prices(subject: Subject, verdicts: Sequence[Verdict], options: CertifyOptions, console: Console) -> Prices:
    from l3ms.verdicts.probes import measure_prices

    means = {item.name: item.mean for item in verdicts if math.isfinite(item.mean)}
    errors = {item.name: item.deviation / math.sqrt(item.groups) for item in verdicts if item.groups > 1}
    seed = stream(subject.config.seed, options.seed, "prices")
    return measure_prices(subject, means, errors, probes=options.probes, seed=seed, console=console)
