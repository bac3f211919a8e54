"""One model against its own logits: the fused loss and its gradients, the distribution that is sampled, a step of the trainer.

What is compared with is written here from `model(...).logits` alone, with none of the library's code.
"""

import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from architectures import BOS, EOS, PAD, VOCABULARY, NotBuilt
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, TrainerCallback

import l3ms
from l3ms.model.heads import fuse_head
from l3ms.rollouts import stepping

TOLERANCE = 1e-3  # of log-likelihoods, nats; gradients and steps: of the largest entry
REFUSALS = ("fuse_head: ", "rollout: ")  # how a refusal begins
RATE = 0.05  # of the trainer's step


class Wrong(Exception):
    """Another value than the model's own logits give."""


class Refused(Exception):
    """In one line, before anything was computed."""


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@dataclass(frozen=True)
class Batch:
    """Rows of unlike lengths, padded on the right."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    seq_weight: Tensor

    @property
    def seen(self) -> dict[str, Tensor]:
        """What every model takes."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @staticmethod
    def made(*weights: float) -> "Batch":
        """Three rows."""
        drawn = torch.Generator().manual_seed(4)
        ids = torch.randint(4, VOCABULARY, (3, 13), generator=drawn)
        mask, labels = torch.ones_like(ids), ids.clone()
        for row, (prompt, end) in enumerate([(2, 9), (6, 8), (3, 13)]):
            labels[row, :prompt] = -100
            labels[row, end:] = -100
            ids[row, end:], mask[row, end:] = PAD, 0
        return Batch(ids, mask, labels, torch.tensor(weights))


# ---- what the model's own logits say ----


def own_loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(the loss that is wanted, (N,) log-likelihoods).

    -sum_n seq_weight_n log pi(y_n), and what the model adds to its own mean cross-entropy (a router loss): times the sum of the tokens'
    weights, which is 1 for a mean; not at all where a weight is negative.
    """
    try:
        out = model(**batch.seen, labels=batch.labels, use_cache=False)
    except ValueError:  # a loss of its own for labels of another shape
        out = model(**batch.seen, use_cache=False)
    logits = out.logits.float()[:, -batch.labels.shape[1] :]
    targets = batch.labels[:, 1:]
    scored = targets != -100
    token = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * scored
    loss = -(batch.seq_weight * token.sum(1)).sum()
    if (batch.seq_weight >= 0).all() and out.loss is not None:
        plain = -token.sum() / scored.sum()
        aligned = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())  # some expect labels that are shifted
        if abs(float(out.loss - aligned)) > 1e-5 * abs(float(aligned)):
            loss = loss + (batch.seq_weight * scored.sum(1)).sum() * (out.loss - plain)
    return loss, token.sum(1)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def same(what: str, wanted: Tensor, got: Tensor, *, size: float = 0.0, rounding: float = 0.0) -> None:
    """Within the tolerance of the largest entry, or of `size` where that is larger."""
    size = max(float(wanted.abs().max()), size, 1e-3)
    apart = float((wanted - got).abs().max())
    if not apart <= TOLERANCE * size + rounding:
        raise Wrong(f"{what}: {apart:.2g} apart, of {size:.2g}")


def same_gradients(
    what: str, wanted: dict[str, Tensor], got: dict[str, Tensor], rounding: dict[str, float] | None = None
) -> None:
    """A gradient that is not there is one of 0."""
    largest = max((float(value.abs().max()) for value in wanted.values()), default=0.0)
    for name in sorted(wanted.keys() | got.keys()):
        one = wanted[name] if name in wanted else torch.zeros_like(got[name])
        other = got[name] if name in got else torch.zeros_like(one)
        same(f"{what} of {name}", one, other, size=0.01 * largest, rounding=(rounding or {}).get(name, 0.0))


# ---- the comparisons ----


def runs_by_itself(model: Any) -> None:
    """Its own forward and backward, without ours."""
    try:
        torch.manual_seed(0)
        loss, _ = own_loss(model.train(), Batch.made(*WEIGHTS[0]))
        finite = bool(loss.isfinite())
        gradients(model, loss)
    except Exception as error:
        raise NotBuilt(f"its own forward raises {_line(error)}") from error
    if not finite:
        raise NotBuilt("its own loss is not finite")


WEIGHTS = ((0.05, 0.1, 0.02), (0.5, -0.2, 0.3))  # of a task, which has the model's own loss terms, and of constraints


def compare_loss(model: Any) -> None:
    batches = [Batch.made(*weights) for weights in WEIGHTS]
    model.train()
    wanted = []
    for batch in batches:
        torch.manual_seed(0)
        loss, sequence = own_loss(model, batch)
        wanted.append((loss.detach(), sequence.detach(), gradients(model, loss)))
    _refusing(lambda: fuse_head(model))
    model.train()
    for batch, (loss, sequence, slope) in zip(batches, wanted, strict=True):
        torch.manual_seed(0)
        out = _refusing(
            lambda batch=batch: model(**batch.seen, labels=batch.labels, seq_weight=batch.seq_weight, use_cache=False)
        )
        same("log-likelihood", sequence, out.sequence)
        same("loss", loss, out.loss.detach())
        same_gradients("gradient", slope, gradients(model, out.loss))


PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [12], [13, 14], [15, 16, 17, 18], [19, 20], [21, 22, 23, 24])


def compare_sampling(model: Any) -> None:
    """The log-likelihoods by which tokens were drawn are those that the training's forward gives them."""
    model.eval()
    options: dict[str, Any] = {"prompts": ["w5"] * len(PROMPTS), "prompt_ids": PROMPTS}
    torch.manual_seed(0)
    _refusing(
        lambda: l3ms.rollout(model, tokenizer(), max_new_tokens=1, **options)
    )  # its way is tried, which is no sampling
    with _recorded(model) as drawn:
        out = _refusing(lambda: l3ms.rollout(model, tokenizer(), max_new_tokens=6, **options))
    with torch.no_grad():
        scored = model(
            input_ids=out.input_ids,
            attention_mask=out.attention_mask,
            labels=out.labels,
            seq_weight=torch.zeros(len(out)),
            use_cache=False,
        ).token[:, -out.input_ids.shape[1] :]  # a learned prefix is before them
    for row, prompt in enumerate(PROMPTS):
        answer = out.completion_ids()[row]
        for place, token in enumerate(answer):
            seen = drawn.get((*prompt, *answer[:place]))
            if seen is None:
                raise Wrong(f"sampling: nothing was drawn behind {[*prompt, *answer[:place]]}")
            given = scored[row, len(prompt) + place - 1]
            if not abs(float(seen[token] - given)) <= TOLERANCE * max(1.0, abs(float(given))):
                raise Wrong(
                    f"sampling: token {place} of row {row} was drawn with {float(seen[token]):.4f}, is scored {float(given):.4f}"
                )


