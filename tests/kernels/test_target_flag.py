"""When a target outside the vocabulary, found by a kernel, is told to the caller; the device is played by CPU tensors and events."""

import pytest
import torch

from l3m_kernels import check_targets, target_flag

DEVICE = torch.device("cuda", 0)


class Event:
    """A copy that is done once the test says so."""

    def __init__(self):
        self.done = False

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self.done


@pytest.fixture
def device(monkeypatch):
    """-> the flags of a device whose copies are pending, and whether a graph is being captured"""
    state = {"capturing": False}
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    flag = target_flag._Flag(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(target_flag, "_flags", {DEVICE: flag})
    return flag, state


def call(flag, bad: bool = False) -> None:
    """What an op does: look, run kernels, send the flag."""
    target_flag.raise_if_set("log_likelihood", DEVICE)
    if bad:
        flag.device.fill_(1)
    target_flag.copy_later(DEVICE)


def test_told_by_the_first_call_that_can_know(device):
    flag, _ = device
    call(flag, bad=True)
    call(flag)  # the copy is not done yet: nobody waits
    flag.copied.done = True
    with pytest.raises(IndexError, match=r"log_likelihood: an earlier call on cuda:0 .* outside the vocabulary"):
        call(flag)
    for _ in range(2):  # told once
        call(flag)
        flag.copied.done = True


def test_told_by_check_targets_at_once(device, monkeypatch):
    flag, _ = device
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    call(flag)
    check_targets()
    call(flag, bad=True)
    check_targets("cuda:1")
    with pytest.raises(IndexError, match="check_targets: an earlier call on cuda:0"):
        check_targets()
    check_targets()
    call(flag)


def test_nothing_is_looked_at_or_sent_while_a_graph_is_captured(device):
    flag, state = device
    call(flag)
    flag.copied.done = True
    before = flag.copied
    state["capturing"] = True
    flag.host.fill_(1)
    call(flag, bad=True)
    assert flag.copied is before
    state["capturing"] = False
    flag.host.fill_(0)
    call(flag)  # sends what a replay set
    flag.copied.done = True
    with pytest.raises(IndexError):
        call(flag)


def test_nothing_to_check_where_there_is_no_gpu():
    check_targets()
    check_targets("cpu")
    assert target_flag.flag(torch.device("cpu")).tolist() == [0]
    assert not target_flag._flags
