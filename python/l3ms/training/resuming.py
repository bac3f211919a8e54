"""What transformers' checkpoints do not hold of a run: where it is among the prompts and the data of its constraints, and the average of
the weights.

They are put next to the rest, in `l3m.json` and `l3m_average.safetensors`: a run that is resumed in the middle is the run that was not
interrupted, bit for bit on a CPU.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from l3ms.model.orders import Order, PromptOrder

logger = logging.getLogger(__name__)


def save_progress(
    folder: Path, prompts: PromptOrder, average: AveragedModel | None, data: Mapping[str, Order] | None = None
) -> None:
    """`data`: by constraint, where the run is in its data."""
    averaged = 0 if average is None else int(average.n_averaged)
    if average is not None:
        save_file(
            {name: p.detach().contiguous() for name, p in _trained(average.module)}, folder / "l3m_average.safetensors"
        )
    state = {
        "prompts": prompts.state(),
        "averaged": averaged,
        "data": {name: order.state() for name, order in (data or {}).items()},
    }
    (folder / "l3m.json").write_text(json.dumps(state), encoding="utf-8")


def load_progress(
    folder: Path, prompts: PromptOrder, model: nn.Module, data: Mapping[str, Order] | None = None
) -> AveragedModel | None:
    """-> the average as it was, of `model` as it is now; None where there was none yet."""
    if not (folder / "l3m.json").is_file():
        logger.warning("%s has no l3m.json: the prompts and the average of the weights begin anew", folder)
        prompts.go_to(0)
        return None
    state = json.loads((folder / "l3m.json").read_text(encoding="utf-8"))
    prompts.restore(state["prompts"])
    for name, order in (data or {}).items():
        if name in state.get("data", {}):
            order.restore(state["data"][name])
        else:
            logger.warning("the checkpoint does not know the data of constraint %r: beginning it anew", name)
    if not state["averaged"]:
        return None
    average = AveragedModel(model)
    average.n_averaged.fill_(state["averaged"])
    kept = load_file(folder / "l3m_average.safetensors")
    with torch.no_grad():
        for name, parameter in _trained(average.module):
            parameter.copy_(kept[name])
    return average


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The average of the others is what they are."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
