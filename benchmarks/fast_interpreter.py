"""Triton's interpreter, faster, and with products whose rounding no processor's BLAS decides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

TF32_DROPPED = 13  # bits of fp32 that tf32 has not


@contextmanager
def fast_interpreter() -> Iterator[None]:
    """Within it, Triton's helper functions are set up once a launch, and products are those of `product`.

    The interpreter patches triton.language anew in every call of a helper function: once per launch will do.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, active = interpreter._patch_lang, []
    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def restore() -> None:
        while active:
            active.pop().restore()

    def patch_once(fn: object) -> SimpleNamespace:
        if not active:
            active.extend((patch(fn), patch(tl.max.fn)))  # the latter for what Triton's own helpers call
        return SimpleNamespace(restore=restore)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        left, right = _values(a, tl), _values(b, tl)
        if left is None or right is None:  # of integers, which no order changes, or of eight bits
            return create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        of_fp32 = left.dtype == right.dtype == np.float32 and tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar)
        precision = input_precision.name.lower() if of_fp32 else "ieee"
        return interpreter.TensorHandle(product(left, right, d.data, precision), d.dtype.scalar)

    interpreter._patch_lang, builder.create_dot = patch_once, dot
    try:
        yield
    finally:
        interpreter._patch_lang, builder.create_dot = patch, create_dot


def _values(handle: Any, tl: Any) -> np.ndarray | None:
    """The numbers of a tensor, where they are floating: the interpreter keeps bf16 as the bits that it has."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data if handle.data.dtype in (np.float16, np.float32, np.float64) else None


def product(left: np.ndarray, right: np.ndarray, accumulator: np.ndarray, precision: str = "ieee") -> np.ndarray:
    """left [..., M, K] times right [..., K, N], added to the accumulator, in its type.

    One rounding a product, accumulator included: GPUs differ in the order and the rounding of the sums within one, and
    none does much better. Chains of products are rounded in every link. So a kernel whose passes chain in different
    ways has different logits here, as it may on a GPU. fp32 takes tf32 as the GPU has it: the multiplier leaves out the
    last bits ("tf32"), or Triton splits each number into two that are rounded to tf32, multiplies three times from
    zero, and then adds up ("tf32x3").
    """
    with np.errstate(all="ignore"):  # NaN and infinity are values like others
        if precision == "tf32":
            return _rounded(_sum(_cut(left), _cut(right)) + accumulator, accumulator)
        if precision == "tf32x3":
            (big_left, small_left), (big_right, small_right) = _split(left), _split(right)
            small = _rounded(_sum(small_left, big_right) + _sum(big_left, small_right), accumulator)
            small[np.isnan(small)] = 0.0  # infinity less infinity: the large parts say what is right
            return _rounded(_sum(big_left, big_right) + small, accumulator) + accumulator
        return _rounded(_sum(left, right) + accumulator, accumulator)


def _sum(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The product in fp64: exact for two numbers, and sums are off by far less than the roundings that follow.

    By einsum, whose loops do with every element the same wherever it lies: equal rows have equal products. BLAS has
    other orders for the rows at the edges of its tiles.
    """
    one, two = (np.ascontiguousarray(each, dtype=np.float64) for each in (left, right))
    return np.einsum("...mk,...kn->...mn", one, two, optimize=False)


def _rounded(total: np.ndarray, like: np.ndarray) -> np.ndarray:
    return total.astype(like.dtype, copy=False)


def _cut(values: np.ndarray) -> np.ndarray:
    """fp32 without the bits that tf32 has not."""
    return (np.ascontiguousarray(values).view(np.uint32) >> TF32_DROPPED << TF32_DROPPED).view(np.float32)


def _nearest(values: np.ndarray) -> np.ndarray:
    """fp32 rounded to tf32, halves away from zero, as cvt.rna does; NaN and infinity stay."""
    half = np.uint32(1 << (TF32_DROPPED - 1))
    rounded = _cut((np.ascontiguousarray(values).view(np.uint32) + half).view(np.float32))
    return np.where(np.isfinite(values), rounded, values)


def _split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    big = _nearest(values)
    return big, _nearest(values - big)
