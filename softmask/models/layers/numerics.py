"""Types, bounds and first values of tensors, as every layer has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def at_least_fp32(values: Tensor) -> Tensor:
    """Half precision (autocast's outputs) to fp32; fp32 and fp64 as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def clamp_value(values: Tensor, *, most: float, least: float | None = None) -> Tensor:
    """Clamped in value only: the gradient stays, so that a parameter that left the range can come back."""
    return values.clamp(least, most).detach() + (values - values.detach())


def initialize(module: nn.Module, *, std: float) -> None:
    """BERT's initialization of a module and all within it: normal weights of linear and embedding layers, no bias."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
