"""The caption head's loss in parts equals that of all tokens at once, with few logits in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmask.models.sycoca import caption_head
from softmask.models.sycoca.caption_head import CaptionHead


def make(tokens: int, *, dtype: torch.dtype = torch.float64) -> tuple[CaptionHead, Tensor, Tensor]:
    torch.manual_seed(0)
    head = CaptionHead(5, 11, bias=False, dtype=dtype)
    return head, torch.randn(tokens, 5, dtype=dtype, requires_grad=True), torch.randint(11, (tokens,))


@pytest.mark.parametrize("tokens", [0, 1, 3, 10])
def test_loss_in_parts_equals_the_whole(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    head, states, labels = make(tokens)
    expected = F.cross_entropy(head(states), labels, reduction="sum")
    leaves = (states, head.weight)
    truth = torch.autograd.grad(expected, leaves)
    for most in (2**26, 3 * 11, 1):  # all at once, three tokens, one
        monkeypatch.setattr(caption_head, "MOST_LOGITS", most)
        loss = head(states, labels)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), truth)


def test_few_logits_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_head, "MOST_LOGITS", 4 * 11 + 10)
    seen, plain = [], caption_head.masked_token_loss

    def watched(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(tuple(logits.shape))
        return plain(logits, labels)

    monkeypatch.setattr(caption_head, "masked_token_loss", watched)
    head, states, labels = make(10)
    loss = head(states, labels)
    assert seen == [(4, 11), (4, 11), (2, 11)]
    loss.backward()
    assert sorted(seen[3:]) == [(2, 11), (4, 11), (4, 11)], "logits must be recomputed for the gradient"


def test_loss_in_parts_is_fp32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are in bf16; the loss and the sum of the parts' gradients in fp32, also where logits are recomputed."""
    exact = gradients(*make(640))
    head, states, labels = make(640, dtype=torch.float32)
    errors = []
    for most in (2**26, 20 * 11):
        monkeypatch.setattr(caption_head, "MOST_LOGITS", most)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = gradients(head, states, labels)
        assert {one.dtype for one in found} == {torch.float32}
        errors.append([(one - truth).norm() / truth.norm() for one, truth in zip(found, exact, strict=True)])
    assert all(parts <= 1.2 * whole + 1e-6 for whole, parts in zip(*errors, strict=True)), errors


def gradients(head: CaptionHead, states: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradients."""
    loss = head(states, labels)
    return loss, *torch.autograd.grad(loss, (states, head.weight))
