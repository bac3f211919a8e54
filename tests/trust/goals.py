"""The goals: what is claimed, what a failure is, and which module counts it."""

from __future__ import annotations

import importlib
from pathlib import Path

from parts import Goal, Part

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "trust"  # a file of figures for each goal

GOALS = (
    Goal("G1", "the fused head on a CPU against float64: random shape, dtype, mask, stride, temperature, softcap, bias, what is frozen",
         "of an element, beyond its rounding to 16 bits: 1.5 times the error that the unfused op in fp32 has there + 8 eps sum |h w|; of"
         " usual numbers also 1.5 times its worst + 2 ulp (products in bf16: the unfused op in bf16, and a bf16 eps of them more); "
         "32 ulp of sum |h w|, 7e-15, in float64",
         "trust_heads", "flash-attention 2 to 3 times the unfused error; cut-cross-entropy 2,880 cases; Liger 141"),
    Goal("G2", "Triton's kernels: random calls, interpreted, against float64; all compiled for sm_80, 90, 100, 120",
         "as G1; no spilled register, no more shared memory than there is", "trust_triton", "none found without a GPU"),
    Goal("G3", "opcheck of every op and backend (Triton: 100 inputs each); PyTorch's linear_cross_entropy samples and error inputs",
         "opcheck's own; torch's tolerances and 1.5 times torch's own error; errors are a ValueError that names the argument",
         "trust_opcheck", "4 samples in PyTorch's extension-cpp"),
    Goal("G4", "gradients against finite differences in float64; a second derivative is right or refused",
         "torch.autograd.gradcheck's own", "trust_gradients", "torch's chunked op is silently wrong"),
    Goal("G5", "errors of bf16 gradients and log-likelihoods have no direction",
         "mean error 0.1 of its standard deviation, over calls of many options", "trust_bias"),
    Goal("G6", "barrier, slope and curvature against 50 digits, for any distance and mu",
         "slope and curvature 4 ulp, the value 8 ulp of its terms; finite for z in [-1e6, 1e6], mu in [1e-7, 1]", "trust_barrier"),
    Goal("G7", "convex problems with known solutions and multipliers, conflicting and stochastic ones too, reached by L3MOptimizer",
         "1e-6 in stationarity (relative to max(1, |grad f|)), feasibility and complementarity, where mu, which is what a log barrier "
         "leaves of the latter, ends at 2e-7, the feasible set has an interior and multipliers are up to 10; by hand: the same bits; "
         "conflicting: the least sum of squared violations to 2 mu^2 sqrt(n) + 1e-6; noisy, after 400 steps, or 1,600 where values are "
         "slow: beyond the bound by half an error of a batch; inside by 3.5 standard errors and what the barrier leaves, mu over the "
         "multiplier and the task's share; the 95% band covers 90% of the steps",
         "trust_convex", "cooper: 544 at 1e-4"),
    Goal("G8", "fused and unfused training are the same run: 200 steps of tiny Llama, Qwen and Gemma 2",
         "from the same weights: loss 1e-6 relative, gradient 5e-6 of its largest number. SGD: loss 1e-6 relative and parameters 1e-6, "
         "or, where a run amplifies rounding, 4 times what the unfused run differs from itself on rows in the other order. AdamW makes "
         "steps of a fixed size of gradients that are rounding: 3 times that, in the geometric mean over the runs. 1e-12 in float64",
         "trust_training", "Liger: 32 steps at 5e-3"),
    Goal("G9", "SIGKILL at any point of a checkpoint's writing, and of whole runs: readable, resumed bit-identical",
         "not one unreadable, not one bit", "trust_kills", "the in-place layout of others: 30% unreadable"),
    Goal("G10", "a disk that gets full at every 4 KiB of a checkpoint: the old one stays valid, exit code 5",
         "not one lost", "trust_disks"),
    Goal("G11", "1, 2 and 4 ranks, uneven batches, FSDP2, micro-batches: one run",
         "multipliers bit-equal; 1e-12 in fp64, 1e-6 in fp32 over 50 steps", "trust_ranks", "TRL checks exit codes"),
    Goal("G12", "a rank killed at any point: the others end",
         "the timeout and 10 s", "trust_lost_ranks"),
    Goal("G13", "malformed and fuzzed configurations and data: exit code 2, one line, the field named",
         "no traceback, no hang", "trust_inputs"),
    Goal("G14", "hostile checkpoints, data, configurations, run folders: nothing of theirs is executed, nothing outside is written",
         "not one", "trust_strangers", "a policy only"),
    Goal("G15", "AddressSanitizer and UBSan over the op suite and random calls; a planted fault is caught",
         "no report", "trust_sanitizers", "none of six peers"),
    Goal("G16", "a soak of training steps: memory, descriptors and threads stay",
         "1 MiB in 10,000 steps, by least squares after 3,000 steps; of descriptors and threads not one more", "trust_soak"),
    Goal("G17", "planted mutants of Python, C++ and CUDA are killed by the tests",
         "95% killed", "trust_mutants"),
)  # fmt: skip


def parts_of(goal: Goal) -> list[Part]:
    """None where the goal is not counted yet."""
    if not (Path(__file__).parent / f"{goal.module}.py").exists():
        return []
    return importlib.import_module(goal.module).parts()
