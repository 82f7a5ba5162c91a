"""attentive_mask in C++ (csrc/cpu/attentive_mask.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from softmask.ops import _library


def attentive_mask(
    patches: Tensor, tokens: Tensor, *, ratio: float, select: str, token_padding_mask: Tensor | None
) -> Tensor:
    count = round(ratio * patches.shape[1])
    patches, tokens = patches.detach(), tokens.detach()
    return torch.ops.softmask.attentive_mask(patches, tokens, token_padding_mask, count, select == "high")


def _fake(patches: Tensor, tokens: Tensor, token_padding_mask: Tensor | None, count: int, high: bool) -> Tensor:
    return patches.new_empty(patches.shape[:2], dtype=torch.bool)


if _library.MISSING is None:
    torch.library.register_fake("softmask::attentive_mask")(_fake)
