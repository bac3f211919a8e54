"""L3Ms: fine-tune a language model on a task while it is required to meet constraints (arXiv 2410.21533).

`L3MOptimizer` adds constraints to any torch loop, `L3MTrainer` to transformers' Trainer, `constrained` to it and TRL's trainers as they
are, `l3ms --help` to a YAML file. Names are loaded
when they are first used, so that the command line answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from l3ms import earlier
from l3ms.extras import missing

if TYPE_CHECKING:
    from l3ms import rewards as rewards
    from l3ms.barrier.agreement import agree
    from l3ms.barrier.optimizer import ConstraintLoss, L3MOptimizer
    from l3ms.barrier.schedules import ExponentialDecay, NoiseFloorDecay
    from l3ms.barrier.solvers import AugmentedLagrangian, DualAscent, Penalty
    from l3ms.constraints.constraint import Constraint, Length
    from l3ms.constraints.data_nll import DataNLL, sequence_nll
    from l3ms.constraints.divergence import KL
    from l3ms.constraints.reward_model import RewardModel
    from l3ms.model.heads import fuse_head
    from l3ms.model.losses import task_loss
    from l3ms.rollouts.engines import Engine, Response
    from l3ms.rollouts.rollout import Rollout
    from l3ms.rollouts.sampling import rollout
    from l3ms.rollouts.vllm_engine import VllmEngine
    from l3ms.rollouts.vllm_server import VllmServerEngine
    from l3ms.training.arguments import L3MConfig
    from l3ms.training.constrained import constrained
    from l3ms.training.settings import L3MSettings
    from l3ms.training.trainer import L3MTrainer
    from l3ms.verdicts.certificates import Verdict, judge
    from l3ms.verdicts.certifying import certify
    from l3ms.verdicts.declaring import declare
    from l3ms.verdicts.options import CertifyOptions
    from l3ms.watching.watch import Watch

_MODULES = {
    "Verdict": "verdicts.certificates",
    "declare": "verdicts.declaring",
    "judge": "verdicts.certificates",
    "CertifyOptions": "verdicts.options",
    "certify": "verdicts.certifying",
    "Constraint": "constraints.constraint",
    "Length": "constraints.constraint",
    "DataNLL": "constraints.data_nll",
    "KL": "constraints.divergence",
    "sequence_nll": "constraints.data_nll",
    "fuse_head": "model.heads",
    "task_loss": "model.losses",
    "agree": "barrier.agreement",
    "ConstraintLoss": "barrier.optimizer",
    "L3MOptimizer": "barrier.optimizer",
    "RewardModel": "constraints.reward_model",
    "Engine": "rollouts.engines",
    "Response": "rollouts.engines",
    "Rollout": "rollouts.rollout",
    "rollout": "rollouts.sampling",
    "VllmEngine": "rollouts.vllm_engine",
    "VllmServerEngine": "rollouts.vllm_server",
    "ExponentialDecay": "barrier.schedules",
    "NoiseFloorDecay": "barrier.schedules",
    "AugmentedLagrangian": "barrier.solvers",
    "DualAscent": "barrier.solvers",
    "Penalty": "barrier.solvers",
    "L3MConfig": "training.arguments",
    "L3MSettings": "training.settings",
    "L3MTrainer": "training.trainer",
    "constrained": "training.constrained",
    "Watch": "watching.watch",
}

__all__ = [
    "KL",
    "AugmentedLagrangian",
    "CertifyOptions",
    "Constraint",
    "ConstraintLoss",
    "DataNLL",
    "DualAscent",
    "Engine",
    "ExponentialDecay",
    "L3MConfig",
    "L3MOptimizer",
    "L3MSettings",
    "L3MTrainer",
    "Length",
    "NoiseFloorDecay",
    "Penalty",
    "Response",
    "RewardModel",
    "Rollout",
    "Verdict",
    "VllmEngine",
    "VllmServerEngine",
    "Watch",
    "agree",
    "certify",
    "constrained",
    "declare",
    "fuse_head",
    "judge",
    "rewards",
    "rollout",
    "sequence_nll",
    "task_loss",
]

earlier.install()


def __getattr__(name: str) -> Any:
    if name == "rewards":
        return importlib.import_module("l3ms.rewards")
    if name == "__version__":
        return importlib.import_module("l3m_kernels").__version__
    if name in _MODULES:
        try:
            return getattr(importlib.import_module(f"l3ms.{_MODULES[name]}"), name)
        except ModuleNotFoundError as error:
            line = missing(f"l3ms.{name}", error)
            raise error if line is None else ImportError(line) from error
    raise AttributeError(f"module 'l3ms' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
