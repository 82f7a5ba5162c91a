"""The momentum encoder: a copy of the encoders that follows them as an exponential moving average."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def momentum_encoder_of(encoder: M) -> M:
    """A copy without gradients. As in ALBEF, its dropout is active while the model trains."""
    return copy.deepcopy(encoder).requires_grad_(False)


@torch.no_grad()
def update_momentum_encoder(momentum_encoder: nn.Module, encoder: nn.Module, momentum: float) -> None:
    """``momentum_encoder = momentum * momentum_encoder + (1 - momentum) * encoder``, in place; buffers are copied."""
    parameters, buffers = dict(encoder.named_parameters()), dict(encoder.named_buffers())
    averages: list[Tensor] = []
    values: list[Tensor] = []
    for name, parameter in momentum_encoder.named_parameters():
        averages += _storages(parameter)
        values += _storages(parameters[name])
    torch._foreach_lerp_(averages, values, 1.0 - momentum)
    for name, buffer in momentum_encoder.named_buffers():
        buffer.copy_(buffers[name])


def _storages(parameter: nn.Parameter) -> Iterator[Tensor]:
    """The tensors that hold the parameter's values on this rank.

    At ZeRO stage 3 a rank keeps its share of a parameter in `ds_tensor`, the same elements for both encoders. The
    parameter itself is empty, unless it is small: then every rank keeps the whole of it between steps, as a copy or,
    on a single rank, as a view of the share.
    """
    share = getattr(parameter, "ds_tensor", None)
    if share is not None:
        yield share
    if parameter.numel() and (share is None or parameter.data_ptr() != share.data_ptr()):
        yield parameter.detach()
