"""`l3ms certify RUN`: fresh responses to held-out prompts, and a verdict on each constraint that holds with a stated probability.

The samples are new: their random stream is neither the training's nor that of the evaluation at its end. Everything that could be chosen to
please (prompts, number of samples, method of each bound) is fixed before the first one is drawn. A certificate holds for one look:
certifying again and again with new seeds until one pleases is as many looks.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import platform
import time
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import l3m_kernels
from l3ms.config.run_config import RunConfig
from l3ms.config.yaml_reader import ConfigError
from l3ms.constraints.constraint import Constraint, Length
from l3ms.constraints.shares import sample_quantile
from l3ms.constraints.single_answers import SingleAnswers, is_mean_length
from l3ms.constraints.trl_arguments import trl_arguments
from l3ms.measuring.evaluation import Evaluation, evaluate, groups_of, prompt_key
from l3ms.model import random_numbers
from l3ms.ranks.group import first_of_machine_first, of_first, world
from l3ms.rollouts.engines import name_of
from l3ms.runs.fingerprints import of_rows
from l3ms.runs.joining import join, same_inputs
from l3ms.runs.progress import progress_bar
from l3ms.runs.terminal import say
from l3ms.runs.whole_files import write_json
from l3ms.verdicts.certificate_table import print_certificate
from l3ms.verdicts.certificates import Verdict, judge, together
from l3ms.verdicts.declaring import Declared, declare, known_range
from l3ms.verdicts.options import PROBES, CertifyOptions, asked
from l3ms.verdicts.prices import Prices
from l3ms.verdicts.probes import check_prices, measure_prices
from l3ms.verdicts.subject import Subject, load_subject, run_config

EXIT_CODES = {"SATISFIED": 0, "VIOLATED": 3, "INCONCLUSIVE": 4}
MOST = 1024  # samples, where --samples does not say: every held-out prompt once, up to so many


def certify(
    run: str | Path, options: CertifyOptions | None = None, *, console: Console | None = None
) -> dict[str, Any]:
    """Sample, judge, print the table, write the certificate and return it; its "verdict" is that of all constraints together.

    Of several processes (torchrun, `accelerate launch`) each calls this and samples its share of the responses; the verdict is of all of
    them, and the certificate the same on all. Rank 0 writes it.

    Raises:
        ConfigError: `run` is no run folder, holds no constraint or no weights; an option is wrong. Nothing is written then.
    """
    start = time.monotonic()
    options, console, run = options or CertifyOptions(), console or Console(), Path(run)
    console = join(run_config(run), console, **asked(options))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with first_of_machine_first():
        subject = load_subject(run, options, console)
    weights = digest(subject.folder)
    same_inputs({"model": [weights, subject.base], "data.evaluation": of_rows(subject.held_out.rows)})
    if options.prices:
        check_prices(subject)
    config, constraints = subject.config, subject.constraints
    rows, keys = draw(subject.held_out.rows, options.samples, stream(config.seed, options.seed, "prompts"))
    notes = [*subject.notes, *repeats(keys)]
    bounds = sum((c.low is not None) + (c.high is not None) for c in constraints)
    delta = options.delta / bounds
    groups = {item.name: groups_of(item, keys) for item in constraints}
    declared = {item.name: _declare(item, config, options, groups[item.name], delta) for item in constraints}
    for note in notes:
        say(console, note)

    with progress_bar(console, f"sampling {len(rows)} responses to held-out prompts") as advance:
        found = evaluate(
            subject.model, subject.tokenizer, rows, max_new_tokens=config.train.max_new_tokens,
            seed=stream(config.seed, options.seed, "responses"), temperature=config.train.temperature,
            batch_size=config.evaluate.batch_size, constraints=constraints, progress=advance,
            training=trl_arguments(iteration=config.train.iterations, iterations=config.train.iterations),
            engine=subject.engine, together=True,
        )  # fmt: skip
    verdicts = [
        judge(item, found.rewards[item.name], delta, declared[item.name], groups[item.name]) for item in constraints
    ]
    prices = _prices(subject, verdicts, options, console) if options.prices else None
    certificate = {
        "format": 1,
        "verdict": together([item.verdict for item in verdicts if item.verdict is not None]),
        "run": str(run.resolve()),
        "weights": options.weights,
        "sha256": weights,
        **({} if subject.base is None else {"base_sha256": subject.base}),  # of what the adapters are of, as it was loaded
        "seed": options.seed,
        "delta": options.delta,
        "one_sided_bounds": bounds,
        "level_of_each": 1 - delta,
        "samples": len(rows),
        "prompts": len(set(keys)),
        "held_out_prompts": len({prompt_key(row) for row in subject.held_out.rows}),
        "max_new_tokens": config.train.max_new_tokens,
        "temperature": config.train.temperature,
        "engine": "transformers" if subject.engine is None else name_of(subject.engine),
        "length": found.summary["length"],
        "ended": found.summary["ended"],
        "perplexity": found.summary["perplexity"] if options.prompts is None else None,
        "constraints": [
            {**asdict(verdict), "type": type(item).__name__, "min": item.min, "max": item.max,
             "threshold": item.threshold, "quantile": item.quantile, **_of_lengths(item, found)}
            for item, verdict in zip(constraints, verdicts, strict=True)
        ],
        "notes": notes,
        "seconds": round(time.monotonic() - start, 1),
        "versions": versions(),
    }  # fmt: skip
    if world() > 1:
        certificate["processes"] = world()  # that sampled: others would be given by another number of them
    if prices is not None:
        certificate["prices"] = prices.as_dict()
    path = options.json or run / "certificate.json"

    def write() -> None:
        write_json(path, certificate)
        print_certificate(certificate, verdicts, constraints, prices, console)
        say(console, f"Certificate: {path}")

    of_first(write)
    return certificate


def stream(*parts: Any) -> int:
    """A seed of its own for each use: training and evaluation take the run's seed as it is."""
    return random_numbers.stream("l3ms certify", *parts)


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
    if different == 1:
        return [f"{len(keys)} responses to one prompt: the verdict is of this prompt alone"]
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


def _declare(
    constraint: Constraint, config: RunConfig, options: CertifyOptions, groups: Sequence[Hashable], delta: float
) -> Declared:
    try:
        known, indicator = known_range(
            constraint, config.train.max_new_tokens, (options.ranges or {}).get(constraint.name)
        )
    except ValueError as error:
        raise ConfigError("--range", str(error)) from None
    n = len(set(groups))
    try:
        return declare(
            constraint, n, delta, known=known, indicator=indicator, grouped=n < len(groups), method=options.method
        )
    except ValueError as error:
        raise ConfigError("--method", str(error)) from None


def _of_lengths(constraint: Constraint, found: Evaluation) -> dict[str, Any]:
    """What the fresh responses say beside the verdict: of single answers under a bound on their mean, or the quantile that is bounded."""
    if is_mean_length(constraint):
        return {"single_answers": SingleAnswers.of(constraint, found.lengths, found.summary["ended"])._asdict()}
    if isinstance(constraint, Length) and constraint.quantile is not None:
        return {"quantile_found": sample_quantile(found.lengths, vars(constraint))}
    return {}


def _prices(subject: Subject, verdicts: Sequence[Verdict], options: CertifyOptions, console: Console) -> Prices:
    means = {item.name: item.mean for item in verdicts if math.isfinite(item.mean)}
    errors = {item.name: item.deviation / math.sqrt(item.groups) for item in verdicts if item.groups > 1}
    seed = stream(subject.config.seed, options.seed, "prices")
    return measure_prices(subject, means, errors, probes=options.probes or PROBES, seed=seed, console=console)
