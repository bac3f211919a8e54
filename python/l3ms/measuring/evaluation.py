"""What a model does on held-out prompts: fresh samples and task perplexity, never the running estimates of its training."""

import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l3ms.constraints.constraint import Constraint
from l3ms.constraints.data_nll import DataNLL
from l3ms.constraints.divergence import per_token, scaled
from l3ms.model.batches import Collator, further_columns, prompt_part
from l3ms.model.heads import fuse_head
from l3ms.model.losses import scored_lengths, shift
from l3ms.model.modes import evaluating
from l3ms.model.random_numbers import stream, undrawn
from l3ms.model.sharding import most, reshard
from l3ms.model.split_heads import uncast
from l3ms.ranks.group import gather, world
from l3ms.ranks.group import rank as own_rank
from l3ms.rollouts.sampling import rollout

Z95 = 1.959964  # of the normal distribution, two-sided 95%

Progress = Callable[[int, int], None]  # (responses done, responses in all)


class Evaluation(NamedTuple):
    """One fresh response per row, and what they come to."""

    summary: dict[
        str, Any
    ]  # {"length": {"mean", "ci95": [lo, hi], "p5", "p50", "p95"}, "ended", "perplexity", "samples"}
    lengths: list[int]  # response tokens, the closing EOS included
    completions: list[Any]
    ended: list[bool]  # closed by EOS; a truncated response is not
    rewards: dict[
        str, list[float | None]
    ]  # by constraint, one value per response, `ratio` of what is per token; of a DataNLL per held-out row of its own


def prompt_key(row: Mapping[str, Any]) -> str:
    """Equal where the prompts are."""
    return json.dumps(row["prompt"], sort_keys=True)


def groups_of(constraint: Constraint, prompts: Sequence[Hashable]) -> list[Hashable]:
    """A key for each value of a constraint in an `Evaluation`, equal where they may depend on each other: responses to one prompt, and of a
    `DataNLL` with rows those of one prompt, or that are one row where a prompt is no more than what a text begins with.

    Where all have one key the mean is of this prompt alone, and its responses are independent.
    """
    keys: list[Hashable] = list(prompts)
    if isinstance(constraint, DataNLL):
        heads = [tuple(prompt_part(row)) for row in constraint.held_out]
        alike = len(set(heads)) == 1
        keys = [
            tuple(row["input_ids"]) if alike or len(head) < 2 else head
            for head, row in zip(heads, constraint.held_out, strict=True)
        ]
    return list(range(len(keys))) if len(set(keys)) == 1 else keys


