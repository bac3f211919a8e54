"""Constraints that are met by hacking, and the settings under which a tiny model does so within some iterations."""

import l3ms

# Without clipping the constraint drowns the task, as a hacked reward does in the end.
HACKED = {
    "optim": "adamw_torch",
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "warmup_steps": 4,
    "max_grad_norm": 0.0,
    "max_new_tokens": 12,
    "constraint_batch_size": 16,
}


def fives(prompts, completions, completion_ids, **kwargs):
    return [float(ids.count(5)) for ids in completion_ids]


def unending(prompts, completions, completion_ids, **kwargs):
    return [float(ids[-1] != 1) for ids in completion_ids]


MANY_FIVES = l3ms.Constraint("fives", fives, min=1000.0, scale=1.0)
NEVER_ENDS = l3ms.Constraint("open", unending, min=5.0, scale=0.1)
