"""The task loss against its definition in float64, and where the shift of the labels stops."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import l3ms
from l3ms.model.batches import Collator, CountingCollator
from l3ms.model.losses import scored_lengths, shift, task_weights

V, D = 11, 6


def definition(hidden, weight, sequences, bias=None, softcap=None, temperature=1.0):
    """Mean over sequences of -(1/|y|) log pi(y|x), token by token. `sequences`: (offset of the first position, labels)."""
    losses = []
    for start, labels in sequences:
        terms = []
        for t, label in enumerate(labels[1:]):  # position t predicts label t + 1
            if label == -100:
                continue
            logits = weight @ hidden[start + t] + (0 if bias is None else bias)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            terms.append(torch.log_softmax(logits / temperature, 0)[label])
        if terms:
            losses.append(-torch.stack(terms).mean())
    return torch.stack(losses).mean() if losses else hidden.sum() * 0


def head(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V, D, generator=generator, dtype=torch.float64, requires_grad=True)


ROWS = [
    [-100, -100, 3, 4, 5, 1],
    [-100, 7, 1, -100, -100, -100],  # padded
    [-100, -100, -100, -100, -100, -100],  # nothing scored: does not count
    [2, 3, 4, 5, 6, 7],  # scored from the start: nothing predicts the first
    [-100, -100, -100, -100, -100, 9],  # one token
    [8, -100, -100, -100, -100, -100],  # its only label has no position before it
    [-100, 5, -100, 6, -100, 7],  # gaps
]
LENGTHS = [4, 2, 0, 5, 1, 0, 3]


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0, "temperature": 0.6}, {"bias": torch.linspace(-2, 2, V).double()}]
)
def test_padded_task_loss_and_gradients_are_the_definitions(options):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(len(ROWS), 6, D, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = head()
    loss = l3ms.task_loss(hidden, weight, torch.tensor(ROWS), **options)
    expected = definition(hidden.reshape(-1, D), weight, [(6 * n, row) for n, row in enumerate(ROWS)], **options)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    ours = torch.autograd.grad(loss, [hidden, weight])
    theirs = torch.autograd.grad(expected, [hidden, weight])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert torch.equal(l3ms.task_loss(hidden, weight, torch.tensor(ROWS), scored=sum(LENGTHS), **options), loss)
    with pytest.raises(ValueError, match=f"scored must be {sum(LENGTHS)}, "):
        l3ms.task_loss(hidden, weight, torch.tensor(ROWS), scored=sum(LENGTHS) + 2, **options)


PACKED = [[2, 3, 4], [], [-100, 5, 6, 7, 8], [9], [], [1, 2], [-100, -100, 3], [-100, -100]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_task_loss_with_empty_and_one_token_sequences(dtype):
    flat = [label for labels in PACKED for label in labels]
    starts = [0]
    for labels in PACKED:
        starts.append(starts[-1] + len(labels))
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(len(flat), D, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = head()
    loss = l3ms.task_loss(hidden, weight, torch.tensor(flat), torch.tensor(starts, dtype=dtype))
    expected = definition(hidden, weight, list(zip(starts, PACKED, strict=False)))
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    ours = torch.autograd.grad(loss, [hidden, weight])
    theirs = torch.autograd.grad(expected, [hidden, weight])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_the_shift_never_crosses_sequences():
    flat = torch.arange(1, 11)
    starts = torch.tensor([0, 0, 3, 4, 4, 9, 10, 10])
    assert shift(flat, starts).tolist() == [2, 3, -100, -100, 6, 7, 8, 9, -100, -100]
    assert shift(flat).tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10, -100]
    assert shift(flat.reshape(2, 5)).tolist() == [[2, 3, 4, 5, -100], [7, 8, 9, 10, -100]]
    assert shift(flat, starts, ignore_index=-1)[2] == -1
    assert flat.tolist() == list(range(1, 11))  # not in place


def test_scored_lengths():
    targets = shift(torch.tensor(ROWS))
    assert scored_lengths(targets).tolist() == LENGTHS
    starts = torch.arange(len(ROWS) + 1) * 6
    assert scored_lengths(targets.reshape(-1), starts).tolist() == LENGTHS
    assert scored_lengths(torch.tensor([[0, -100, 7]]), ignore_index=0).tolist() == [2]


def test_task_weights():
    weights = task_weights(torch.tensor(LENGTHS))
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([1 / (5 * n) if n else 0.0 for n in LENGTHS])
    assert task_weights(torch.tensor([0, 0])).tolist() == [0.0, 0.0]
    assert len(task_weights(torch.tensor([], dtype=torch.int64))) == 0


def test_a_batch_with_nothing_scored_is_0_and_has_no_gradient():
    hidden = torch.randn(2, 4, D, requires_grad=True)
    loss = l3ms.task_loss(hidden, torch.randn(V, D), torch.full((2, 4), -100))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))  # type: ignore[arg-type]


def test_its_exponential_is_the_perplexity_of_a_uniform_model():
    hidden, labels = torch.zeros(3, 5, D), torch.randint(0, V, (3, 5))
    assert math.exp(l3ms.task_loss(hidden, torch.randn(V, D), labels)) == pytest.approx(V, rel=1e-6)


def test_long_sequences_do_not_weigh_more():
    """Normalised by length: a sequence repeated to thrice its length has the same loss."""
    hidden = torch.randn(1, 9, D).expand(2, 9, D).clone()
    weight = torch.randn(V, D)
    short = torch.tensor([[-100, 4, -100, -100, -100, -100, -100, -100, -100]])
    long = torch.tensor([[-100, 4, 4, 4, 4, 4, 4, 4, 4]])
    both = l3ms.task_loss(hidden, weight, torch.cat([short, long]))
    alone = [l3ms.task_loss(hidden[:1], weight, labels) for labels in (short, long)]
    assert both.item() == pytest.approx((alone[0] + alone[1]).item() / 2, rel=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_of_a_loss_that_is_computed_again(reentrant):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(len(ROWS), 6, D, generator=generator, dtype=torch.float64).requires_grad_(), head()

    def loss(hidden):
        return l3ms.task_loss(hidden, weight, torch.tensor(ROWS))

    expected = torch.autograd.grad(loss(hidden), [hidden, weight])
    checkpoint(loss, hidden, use_reentrant=reentrant).backward()
    for leaf, gradient in zip((hidden, weight), expected, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient)


def test_another_ignore_index():
    hidden, weight = torch.randn(2, 4, D), torch.randn(V, D)
    labels = torch.tensor([[0, 3, 4, 0], [0, 0, 5, 6]])
    masked = labels.masked_fill(labels == 0, -100)
    expected = l3ms.task_loss(hidden, weight, masked)
    assert torch.equal(l3ms.task_loss(hidden, weight, labels, ignore_index=0), expected)


def test_errors_of_the_op_come_through():
    with pytest.raises(IndexError, match="outside the vocabulary"):
        l3ms.task_loss(torch.zeros(1, 3, D), torch.zeros(V, D), torch.tensor([[0, 0, V]]))
    with pytest.raises(ValueError, match="weight must be"):
        l3ms.task_loss(torch.zeros(1, 3, D), torch.zeros(V, D + 1), torch.tensor([[0, 0, 1]]))


def test_rows_become_a_padded_batch_with_the_count_of_what_is_scored():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    found = CountingCollator(9)(rows)
    assert {name: value.tolist() for name, value in found.items() if name != "scored"} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]], "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }  # fmt: skip
    assert found["scored"] == 2  # what nothing comes before is not predicted


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"attention_mask": [1, 1, 2, 2]}, "a row must be one sequence, got a packed one"),
        ({"position_ids": [0, 1, 0, 1]}, "a row must be one sequence, got a packed one"),
        ({"position_ids": [0, 1, 40, 41]}, "position_ids of a row must count from 0: .*give a data_collator"),
        ({"position_ids": [0, 1, 2, 3], "attention_mask": [0, 1, 1, 1]}, "position_ids of a row must count from 0"),
        ({"token_type_ids": [0, 0, 1, 1]}, "token_type_ids of a row must be 0: .*give a data_collator"),
    ],
)
def test_what_a_batch_would_not_hold_of_a_row_is_refused(columns, line):
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}
    with pytest.raises(ValueError, match=line):
        Collator(0)([{**row, **columns}])


def test_columns_that_say_what_is_so_anyway_are_taken():
    row = {"input_ids": [0, 6, 7, 8], "labels": [-100, -100, 7, 8], "token_type_ids": [0, 0, 0, 0]}
    batch = Collator(0)([{**row, "position_ids": torch.arange(4), "attention_mask": torch.ones(4)}])
    assert batch["input_ids"].tolist() == [[0, 6, 7, 8]]