def half_width(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> float:
    """Half of the normal 95% interval of a mean; values of one group, such as responses to one prompt, may depend on each other."""
    return Z95 * standard_error(values, groups)


def standard_error(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> float:
    """Of a mean; inf of fewer than two values. `groups` as in `half_width`."""
    x = torch.tensor(values, dtype=torch.float64)
    index: dict[Hashable, int] = {}
    keys = [index.setdefault(key, len(index)) for key in (range(len(x)) if groups is None else groups)]
    if len(index) == 1:  # of this prompt alone
        keys = list(range(len(x)))
    count = max(keys, default=0) + 1
    if count < 2:
        return math.inf
    # n / N of each group's sum of deviations: independent, and their mean is that of all (the cluster-robust variance)
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, torch.tensor(keys), x - x.mean())
    return float((sums * count / len(x)).std()) / math.sqrt(count)


def ratio(values: Sequence[float | None], lengths: Sequence[int]) -> list[float | None]:
    """n values whose mean is R = sum a / sum l of n pairs (a, l), and whose spread is that of R: linearised, a/m - R (l/m - 1) with m the
    mean length. That of a/m alone forgets that m is sampled too. None, NaN and inf stay, and are left out of R and m."""
    pairs = [
        (value, length)
        for value, length in zip(values, lengths, strict=True)
        if value is not None and math.isfinite(value)
    ]
    if not pairs:
        return list(values)
    mean = math.fsum(length for _, length in pairs) / len(pairs)
    whole = math.fsum(value for value, _ in pairs) / len(pairs) / mean
    return [
        value if value is None or not math.isfinite(value) else value / mean - whole * (length / mean - 1)
        for value, length in zip(values, lengths, strict=True)
    ]


def length_statistics(
    lengths: Sequence[int] | Tensor, ended: Sequence[bool] | Tensor, groups: Sequence[Hashable] | None = None
) -> dict[str, Any]:
    """Of n responses: mean length with its normal 95% interval, percentiles, and the share that ended with EOS. Tokens.

    Args:
        groups: n keys, equal where responses have the same prompt; default: no two have.

    Raises:
        ValueError: no response.
    """
    values = torch.as_tensor(lengths, dtype=torch.float64)
    if not len(values):
        raise ValueError("length_statistics: no responses")
    mean = float(values.mean())
    half = half_width(values.tolist(), groups)
    percentiles = {f"p{p}": float(values.quantile(p / 100)) for p in (5, 50, 95)}
    share = float(torch.as_tensor(ended, dtype=torch.float64).mean())
    return {
        "length": {"mean": mean, "ci95": [mean - half, mean + half], **percentiles},
        "ended": share,
        "samples": len(values),
    }


def task_perplexity(
    model: Any, rows: Sequence[dict[str, Any]], *, batch_size: int = 64, pad_token_id: int = 0
) -> float:
    """exp of the mean over rows of -(1/|y|) log pi(y|x): the length-normalised task loss, exponentiated; inf where that is beyond floats.

    Args:
        rows: {"input_ids", "labels"}, labels not shifted, -100 where not scored.

    Raises:
        ValueError: no row has anything scored.
    """
    return _perplexity(_losses(model, rows, batch_size, pad_token_id))


def _perplexity(losses: Tensor) -> float:
    values = losses[~losses.isnan()]
    if not len(values):
        raise ValueError("task_perplexity: no row has a scored token")
    return exp(float(values.mean()))


@torch.no_grad()
def _losses(model: Any, rows: Sequence[dict[str, Any]], batch_size: int, pad_token_id: int) -> Tensor:
    """(n,) float64 -(1/|y|) log pi(y|x) of each row; NaN where nothing is scored."""
    inner, collate = fuse_head(model), Collator(pad_token_id)
    sequences, lengths = [torch.empty(0)], [torch.empty(0)]
    with evaluating(model):
        for start in _starts(model, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size])
            lengths.append(scored_lengths(shift(batch["labels"])))  # on the host: where they were made
            batch = {name: tensor.to(inner.device) for name, tensor in batch.items()}
            nothing = torch.zeros(len(lengths[-1]), device=inner.device)  # weights 0: likelihoods alone
            options = {"seq_weight": uncast(model, nothing), "scored": int(lengths[-1].sum()), "use_cache": False}
            sequences.append(model(**batch, **options).sequence)
        reshard(model)
    length = torch.cat(lengths)[: len(rows)]
    nll = -torch.cat([part.double().cpu() for part in sequences])[: len(rows)]
    return torch.where(length > 0, nll / length, math.nan)


def _starts(model: Any, count: int, size: int) -> list[int]:
    """Of the batches; of ranks with parts of one model each goes through as many as the one with the most, its last ones again."""
    starts = list(range(0, count, size))
    return starts + starts[-1:] * (most(model, len(starts)) - len(starts))


