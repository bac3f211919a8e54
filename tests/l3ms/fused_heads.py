"""A fused head against the logits that the model returns itself."""

import torch


def batch(vocabulary=17):
    """Three rows, right-padded, responses of 4, 2 and 7 tokens; weights of both signs."""
    generator = torch.Generator().manual_seed(4)
    input_ids = torch.randint(3, vocabulary, (3, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    for row, (prompt, end) in enumerate([(2, 6), (4, 6), (2, 9)]):
        labels[row, :prompt] = -100
        labels[row, end:] = -100
        input_ids[row, end:] = 0
        attention_mask[row, end:] = 0
    weights = torch.tensor([0.5, -0.2, 0.3])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}, weights


def own_logits(model, inputs, weights, temperature=1.0):
    """-sum_n weight_n log pi(y_n) from the logits that the model returns, in float32 at least."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    targets = inputs["labels"][:, 1:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    token = (logits[:, :-1] / temperature).log_softmax(-1)
    token = token.gather(-1, targets[..., None].clamp(min=0))[..., 0] * (targets != -100)
    return -(weights * token.sum(1)).sum(), token


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item(), msg=name)


def assert_fused_is_own(model, plain, temperature=1.0):
    """`model` has the fused head, `plain` the same weights."""
    inputs, weights = batch()
    expected, token = own_logits(plain, inputs, weights, temperature)
    out = model(**inputs, seq_weight=weights, use_cache=False, temperature=temperature)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.token[:, :-1], token.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.sequence, token.detach().sum(1), rtol=1e-5, atol=1e-5)
    assert out.length.tolist() == [4, 2, 7]
    assert not out.sequence.requires_grad
    assert_same_gradients(gradients(model, out.loss), gradients(plain, expected))


def trained(model):
    """Its adapters as after some steps: those of PEFT say nothing at first."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
