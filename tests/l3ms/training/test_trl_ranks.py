"""TRL's trainers under constraints on two processes: the ranks agree bit for bit, and do what one process does with the whole batch."""

from importlib.util import find_spec

import pytest
import rank_forks
import torch
from tiny_models import SIZES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("trl") is None, reason='trl is not installed: pip install ".[trl]"'),
]
KINDS = ("SFTTrainer", "DPOTrainer", "GRPOTrainer", "RLOOTrainer")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tokenizer):
    """What one process found, and each of two, with the whole model and with a half of it."""
    import transformers

    folder = tmp_path_factory.mktemp("ranks")
    tokenizer.save_pretrained(folder / "model")
    settings = transformers.LlamaConfig(**SIZES, vocab_size=17, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(settings).save_pretrained(folder / "model")
    return [start(folder, world) for world in (1, 2)] + [start(folder, 2, "fsdp")]


def start(folder, world, *how):
    place = folder / "-".join((str(world), *how))
    place.mkdir()
    rank_forks.start("trl_ranks", world, folder / "model", place, 8 // world, *how, seconds=300)
    return [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_agree_and_do_what_one_process_does(ranks, kind, sharded):
    [[one], whole, split] = ranks
    one, (first, second) = one[kind], [rank[kind] for rank in (split if sharded else whole)]
    assert first["l3m"] == second["l3m"]
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    assert first["sampled"] == one["sampled"]
    for ours, whole in zip(first["weights"], one["weights"], strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-5)
    assert len(first["log"]) == len(one["log"]) == 3
    for ours, whole in zip(first["log"], one["log"], strict=True):
        for name in whole:
            if name.startswith("constraints/") or name in ("l3m/mu", "l3m/truncated"):
                assert ours[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-4), name
    assert one["log"][-1]["constraints/length/lambda"] > 0


@pytest.mark.parametrize("kind", ["GRPOTrainer", "SFTTrainer"])
def test_a_sharded_run_goes_on_where_it_was(ranks, kind):
    """From whole and from sharded checkpoints, with LoRA and without, to the bit."""
    for rank in ranks[2]:
        first, again = rank[f"resumed {kind}"]
        assert all(torch.equal(a, b) for a, b in zip(first["weights"], again["weights"], strict=True))
        assert first["log"][-1]["loss"] == again["log"][-1]["loss"]
