"""Exponentials and scalars in kernels."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def number(given):
    """An fp32 scalar, given as a number or as a pointer to one."""
    if isinstance(given, float):  # in the interpreter
        given = tl.full([], given, tl.float32)
    elif given.dtype.is_ptr():
        given = tl.load(given)
    return given.to(tl.float32)


@triton.jit
def exp(exponent, FAST: tl.constexpr = True):
    """FAST: without tl.exp's five instructions for results below the normal numbers, which become 0. It may take
    registers, of which IEEE products leave few."""
    return tl.exp2(exponent * LOG2E) if FAST else tl.exp(exponent)
