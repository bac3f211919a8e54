"""What a loader packs into a row are the sequences that they were."""

import pytest
import torch
from training_runs import rows
from transformers import DataCollatorWithFlattening

import l3ms
from l3ms.model.batches import Collator


def test_packed_batches_of_a_loader_are_the_losses_of_their_rows(make_model):
    model = make_model()
    l3ms.fuse_head(model)
    plain = [{name: row[name] for name in ("input_ids", "labels")} for row in rows(4)]
    packed = [DataCollatorWithFlattening()(plain[:3]), DataCollatorWithFlattening()(plain[3:])]
    own = l3ms.DataNLL("rows", plain, max=1.0).evaluate(model)
    assert l3ms.DataNLL("packed", packed, max=1.0).evaluate(model) == pytest.approx(own, rel=1e-5)
    shifted = {**Collator(0)(plain[:1]), "position_ids": torch.arange(5, 5 + len(plain[0]["input_ids"]))[None] * 3}
    assert float(l3ms.sequence_nll(model, shifted)[0].detach()) != pytest.approx(own[0], rel=1e-3)
