"""A faster interpreter for Triton, with products whose rounding does not depend on the processor's BLAS."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
TF32_DROPPED = 13  # bits of fp32 that tf32 lacks


@contextmanager
def fast_interpreter() -> Iterator[None]:
    """Within this context, Triton's helper functions are set up once per launch, and products are those of `product`.

    The interpreter patches triton.language again in every call of a helper function, although once per launch is
    enough. In every operation it rebuilds a table of types, and it checks additions of integers for overflow with a
    dozen operations.
    """
    import triton.language as tl
    from triton.language import semantic
    from triton.runtime import interpreter

    patch, active = interpreter._patch_lang, []
    builder = interpreter.InterpreterBuilder
    create_dot, numpy_type = builder.create_dot, interpreter._get_np_dtype
    types: dict[str, np.dtype] = {}
    adder = getattr(semantic, "TritonSemantic", None)  # Triton before 3.4 has no such class
    check = adder and adder.binary_op_sanitize_overflow_impl

    def restore() -> None:
        while active:
            active.pop().restore()

    def patch_once(fn: object) -> SimpleNamespace:
        if not active:
            active.extend((patch(fn), patch(tl.max.fn)))  # the latter for calls from Triton's own helpers
            # Triton 3.6 and older convert an array to a number, which numpy 2.4 refuses (triton-lang/triton#9171).
            tl.tensor.__index__ = lambda self: int(self.handle.data.item())
        return SimpleNamespace(restore=restore)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        left, right = _values(a, tl), _values(b, tl)
        if left is None or right is None:  # integers, whose sums have no order, or eight-bit types
            return create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        of_fp32 = left.dtype == right.dtype == np.float32 and tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar)
        precision = input_precision.name.lower() if of_fp32 else "ieee"
        return interpreter.TensorHandle(product(left, right, d.data, precision), d.dtype.scalar)

    def known_type(of: Any) -> np.dtype:
        if of.name not in types:
            types[of.name] = numpy_type(of)
        return types[of.name]

    interpreter._patch_lang, builder.create_dot, interpreter._get_np_dtype = patch_once, dot, known_type
    if adder:
        adder.binary_op_sanitize_overflow_impl = _check_integers
    try:
        yield
    finally:
        interpreter._patch_lang, builder.create_dot, interpreter._get_np_dtype = patch, create_dot, numpy_type
        if adder:
            adder.binary_op_sanitize_overflow_impl = check


def _check_integers(self: Any, left: Any, right: Any, operation: Any) -> None:
    """The same check as Triton's: an integer that does not fit its type is an error."""
    kind = left.type.scalar
    if kind.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
        return
    exact = OPERATIONS[operation.__name__](*(each.handle.data.astype(np.int64) for each in (left, right)))
    lowest, highest = kind.get_int_min_value(), kind.get_int_max_value()
    assert lowest <= exact.min() and exact.max() <= highest, f"{kind} overflow in {operation.__name__}"


def _values(handle: Any, tl: Any) -> np.ndarray | None:
    """The values of a floating-point tensor, else None. The interpreter keeps bf16 as its bits."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data if handle.data.dtype in (np.float16, np.float32, np.float64) else None


def product(left: np.ndarray, right: np.ndarray, accumulator: np.ndarray, precision: str = "ieee") -> np.ndarray:
    """left [..., M, K] times right [..., K, N], added to the accumulator, in its type.

    A product is rounded once, accumulator included: GPUs differ in the order and rounding of the sums within a product,
    and none does much better. Chained products are rounded at every link, so a kernel whose passes chain differently
    gets different logits here, as it may on a GPU. With "tf32", the operands lose the last bits of fp32.

    Sums are in fp64: exact for two terms, and otherwise off by far less than the rounding that follows. einsum treats
    every element the same wherever it lies, so that equal rows have equal products; BLAS sums rows at the edges of its
    tiles in another order.
    """
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision: expected 'ieee' or 'tf32', got {precision!r}")
    given = (_cut(left), _cut(right)) if precision == "tf32" else (left, right)
    with np.errstate(all="ignore"):  # NaN and infinity are values like others
        one, two = (np.ascontiguousarray(each, dtype=np.float64) for each in given)
        total = np.einsum("...mk,...kn->...mn", one, two, optimize=False)
        return (total + accumulator).astype(accumulator.dtype, copy=False)


def _cut(values: np.ndarray) -> np.ndarray:
    """fp32 without the bits that tf32 lacks."""
    return (np.ascontiguousarray(values).view(np.uint32) >> TF32_DROPPED << TF32_DROPPED).view(np.float32)
