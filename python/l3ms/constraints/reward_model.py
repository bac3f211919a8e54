"""A reward from a model: any sequence classifier of transformers, as a constraint on the policy's responses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from l3ms.constraints.constraint import Constraint
from l3ms.constraints.rewards import text_of
from l3ms.model.pretrained import load_pretrained, load_tokenizer, reason
from l3ms.rollouts.prompts import chat_text

ChatTemplate = Literal["auto", True, False]


class RewardModelError(ValueError):
    """An argument of `RewardModel` is wrong, or does not fit its model; the message begins with its name."""

    def __init__(self, argument: str, message: str):
        super().__init__(f"{argument} {message}")


class RewardModel(Constraint):
    """Bounds on the mean score that a sequence classifier gives to the responses (with their prompts).

    Args:
        name: of the constraint.
        model: folder or hub id of a `transformers` sequence-classification checkpoint, loaded when it is first needed; or a loaded model.
        tokenizer: of that model; by default the one in its folder. A loaded model needs it here.
        head: which of the model's outputs is the score.
        batch_size: responses scored at a time.
        max_length: tokens of prompt and response that the model gets; by default what model and tokenizer take. Longer texts lose their
            beginning: the response's end is kept.
        chat_template: "auto", conversations go through the tokenizer's chat template if it has one; True, plain prompts too, as one user
            turn; False, never. Without a template the text is prompt + completion, of a conversation its messages, one per line.
        squash: "tanh" or "sigmoid" of the score. A bounded score is harder to exploit than a linear one.
        min, max, scale, margin, threshold, quantile: as in `Constraint`, in units of the (squashed) score.
        device: where the model is put; by default a loaded model stays where it is, another goes to the GPU if there is one.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        RewardModelError: (a ValueError) an argument is wrong; when the model is loaded: it cannot be, has no trained head, or has no
            output number `head`.
        ValueError: as `Constraint`.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        *,
        tokenizer: Any = None,
        head: int = 0,
        batch_size: int = 16,
        max_length: int | None = None,
        chat_template: ChatTemplate = "auto",
        squash: Literal["tanh", "sigmoid"] | None = None,
        min: float | None = None,
        max: float | None = None,
        scale: float | None = None,
        margin: float | None = None,
        threshold: float | None = None,
        quantile: float | None = None,
        monitor: bool = False,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ):
        score = Score(
            model,
            tokenizer=tokenizer,
            head=head,
            batch_size=batch_size,
            max_length=max_length,
            chat_template=chat_template,
            squash=squash,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        super().__init__(
            name, score, min=min, max=max, scale=scale, margin=margin, threshold=threshold, quantile=quantile, monitor=monitor
        )  # fmt: skip

    def load(self) -> None:
        """Load the model now rather than at the first response, and check that it has what it needs."""
        score: Any = self.function
        score.load()


class Score:
    """The reward function of a `RewardModel`: `(prompts, completions) -> list[float]`.

    Padding is on the right whatever the tokenizer does. Classifiers on a causal model read the last token that is not padding, which they
    find by its id: a model whose configuration names none is padded with an id that no text of the batch ends with, so that the score of a
    text does not depend on what it is scored with.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any,
        head: int,
        batch_size: int,
        max_length: int | None,
        chat_template: ChatTemplate,
        squash: str | None,
        device: str | torch.device | None,
        trust_remote_code: bool,
    ):
        if head < 0:
            raise RewardModelError("head", f"must be at least 0, got {head}")
        if batch_size < 1:
            raise RewardModelError("batch_size", f"must be at least 1, got {batch_size}")
        if max_length is not None and max_length < 2:
            raise RewardModelError("max_length", f"must be at least 2, got {max_length}")
        if chat_template not in ("auto", True, False):
            raise RewardModelError("chat_template", f"must be 'auto', True or False, got {chat_template!r}")
        if squash not in (None, "tanh", "sigmoid"):
            raise RewardModelError("squash", f"must be tanh, sigmoid or None, got {squash!r}")
        self.source = str(model) if isinstance(model, (str, Path)) else None
        self.model: Any = None if self.source is not None else model
        self.tokenizer, self.head, self.batch_size, self.max_length = tokenizer, head, batch_size, max_length
        self.chat_template, self.squash, self.device = chat_template, squash, device
        self.trust_remote_code = trust_remote_code
        self.__name__ = self.source or type(model).__name__
        self._checked = False
        if self.source is None:
            self.load()

    def __getstate__(self) -> dict[str, Any]:
        """A model that was loaded from a checkpoint is loaded from it again."""
        return vars(self) | ({"model": None, "_checked": False} if self.source is not None else {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Score:
        """Its weights do not change: a copy of an optimizer with its constraints shares them."""
        return self

    def load(self) -> None:
        """Load what is not loaded yet, and check that it fits. Raises RewardModelError."""
        if self._checked:
            return
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.model is None:
            self.model = self._load_model(options)
        elif not hasattr(getattr(self.model, "config", None), "num_labels"):
            raise RewardModelError("model", f"must be a sequence classifier, got {type(self.model).__name__}")
        elif self.device is not None:
            self.model.to(self.device)
        if self.tokenizer is None:
            self.tokenizer = self._load_tokenizer(options)
        heads = self.model.config.num_labels
        if self.head >= heads:
            raise RewardModelError("head", f"must be one of the {heads} outputs, 0 to {heads - 1}, got {self.head}")
        if self.chat_template is True and not getattr(self.tokenizer, "chat_template", None):
            raise RewardModelError("chat_template", "is true, but the reward model's tokenizer has none")
        self._room = self._longest()
        self._checked = True

    def _load_model(self, options: dict[str, Any]) -> Any:
        from transformers import AutoModelForSequenceClassification

        assert self.source is not None
        if os.path.isabs(self.source) and not os.path.isdir(self.source):  # false where pathlib raises
            raise RewardModelError("model", f"must be a checkpoint, no such folder: {self.source}")
        try:
            model, missing = load_pretrained(AutoModelForSequenceClassification, self.source, dtype="auto", **options)
        except Exception as error:  # transformers, the hub client and safetensors raise many kinds
            raise RewardModelError("model", _cannot("load", self.source, error)) from error
        if missing:  # a language model would get a head of random numbers
            names = ", ".join(missing[:3])
            raise RewardModelError("model", f"must be a trained classifier; {self.source!r} has no {names}")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return model.to(device).eval().requires_grad_(False)

    def _load_tokenizer(self, options: dict[str, Any]) -> Any:
        from transformers import AutoTokenizer

        if self.source is None:
            raise RewardModelError("tokenizer", "is required with a model that is loaded already")
        # of a folder without one transformers makes an empty tokenizer
        folder = Path(self.source)
        if folder.is_dir() and not [*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("*.model")]:
            raise RewardModelError("model", f"cannot load the tokenizer of {self.source!r}: the folder holds none")
        try:
            return load_tokenizer(AutoTokenizer, self.source, **options)
        except Exception as error:
            raise RewardModelError("model", _cannot("load the tokenizer of", self.source, error)) from error

    def _longest(self) -> int:
        config = self.model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or 2**31
        for name, module in self.model.named_modules():
            # RoBERTa and its kin count positions from behind the padding's
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                context = min(context, module.num_embeddings - module.padding_idx - 1)
        if self.max_length is not None and self.max_length > context:
            raise RewardModelError(
                "max_length", f"must be at most the model's context of {context} tokens, got {self.max_length}"
            )
        return self.max_length or min(context, self.tokenizer.model_max_length)

    # ---- scoring ----

    @property
    def reward_range(self) -> tuple[float, float] | None:
        """Of a score, for certificates; None where it has no bounds."""
        return {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0), None: None}[self.squash]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        self.load()
        texts = [self._tokens(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # alike lengths together: little padding
        scores = [0.0] * len(texts)
        training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                for row, score in zip(rows, self._scores([texts[row] for row in rows]), strict=True):
                    scores[row] = score
        finally:
            self.model.train(training)
        return scores

    def _tokens(self, prompt: Any, completion: Any) -> list[int]:
        """Of prompt and response, cut on the left."""
        tokenizer = self.tokenizer
        side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
        options: dict[str, Any] = {"truncation": True, "max_length": self._room}
        try:
            templated = getattr(tokenizer, "chat_template", None) and self.chat_template is not False
            if templated and (self.chat_template is True or not isinstance(prompt, str)):
                turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
                answer = completion
                if isinstance(completion, str):
                    answer = [{"role": "assistant", "content": completion}]
                text = chat_text(tokenizer, [*turns, *answer])
                return list(tokenizer(text, add_special_tokens=False, **options)["input_ids"])
            gap = "" if isinstance(prompt, str) else "\n"
            return list(tokenizer(text_of(prompt) + gap + text_of(completion), **options)["input_ids"])
        finally:
            tokenizer.truncation_side = side

    @torch.inference_mode()
    def _scores(self, texts: list[list[int]]) -> list[float]:
        """Of token lists, one batch."""
        config, device = self.model.config.get_text_config(), self.model.device
        own = config.pad_token_id
        pad = own
        if pad is None or not 0 <= pad < config.vocab_size:
            last = {ids[-1] for ids in texts if ids}
            pad = next(token for token in range(len(last) + 1) if token not in last)
        texts = [ids or [pad] for ids in texts]  # an empty text, of a tokenizer without special tokens
        width = max(map(len, texts))
        input_ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in texts], device=device)
        attention_mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts], device=device)
        config.pad_token_id = pad
        try:
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        finally:
            config.pad_token_id = own
        if logits.ndim != 2:
            kind, shape = type(self.model).__name__, tuple(logits.shape)
            raise RewardModelError(
                "model", f"must be a sequence classifier, {kind} returns {shape} for {len(texts)} texts"
            )
        score = logits[:, self.head].double()
        if self.squash is not None:
            score = score.tanh() if self.squash == "tanh" else score.sigmoid()
        return score.tolist()


def _cannot(do: str, source: str, error: Exception) -> str:
    return f"cannot {do} {source!r}: {reason(error)}"
