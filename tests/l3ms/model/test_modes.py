"""Measuring and sampling are in evaluation mode, and leave each module in its own."""

import pytest
import torch

import l3ms
from l3ms.measuring.evaluation import task_perplexity
from l3ms.model.modes import evaluating


class Merging(torch.nn.Linear):
    """Does something of its own when its mode changes, as layers do that merge an adapter."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def test_each_module_is_in_its_own_mode_afterwards():
    model = torch.nn.Sequential(Merging(2, 2), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()))
    model.train()
    model.get_submodule("1.0").eval()
    seen = []

    def fail():
        with evaluating(model):
            seen.extend(module.training for module in model.modules())
            seen.append(not model[0].merged)
            raise RuntimeError("an error")

    with pytest.raises(RuntimeError, match="an error"):
        fail()
    assert seen == [False] * 6
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert not model[0].merged


def test_a_frozen_part_stays_in_evaluation(make_model, tokenizer):
    model = make_model()
    l3ms.fuse_head(model)
    model.train()
    model.model.layers[0].eval()
    rows = [{"input_ids": [3, 4, 5, 1], "labels": [-100, 4, 5, 1]}] * 2
    l3ms.rollout(model, tokenizer, ["red"], max_new_tokens=2)
    task_perplexity(model, rows)
    assert model.training
    assert not any(module.training for module in model.model.layers[0].modules())
    assert model.model.norm.training
