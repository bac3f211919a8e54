"""A reward model from preference pairs, by the Bradley-Terry model: P(chosen over rejected) = sigmoid(r(chosen) - r(rejected)).

    python experiments/harmlessness/train_reward_model.py --data pairs.jsonl --model MODEL --output out/rm

MODEL is any checkpoint that `AutoModelForSequenceClassification` loads; of a causal language model the body is taken and a head of one
output is added. The loss, -log sigmoid(r_c - r_r), leaves a constant free, and its scale is that of its own certainty: after training the
head is changed so that the scores of the validation replies have mean 0 and standard deviation 1. Then 0 is an average reply, and
`l3ms.RewardModel(squash="tanh")` bounds scores of unit spread.

The folder OUTPUT then holds the checkpoint, its tokenizer and reward_model.json: accuracy on held-out pairs with its 95% interval, beside
the accuracy of preferring the shorter reply and the correlation of the score with the length, since a model may have learned only that.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.harmlessness.pairs import Pair, conversation, data_path, read_pairs, shorten, split, without
from experiments.harmlessness.scoring import encode, logits_of, outputs, scores, texts_of
from l3ms.config.yaml_reader import ConfigError
from l3ms.runs.progress import progress_bar

Z95 = 1.959964


@dataclass(frozen=True)
class Settings:
    """How a reward model is trained. The defaults are for the 1M-parameter model and about 1,000 pairs: it overfits from epoch 2 on."""

    epochs: int = (
        3  # at most: ends after the first one that does not lower the validation loss, with the weights before it
    )
    batch_size: int = 16  # pairs
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    max_length: int = 256  # tokens of a conversation; longer ones lose their beginning
    validation: float = 0.15  # share of the training conversations
    bf16: bool = False  # bfloat16 activations over float32 weights
    blocks: int = 0  # only the last so many of the model learn, with the head; 0: all of it
    seed: int = 0


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected); (B,) each -> scalar."""
    return -logsigmoid(chosen - rejected).mean()


