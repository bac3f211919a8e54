"""L3Ms: fine-tune a language model on a task while it is required to meet constraints (arXiv 2410.21533).

`L3MOptimizer` adds constraints to any torch loop, `L3MTrainer` to transformers' Trainer, `l3ms --help` to a YAML file. Names are loaded
when they are first used, so that the command line answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l3ms import rewards
    from l3ms.certificates import Verdict, declare, judge
    from l3ms.certifying import CertifyOptions, certify
    from l3ms.constraints import Constraint, Length
    from l3ms.data_constraints import KL, DataNLL, sequence_nll
    from l3ms.heads import fuse_head
    from l3ms.losses import task_loss
    from l3ms.optimizer import ConstraintLoss, L3MOptimizer
    from l3ms.reward_model import RewardModel
    from l3ms.rollouts import Rollout, rollout
    from l3ms.schedules import ExponentialDecay, NoiseFloorDecay
    from l3ms.solvers import AugmentedLagrangian, DualAscent, Penalty
    from l3ms.trainer import L3MConfig, L3MTrainer
    from l3ms.watch import Watch

_MODULES = {
    "Verdict": "certificates",
    "declare": "certificates",
    "judge": "certificates",
    "CertifyOptions": "certifying",
    "certify": "certifying",
    "Constraint": "constraints",
    "Length": "constraints",
    "DataNLL": "data_constraints",
    "KL": "data_constraints",
    "sequence_nll": "data_constraints",
    "fuse_head": "heads",
    "task_loss": "losses",
    "ConstraintLoss": "optimizer",
    "L3MOptimizer": "optimizer",
    "RewardModel": "reward_model",
    "Rollout": "rollouts",
    "ExponentialDecay": "schedules",
    "NoiseFloorDecay": "schedules",
    "AugmentedLagrangian": "solvers",
    "DualAscent": "solvers",
    "Penalty": "solvers",
    "L3MConfig": "trainer",
    "L3MTrainer": "trainer",
    "Watch": "watch",
}

__all__ = [
    "KL",
    "AugmentedLagrangian",
    "CertifyOptions",
    "Constraint",
    "ConstraintLoss",
    "DataNLL",
    "DualAscent",
    "ExponentialDecay",
    "L3MConfig",
    "L3MOptimizer",
    "L3MTrainer",
    "Length",
    "NoiseFloorDecay",
    "Penalty",
    "RewardModel",
    "Rollout",
    "Verdict",
    "Watch",
    "certify",
    "declare",
    "fuse_head",
    "judge",
    "rewards",
    "rollout",
    "sequence_nll",
    "task_loss",
]


def __getattr__(name: str) -> Any:
    if name == "rollout":
        return importlib.import_module("l3ms.rollouts").rollout
    if name == "rewards":
        return importlib.import_module("l3ms.rewards")
    if name == "__version__":
        return importlib.import_module("l3m_kernels").__version__
    if name in _MODULES:
        return getattr(importlib.import_module(f"l3ms.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'l3ms' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
