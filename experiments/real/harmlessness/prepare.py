"""Replies of the real model and two reward models of it, from preference pairs alone, as in `experiments/harmlessness`.

Both reward models are the whole model with a head of one output, whose last ten blocks of thirty learn from one half of the training pairs
each: 45 minutes a model on one core of an AMD EPYC with AVX2 alone, at 29 s a step; with all blocks, in batches padded to their longest
row, a step took 95 s. The replies to learn are those that can be written in 40 tokens.
"""

from pathlib import Path
from typing import Any

from experiments.harmlessness.pairs import data_path
from experiments.harmlessness.prepare import JUDGED, Plan, make_inputs, reward_model_reports
from experiments.harmlessness.train_reward_model import Settings
from experiments.inputs import Arguments
from experiments.real.task import model_folder
from l3ms.model.autocasting import has_bfloat16_products

TASK = {"prompt": 240, "reply": 160}  # characters: about 40 tokens
REWARD_MODEL = Settings(learning_rate=5e-5, epochs=2, max_length=256, blocks=10, bf16=has_bfloat16_products())


def prepare(output: Path, arguments: Arguments) -> dict[str, Any]:
    """{"model", "train", "held_out", "reward_model", "second_opinion", "accuracy"}; the last is that of both, on held-out pairs.

    Raises:
        ConfigError: no data, or data that hold no preference pairs.
    """
    data = data_path(arguments.data)  # refused before a model is made
    values = make_inputs(output, data, Plan(model_folder(arguments), TASK, JUDGED, REWARD_MODEL), arguments.rows)
    reports = reward_model_reports(output)
    return {**values, "accuracy": {name: report["accuracy"] for name, report in reports.items()}}
