"""SyCoCa's selection of patches by their relevance to the caption."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softmask import reference
from softmask.ops import _checks
from softmask.ops._backend import run
from softmask.ops._fused import attentive_mask as fused

SELECTIONS = ("high", "low")


def attentive_mask(
    patches: Tensor,
    tokens: Tensor,
    *,
    ratio: float,
    select: str = "high",
    token_padding_mask: Tensor | None = None,
) -> Tensor:
    """Select the most or least relevant patches: relevance = max over real tokens of cosine similarity.

    Args:
        patches: [B, P, D], without prefix tokens; fp32, fp16, bf16 or fp64.
        tokens: [B, T, D].
        ratio: fraction of patches, 0 to 1; exactly round(ratio * P) are selected per image (Python's round).
        select: "high" or "low". Ties go to the lower position.
        token_padding_mask: [B, T] bool, True = ignore. If all tokens are ignored, all patches tie.

    Returns:
        bool [B, P], True = selected. Not differentiable.

    Raises:
        ValueError: an argument is invalid; the message states what was expected and what was given.

    Source: SyCoCa (arXiv 2401.02137).
    """
    _checks.shape("patches", patches, ("B", "P", "D"), D="feature")
    batch, _, width = patches.shape
    _checks.shape("tokens", tokens, (batch, "T", width), T="token")
    _checks.dtype("patches", patches)
    _checks.dtype("tokens", tokens)
    if token_padding_mask is not None:
        _checks.shape("token_padding_mask", token_padding_mask, (batch, tokens.shape[1]))
        _checks.dtype("token_padding_mask", token_padding_mask, (torch.bool,))
    _checks.device(patches, tokens=tokens, token_padding_mask=token_padding_mask)
    _checks.one_of("select", select, SELECTIONS)
    _checks.number("ratio", ratio, least=0, most=1)
    return run(
        "attentive_mask",
        reference.attentive_mask,
        fused.attentive_mask,
        patches,
        tokens,
        floating=(patches, tokens),
        ratio=ratio,
        select=select,
        token_padding_mask=token_padding_mask,
    )


class AttentiveMask(nn.Module):
    """:func:`attentive_mask` as a layer without parameters."""

    def __init__(self, *, ratio: float, select: str = "high") -> None:
        super().__init__()
        self.ratio, self.select = ratio, select

    def forward(self, patches: Tensor, tokens: Tensor, *, token_padding_mask: Tensor | None = None) -> Tensor:
        return attentive_mask(
            patches, tokens, ratio=self.ratio, select=self.select, token_padding_mask=token_padding_mask
        )

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, select={self.select!r}"