@contextmanager
def _recorded(model: Any):
    """{tokens without left padding: (V,) log-probabilities of the next} of every step of `generate` inside the block."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    drawn: dict[tuple[int, ...], Tensor] = {}

    def record(rows: Any, scores: Tensor) -> None:
        for ids, row in zip(rows, scores.float().log_softmax(-1), strict=True):
            start = next((i for i, token in enumerate(ids) if token != PAD), len(ids))
            drawn.setdefault(tuple(ids[start:]), row)

    class Record(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            record(input_ids.tolist(), scores)
            return scores

    generate: Callable[..., Any] = inner.generate
    inner.generate = lambda *args, logits_processor=(), **options: generate(
        *args, **options, logits_processor=LogitsProcessorList([Record(), *logits_processor])
    )
    last_logits = stepping.last_logits

    def recorded(model: Any, rows: Any, pad: int) -> Tensor:
        logits = last_logits(model, rows, pad)
        record(rows, logits)
        return logits

    stepping.last_logits = recorded
    try:
        yield drawn
    finally:
        del inner.generate
        stepping.last_logits = last_logits


@dataclass
class _Steps(TrainerCallback):
    """Weights before each half-step, and the calls of the model that its gradient comes from."""

    weights: list[dict[str, Tensor]] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)  # S, by which L3MOptimizer multiplies a gradient
    states: list[Tensor] = field(default_factory=list)  # of the random generator
    optimizer: Callable[[], Any] = lambda: None

    def see(self, module: Any, args: Any, given: dict[str, Any]) -> None:
        if given.get("seq_weight") is not None and torch.is_grad_enabled():
            self.weights.append(_trained(module))
            self.states.append(torch.get_rng_state())
            names = ("input_ids", "attention_mask", "labels", "seq_weight")
            total = self.optimizer().estimates.total
            self.factors.append(float(self.optimizer().task_share if total is None else total))
            self.batches.append(Batch(*(given[name].detach().clone() for name in names)))


def _trained(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def compare_step(model: Any) -> None:
    """Both half-steps of an iteration of `L3MTrainer` are SGD on the gradients of the model's own logits."""
    steps = _Steps()
    seen = model.register_forward_pre_hook(steps.see, with_kwargs=True)
    drawn = torch.Generator().manual_seed(1)
    rows = []
    for i in range(6):
        prompt, answer = (torch.randint(4, VOCABULARY, (n,), generator=drawn).tolist() for n in (1 + i % 3, 2 + i % 4))
        rows.append(
            {"input_ids": [*prompt, *answer, EOS], "labels": [-100] * len(prompt) + [*answer, EOS], "prompt": "w5"}
        )
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "max_steps": 1,
            "constraint_batch_size": 6,
            "per_device_train_batch_size": 6,
            "max_new_tokens": 5,
        }
        options |= {
            "learning_rate": RATE,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "report_to": [],
        }
        options |= {
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "average_fraction": 0.0,
        }
        trainer = _refusing(
            lambda: l3ms.L3MTrainer(
                model,
                l3ms.L3MConfig(output_dir=folder, **options),
                constraints=[l3ms.Length(max=3)],
                train_dataset=rows,
                processing_class=tokenizer(),
            )
        )
        steps.optimizer = lambda: trainer.l3m_optimizer
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
                trainer.remove_callback(callback)
        _refusing(trainer.train)
    seen.remove()
    if len(steps.batches) != 2:
        raise Wrong(f"step: {len(steps.batches)} calls of the model for 2 half-steps")
    after = [*steps.weights[1:], _trained(model)]
    named = dict(model.named_parameters())
    halves = zip(("task", "constraint"), steps.factors, steps.weights, steps.batches, steps.states, after, strict=True)
    for half, factor, before, batch, state, got in halves:
        with torch.no_grad():
            for name, value in before.items():
                named[name].copy_(value)
        model.train()
        torch.set_rng_state(state)
        slope = gradients(model, own_loss(model, batch)[0])
        moved = {name: (before[name] - got[name]) / RATE for name in before}
        # of a weight that was subtracted from
        rounding = {name: 4e-7 * float(value.abs().max()) / RATE for name, value in before.items()}
        same_gradients(
            f"{half} half-step", {name: factor * slope[name] for name in before if name in slope}, moved, rounding
        )


def _refusing(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ValueError as error:
        line = str(error)
        if line.startswith(REFUSALS) and "\n" not in line:
            raise Refused(line) from error
        raise


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


COMPARISONS = {"loss": compare_loss, "sampling": compare_sampling, "step": compare_step}
