"""Detects forward-mode AD, torch.func's transforms and inference mode, which kernels do not support."""

from __future__ import annotations

from collections.abc import Iterable
from typing import overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch


def acting_on(tensors: Iterable[Tensor]) -> str | None:
    """The name of a transform that acts on one of the tensors, or None if kernels can take them.

    Under torch.compile any active transform counts, because the tensors it wraps are unknown.
    """
    transforms = isinstance(_functorch.peek_interpreter_stack(), _functorch.CInterpreter)  # torch.compile knows this
    if torch.compiler.is_compiling():
        return "a transform of torch.func" if transforms else None
    if not transforms and forward_ad._current_level < 0:
        return None
    return next(filter(None, map(_of, tensors)), None)


def _of(tensor: Tensor) -> str | None:
    if _functorch.is_batchedtensor(tensor):
        return "torch.func.vmap"
    if _functorch.is_gradtrackingtensor(tensor):
        return "torch.func.grad, vjp or jvp"
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        return "forward-mode AD"
    return None


def has_values(tensor: Tensor) -> bool:
    """Whether reading its values is free: on the CPU, and not traced, fake or wrapped."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    return plain and tensor.device.type == "cpu" and not _functorch.is_functorch_wrapped_tensor(tensor)


@overload
def saveable(value: Tensor) -> Tensor: ...
@overload
def saveable(value: object) -> object: ...
def saveable(value: object) -> object:
    """The value, or a copy of a tensor from inference mode, which autograd refuses to save for the backward pass."""
    if not isinstance(value, Tensor) or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return value
    return value.clone() if value.is_inference() else value


@overload
def constant(value: Tensor) -> Tensor: ...
@overload
def constant(value: float) -> float: ...
@overload
def constant(value: None) -> None: ...
def constant(value: Tensor | float | None) -> Tensor | float | None:
    """A value without gradient or tangent."""
    return value.detach() if isinstance(value, Tensor) else value
