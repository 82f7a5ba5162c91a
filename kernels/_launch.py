"""How every kernel is launched, and what a launch depends on: GPU, types, settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels import INTERPRETED

AUTOTUNE = os.environ.get("SOFTMASK_AUTOTUNE", "0") not in ("", "0")
WARP_FACTORS = (0.5, 1, 2)  # tried by tuning, times the table's number of warps
OLDEST = 80  # the lowest compute capability in every table

SMALL = (86, 87, 89, 120, 121)  # 99 KiB of shared memory per block, products as on 80

Configs = Mapping[int, Mapping[str, int]]
"""Compute capability (80, 90, 100) -> block sizes, num_warps, num_stages and maxnreg. A newer GPU takes the nearest
lower entry of its family: the small ones (86, 89, 120) take each other's and 80's, the others never take theirs. 0 is
the interpreter, whose run time depends on the number of programs. maxnreg limits the registers per thread: by default,
the assembler spills a few to fit one more block; with a limit that fits the same number of blocks anyway, it does
not."""


class Launch(NamedTuple):
    """One launch, as a hook sees it."""

    kernel: Any
    grid: tuple[int, ...]
    given: tuple[Any, ...]  # arguments by position
    constants: dict[str, Any]  # those by name
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    updates: bool = False  # changes what it reads, so a second run would write something else

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by the names of the kernel's parameters."""
        return dict(zip(self.kernel.arg_names[: len(self.given)], self.given, strict=True)) | self.constants

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}

    def with_warps(self, num_warps: int) -> Launch:
        """A register limit applies only to the number of warps for which it was chosen."""
        return self if num_warps == self.num_warps else self._replace(num_warps=num_warps, maxnreg=None)

    @property
    def device(self) -> torch.device:
        return next(value.device for value in self.arguments.values() if isinstance(value, Tensor))

    def run(self) -> None:
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            self.kernel[self.grid](*self.given, **self.constants, **self.options)


_hook: Callable[[Launch], None] | None = None
_architecture: int | None = None
_tuned: dict[tuple, int] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *given: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    maxnreg: int | None = None,
    updates: bool = False,
    **constants: Any,
) -> None:
    """Run kernel over grid, unless the grid is empty. A launch that `updates` must run only once, so it is not
    tuned."""
    if 0 in grid:
        return
    one = Launch(kernel, grid, given, constants, num_warps, num_stages, maxnreg, updates)
    if _hook is not None:
        _hook(one)
    elif AUTOTUNE and not updates and not INTERPRETED and not torch.cuda.is_current_stream_capturing():
        tune(one).run()
    else:
        one.run()


@contextmanager
def hooked(hook: Callable[[Launch], None], *, architecture: int | None = None) -> Iterator[None]:
    """Pass every launch to hook instead of running it, with the configurations of an architecture."""
    global _hook, _architecture
    before, _hook, _architecture = (_hook, _architecture), hook, architecture
    try:
        yield
    finally:
        _hook, _architecture = before


def config(table: Configs, tensor: Tensor) -> dict[str, int]:
    """The entry of table for the GPU that runs kernels on tensor."""
    if _architecture is None and INTERPRETED:
        return dict(table[0])
    capability = _architecture or OLDEST
    if _architecture is None and tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        capability = 10 * major + minor
    return dict(table[_nearest(tuple(table), capability)])


@cache
def _nearest(entries: tuple[int, ...], capability: int) -> int:
    """The entry for a GPU: the newest of its family that is not newer than the GPU, else the oldest."""
    alike = [known for known in entries if (known in SMALL) == (capability in SMALL) and OLDEST <= known <= capability]
    return max(alike, default=OLDEST)


def cdiv(count: int, size: int) -> int:
    """The number of blocks of `size` that hold `count`. Triton's own costs the host 2 microseconds (3.8)."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The lowest power of 2 that is at least `count`; 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0


def dots(*tensors: Tensor) -> dict[str, Any]:
    """DOT: the type in which the tensors' values enter products, fp32 if they differ; PRECISION: of fp32 products.

    The interpreter has no bf16 products. fp32 is rounded to tf32 if torch does so in its own products on a GPU.
    """
    types = {tensor.dtype for tensor in tensors}
    half = {torch.float16: tl.float16, torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16}
    dot = half.get(types.pop(), tl.float32) if len(types) == 1 else tl.float32
    return {"DOT": dot, "PRECISION": "tf32" if _allows_tf32() else "ieee"}


def _allows_tf32() -> bool:
    settings = torch.backends.cuda.matmul
    try:
        return settings.fp32_precision == "tf32"
    except AttributeError:  # before torch 2.9
        return settings.allow_tf32


def factor_dots(*tensors: Tensor) -> dict[str, Any]:
    """As dots, for products of the tensors' values with a computed factor, a probability or a gradient with respect to
    logits. It may be too small for fp16; tf32 holds fp16 values exactly."""
    chosen = dots(*tensors)
    return {"DOT": tl.float32, "PRECISION": "tf32"} if chosen["DOT"] == tl.float16 else chosen


def type_of(number: Tensor | float) -> torch.dtype:
    """The type of a gradient with respect to a number, which nobody reads if it is none of a tensor."""
    return number.dtype if isinstance(number, Tensor) else torch.float32


def readable(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as kernels read them: contiguous in the last dimension, with any other strides."""
    return [None if tensor is None else last_contiguous(tensor) for tensor in tensors]


def strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """The strides of a tensor's first dimensions, as kernels take them; zeros for None."""
    return (0,) * dimensions if tensor is None else tensor.stride()[:dimensions]


def last_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous in memory, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def tune(one: Launch) -> Launch:
    """The launch with the fastest number of warps, timed once per device, kernel, constants and shapes.

    The launch writes the same values on every run, so trial runs are harmless.
    """
    key = (one.device, one.kernel, *(_tuning_key(value) for value in one.arguments.values()))
    if key not in _tuned:
        tried = {int(one.num_warps * factor) for factor in WARP_FACTORS} & {1, 2, 4, 8, 16}
        times = {warps: _milliseconds(one.with_warps(warps)) for warps in sorted(tried)}
        _tuned[key] = min(times, key=times.__getitem__)
    return one.with_warps(_tuned[key])


def _tuning_key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    return None if isinstance(value, float) else value


def _milliseconds(one: Launch) -> float:
    with torch.cuda.device(one.device):
        try:
            return triton.testing.do_bench(one.run, return_mode="median")
        except triton.runtime.errors.OutOfResources:
            return float("inf")
