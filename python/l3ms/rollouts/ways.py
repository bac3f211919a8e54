"""Which way of `generate` draws from the policy that a training's forward scores: tried once for each model, on a few tokens.

`generate` pads prompts on the left and keeps a cache; a training pads on the right and keeps none. To most models that is the same. Where a
state runs through the padding (RWKV, xLSTM), positions count it (BART's decoder and its kin), or a cache keeps less than the forward sees,
another distribution would be sampled than is scored, and nothing would say so. So the probabilities of a few next tokens are compared: as
generate has them, step by step, and as one forward of the whole gives them. The first way that agrees is taken: prompts in one batch, those
of one length at a time, a whole forward for each token (`stepping`). A model that sees later tokens has none, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig

from l3ms.model.inside_adapters import active_adapters, inside_adapters, reads_rows
from l3ms.model.sharding import any_rank
from l3ms.rollouts.packed_weights import is_large
from l3ms.rollouts.positions import context
from l3ms.rollouts.shared_prefix import begun
from l3ms.rollouts.shrinking import left_padded, selects
from l3ms.rollouts.stepping import last_logits, scored_logits

LENGTHS = (19, 8, 1)  # of the prompts that are tried
BEGINNING = 6  # tokens that all of them begin with
STEPS = 5  # tokens before a batch shrinks, and after it
EXACT = 1e-3  # largest total variation between the next tokens of float32 models
NARROW = 0.02  # mean one of 16-bit models, or NOISE times that between a batch and a row of it
NOISE = 4.0
STRIDE = 7919  # a prime: tokens from all over the vocabulary


class Way(NamedTuple):
    """How responses are sampled."""

    kind: Literal[
        "padded", "equal lengths", "forward"
    ]  # generate with prompts of unlike lengths, or of one; no generate
    shrink: bool  # its cache goes on with some of its rows
    together: bool = False  # and begins with what all prompts begin with


class Tried(NamedTuple):
    """How far apart the distributions were, in total variation."""

    first: float
    resumed: float  # behind the step in which a row left
    selected: bool  # whether the cache could go on with the others


_found: WeakKeyDictionary[Any, dict[Any, Way]] = WeakKeyDictionary()


def way_of(model: Any, tokenizer: Any, pad: int) -> Way:
    """The way for a model in eval mode, with no autocast around it. Draws nothing from the global generator.

    Raises:
        ValueError: it sees later tokens, or its logits are not finite.
    """
    known = _found.setdefault(model, {})
    attention = getattr(model.config, "_attn_implementation", None)
    state = str((model.dtype, type(model), active_adapters(model), attention))
    if any_rank(model, state not in known):  # those with parts of it try it together
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            known[state] = _chosen(model, _tokens(model, tokenizer), pad)
    return known[state]


def _chosen(model: Any, tokens: Sequence[int], pad: int) -> Way:
    exact = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
    limit = EXACT if exact else max(NARROW, NOISE * _noise(model, tokens, pad))
    kinds: tuple[Literal["padded", "equal lengths"], ...] = ("padded", "equal lengths")
    for kind in kinds:
        try:
            tried = _tried(model, tokens, pad, padded=kind == "padded", exact=exact)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of the model's own code: as many kinds as there are models
            continue
        if tried.first <= limit:
            shrink = tried.selected and tried.resumed <= limit
            could = shrink and kind == "padded" and is_large(model) and not reads_rows(model)
            together = could and _together(model, tokens, pad, exact) <= limit
            return Way(kind, shrink, together)
    apart = _seen_ahead(model, tokens, pad, exact=exact)
    if apart <= limit:
        return Way("forward", shrink=True)
    name = type(inside_adapters(model)).__name__
    if scored_logits(model, [tokens[: LENGTHS[1]]], pad).double().softmax(-1).isnan().any():
        raise ValueError(
            f"rollout: {name} has logits that are not finite on ordinary tokens: its weights are damaged, or have diverged"
        )
    raise ValueError(
        f"rollout: {name} sees later tokens: the next one has another probability where they are there "
        f"({apart:.2g} apart in total variation), so no response can be sampled as it is scored; an encoder needs "
        "is_decoder=True in its configuration"
    )


def _seen_ahead(model: Any, tokens: Sequence[int], pad: int, *, exact: bool) -> float:
    rows = _batches(model, tokens, padded=True)[0]
    whole = scored_logits(model, rows, pad)
    parts = []
    for cut in range(1, STEPS + 1):
        ends = [max(1, len(row) - cut) for row in rows]
        last = last_logits(model, [row[:end] for row, end in zip(rows, ends, strict=True)], pad)
        parts.append(_apart(last, torch.stack([whole[row, end - 1] for row, end in enumerate(ends)])))
    return _summary(parts, exact)


def _tried(model: Any, tokens: Sequence[int], pad: int, *, padded: bool, exact: bool) -> Tried:
    first, resumed, selected = [], [], True
    batches = _batches(model, tokens, padded)
    # One after the other, as in a sampling: states that a model keeps in itself would be cleared by a forward in between.
    for prompts, (known, known_later, taken) in [(prompts, _generated(model, prompts, pad)) for prompts in batches]:
        selected &= taken
        sequences = [sequence for sequence, _ in known_later]
        scored = scored_logits(model, sequences, pad)
        for row, (prompt, (_, later), early) in enumerate(zip(prompts, known_later, known, strict=True)):
            start = len(prompt) - 1
            first.append(_apart(early, scored[row, start : start + len(early)]))
            start += len(early)
            if later is not None:
                resumed.append(_apart(later, scored[row, start : start + len(later)]))
    return Tried(_summary(first, exact), _summary(resumed, exact), selected)


def _together(model: Any, tokens: Sequence[int], pad: int, exact: bool) -> float:
    """How far apart the distributions are where the prompts' common beginning is in the cache of all rows."""
    beginning = list(tokens[-BEGINNING:])
    lengths = [max(1, min(length, context(model) - BEGINNING - STEPS - 1)) for length in LENGTHS]
    prompts = [[*beginning, *(tokens[(5 * row + i) % len(tokens)] for i in range(n))] for row, n in enumerate(lengths)]
    try:
        cache, ids, mask = begun(model, prompts, pad)
        if not selects(cache):
            return 1.0
        output = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=_greedy(pad)
        )
    except torch.OutOfMemoryError:
        raise
    except Exception:  # as above
        return 1.0
    news = output.sequences[:, ids.shape[1] :].tolist()
    scored = scored_logits(model, [[*prompt, *new] for prompt, new in zip(prompts, news, strict=True)], pad)
    starts = [len(prompt) - 1 for prompt in prompts]
    found = torch.stack(output.logits, 1)
    return _summary([_apart(found[row], scored[row, start : start + STEPS]) for row, start in enumerate(starts)], exact)


