"""attentive_mask by kernels: csrc/cpu/attentive_mask.cpp and kernels/attentive_mask.py."""

from __future__ import annotations

import torch
from torch import Tensor

from softmask.ops import _library


def attentive_mask(
    backend: str, patches: Tensor, tokens: Tensor, *, ratio: float, select: str, token_padding_mask: Tensor | None
) -> Tensor:
    count = round(ratio * patches.shape[1])
    kernel = _KERNELS[backend]
    return kernel(patches.detach(), tokens.detach(), token_padding_mask, count, select == "high")


def _fake(patches: Tensor, tokens: Tensor, token_padding_mask: Tensor | None, count: int, high: bool) -> Tensor:
    return patches.new_empty(patches.shape[:2], dtype=torch.bool)


def _flops(patches: torch.Size, tokens: torch.Size, *_options: object) -> int:
    return 2 * patches.numel() * tokens[1]


_KERNELS = _library.register("attentive_mask", fake=_fake, flops=_flops)
