"""When targets that a kernel found wrong are told to the caller; the device is played by CPU tensors and events."""

import pytest
import torch

from l3m_kernels import check_targets, device_flags

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

    def down() -> torch.Tensor:
        return torch.zeros(len(device_flags.FAULTS), dtype=torch.int32)

    state = {"capturing": False}
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    flag = device_flags._Flags(down(), down())
    monkeypatch.setattr(device_flags, "_flags", {DEVICE: flag})
    return flag, state


def call(flags, bad: str | None = None) -> None:
    """What an op does: look, run kernels, send the flags."""
    device_flags.raise_if_set("log_likelihood", DEVICE)
    if bad:
        device_flags.flag(DEVICE, bad).fill_(1)
    device_flags.copy_later(DEVICE)


def test_told_by_the_first_call_that_can_know(device):
    flag, _ = device
    call(flag, bad="targets")
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
    call(flag, bad="targets")
    check_targets("cuda:1")
    with pytest.raises(IndexError, match="check_targets: an earlier call on cuda:0"):
        check_targets()
    check_targets()
    call(flag)


def test_each_fault_is_told_by_its_name(device):
    """Both at once: one after the other."""
    flag, _ = device
    call(flag, bad="scored")
    call(flag, bad="targets")
    flag.copied.done = True
    with pytest.raises(IndexError, match="outside the vocabulary"):
        call(flag)
    call(flag)
    flag.copied.done = True
    with pytest.raises(
        ValueError, match="log_likelihood: an earlier call on cuda:0 had a `scored` that is not the number"
    ):
        call(flag)
    call(flag)
    flag.copied.done = True
    call(flag)


def test_nothing_is_looked_at_or_sent_while_a_graph_is_captured(device):
    flag, state = device
    call(flag)
    flag.copied.done = True
    before = flag.copied
    state["capturing"] = True
    flag.host[0] = 1
    call(flag, bad="targets")
    assert flag.copied is before
    state["capturing"] = False
    flag.host[0] = 0
    call(flag)  # sends what a replay set
    flag.copied.done = True
    with pytest.raises(IndexError):
        call(flag)


def test_the_first_call_cannot_be_captured(monkeypatch):
    """It makes the flags, by a copy that a capture would break on: a named error, with the way out."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(device_flags, "_flags", {})
    with pytest.raises(
        RuntimeError, match=r"first call on cuda:0 cannot be captured .* call the op once before the capture"
    ):
        device_flags.flag(DEVICE, "targets")
    assert device_flags._flags == {}


def test_after_a_first_call_a_capture_finds_the_flags(device):
    flag, state = device
    state["capturing"] = True
    device_flags.flag(DEVICE, "cu_seqlens").fill_(1)
    assert flag.device.tolist() == [0, 0, 1]


def test_nothing_to_check_where_there_is_no_gpu():
    check_targets()
    check_targets("cpu")
    assert [device_flags.flag(torch.device("cpu"), name).tolist() for name in device_flags.FAULTS] == [[0]] * 3
    assert not device_flags._flags
