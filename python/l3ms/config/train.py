"""`train:`, how the constrained problem is solved."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from l3ms.config.optimizers import wrong_optimizer
from l3ms.config.sections import MOST, Batch, Count, NonNegative, Positive, Section, Share, Text, check_used

BETAS = (0.5, 0.95)
OF = (  # fields that something else in the section must ask for
    ("dual_rate", "solver", ("dual_ascent", "augmented_lagrangian")),
    ("penalty", "solver", ("penalty", "augmented_lagrangian")),
    ("mu", "solver", ("barrier",)),
    ("mu_end", "solver", ("barrier",)),
    ("final_learning_rate_share", "schedule", ("linear", "cosine")),
)
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"]


class LoraConfig(Section):
    """Low-rank adapters instead of the full weights (needs `peft`)."""

    r: Annotated[int, Field(ge=1, le=1 << 16)] = 16
    alpha: Annotated[int, Field(ge=1, le=1 << 16)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[Text] = "all-linear"


class TrainConfig(Section):
    """How the constrained problem is solved; one iteration is a task half-step and a constraint half-step."""

    # none: plain supervised fine-tuning; the others are what the barrier is compared with
    solver: Literal["barrier", "dual_ascent", "augmented_lagrangian", "penalty", "none"] = "barrier"
    dual_rate: Positive = 0.5  # of dual_ascent and augmented_lagrangian: multiplier per step and unit of violation
    penalty: Positive = 5.0  # weight of penalty; multiplier per unit of violation of augmented_lagrangian
    iterations: Count = 200
    batch_size: Batch = 8  # task sequences per backward pass, on each process
    gradient_accumulation: Batch = 1  # backward passes per task half-step
    constraint_batch_size: Annotated[int, Field(ge=2, le=1 << 24)] = 32  # sampled responses per constraint half-step
    learning_rate: Positive = 1e-5
    # adamw, muon (matrices; AdamW has the rest), sgd ..., or transformers' name of another package's
    optimizer: Text = "adamw_fused"
    # of torch's own, beside the fields here: eps: 1e-6, nesterov: true ...
    optimizer_options: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    # a momentum of 0.9 makes the constraints' pressure late, and the mean swings (experiments/ablations); muon has the first alone
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = BETAS
    weight_decay: NonNegative = 0.0
    warmup: Annotated[int, Field(ge=0, le=MOST)] | None = None  # iterations; default: a tenth of the run, at most 10
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    final_learning_rate_share: Annotated[float, Field(ge=0, le=1)] = 0.1  # of learning_rate, at the end
    max_grad_norm: Positive = 1.0
    max_new_tokens: Annotated[int, Field(ge=2, le=MOST)] = 256
    temperature: Positive = 1.0
    mu: Literal["auto", "paper"] = "auto"  # auto: a decay to the noise floor of the estimates
    mu_end: Annotated[float, Field(gt=0, le=1)] = 1e-6
    # of the running estimates: a filter of level and trend; an average in which a new batch has this weight; ema: 0.1, the paper's
    smoothing: Annotated[float, Field(gt=0, le=1)] | Literal["trend", "ema"] = "trend"
    half_steps: Literal["alternating", "joint"] = "alternating"  # joint: one step on the sum, clipped as a whole
    clipping: Literal["adaptive", "separate"] = "adaptive"  # adaptive: the task steps less while a bound is violated
    length_norm: Literal["mean", "sequence", "none"] = "mean"
    nonfinite: Literal["raise", "drop"] = (
        "raise"  # a reward that is NaN or inf: stop, or leave the response out and count it
    )
    save_steps: Count | None = 50  # iterations between checkpoints, the newest two of which are kept until the run ends
    average_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2  # last part of the run whose weights are averaged
    # of several processes: seconds that one waits for the others before the run ends; more than the slowest reward and sampling take
    timeout: Annotated[int, Field(ge=5, le=MOST)] = 1800
    # iterations after which they compare multipliers, mu and weights, bit for bit; null: never
    agree_every: Count | None = 50
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    autocast: bool = False  # bfloat16 activations over float32 weights
    # how the policy computes attention, by transformers' names; null: its own choice, sdpa where a model has it. On a CPU with autocast
    # eager is faster for short rows: 0.79 of both half-steps (SmolLM2-135M, docs/beside-0.1.0.json); `l3ms check` estimates both
    attn_implementation: Attention | None = None
    activation_checkpointing: bool = False  # less memory, a second forward
    # fsdp2: each of several processes holds a part of weights, gradients and optimizer (accelerate's fully_shard, GPUs); null: all of them
    sharding: Literal["fsdp2"] | None = None
    device: Literal["auto", "cpu"] = "auto"
    lora: LoraConfig | None = None

    @model_validator(mode="after")
    def _check_optimizer(self) -> TrainConfig:
        if (wrong := wrong_optimizer(self.optimizer, self.optimizer_options, self.betas != BETAS)) is not None:
            raise ValueError(" ".join(wrong))
        return self

    @model_validator(mode="after")
    def _check_used(self) -> TrainConfig:
        check_used(self, OF)
        return self
