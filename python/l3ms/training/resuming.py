"""What transformers' checkpoints do not hold of a run: where it is among the prompts and the data of its constraints, and the average of
the weights.

They are put next to the rest, in `l3m.json` and `l3m_average.safetensors`: a run that is resumed in the middle is the run that was not
interrupted, bit for bit on a CPU.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from l3ms.model.averaging import WeightAverage
from l3ms.model.orders import Order, PromptOrder

NO_COUNTS = {"left_out": 0, "sampled_tokens": 0}  # 0.1.0 did not keep them

logger = logging.getLogger(__name__)


def save_progress(
    folder: Path,
    prompts: PromptOrder | None,
    averaged: int,
    average: Mapping[str, Tensor] | None,
    data: Mapping[str, Order] | None = None,
    counts: Mapping[str, int] | None = None,
) -> None:
    """`averaged` iterations are in `average`, whole and by name. `data`: by constraint, where the run is in its data.
    `counts`: of sampling, see `fewer_samples`.
    """
    if average is not None:
        save_file(dict(average), folder / "l3m_average.safetensors")
    state = {
        "prompts": None if prompts is None else prompts.state(),
        "averaged": averaged,
        "data": {name: order.state() for name, order in (data or {}).items()},
        "sampling": dict(counts or NO_COUNTS),
    }
    (folder / "l3m.json").write_text(json.dumps(state), encoding="utf-8")


def load_progress(
    folder: Path, prompts: PromptOrder | None, model: nn.Module, data: Mapping[str, Order] | None = None
) -> tuple[WeightAverage | None, dict[str, int]]:
    """-> the average as it was, of `model` as it is now, None where there was none yet; and the counts of sampling."""
    if not (folder / "l3m.json").is_file():
        logger.warning("%s has no l3m.json: the prompts and the average of the weights begin anew", folder)
        if prompts is not None:
            prompts.go_to(0)
        return None, dict(NO_COUNTS)
    state = json.loads((folder / "l3m.json").read_text(encoding="utf-8"))
    if prompts is not None and state["prompts"] is not None:
        prompts.restore(state["prompts"])
    for name, order in (data or {}).items():
        if name in state.get("data", {}):
            order.restore(state["data"][name])
        else:
            logger.warning("the checkpoint does not know the data of constraint %r: beginning it anew", name)
    counts = {**NO_COUNTS, **state.get("sampling", {})}
    if not state["averaged"]:
        return None, counts
    return WeightAverage.of(state["averaged"], load_file(folder / "l3m_average.safetensors"), model), counts
