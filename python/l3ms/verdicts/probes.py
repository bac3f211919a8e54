"""Probe gradients of a model on held-out data, batch by batch, for `prices`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from l3ms.config.yaml_reader import ConfigError
from l3ms.constraints.constraint import Constraint, Length
from l3ms.constraints.trl_arguments import trl_arguments
from l3ms.model.batches import Collator, further_columns, prompt_part
from l3ms.model.losses import scored_lengths, shift, task_weights
from l3ms.rollouts.sampling import rollout
from l3ms.runs.progress import progress_bar
from l3ms.verdicts.prices import Price, Prices, round_step, solve
from l3ms.verdicts.subject import Subject

BATCHES = 16  # of probes: the jackknife has so many values
EXACT_SIZE, SKETCH_SIZE = 2**22, 2**21  # parameters up to which gradients are kept whole; numbers kept of larger ones
NEAR = 0.25  # of the range (two bounds) or 0.1 of the scale (one): where a barrier with its margin settles, the bound counts as active


class Side(NamedTuple):
    """A one-sided constraint."""

    constraint: Constraint
    sign: float  # C = sign (r - limit) / unit
    limit: float

    @property
    def name(self) -> str:
        return "min" if self.sign < 0 else "max"


def check_prices(subject: Subject) -> None:
    """ConfigError where there are too few held-out rows for probes that are independent of each other."""
    counts = {"": len(subject.held_out.rows)}
    for item in subject.constraints:
        if getattr(item, "data", False) and not item.monitor:
            counts[f" of {item.name!r}"] = sum(len(part) for part in _parts(item.held_out, 1))  # type: ignore[attr-defined]
    for name, count in counts.items():
        if count < 2 * BATCHES:
            raise ConfigError("--prices", f"need at least {2 * BATCHES} held-out rows{name}, got {count}")


def measure_prices(
    subject: Subject,
    means: Mapping[str, float],
    errors: Mapping[str, float],
    *,
    probes: int,
    seed: int,
    console: Console,
) -> Prices:
    """The price of each bound: of those that bind, from `probes` responses and as many task rows.

    Args:
        means, errors: mean reward and its standard error by constraint: which bounds bind.
    """
    sides, priced = [], []
    for item in subject.constraints:
        for side in _sides(item):
            why = _inactive(side, means.get(item.name, math.nan), errors.get(item.name, 0.0))
            priced.append((side, why))
            sides += [] if why else [side]
    found = None
    if sides:
        with progress_bar(console, f"{probes} probe gradients") as advance:
            found = solve(_products(subject, sides, probes, seed, advance))
    bounds = []
    for side, why in priced:
        i = sides.index(side) if found is not None and not why else None
        multiplier, error = (
            (0.0, 0.0) if i is None or found is None else (float(found.multipliers[i]), float(found.stderr[i]))
        )
        unit = side.constraint.unit
        bounds.append(
            Price(
                side.constraint.name, side.name, side.limit,
                "tokens" if isinstance(side.constraint, Length) and _plain(side.constraint) else "",
                _step(side), multiplier / unit, error / unit, multiplier, _share(side.constraint), why,
            )
        )  # fmt: skip
    return Prices(bounds, math.nan if found is None else found.residual, probes, BATCHES)


def _step(side: Side) -> float:
    """By how much the bound is relaxed in words: of a share not beyond 0 and 1."""
    step = round_step(side.limit, side.constraint.unit)
    return step if _plain(side.constraint) else min(step, side.limit if side.sign < 0 else 1 - side.limit)


def _plain(constraint: Constraint) -> bool:
    return constraint.event is None


def _share(constraint: Constraint) -> str:
    return "" if constraint.event is None else constraint.event.text(constraint.name)


def _sides(constraint: Constraint) -> list[Side]:
    sides = ((-1.0, constraint.low), (1.0, constraint.high))
    return [Side(constraint, sign, float(limit)) for sign, limit in sides if limit is not None]


def _inactive(side: Side, mean: float, error: float) -> str:
    """Why a bound does not bind at this mean; empty where it does."""
    item = side.constraint
    if not math.isfinite(mean):
        return "it has no values"
    slack = side.sign * (side.limit - mean)
    two = math.isfinite(item.width) and item.width > 0
    near = max(NEAR * item.width if two else 0.1 * item.unit, 3 * error)
    if two:  # not both at once: of the two, the nearer
        near = min(near, item.width / 2)
    return f"the mean, {mean:.4g}, is {slack:.2g} away from it" if slack > near else ""


def _products(subject: Subject, sides: Sequence[Side], probes: int, seed: int, advance: Any) -> np.ndarray:
    """(M, K + 1, M, K + 1) products of the probe gradients: of the task, then of each side; see `prices.cross_gram`."""
    model = subject.model.eval()
    parameters = _trainable(model)
    sketch = Sketch(parameters)
    size = math.ceil(probes / BATCHES)
    rows = _rows_of(subject, size, seed)
    data = {
        side.constraint.name: _parts(side.constraint.held_out, BATCHES)  # type: ignore[attr-defined]
        for side in sides
        if getattr(side.constraint, "data", False)
    }
    sampled = [side.constraint for side in sides if side.constraint.name not in data]
    sampled = list({item.name: item for item in sampled}.values())
    kept = []
    device = model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for m in range(BATCHES):
            part = rows[m * size : (m + 1) * size]
            kept.append(sketch(_nll(subject, part, 1.0)))
            responses, rewards = _respond(subject, part, sampled) if sampled else (None, {})
            for side in sides:
                name = side.constraint.name
                factor = side.sign / side.constraint.unit
                if name in data:
                    kept.append(sketch(_nll(subject, data[name][m], factor)))
                else:
                    assert responses is not None
                    kept.append(sketch(_score(subject, responses, rewards[name], factor)))
            advance((m + 1) * size, BATCHES * size)
    model.zero_grad(set_to_none=True)
    vectors = torch.stack(kept)
    return _dot(vectors).reshape(BATCHES, len(sides) + 1, BATCHES, len(sides) + 1)


def _dot(vectors: Tensor, chunk: int = 2**18) -> np.ndarray:
    """(n, D) float32 -> (n, n) float64 products, summed in float64."""
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for start in range(0, vectors.shape[1], chunk):
        part = vectors[:, start : start + chunk].double()
        total += part @ part.T
    return total.numpy()


class Sketch:
    """The gradients of the parameters as one vector: whole, or, of large models, a count sketch of it.

    Charikar, Chen, Farach-Colton, ICALP 2002: each coordinate is added, with a random sign, to a random one of D numbers. Products
    of two sketches are unbiased estimates of the vectors' products, with an error of about their norms' product times sqrt(1/D).
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]):
        self.parameters = parameters
        self.whole = sum(p.numel() for p in parameters) <= EXACT_SIZE

    def __call__(self, gradients: Sequence[Tensor]) -> Tensor:
        """(D,) float32 on the host."""
        flat = [g.reshape(-1).float() for g in gradients]
        if self.whole:
            return torch.cat(flat).cpu()
        total = torch.zeros(SKETCH_SIZE, device=flat[0].device)
        generator = torch.Generator(flat[0].device)
        for number, values in enumerate(flat):
            generator.manual_seed(number)  # the same places each time, without keeping them
            places = torch.randint(2 * SKETCH_SIZE, values.shape, generator=generator, device=values.device)
            total.index_add_(0, places >> 1, torch.where(places % 2 == 0, values, -values))
        return total.cpu()


