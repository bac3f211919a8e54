"""Responses of the current policy, y ~ pi_theta(.|x), ready for rewards and for the head: data, which others measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from l3ms.model.columns import check_names
from l3ms.rollouts.engines import Response

if TYPE_CHECKING:  # the YAML's constraints are read before torch is imported
    from torch import Tensor


class Answer(Protocol):
    """Of a measure about a rollout, one value per response; it may be on its way."""

    def values(self) -> list[float | None]: ...

    def cancel(self) -> None:
        """It is no longer wanted."""
        ...


class Measure(Protocol):
    """What values responses by a number each: a constraint."""

    @property
    def name(self) -> str: ...

    @property
    def samples(self) -> bool:
        """Whether its values come from responses."""
        ...

    def begin(self, rollout: Rollout, model: Any = None) -> Answer: ...


@dataclass(frozen=True)
class Rollout:
    """N responses and their prompts; the mapping interface holds what a model's forward takes."""

    prompts: list[Any]  # as given
    completions: list[Any]  # text; a list with one assistant message where the prompt is a list of messages, as in TRL
    input_ids: Tensor  # (N, L) prompt, response, padding
    attention_mask: Tensor  # (N, L)
    labels: Tensor  # (N, L) not shifted, -100 on prompts and padding
    lengths: Tensor  # (N,) int64, response tokens, the closing EOS included
    ended: Tensor  # (N,) bool, closed by EOS; a truncated response is not
    columns: dict[str, list[Any]] = field(default_factory=dict)  # more columns of the data, for the rewards
    host_lengths: list[int] = field(default_factory=list)  # `lengths`, with no device to wait for; made where not given
    temperature: float = 1.0  # of the sampling
    training: Mapping[str, Any] = field(default_factory=dict)  # what reward functions get of the training that asks
    raw_completions: list[str] = field(default_factory=list)  # texts with their special tokens
    # of the engine that sampled, for each response and token, at the temperature; None where it gave none
    engine_log_likelihood: list[list[float]] | None = None
    host_widths: list[int] = field(default_factory=list)  # tokens of each row, as `host_lengths`: prompt and response

    def __post_init__(self) -> None:
        check_columns("Rollout", self.columns, len(self.prompts))
        if not self.host_lengths:
            object.__setattr__(self, "host_lengths", self.lengths.tolist())
        if not self.host_widths:
            object.__setattr__(self, "host_widths", self.attention_mask.sum(1).tolist())

    @staticmethod
    def from_tokens(
        tokenizer: Any,
        prompts: Sequence[Any],
        prompt_ids: Sequence[Sequence[int]],
        responses: Sequence[Response],
        columns: dict[str, list[Any]] | None = None,
        *,
        temperature: float = 1.0,
        special_tokens: bool = False,
        device: Any = None,
    ) -> Rollout:
        """Of responses that were sampled elsewhere, whatever by.

        Args:
            prompts: as rewards see them, texts or lists of messages.
            prompt_ids: what was continued, token for token.
            responses: one per prompt, the end token in it.
            columns: more columns of the data, for the rewards.
            temperature: of the sampling.
            special_tokens: leave special tokens in the text of the completions.
            device: of the tensors.

        Raises:
            ValueError: not as many of one as of the others, or a response or prompt without a token.
        """
        import torch

        counts = {"prompts": len(prompts), "prompt_ids": len(prompt_ids), "responses": len(responses)}
        if len(set(counts.values())) != 1 or not prompts:
            found = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise ValueError(f"Rollout.from_tokens: wanted as many responses as prompts and their tokens, got {found}")
        for row, (ids, response) in enumerate(zip(prompt_ids, responses, strict=True)):
            if not len(ids) or not response.tokens:
                raise ValueError(
                    f"Rollout.from_tokens: {'responses' if len(ids) else 'prompt_ids'}[{row}] has no tokens"
                )
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        answers = [response.tokens for response in responses]
        sequences = [[*ids, *answer] for ids, answer in zip(prompt_ids, answers, strict=True)]
        width = max(map(len, sequences))
        input_ids = torch.full((len(sequences), width), pad)
        labels = torch.full((len(sequences), width), -100)
        attention_mask = torch.zeros((len(sequences), width), dtype=torch.int64)
        for row, (sequence, answer) in enumerate(zip(sequences, answers, strict=True)):
            input_ids[row, : len(sequence)] = torch.tensor(sequence)
            labels[row, len(sequence) - len(answer) : len(sequence)] = torch.tensor(answer)
            attention_mask[row, : len(sequence)] = 1
        raw = tokenizer.batch_decode(answers, skip_special_tokens=False)
        texts = raw if special_tokens else tokenizer.batch_decode(answers, skip_special_tokens=True)
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        lengths = [len(answer) for answer in answers]
        known = [response.log_likelihood for response in responses if response.log_likelihood is not None]
        return Rollout(
            prompts=list(prompts),
            completions=completions,
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            labels=labels.to(device),
            lengths=torch.tensor(lengths, device=device),
            ended=torch.tensor([bool(response.ended) for response in responses], device=device),
            columns=columns or {},
            host_lengths=lengths,
            host_widths=[len(sequence) for sequence in sequences],
            temperature=temperature,
            raw_completions=raw,
            engine_log_likelihood=known if len(known) == len(responses) else None,
        )

    @property
    def scored(self) -> int:
        """Response tokens of all, which are what the head scores: for `L3MOptimizer.constraint_loss(..., scored=rollout.scored)`."""
        return self.scored_in(slice(None))

    def scored_in(self, part: slice) -> int:
        """Response tokens of a micro-batch."""
        return sum(self.host_lengths[part])

    def inputs(self, rows: slice | Sequence[int]) -> dict[str, Any]:
        """What a forward of a fused head takes of some rows, which are as wide as the widest of them."""
        indices = range(len(self))[rows] if isinstance(rows, slice) else rows
        width = max(self.host_widths[row] for row in indices)
        tensors = {name: self[name][rows, :width] for name in ("input_ids", "attention_mask", "labels")}
        return {**tensors, "scored": sum(self.host_lengths[row] for row in indices), "use_cache": False}

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def rewards(
        self, constraints: Sequence[Measure], model: Any = None, training: Mapping[str, Any] | None = None
    ) -> dict[str, list[float | None]]:
        """One value per response and constraint, by name; constraints without a function are left out (give those to `observe`).

        Asynchronous reward functions run at the same time as each other and as the others. NaN and inf are let through, to `observe`:
        there it is decided about them, and an error is one of all ranks.

        Args:
            model: the policy that was sampled, for constraints that need it (`KL`).
            training: TRL's `trainer_state`, `log_extra` and `log_metric`, for reward functions; by default of no training.

        Raises:
            ValueError: a reward of the wrong length, or no number: names the function and row.
            What a function raises, with the constraint and the function in its words.
        """
        asked = self if training is None else replace(self, training=training)
        answers: list[Answer] = []
        own = [constraint for constraint in constraints if constraint.samples]
        try:
            for constraint in own:
                answers.append(constraint.begin(asked, model))
            return {constraint.name: answer.values() for constraint, answer in zip(own, answers, strict=True)}
        finally:
            for answer in answers:
                answer.cancel()

    def reward_columns(self) -> dict[str, list[Any]]:
        """What reward functions get beside prompts and completions: the data's columns, `completion_ids`, `ended` (bool), and
        `raw_completions`, the texts with their special tokens."""
        own = {"completion_ids": self.completion_ids(), "ended": self.ended.tolist()}
        return {**self.columns, **own, **({"raw_completions": self.raw_completions} if self.raw_completions else {})}

    def completion_ids(self) -> list[list[int]]:
        """The response tokens of each sequence."""
        return [ids[labels != -100].tolist() for ids, labels in zip(self.input_ids, self.labels, strict=True)]


def check_columns(where: str, columns: Mapping[str, Any], count: int) -> None:
    """ValueError, which begins with `where`, for a name that is taken or a column without one value for each of `count` responses."""
    check_names(f"{where}: columns", columns)
    for name, values in columns.items():
        if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
            raise ValueError(f"{where}: columns[{name!r}] must be a list, one value per prompt, got {values!r:.100}")
        if len(values) != count:
            raise ValueError(
                f"{where}: columns[{name!r}] must have one value per prompt, wanted {count}, got {len(values)}"
            )
