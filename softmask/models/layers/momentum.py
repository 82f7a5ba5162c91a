"""The momentum encoder: a copy of the encoders that follows them by an exponential moving average."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def momentum_encoder_of(student: nn.Module) -> nn.Module:
    """A copy without gradients. As in ALBEF, its dropout is on while the model trains."""
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def update_momentum_encoder(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, in place; buffers are copied. What of the student has no
    counterpart of its name in the momentum encoder does not count."""
    parameters, buffers = dict(student.named_parameters()), dict(student.named_buffers())
    ours, theirs = [], []
    for name, parameter in teacher.named_parameters():
        ours += _storages(parameter)
        theirs += _storages(parameters[name])
    torch._foreach_lerp_(ours, theirs, 1.0 - momentum)
    for name, buffer in teacher.named_buffers():
        buffer.copy_(buffers[name])


def _storages(parameter: nn.Parameter) -> Iterator[Tensor]:
    """What holds the parameter's values on this rank.

    DeepSpeed's ZeRO stage 3 leaves a rank its share of a parameter in `ds_tensor`, the same elements of teacher and
    student. The parameter itself is empty or, when it is small, the whole that every rank keeps from step to step:
    a copy, or with one rank a view of the share.
    """
    share = getattr(parameter, "ds_tensor", None)
    if share is not None:
        yield share
    if parameter.numel() and (share is None or parameter.data_ptr() != share.data_ptr()):
        yield parameter.detach()
