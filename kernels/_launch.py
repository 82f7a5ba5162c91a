"""The one place through which every kernel is launched, and what a launch depends on: processor, types, settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels import INTERPRETED

AUTOTUNE = os.environ.get("SOFTMASK_AUTOTUNE", "0") not in ("", "0")
TUNED_WARPS, TUNED_STAGES = (2, 4, 8), (1, 2, 3, 4)
OLDEST = 80  # the first compute capability in every table

Configs = Mapping[int, Mapping[str, int]]
"""Compute capability (80, 90, 100) -> block sizes, num_warps and num_stages. A newer one takes the nearest below; 0 is
the interpreter, whose time is the number of programs."""


@dataclass(frozen=True)
class Launch:
    """One launch, as a hook sees it; arguments by the kernel's parameter names, constants among them."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        tensor = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


_hook: Callable[[Launch], None] | None = None
_architecture: int | None = None
_tuned: dict[tuple, tuple[int, int]] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], *given: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Run kernel over grid; an empty grid runs nothing."""
    arguments = dict(zip(kernel.arg_names, given, strict=False)) | constants
    one = Launch(kernel, grid, arguments, num_warps, num_stages)
    if 0 in grid:
        return
    if _hook is not None:
        _hook(one)
    elif AUTOTUNE and not INTERPRETED:
        tune(one).run()
    else:
        one.run()


@contextmanager
def hooked(hook: Callable[[Launch], None], *, architecture: int | None = None) -> Iterator[None]:
    """Give every launch to hook instead of running it, with the configurations of an architecture."""
    global _hook, _architecture
    before, _hook, _architecture = (_hook, _architecture), hook, architecture
    try:
        yield
    finally:
        _hook, _architecture = before


def config(table: Configs, tensor: Tensor) -> dict[str, int]:
    """The entry of table for the processor that runs kernels on tensor."""
    capability = _architecture or (0 if INTERPRETED else OLDEST)
    if _architecture is None and tensor.is_cuda and not INTERPRETED:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        capability = 10 * major + minor
    return dict(table[max((known for known in table if known <= capability), default=OLDEST)])


def dots(*tensors: Tensor) -> dict[str, Any]:
    """DOT: the type in which the tensors' values enter products, fp32 if they differ; PRECISION: of fp32 products.

    The interpreter has no bf16 products. fp32 is rounded to tf32 where torch's own products are.
    """
    types = {tensor.dtype for tensor in tensors}
    half = {torch.float16: tl.float16, torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16}
    dot = half.get(types.pop(), tl.float32) if len(types) == 1 else tl.float32
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return {"DOT": dot, "PRECISION": "tf32" if tf32 else "ieee"}


def last_contiguous(tensor: Tensor) -> Tensor:
    """As it is where neighbours of the last dimension are neighbours in memory, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def tune(one: Launch) -> Launch:
    """The launch with the fastest number of warps and stages, timed once per kernel, constants and tensors' types.

    Kernels write the same values on every run, so trying is harmless.
    """
    key = (one.kernel, *(_tuning_key(value) for value in one.arguments.values()))
    if key not in _tuned:
        tried = {pair: _milliseconds(one, *pair) for pair in product(TUNED_WARPS, TUNED_STAGES)}
        _tuned[key] = min(tried, key=tried.__getitem__)
    warps, stages = _tuned[key]
    return replace(one, num_warps=warps, num_stages=stages)


def _tuning_key(value: Any) -> Any:
    return (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else value


def _milliseconds(one: Launch, warps: int, stages: int) -> float:
    try:
        return triton.testing.do_bench(replace(one, num_warps=warps, num_stages=stages).run, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")
