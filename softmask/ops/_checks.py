"""Argument checks: a ValueError names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NORMALIZATIONS = (None, "minmax", "max", "sum")
REDUCTIONS = ("mean", "sum", "none")


def fail(name: str, expected: object, got: object) -> None:
    raise ValueError(f"{name}: expected {expected}, got {got}")


def shape(name: str, tensor: Tensor, dims: Sequence[int | str]) -> None:
    """dims: an int where the size is known, a letter where it is free, as in ("B", heads, "T", width)."""
    sizes = tuple(tensor.shape)
    fits = len(sizes) == len(dims)
    if not fits or any(isinstance(want, int) and want != size for want, size in zip(dims, sizes, strict=True)):
        fail(name, "shape [" + ", ".join(map(str, dims)) + "]", list(sizes))


def dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype] = FLOATING) -> None:
    if tensor.dtype not in allowed:
        fail(name, " or ".join(str(one).removeprefix("torch.") for one in allowed), tensor.dtype)


def positions(name: str, index: Tensor, *, least: int, size: int) -> None:
    """least <= index < size, on the CPU: elsewhere it would wait for the device. Not of tensors without values."""
    has_values = type(index) is Tensor and not torch.compiler.is_compiling()  # fake tensors are of another class
    if not has_values or index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = (int(value) for value in index.aminmax())
    if low < least or high >= size:
        fail(name, f"{least} to {size - 1}", low if low < least else high)


def device(like: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            fail(name, f"device {like.device}", tensor.device)


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        fail(name, "one of " + ", ".join(map(repr, allowed)), repr(value))


def scalar(name: str, value: Tensor | float) -> None:
    if isinstance(value, Tensor) and value.dim() != 0:
        fail(name, "a float or a 0-dim tensor", f"shape {list(value.shape)}")


def at_least(name: str, value: float, minimum: float) -> None:
    if value < minimum:
        fail(name, f"at least {minimum}", value)
