"""G8: a training with the fused head beside one on the model's own logits, from the same weights, on the same batches and responses.

Two runs that round differently come apart, as far as the training amplifies it: AdamW makes steps of a fixed size out of gradients that
are nothing but rounding, and a rate near what the curvature allows does so with any optimizer. What that comes to is measured on the
unfused run itself, which gets its rows in the other order. From the same weights loss and gradient are compared as well, every tenth step.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fused_heads import own_logits
from parts import Found, Part

import l3ms
from l3ms.model.batches import Collator
from l3ms.model.losses import scored_lengths, shift, task_weights

STEPS = 200
LOSS = WEIGHT = 1e-6  # relative; absolute
GRADIENT = 5e-6  # of its largest number
AMPLIFIED = 4  # times what the unfused run differs from itself, where that is more
VOCABULARY = 131
KINDS = ("Llama", "Qwen2", "Gemma2")
FAMILIES = ("sgd", "adamw", "float64")


@dataclass(frozen=True)
class Settings:
    """Of one case."""

    kind: str
    config: dict[str, Any]
    constrained: bool
    adapters: str  # "", or the modules that LoRA is on
    frozen: str  # a part of the names of what is not trained
    parts: int  # micro-batches of a half-step
    temperature: float
    rate: float
    dtype: torch.dtype
    optimizer: str

    @staticmethod
    def of(seed: int, family: str) -> Settings:
        """Of three seeds each kind has one, of six constraints three, of twelve LoRA six."""
        draw = random.Random(f"{family} {seed}")
        kind = KINDS[(seed + FAMILIES.index(family)) % 3]
        optimizer = draw.choice(("sgd", "momentum")) if family == "sgd" else "adamw"
        config: dict[str, Any] = {"tie_word_embeddings": draw.random() < 0.5, "num_hidden_layers": draw.choice((1, 2))}
        if kind == "Gemma2":
            config["final_logit_softcapping"] = draw.choice((2.0, 5.0, 30.0))
        adapters = "" if (seed // 6) % 2 == 0 else draw.choice(("q_proj v_proj", "q_proj down_proj lm_head"))
        if "lm_head" in adapters:
            config["tie_word_embeddings"] = False  # which PEFT would have to untie
        return Settings(
            kind,
            config,
            constrained=(seed // 3) % 2 == 1,
            adapters=adapters,
            frozen="" if adapters else draw.choice(("", "", "embed_tokens", "layers.0")),
            parts=draw.choice((1, 1, 2)),
            temperature=draw.choice((1.0, 0.7, 1.3)),
            rate=draw.choice({"sgd": (0.005, 0.01), "momentum": (0.001, 0.003), "adamw": (2e-4, 1e-3)}[optimizer]),
            dtype=torch.float64 if family == "float64" else torch.float32,
            optimizer=optimizer,
        )


def even(prompts, completions, completion_ids, **columns):
    """None for a response that ends at once."""
    return [None if len(ids) < 2 else sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


class Training:
    """One of the two."""

    def __init__(self, settings: Settings, seed: int, *, fused: bool):
        import tiny_models

        self.settings, self.fused = settings, fused
        model = tiny_models.make_model(settings.kind, vocab_size=VOCABULARY, seed=seed, gain=0.5, **settings.config).to(
            settings.dtype
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not settings.frozen or settings.frozen not in name)
        self.model = _with_adapters(model, settings.adapters, seed) if settings.adapters else model
        if fused:
            l3ms.fuse_head(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        base = {
            "sgd": lambda: torch.optim.SGD(trained, lr=settings.rate),
            "momentum": lambda: torch.optim.SGD(trained, lr=settings.rate, momentum=0.9),
            "adamw": lambda: torch.optim.AdamW(trained, lr=settings.rate, betas=(0.5, 0.95)),
        }[settings.optimizer]()
        self.constraints = [
            l3ms.Length(min=2, max=5),
            l3ms.Constraint("even", even, max=0.4),
            l3ms.DataNLL("kept", rows(seed, 12), max=4.0),
        ]
        self.opt = l3ms.L3MOptimizer(base, self.constraints if settings.constrained else [])

    def loss(self, inputs: Any, weights: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        weights = weights.to(self.settings.dtype)
        if not self.fused:
            return own_logits(self.model, inputs, weights, temperature)[0]
        return self.model(**inputs, seq_weight=weights, temperature=temperature, use_cache=False).loss

    def task(self, batch: Any) -> float:
        weights = task_weights(scored_lengths(shift(batch["labels"])), self.settings.dtype)
        size, total = -(-len(weights) // self.settings.parts), 0.0
        for start in range(0, len(weights), size):
            part = slice(start, start + size)
            loss = self.loss({name: value[part] for name, value in batch.items()}, weights[part])
            loss.backward()
            total += loss.item()
        self.move()
        return total

    def constrain(self, rollout: l3ms.Rollout, kept: Any) -> float:
        weights = self.opt.observe(rollout.rewards(self.constraints), rollout.lengths)
        inputs = {name: rollout[name] for name in ("input_ids", "attention_mask", "labels")}
        nll = self.loss(kept, task_weights(scored_lengths(shift(kept["labels"])), self.settings.dtype))
        loss = self.loss(inputs, weights, rollout.temperature) + self.opt.barrier_loss({"kept": nll})
        loss.backward()
        self.move()
        return nll.item()

    def move(self) -> None:
        self.opt.step()
        self.opt.zero_grad()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}


def _with_adapters(model: Any, modules: str, seed: int) -> Any:
    import peft

    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=modules.split(), task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Of 1 to 7 tokens after 1 to 3, of which some are not scored."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        prompt = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 3))]
        response = [*(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(0, 6))), 1]
        labels = [*(-100 if draw.random() < 0.1 else token for token in response[:-1]), 1]
        made.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + labels, "prompt": prompt})
    return made


@dataclass
class Apart:
    """How far two runs are apart, at most."""

    loss: float = 0.0  # relative
    weight: float = 0.0

    def see(self, pairs: list[tuple[float, float]], ours: Training, theirs: Training) -> None:
        self.loss = max([self.loss, *(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs)])
        other = theirs.weights()
        self.weight = max([self.weight, *(float((p - other[name]).abs().max()) for name, p in ours.weights().items())])


def flipped(inputs: Any) -> Any:
    """The same rows in the other order: the same sums, rounded otherwise."""
    return {name: value.flip(0) for name, value in inputs.items()}


def from_the_same_weights(run: Training, batch: Any) -> tuple[float, float]:
    """How far loss and gradient are apart: relative, the gradient to its largest number."""
    weights = task_weights(scored_lengths(shift(batch["labels"])), run.settings.dtype)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    fused = run.model(**batch, seq_weight=weights, use_cache=False).loss
    own, _ = own_logits(run.model, batch, weights)  # a fused model's logits are its own
    pairs = zip(*(torch.autograd.grad(loss, trained) for loss in (fused, own)), strict=True)
    far, size = torch.tensor([[float((a - b).abs().max()), float(b.abs().max())] for a, b in pairs]).max(0).values
    return abs(fused.item() - own.item()) / abs(own.item()), float(far / size)


def compare(settings: Settings, seed: int, *, again: bool) -> tuple[Apart, Apart, Apart]:
    """Loss and gradient from the same weights; fused and own logits; with `again` own logits, and own logits on rows in the other order."""
    import tiny_models

    runs = [Training(settings, seed, fused=kind == 0) for kind in range(3 if again else 2)]
    fused, own, turned = runs[0], runs[1], runs[2] if again else None
    data, collate, tokenizer = rows(seed + 1, 40), Collator(0), tiny_models.tokenizer()
    apart, apart_again, once = Apart(), Apart(), Apart()
    start = {name: p.clone() for name, p in fused.weights().items()}
    torch.manual_seed(seed)
    for step in range(STEPS):
        batch = collate([data[(3 * step + k) % len(data)] for k in range(3 + step % 4)])
        batch["labels"][-1] = -100 if step % 7 == 6 else batch["labels"][-1]  # a row with nothing scored
        if step % 10 == 9:
            loss, gradient = from_the_same_weights(fused, batch)
            once.loss, once.weight = max(once.loss, loss), max(once.weight, gradient)
        losses = [[run.task(flipped(batch) if run is turned else batch)] for run in runs]
        if settings.constrained:
            asked = [row["prompt"] for row in data[step % 30 : step % 30 + 4 + step % 3]]
            rollout = l3ms.rollout(
                fused.model, tokenizer, [str(ids) for ids in asked], prompt_ids=asked, max_new_tokens=6,
                temperature=settings.temperature, chat_template=False,
            )  # fmt: skip
            kept = collate([data[(step + k) % len(data)] for k in range(3)])
            for seen, run in zip(losses, runs, strict=True):
                seen.append(run.constrain(rollout, flipped(kept) if run is turned else kept))
        apart.see(list(zip(losses[0], losses[1], strict=True)), fused, own)
        if turned is not None:
            apart_again.see(list(zip(losses[2], losses[1], strict=True)), turned, own)
    moved = max(float((p - start[name]).abs().max()) for name, p in fused.weights().items())
    assert moved > 1e-2, f"it trained nothing: no weight moved by more than {moved:.2g}"
    return once, apart, apart_again


def alike(family: str, seeds: range) -> Found:
    """From the same weights; over whole runs with SGD and in float64; with AdamW whole runs are for `no_farther`."""
    found, finer = Found(), 1e-6 if family == "float64" else 1.0
    for seed in seeds:
        found.cases += 1
        settings = Settings.of(seed, family)
        case = f"seed {seed}: {settings.kind}, {'constraints' if settings.constrained else 'the task alone'}"
        case += f", LoRA on {settings.adapters}" if settings.adapters else ""
        try:
            once, apart, again = compare(settings, seed, again=family != "float64")
        except Exception as error:
            found.fail(f"{case}: {type(error).__name__}: {error}")
            continue
        shares = [once.loss / LOSS / finer, once.weight / GRADIENT / finer]
        if family != "adamw":
            shares.append(apart.loss / max(LOSS * finer, AMPLIFIED * again.loss))
            shares.append(apart.weight / max(WEIGHT * finer, AMPLIFIED * again.weight))
        found.measure(max(shares), case)
        if not max(shares) <= 1:
            found.fail(f"{case}: from the same weights {once}, the runs {apart}, in the other order {again}")
        tell = {"loss from the same weights": once.loss, "gradient": once.weight}
        tell |= {"losses of the runs": apart.loss, "weights": apart.weight}
        within = apart.loss <= LOSS * finer and apart.weight <= WEIGHT * finer
        ratios = [apart.loss / max(again.loss, 1e-7), apart.weight / max(again.weight, 1e-7)]
        logarithm = sum(math.log(max(ratio, 1e-3)) for ratio in ratios) / 2
        if family != "float64":
            tell |= {
                "losses, unfused in the other order": again.loss,
                "weights, unfused in the other order": again.weight,
            }
        found.add(Found(figures=tell, sums={"runs": 1.0, "within": float(within), "log": logarithm}))
    return found


def no_farther(found: Found) -> None:
    """Fused and unfused come no farther apart than unfused and unfused: in the geometric mean over the runs, at most 3 times."""
    runs = found.sums.get("runs", 0.0)
    if not runs:
        return
    ratio = math.exp(found.sums["log"] / runs)
    found.figures["runs within 1e-6"] = f"{found.sums['within']:.0f} of {runs:.0f}"
    found.figures["apart, as a multiple of unfused in the other order"] = ratio
    if runs >= 6 and not ratio <= 3:
        found.fail(
            f"fused and unfused runs come {ratio:.2g} times as far apart as unfused ones whose rows have another order"
        )


def parts() -> list[Part]:
    return [
        Part("SGD", partial(alike, "sgd"), 12, slice=1, piece=2, seconds=90, close=no_farther),
        Part("AdamW", partial(alike, "adamw"), 12, piece=2, seconds=90, close=no_farther),
        Part("float64", partial(alike, "float64"), 6, slice=1, piece=2, seconds=35),
    ]
