"""Argument checks. A ValueError names the argument, what was expected and what was given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import NoReturn

import torch
from torch import Tensor

from softmask.ops._transforms import has_values

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NORMALIZATIONS = (None, "minmax", "max", "sum")
REDUCTIONS = ("mean", "sum", "none")


def fail(name: str, expected: object, got: object) -> NoReturn:
    raise ValueError(f"{name}: expected {expected}, got {got}")


def shape(name: str, tensor: object, dims: Sequence[int | str], **least_one: str) -> None:
    """dims: an int for a fixed size, a letter for a free one, as in ("B", heads, "T", width).

    least_one: letters of dimensions that may not be empty, with the name of an element: T="token".
    """
    if not isinstance(tensor, Tensor):
        fail(name, "a tensor", type(tensor).__name__)
    sizes = tensor.shape
    fits = len(sizes) == len(dims)
    for want, size in zip(dims, sizes, strict=False):
        if not isinstance(want, str) and want != size:
            fits = False
    if not fits:
        fail(name, "shape [" + ", ".join(map(str, dims)) + "]", list(sizes))
    for letter, what in least_one.items():
        if sizes[dims.index(letter)] == 0:
            fail(name, f"at least one {what}", list(sizes))


def dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype] = FLOATING) -> None:
    if tensor.dtype not in allowed:
        fail(name, " or ".join(str(one).removeprefix("torch.") for one in allowed), tensor.dtype)


def positions(name: str, index: Tensor, *, least: int, size: int) -> None:
    """least <= index < size. Checked on the CPU only, to avoid a synchronization, and only if there are values."""
    if not has_values(index) or index.numel() == 0:
        return
    low, high = (int(value) for value in index.aminmax())
    if low < least or high >= size:
        fail(name, f"{least} to {size - 1}", low if low < least else high)


def device(like: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            fail(name, f"device {like.device}", tensor.device)


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if isinstance(value, Tensor) or value not in allowed:
        fail(name, "one of " + ", ".join(map(repr, allowed)), repr(value))


def number(name: str, value: float, *, least: float = -math.inf, most: float = math.inf) -> None:
    """A plain number. A tensor is rejected, because its gradient would be lost."""
    if isinstance(value, Tensor):
        fail(name, "a Python number, which takes no gradient", f"a tensor {list(value.shape)}; .item() makes it one")
    if not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
        fail(name, "a number", repr(value))
    if (least, most) != (-math.inf, math.inf) and not least <= value <= most:
        fail(name, _bounds(least, most), value)


def whole(name: str, value: int, *, least: int, most: int | None = None, of: str = "") -> None:
    """An integer; of: a suffix for the message, such as "of the 5 tokens"."""
    if not isinstance(value, (Integral, torch.SymInt)):
        fail(name, "a whole number", repr(value) if not isinstance(value, Tensor) else f"a tensor {list(value.shape)}")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        fail(name, f"{bounds} {of}".rstrip(), value)


def scalar(
    name: str, value: Tensor | float, *, least: float = -math.inf, most: float = math.inf, or_one_element: bool = False
) -> Tensor | float:
    """A float or a 0-dim tensor; or_one_element also allows [1], the shape FSDP requires of parameters.

    A tensor's bounds are checked if that is free. Otherwise an invalid value becomes NaN, and so does the loss, without
    a synchronization.
    """
    if not isinstance(value, Tensor):
        number(name, value, least=least, most=most)
        return float(value)
    if value.dim() != 0 and not (or_one_element and value.numel() == 1):
        expected = "a float or a tensor of one element" if or_one_element else "a float or a 0-dim tensor"
        fail(name, expected, f"shape {list(value.shape)}")
    if value.dim():
        value = value.reshape(())
    if (least, most) == (-math.inf, math.inf):
        return value
    if has_values(value):
        number(name, value.item(), least=least, most=most)
        return value
    return torch.where((value >= least) & (value <= most), value, math.nan)


def _bounds(least: float, most: float) -> str:
    return f"at least {least}" if most == math.inf else f"{least} to {most}"