def _greedy(pad: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False, max_new_tokens=STEPS, eos_token_id=None, pad_token_id=pad, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


def _generated(
    model: Any, prompts: list[list[int]], pad: int
) -> tuple[list[Tensor], list[tuple[list[int], Tensor | None]], bool]:
    """Per row (STEPS, V) logits of the first tokens; all tokens, and the logits of the later ones where it stayed. If the cache went on."""
    ids, mask = left_padded(prompts, pad, model.device)
    width = ids.shape[1]
    config = _greedy(pad)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    early = list(torch.stack(output.logits, 1))
    rows = [[*prompt, *new] for prompt, new in zip(prompts, output.sequences[:, width:].tolist(), strict=True)]
    stay = [0, len(prompts) - 1]
    kept: Any = getattr(output, "past_key_values", None)
    taken = selects(kept)
    live = torch.tensor(stay, device=ids.device)
    if taken:
        kept.batch_select_indices(live)
    ids = output.sequences[live]
    mask = torch.cat([mask[live], mask.new_ones(len(stay), STEPS)], 1)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        **({"past_key_values": kept} if taken else {}),
    )
    later = dict(zip(stay, torch.stack(output.logits, 1), strict=True))
    for row, new in zip(stay, output.sequences[:, ids.shape[1] :].tolist(), strict=True):
        rows[row] += new
    return early, [(rows[row], later.get(row)) for row in range(len(rows))], taken


def _noise(model: Any, tokens: Sequence[int], pad: int) -> float:
    """Of the forward itself, between a batch and one of its rows alone."""
    rows = [list(tokens[start : start + length]) for start, length in enumerate(LENGTHS)]
    return _summary(
        [_apart(scored_logits(model, rows, pad)[1, : len(rows[1])], scored_logits(model, rows[1:2], pad)[0])], False
    )


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """(T,) total variation between the distributions of (T, V) logits; 1 where one is none."""
    distance = (one.double().softmax(-1) - other.double().softmax(-1)).abs().sum(-1) / 2
    return distance.nan_to_num(nan=1.0)


def _summary(parts: list[Tensor], exact: bool) -> float:
    """The mean goes over what 16 bits do to a single step; a wrong position or a lost state is in all."""
    together = torch.cat(parts) if parts else torch.zeros(1)
    return float(together.max() if exact else together.mean())


# ---- what is tried ----


def _batches(model: Any, tokens: Sequence[int], padded: bool) -> list[list[list[int]]]:
    room = context(model) - 2 * STEPS - 2
    lengths = [max(1, min(length, room)) for length in LENGTHS]
    prompts = [[tokens[(5 * row + i) % len(tokens)] for i in range(length)] for row, length in enumerate(lengths)]
    if padded:
        return [prompts, [prompt[:1] for prompt in prompts]]
    return [[prompt, [tokens[(i + 11) % len(tokens)] for i in range(len(prompt))]] for prompt in prompts]


def _tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ordinary ones, the same on every rank: special tokens may stand for images."""
    size = model.get_input_embeddings().weight.shape[0]
    special = set(getattr(tokenizer, "all_special_ids", ())) | set(getattr(tokenizer, "added_tokens_decoder", ()))
    size = min(size, len(tokenizer)) if hasattr(tokenizer, "__len__") else size
    found = [STRIDE * i % size for i in range(1, 65)]
    ordinary = [token for token in found if token not in special] or [t for t in range(size) if t not in special]
    return ordinary or [0]
