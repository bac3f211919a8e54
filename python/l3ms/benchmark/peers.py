"""Peers from other packages, all optional: `make bench` installs those that are on a package index.

They are imported by name when they are used, so that one that is missing, or that needs a GPU, is a line in the table.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module, metadata

import torch
import torch.nn.functional as F
from torch import Tensor

from l3ms.benchmark.contestant import Contestant, Functions, Unavailable
from l3ms.benchmark.inputs import IGNORED, Batch
from l3ms.benchmark.shapes import Case

PACKAGES = ("liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl")


def installed() -> dict[str, str]:
    """Package -> version, of those that are here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cut_cross_entropy(case: Case, implementation: str) -> Functions:
    function = import_module("cut_cross_entropy").linear_cross_entropy

    def token(batch: Batch) -> Tensor:
        return -function(
            batch.hidden, batch.weight, batch.targets, ignore_index=IGNORED, reduction="none", impl=implementation
        )

    return Functions(token)


def _liger_cross_entropy(case: Case) -> Functions:
    function = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def loss(batch: Batch) -> Tensor:
        return function(batch.weight, batch.hidden, batch.targets) / case.scored

    return Functions(loss=loss)


def _on_hopper(case: Case) -> None:
    if case.device != "cuda" or torch.cuda.get_device_capability()[0] != 9:
        raise Unavailable("needs an NVIDIA GPU of compute capability 9")
    if case.dtype != "bf16":
        raise Unavailable("takes bf16 alone")


def _liger_cross_entropy_sm90(case: Case) -> Functions:
    """Needs nvidia-cutlass-dsl, as the next one does."""
    module = import_module("liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90")
    _on_hopper(case)
    function = module.LigerFusedLinearCrossEntropySM90Function

    def loss(batch: Batch) -> Tensor:
        return function.apply(batch.hidden, batch.weight, batch.targets, IGNORED, "sum") / case.scored

    return Functions(loss=loss)


def _liger_scaled_sm90(case: Case) -> Functions:
    """The log-likelihood of each token at a temperature: the upstream gradient is not known in advance."""
    module = import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
    _on_hopper(case)
    function = module.LigerFusedScaledCrossEntropySM90Function

    def token(batch: Batch) -> Tensor:
        return -function.apply(batch.hidden, batch.weight, batch.targets, 1.0, IGNORED)

    return Functions(token)


def _liger_grpo(case: Case, whole: bool) -> Functions:
    """On-policy and without a KL term the gradient of GRPO is that of -sum advantage * log pi / (N L), so advantages are N L weights.

    Its default is a chunk per sequence; whole: all sequences in one chunk (it goes through the vocabulary in blocks all the same).
    Its own torch.compile of the loss is off: that is made again in every call, which takes longer than it saves.
    """
    module = import_module("liger_kernel.chunked_loss")
    sequences, length = case.shape.sequences, case.shape.rows // case.shape.sequences
    function = module.LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, loss_type="dr_grpo", max_completion_length=length,
        chunk_size=sequences if whole else 1,
    )  # fmt: skip

    def loss(batch: Batch) -> Tensor:
        hidden = batch.hidden.view(batch.sequences, -1, batch.hidden.shape[1])
        targets = batch.targets.view(batch.sequences, -1)
        scored = targets != IGNORED
        size = targets.numel()
        return function(hidden, batch.weight, targets.where(scored, 0), scored.float(), batch.seq_weight * size)[0]

    return Functions(loss=loss)


def _liger_log_probabilities(case: Case) -> Functions:
    base = import_module("liger_kernel.chunked_loss.fused_linear_ppo").LigerFusedLinearPPOBase

    def token(batch: Batch) -> Tensor:
        scored = batch.targets != IGNORED
        found = base.chunk_forward(batch.hidden[None], batch.weight, batch.targets.where(scored, 0)[None])
        return found[0].where(scored, 0)

    return Functions(token)


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """(N, L, V), (N, L) -> (N, L), a sequence at a time, as trl.trainer.utils has it."""
    if logits.dtype in (torch.float32, torch.float64):
        selected = logits.gather(-1, index[..., None])[..., 0]
        return selected - torch.stack([row.logsumexp(-1) for row in logits])
    rows = zip(logits, index, strict=True)
    return torch.stack([F.log_softmax(row, -1).gather(-1, labels[:, None])[:, 0] for row, labels in rows])


def _trl(case: Case) -> Functions:
    def token(batch: Batch) -> Tensor:
        hidden = batch.hidden.view(batch.sequences, -1, batch.hidden.shape[1])
        targets = batch.targets.view(batch.sequences, -1)
        scored = targets != IGNORED
        found = selective_log_softmax(F.linear(hidden, batch.weight), targets.where(scored, 0))
        return found.where(scored, 0).flatten()

    return Functions(token)


def _quack(case: Case) -> Functions:
    function = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    if case.device != "cuda" or torch.cuda.get_device_capability()[0] < 9:
        raise Unavailable("needs an NVIDIA GPU (SM90 or newer)")

    def loss(batch: Batch) -> Tensor:
        return function(batch.hidden, batch.weight, batch.targets, ignore_index=IGNORED, reduction="sum") / case.scored

    return Functions(loss=loss)


PEERS = (
    Contestant("trl", "TRL's selective_log_softmax", _trl),
    Contestant(
        "cce-compile", "cut-cross-entropy, torch_compile",
        partial(_cut_cross_entropy, implementation="torch_compile"), compiled=True,
    ),
    Contestant("cce", "cut-cross-entropy, Triton", partial(_cut_cross_entropy, implementation="cce")),
    Contestant("cce-exact", "cut-cross-entropy, exact", partial(_cut_cross_entropy, implementation="cce_exact")),
    Contestant("liger-grpo", "Liger GRPO, chunks of a sequence", partial(_liger_grpo, whole=False)),
    Contestant("liger-grpo-whole", "Liger GRPO, one chunk", partial(_liger_grpo, whole=True)),
    Contestant("liger-log-probs", "Liger selective log-probabilities", _liger_log_probabilities),
    Contestant("liger-cross-entropy", "Liger fused cross-entropy, Triton", _liger_cross_entropy, uniform=True),
    Contestant(
        "liger-cross-entropy-sm90", "Liger fused cross-entropy, SM90", _liger_cross_entropy_sm90, uniform=True, compiled=True
    ),
    Contestant("liger-scaled-sm90", "Liger fused scaled cross-entropy, SM90", _liger_scaled_sm90, compiled=True),
    Contestant("quack", "QuACK linear cross-entropy", _quack, uniform=True, compiled=True),
)  # fmt: skip
