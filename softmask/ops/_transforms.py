"""Detects forward-mode AD, torch.func's transforms and inference mode, which kernels do not support."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

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


def are_plain(values: tuple) -> bool:
    """Whether only autograd has to see an op on these values: nothing traces, counts or profiles ops, no functorch
    transform is active, and no tensor is of a subclass."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._get_tracing_state() is not None or torch.autograd._profiler_enabled():
        return False
    if _functorch.peek_interpreter_stack() is not None:
        return False
    for one in values:  # a loop, because this is on the way of every call
        kind = type(one)
        if kind is not Tensor and kind is not torch.nn.Parameter and isinstance(one, Tensor):
            return False
    return True


def need_gradient(values: tuple) -> bool:
    """Whether autograd has to record an op on these values."""
    if torch.is_grad_enabled():
        for one in values:
            if isinstance(one, Tensor) and one.requires_grad:
                return True
    return False


def has_values(tensor: Tensor) -> bool:
    """Whether reading its values is free: on the CPU, and not traced, fake or wrapped."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    return plain and tensor.device.type == "cpu" and not _functorch.is_functorch_wrapped_tensor(tensor)


def saveable(values: Iterable[Any]) -> list[Any]:
    """The values, with copies of tensors from inference mode, which autograd refuses to save for the backward pass."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return list(values)
    return [one.clone() if isinstance(one, Tensor) and one.is_inference() else one for one in values]


@overload
def constant(value: Tensor) -> Tensor: ...
@overload
def constant(value: float) -> float: ...
@overload
def constant(value: None) -> None: ...
def constant(value: Tensor | float | None) -> Tensor | float | None:
    """A value without gradient or tangent."""
    if not isinstance(value, Tensor) or not (value.requires_grad or forward_ad._current_level >= 0):
        return value
    return value.detach()