def exp(nats: float) -> float:
    """inf beyond the largest float, from 709.8 on."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


class _Part(NamedTuple):
    """What one rank has found for its rows, in their order."""

    lengths: list[int]
    ended: list[bool]
    completions: list[Any]
    rewards: dict[str, list[float | None]]  # per token: times the mean length of their batch
    losses: list[float]


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    constraints: Sequence[Constraint] = (),
    training: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    engine: Any = None,
    together: bool = False,
) -> Evaluation:
    """Sample one response to the prompt of each row, measure it, and score the row's own response.

    Args:
        rows: {"input_ids", "labels", "prompt"} as the trainer takes them.
        seed: of the samples; the global random state is left as it was.
        batch_size: responses sampled at a time.
        constraints: whose rewards the responses get, NaN and inf let through; those without a function are left out. A `DataNLL` is
            measured on its held-out data, nats per token.
        training: what reward functions get of the training that asks, see `trl_arguments`; by default of none.
        engine: what samples, see `rollout`; it is given the model's weights once.
        together: the rows are those of all ranks, each of which samples its share from a stream of its own; all get the whole.
            The responses are others with another number of ranks, of the same distribution.
    """
    ranks, rank = (world(), own_rank()) if together else (1, 0)
    # As many rows on each rank: with shards of a model they take every step together
    share = [rows[(rank + ranks * i) % len(rows)] for i in range(-(-len(rows) // ranks))]
    seed = seed if ranks == 1 else stream("l3ms evaluation", seed, rank)
    device = next(model.parameters()).device
    with undrawn(device):
        torch.manual_seed(seed)
        part = _sampled(
            model, tokenizer, share, constraints=constraints, training=training, engine=engine, batch_size=batch_size,
            max_new_tokens=max_new_tokens, temperature=temperature,
            progress=None if progress is None else lambda done, _: progress(min(ranks * done, len(rows)), len(rows)),
        )  # fmt: skip
        data: dict[str, list[float | None]] = {}
        for constraint in constraints:
            if isinstance(constraint, DataNLL):
                fuse_head(model)
                data[constraint.name] = list(constraint.evaluate(model))
    pad = tokenizer.pad_token_id or 0
    part = part._replace(losses=_losses(model, share, 64, pad).tolist())
    found = part
    if together:
        parts = gather((part, data))
        found, data = _joined([part for part, _ in parts], len(rows)), parts[0][1]
    for name in per_token(constraints):
        found.rewards[name] = ratio(found.rewards[name], found.lengths)
    summary = length_statistics(found.lengths, found.ended, [prompt_key(row) for row in rows])
    summary["perplexity"] = _perplexity(torch.tensor(found.losses, dtype=torch.float64))
    return Evaluation(summary, found.lengths, found.completions, found.ended, {**found.rewards, **data})


def _sampled(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    *,
    constraints: Sequence[Constraint],
    training: Mapping[str, Any] | None,
    batch_size: int,
    progress: Progress | None,
    **options: Any,
) -> _Part:
    """Responses to the prompts of `rows`, and their rewards; without the losses."""
    found = _Part([], [], [], {}, [])
    for start in _starts(model, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        responses = rollout(
            model,
            tokenizer,
            [row["prompt"] for row in batch],
            prompt_ids=[prompt_part(row) for row in batch],
            columns=further_columns(batch),
            update=not start,
            **options,
        )
        if len(found.lengths) == len(
            rows
        ):  # of another rank's part of the model: asked once more, and measured with it
            responses.rewards(constraints, model, training)
            continue
        found.lengths.extend(responses.lengths.tolist())
        found.ended.extend(responses.ended.tolist())
        found.completions.extend(responses.completions)
        # what was divided by the mean length of the batch is so by that of all responses, in `evaluate`
        mean = float(responses.lengths.double().mean())
        rewards = scaled(responses.rewards(constraints, model, training), per_token(constraints), mean)
        for name, values in rewards.items():
            found.rewards.setdefault(name, []).extend(values)
        if progress is not None:
            progress(len(found.lengths), len(rows))
    return found


def _joined(parts: Sequence[_Part], count: int) -> _Part:
    """The first `count` rows, of which each rank had every so many-th."""

    def of_all(columns: Sequence[Sequence[Any]]) -> list[Any]:
        return [value for turn in zip(*columns, strict=True) for value in turn][:count]

    rewards = {name: of_all([part.rewards[name] for part in parts]) for name in parts[0].rewards}
    columns = {name: of_all([getattr(part, name) for part in parts]) for name in _Part._fields if name != "rewards"}
    return _Part(rewards=rewards, **columns)
