"""Each constrained trainer on a problem whose answer is known: one token, of which the task wants one kind always and a bound allows 30%.

The optimum is at the bound. Transformers' Trainer, TRL's SFTTrainer and L3MTrainer have the same task here, and come to the same end.
"""

from importlib.util import find_spec

import pytest
import torch
import trl_runs

import l3ms

TRL = pytest.mark.skipif(find_spec("trl") is None, reason='trl is not installed: pip install ".[trl]"')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*is deprecated:FutureWarning"),
]
BOUND = 0.3
WANTED, UNWANTED = 7, 8  # "e", with which the answers of the data begin, and "f"


class begins_with:
    """1 where the response's first token is this one."""

    binary = True

    def __init__(self, token):
        self.token = token

    def __call__(self, completion_ids, **columns):
        return [float(ids[0] == self.token) for ids in completion_ids]


def eight_times(completion_ids, **columns):
    """The online task: so large that the barrier does not drive its first token out before mu has decayed."""
    return [8.0 * value for value in begins_with(WANTED)(completion_ids)]


def options(kind):
    made = {
        "max_steps": 120, "optim": "adamw_torch", "adam_beta1": 0.5, "learning_rate": 0.02, "lr_scheduler_type": "linear",
        "logging_steps": 60, "per_device_train_batch_size": 8,
    }  # fmt: skip
    l3m = {"mu": "paper", "mu_end": 1e-3}
    if kind in ("GRPOTrainer", "RLOOTrainer"):
        own = {"per_device_train_batch_size": 128, "num_generations": 8, "beta": 0.0, "max_completion_length": 1}
        return {**made, **own, "reward_funcs": eight_times}, l3m
    return made, {**l3m, "constraint_batch_size": 128, "max_new_tokens": 1}


def share(trainer, tokenizer, token):
    """Over 9600 fresh answers: a standard error of 0.005."""
    torch.manual_seed(1)
    prompts = [row["prompt"] for row in trl_runs.PROMPTS] * 400
    found = l3ms.rollout(trainer.policy, tokenizer, prompts, max_new_tokens=1, chat_template=False, batch_size=2400)
    return sum(begins_with(token)(found.completion_ids())) / len(prompts)


def constrained(kind, folder, tokenizer, model):
    made, l3m = options(kind)
    token = WANTED
    bound = l3ms.Constraint("first", begins_with(token), max=BOUND, margin=0.0)
    if kind == "DPOTrainer":  # which lowers what is rejected: at least 30% of that
        from datasets import Dataset

        token = UNWANTED
        bound = l3ms.Constraint("first", begins_with(token), min=BOUND, margin=0.0)
        rows = [{**row, "chosen": " e", "rejected": " f"} for row in trl_runs.PROMPTS]
        made |= {"train_dataset": Dataset.from_list(rows), "beta": 0.1, "max_length": 2}  # the end is not compared
    trainer = trl_runs.make(kind, folder, tokenizer, model, constraints=[bound], l3m=l3ms.L3MSettings(**l3m), **made)
    trainer.train()
    return trainer, token


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=TRL) for kind in ("SFTTrainer", "DPOTrainer", "GRPOTrainer", "RLOOTrainer")]
)
def test_a_trainer_of_trl_ends_at_the_bound(kind, tmp_path, tokenizer, make_model):
    trainer, token = constrained(kind, tmp_path, tokenizer, make_model(gain=0.3))
    assert share(trainer, tokenizer, token) == pytest.approx(BOUND, abs=0.04)


def test_transformers_trainer_ends_where_ours_does(tmp_path, tokenizer, make_model):
    trainer, token = constrained("Trainer", tmp_path, tokenizer, make_model(gain=0.3))
    made, l3m = options("Trainer")
    args = l3ms.L3MConfig(**{**trl_runs.COMMON, **made, **l3m, "output_dir": str(tmp_path)})
    ours = l3ms.L3MTrainer(
        make_model(gain=0.3), args, constraints=trainer.constraints, processing_class=tokenizer,
        train_dataset=trl_runs.dataset("Trainer", tokenizer).to_list(),
    )  # fmt: skip
    ours.train()
    found = share(trainer, tokenizer, token)
    assert found == pytest.approx(BOUND, abs=0.03)
    assert found == pytest.approx(share(ours, tokenizer, token), abs=0.01)