def fit(
    model: Any,
    tokenizer: Any,
    train: Sequence[Pair],
    validation: Sequence[Pair],
    settings: Settings,
    advance: Any = None,
) -> tuple[Any, list[float]]:
    """(`model` trained on `train` with the weights of the best epoch, validation loss before training and after each epoch)."""
    collate = _Collator(tokenizer, settings.max_length)
    total = settings.epochs * math.ceil(len(train) / settings.batch_size)
    best = _BestEpoch(model, tokenizer, validation, settings, advance, total)
    with tempfile.TemporaryDirectory() as unused:  # the Trainer makes its folder even where it saves nothing
        arguments = TrainingArguments(
            output_dir=unused,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            warmup_steps=total // 20,
            lr_scheduler_type="linear",
            bf16=settings.bf16,
            seed=settings.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        rows: Any = list(train)  # all that the Trainer wants of a data set
        trainer = _BradleyTerry(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[best])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    model.load_state_dict(best.weights)
    return model.eval(), best.losses


def freeze_below(model: nn.Module, blocks: int) -> None:
    """Leave the last `blocks` of the model, its last norm and its head to learn. ConfigError where there are not as many."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=len, default=nn.ModuleList())
    if not 0 < blocks <= len(layers):
        raise ConfigError("blocks", f"the model has {len(layers)} of them: {blocks} cannot learn")
    embeddings: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for module in (*embeddings, *layers[: len(layers) - blocks]):
        module.requires_grad_(False)


@torch.no_grad()
def standardise(model: Any, tokenizer: Any, pairs: Sequence[Pair], settings: Settings) -> dict[str, float] | None:
    """Change the linear head so that the scores of the pairs' replies have mean 0 and standard deviation 1; returns what they were.

    A head without a bias takes the constant from the direction v of the features h that is most nearly constant: v.h has mean 1 and the
    least variance, v ~ (Cov h + ridge)^-1 E h. A model without a linear head is left as it is (None).
    """
    name = next((name for name in ("score", "classifier") if isinstance(getattr(model, name, None), nn.Linear)), None)
    if name is None:
        return None
    head = getattr(model, name)
    setattr(model, name, nn.Identity())
    try:
        features = outputs(model, tokenizer, texts_of(pairs, tokenizer), settings.max_length)  # (N, D)
    finally:
        setattr(model, name, head)
    weight = head.weight[0].double().cpu()
    values = features @ weight + (0.0 if head.bias is None else float(head.bias))
    mean, spread = float(values.mean()), float(values.std())
    if head.bias is not None:
        head.bias -= mean
    else:
        centre, covariance = features.mean(0), features.T.cov()
        ridge = 1e-3 * covariance.diagonal().mean() * torch.eye(len(centre), dtype=torch.float64)
        constant = torch.linalg.solve(covariance + ridge, centre)
        head.weight -= mean * (constant / (constant @ centre)).to(head.weight)
        spread = float((features @ head.weight[0].double().cpu()).std())
    for parameter in head.parameters():
        parameter /= spread
    return {"mean": mean, "std": float(values.std())}


def assess(model: Any, tokenizer: Any, pairs: Sequence[Pair], settings: Settings) -> dict[str, Any]:
    """What the model is worth on pairs it has not seen, and how much of it is the length of the reply."""
    chosen, rejected = scores(model, tokenizer, pairs, settings.max_length)
    length = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs], dtype=torch.float64)
    shorter = length[:, 0] < length[:, 1]
    right = chosen > rejected
    both = torch.cat([chosen, rejected])
    return {
        "pairs": len(pairs),
        "loss": float(bradley_terry_loss(chosen, rejected)),
        "accuracy": share(right),
        "accuracy_of_the_shorter": share(shorter),
        "accuracy_where_the_shorter_is_chosen": share(right[shorter]),
        "accuracy_where_the_longer_is_chosen": share(right[length[:, 0] > length[:, 1]]),
        "correlation_with_length": float(torch.corrcoef(torch.stack([both, torch.cat([*length.T])]))[0, 1]),
        "score": {"mean": float(both.mean()), "std": float(both.std()), "mean_tanh": float(both.tanh().mean())},
    }


def share(hits: Tensor) -> dict[str, Any]:
    """Share of True with Wilson's 95% interval."""
    n = len(hits)
    if n == 0:
        return {"share": None, "ci95": None, "of": 0}
    p, z2 = float(hits.double().mean()), Z95**2
    middle, half = (p + z2 / (2 * n)) / (1 + z2 / n), Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return {"share": p, "ci95": [middle - half, middle + half], "of": n}


def train_reward_model(
    model: str,
    train: Sequence[Pair],
    held_out: Sequence[Pair],
    output: Path,
    settings: Settings | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train from the checkpoint `model` on `train`, write the result to `output`, and return what is in its reward_model.json."""
    settings, console = settings or Settings(), console or Console()
    transformers.set_seed(settings.seed)
    transformers.logging.set_verbosity_error()  # that the head is new
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        classifier: Any = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError("model", f"cannot load {model!r}: {' '.join(str(error).split())[:300]}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.truncation_side = "left"  # the reply is what is judged
    tokenizer.padding_side = (
        "right"  # as l3ms.RewardModel pads: a model with absolute positions counts from the first token
    )
    classifier.config.pad_token_id = tokenizer.pad_token_id
    if settings.blocks:
        freeze_below(classifier, settings.blocks)
    learned, validation = split(train, settings.validation, seed=settings.seed)
    with progress_bar(console, "reward model") as advance:
        classifier, losses = fit(classifier, tokenizer, learned, validation, settings, advance)
    before = standardise(classifier, tokenizer, validation, settings)
    report = {
        "settings": asdict(settings),
        "learned_from": {"train": len(learned), "validation": len(validation)},
        "validation_loss": losses,
        "best_epoch": min(range(len(losses)), key=losses.__getitem__),
        "before_standardising": before,
        **assess(classifier, tokenizer, held_out, settings),
    }
    output.mkdir(parents=True, exist_ok=True)
    classifier.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "reward_model.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def summary(report: dict[str, Any]) -> str:
    """One line for the terminal."""
    right, shorter = report["accuracy"], report["accuracy_of_the_shorter"]
    low, high = right["ci95"]
    return (
        f"accuracy {right['share']:.3f} [{low:.3f}, {high:.3f}] on {right['of']} held-out pairs; preferring the shorter reply: "
        f"{shorter['share']:.3f}; correlation of the score with the length: {report['correlation_with_length']:.2f}"
    )


class _Collator:
    """Pairs -> the tokens of all chosen conversations, then of all rejected ones, padded together."""

    def __init__(self, tokenizer: Any, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, pairs: Sequence[Pair]) -> Any:
        texts = [conversation(p, reply, self.tokenizer) for p in pairs for reply in (p.chosen, p.rejected)]
        return encode(self.tokenizer, texts[::2] + texts[1::2], self.max_length)


class _BradleyTerry(Trainer):
    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        chosen, rejected = logits_of(model, inputs)[:, 0].float().chunk(2)
        return bradley_terry_loss(chosen, rejected)


class _BestEpoch(TrainerCallback):
    """Validation loss after each epoch; keeps the weights of the least, ends at the first epoch without a new one."""

    def __init__(self, model: Any, tokenizer: Any, pairs: Sequence[Pair], settings: Settings, advance: Any, total: int):
        self.model, self.tokenizer, self.pairs, self.settings = model, tokenizer, pairs, settings
        self.advance, self.total = advance, total
        self.losses = [self._loss()]
        self.weights = copy.deepcopy(model.state_dict())

    def _loss(self) -> float:
        chosen, rejected = scores(self.model, self.tokenizer, self.pairs, self.settings.max_length)
        self.model.train()
        return float(bradley_terry_loss(chosen, rejected))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.advance is not None:
            self.advance(state.global_step, self.total)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses.append(self._loss())
        if self.losses[-1] == min(self.losses):
            self.weights = copy.deepcopy(self.model.state_dict())
        else:
            control.should_training_stop = True


def main(arguments: Sequence[str] | None = None) -> int:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="preference pairs, JSONL or JSONL.gz; default: $L3M_HH_DATA")
    parser.add_argument("--model", required=True, help="checkpoint to start from: a folder or a hub id")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the conversations to report on")
    parser.add_argument(
        "--prompt-characters", type=int, default=240, help="of a prompt the last turns that fit are kept"
    )
    parser.add_argument("--reply-characters", type=int, default=600, help="pairs with a longer reply are left out")
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args(arguments)
    console = Console()
    try:
        if given.output.exists() and any(given.output.iterdir()):
            raise ConfigError("output", f"{given.output} is not empty")
        pairs = read_pairs(data_path(given.data)).pairs
        limits = {"prompt": given.prompt_characters, "reply": given.reply_characters}
        train, held_out = (shorten(side, **limits) for side in split(pairs, given.held_out, seed=0))
        train = without(train, held_out)
        settings = Settings(**{name: getattr(given, name) for name in asdict(defaults)})
        report = train_reward_model(given.model, train, held_out, given.output, settings, console)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    console.print(f"{summary(report)}\nWritten: {given.output}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
