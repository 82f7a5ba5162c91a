"""The MLM loss against its definition: values, gradients, chunks, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from softmask.models.layers import token_loss as mlm
from softmask.models.layers.token_loss import masked_token_loss


def definition(logits: Tensor, labels: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    log_p = logits.log_softmax(-1)
    hard = -log_p.gather(1, labels[:, None]).sum()
    return (1 - alpha) * hard - alpha * (teacher.softmax(-1) * log_p).sum()


@pytest.mark.parametrize("positions", [0, 1, 7, 10])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_values_and_gradients_equal_the_definition(
    monkeypatch: pytest.MonkeyPatch, alpha: float, positions: int
) -> None:
    monkeypatch.setattr(mlm, "CHUNK", 3)
    torch.manual_seed(0)
    logits = (5 * torch.randn(positions, 11, dtype=torch.float64)).requires_grad_()
    teacher, labels = torch.randn(positions, 11, dtype=torch.float64), torch.randint(11, (positions,))
    ours = masked_token_loss(logits, labels, teacher=teacher, alpha=alpha)
    expected = definition(logits, labels, teacher, alpha)
    torch.testing.assert_close(ours, expected)
    (gradient,), (truth,) = (torch.autograd.grad(3.0 * loss, logits) for loss in (ours, expected))
    torch.testing.assert_close(gradient, truth)


def test_fp32_error_is_at_most_twice_pytorchs() -> None:
    torch.manual_seed(0)
    logits, teacher = 5 * torch.randn(200, 3000), torch.randn(200, 3000)
    labels = torch.randint(3000, (200,))
    results = []
    for function, dtype in ((definition, torch.float64), (definition, torch.float32), (None, torch.float32)):
        leaf, target = logits.to(dtype).requires_grad_(), teacher.to(dtype)
        if function is None:
            loss = masked_token_loss(leaf, labels, teacher=target, alpha=0.4)
        else:
            loss = function(leaf, labels, target, 0.4)
        results.append([loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()])
    for exact, plain, ours in zip(*results, strict=True):
        error, in_torch = ((value - exact).norm() / exact.norm() for value in (ours, plain))
        assert error <= 2 * in_torch + 4 * torch.finfo(torch.float32).eps


def test_no_gradient_is_computed_unless_required() -> None:
    logits = torch.randn(4, 5)
    assert masked_token_loss(logits, torch.zeros(4, dtype=torch.int64)).grad_fn is None