def _trainable(model: Any) -> list[torch.nn.Parameter]:
    """What was trained: the adapters where there are some, everything otherwise."""
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    for parameter in model.parameters():
        parameter.requires_grad_(not adapters)
    for parameter in adapters:
        parameter.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def _rows_of(subject: Subject, size: int, seed: int) -> list[dict[str, Any]]:
    """BATCHES x size held-out rows, no row in two batches: products of different batches must be of independent ones."""
    rows = subject.held_out.rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = []
    for m in range(BATCHES):
        own = order[m::BATCHES]
        drawn += [rows[own[n % len(own)]] for n in range(size)]
    return drawn


def _parts(loader: Iterable[Any], count: int) -> list[list[dict[str, Any]]]:
    """The held-out data of a constraint, as rows of tokens, in `count` parts."""
    rows: list[dict[str, Any]] = []
    for item in loader:
        if isinstance(item["input_ids"], Tensor) and item["input_ids"].ndim == 2:
            mask = item["attention_mask"].bool()
            for ids, labels, keep in zip(item["input_ids"], item["labels"], mask, strict=True):
                rows.append({"input_ids": ids[keep].tolist(), "labels": labels[keep].tolist()})
        else:
            rows.append(item)
    return [[rows[i % len(rows)] for i in range(m, max(len(rows), count), count)] for m in range(count)]


def _nll(subject: Subject, rows: Sequence[dict[str, Any]], factor: float) -> list[Tensor]:
    """Gradient of `factor` times the length-normalised loss of the rows."""
    batch = Collator(subject.tokenizer.pad_token_id or 0)(rows)
    weights = factor * task_weights(scored_lengths(shift(batch["labels"])))
    return _backward(subject, batch, weights)


def _respond(subject: Subject, rows: Sequence[dict[str, Any]], constraints: Sequence[Constraint]) -> tuple[Any, Any]:
    train = subject.config.train
    responses = rollout(
        subject.model,
        subject.tokenizer,
        [row["prompt"] for row in rows],
        prompt_ids=[prompt_part(row) for row in rows],
        max_new_tokens=train.max_new_tokens,
        temperature=train.temperature,
        columns=further_columns(rows),
        engine=subject.engine,
    )
    training = trl_arguments(iteration=train.iterations, iterations=train.iterations)
    return responses, responses.rewards(constraints, subject.model, training)


def _score(subject: Subject, responses: Any, values: Sequence[float | None], factor: float) -> list[Tensor]:
    """Gradient of `factor` times the mean reward, by the score function with the mean of the others as baseline."""
    given = torch.tensor(
        [math.nan if value is None or not math.isfinite(value) else value for value in values], dtype=torch.float64
    )
    present = given.isfinite()
    count = int(present.sum())
    weights = torch.zeros(len(given), dtype=torch.float64)
    if count > 1:
        weights[present] = -factor * (given[present] - given[present].mean()) / (count - 1)
    batch = {name: responses[name].cpu() for name in ("input_ids", "attention_mask", "labels")}
    return _backward(subject, batch, weights, temperature=subject.config.train.temperature, auxiliary=False)


def _backward(subject: Subject, batch: Mapping[str, Tensor], weights: Tensor, **options: Any) -> list[Tensor]:
    """Gradients of -sum_n weights_n log pi(y_n), in micro-batches."""
    model = subject.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    size = subject.config.train.batch_size
    for start in range(0, len(weights), size):
        part = {name: tensor[start : start + size].to(model.device) for name, tensor in batch.items()}
        seq_weight = weights[start : start + size].float().to(model.device)
        model(**part, seq_weight=seq_weight, use_cache=False, **options).loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
