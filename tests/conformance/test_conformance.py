"""A dozen of the architectures that `make conformance` builds, one for each thing that a model may do to its head, padding or cache."""

import pytest
import torch
from adapters import ADAPTERS, adapted
from architectures import ARCHITECTURES, build
from comparison import COMPARISONS, Batch, Refused, Wrong, compare_loss, compare_sampling, own_loss, runs_by_itself
from page import Result, written

from l3ms.rollouts import transformers_engine, ways

# why it stands for others
KINDS = {
    "llama": "the plain case",
    "gemma2": "a softcap, sliding windows",
    "cohere": "scaled logits",
    "granitemoe": "a router, divided logits",
    "mamba": "a state instead of a cache",
    "jamba": "states and keys in one cache",
    "deepseek_v4": "a cache of compressed keys, to which padding matters",
    "gpt2": "absolute positions",
    "roberta": "positions that are counted from behind the padding's",
    "bart": "positions that count the padding",
    "rwkv": "a state that its own decoding does not carry as its forward does",
    "bert": "an encoder as a decoder",
}


@pytest.fixture(autouse=True)
def not_in_the_way():
    """Warnings are of other people's models here."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_what_its_own_logits_say(kind):
    model = build(kind)
    runs_by_itself(model)
    for compare in COMPARISONS.values():
        compare(model)


@pytest.mark.parametrize("kind", ["granitemoe", "mixtral"])
def test_a_router_loss_that_is_asked_for_is_in_the_loss(kind):
    model = build(kind, output_router_logits=True, router_aux_loss_coef=0.5)
    weights = (0.05, 0.1, 0.02)
    without = own_loss(build(kind, output_router_logits=False), Batch.made(*weights))[0]
    assert abs(float(own_loss(model, Batch.made(*weights))[0] - without)) > 0.1  # that there is one
    compare_loss(model)


@pytest.mark.parametrize("kind", ["LORA", "PREFIX_TUNING"])
def test_an_adapter_is_what_its_own_logits_say(kind):
    model = adapted(kind)
    runs_by_itself(model)
    for compare in COMPARISONS.values():
        compare(model)


def test_an_encoder_is_refused():
    with pytest.raises(Refused):
        compare_loss(build("bert", is_decoder=False))


def test_another_distribution_would_be_found(monkeypatch):
    """The comparison can fail: a model that wants prompts of one length, padded all the same."""
    monkeypatch.setattr(transformers_engine, "way_of", lambda *_: ways.Way("padded", shrink=True))
    model = build("bart")
    compare_loss(model)
    with pytest.raises(Wrong, match="sampling: token"):
        compare_sampling(model)


def test_another_loss_would_be_found():
    model = build("llama")
    compare_loss(model)
    with torch.no_grad():
        model._l3m_after = type(model._l3m_after)(**{**vars(model._l3m_after), "divisor": 1.1})
    with pytest.raises(Wrong, match="log-likelihood"):
        compare_loss(model)


def test_every_architecture_and_adapter_is_known():
    assert len(ARCHITECTURES) > 150
    assert "LORA" in ADAPTERS
    assert KINDS.keys() <= ARCHITECTURES.keys()


def test_the_page_counts_what_it_lists():
    page = written(
        [
            Result("llama", "architecture", "right", ""),
            Result("t|5", "architecture", "refused", "fuse_head: an | encoder-decoder"),
            Result("LORA", "adapter", "right", ""),
        ]
    )
    assert "| architectures | 2 | 1 | 1 | 0 | 0 | 0 |" in page
    assert "| adapters | 1 | 1 | 0 | 0 | 0 | 0 |" in page
    assert r"fuse_head: an \| encoder-decoder" in page
