"""What goes wrong on one rank alone, put there before its command runs: BROKEN=WHAT:RANK in the environment, see `launches`."""

import errno
import math
import os
import time

AT = 4  # the iteration in which it happens


def apply():
    what, _, rank = os.environ.get("BROKEN", "").partition(":")
    if what and rank in ("", os.environ["RANK"]):
        globals()[f"_{what}"]()


def _in_iteration(act):
    from l3ms.training.trainer import L3MTrainer

    average = L3MTrainer.average_weights

    def acting(self):
        if self.state.global_step + 1 == AT:
            act(self)
        average(self)

    L3MTrainer.average_weights = acting


def _weight(trainer):
    return next(trainer.policy.parameters()).data


def _version():
    import l3m_kernels

    l3m_kernels.__version__ = "9.9.9"


def _memory():
    def act(trainer):
        raise MemoryError("wanted 3 GiB")

    _in_iteration(act)


def _full():
    """The disk, when a rank writes its part of a checkpoint."""
    from l3ms.training.checkpointing import CheckpointingTrainer

    def full(self, output_dir):
        raise OSError(errno.ENOSPC, "No space left on device")

    CheckpointingTrainer._save_rng_state = full


def _stuck():
    _in_iteration(lambda trainer: time.sleep(1000))


def _nan():
    """In a weight of one rank, behind the look at the weights: its next responses show it."""
    _in_iteration(lambda trainer: _weight(trainer).view(-1)[3].fill_(math.nan))


def _drift():
    """One weight, by a little."""
    _in_iteration(lambda trainer: _weight(trainer).view(-1)[40].add_(1e-4))


def _multiplier():
    """Of the last step, as if a rank had seen another batch; looked at before the next one."""
    from l3ms.training.trainer import L3MTrainer

    half_step = L3MTrainer.constraint_half_step

    def other(self):
        half_step(self)
        if self.state.global_step + 1 == AT:
            estimates = self.l3m_optimizer.estimates
            estimates._last = estimates._last._replace(multiplier=estimates._last.multiplier * 1.5)

    L3MTrainer.constraint_half_step = other


def _data():
    """One token of one row is another."""
    from l3ms.runs import loading

    encode = loading.encode_sides

    def other(*arguments):
        train, held_out = encode(*arguments)
        train.rows[5]["input_ids"][0] += 1
        return train, held_out

    loading.encode_sides = other


def _rows():
    from l3ms.runs import loading

    encode = loading.encode_sides

    def other(*arguments):
        train, held_out = encode(*arguments)
        del train.rows[5]
        return train, held_out

    loading.encode_sides = other


def _reward():
    """A reward function that raises, on a rank."""
    from l3ms.training import constraint_step

    def broken(trainer, responses, share):
        raise ValueError("constraint 'polite': no luck")

    def act(trainer):
        constraint_step.rewards_of = broken

    _in_iteration(act)
