"""Types, bounds and initial values of tensors, for all layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def at_least_fp32(values: Tensor) -> Tensor:
    """Half precision (autocast's outputs) to fp32; fp32 and fp64 unchanged."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def clamp_value(values: Tensor, *, most: float, least: float | None = None) -> Tensor:
    """Clamps the value but not the gradient, so that a parameter outside of the range can return."""
    return values.clamp(least, most).detach() + (values - values.detach())


def initialize(module: nn.Module, *, std: float) -> None:
    """BERT's initialization: normal weights for all linear and embedding layers of a module, zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def weighted_sum(losses: dict[str, Tensor], weights: object) -> Tensor:
    """The sum of the losses, each by its weight of the same name."""
    total, *others = (getattr(weights, name) * loss for name, loss in losses.items())
    for loss in others:
        total = total + loss
    return total
