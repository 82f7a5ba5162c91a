"""The faster products that tests give Triton's interpreter: their rounding is known, and kernel bugs still show."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support import kernel_cases as cases
from tests.support.kernel_cases import check_errors

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from benchmarks.gpu.fast_interpreter import product  # noqa: E402
from softmask.kernels._similarity import load_features  # noqa: E402

pytestmark = [cases.needs_triton, pytest.mark.usefixtures("fast_interpreter")]
PRECISIONS = ("ieee", "tf32")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@triton.jit
def _multiply(left, right, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """out [M, N] += left [M, K] right [N, K]^T"""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(left + m[:, None] * K + k[None, :]), tl.load(right + n[:, None] * K + k[None, :])
    place = out + m[:, None] * N + n[None, :]
    tl.store(place, tl.dot(a, tl.trans(b), tl.load(place), input_precision=PRECISION))


def by_triton(left: np.ndarray, right: np.ndarray, out: np.ndarray, precision: str, dtype: torch.dtype) -> torch.Tensor:
    """out + left right^T, of operands in dtype."""
    result, (m, k) = torch.from_numpy(out.copy()), left.shape
    operands = (torch.from_numpy(each).to(dtype) for each in (left, right))
    _multiply[(1,)](*operands, result, m, len(right), k, precision)
    return result


@triton.jit
def _add_integers(place, other):
    tl.store(place, tl.load(place) + tl.load(other))


def test_integer_overflow_raises() -> None:
    number, most = torch.tensor([2]), torch.tensor([2**31 - 1], dtype=torch.int32)
    _add_integers[(1,)](most - 2, number.int())
    _add_integers[(1,)](most.long(), number)
    with pytest.raises(Exception, match="overflow"):
        _add_integers[(1,)](most, number.int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_are_rounded_once(dtype: torch.dtype) -> None:
    """The sum over k and the addend are rounded to nearest once."""
    left, right, out = (normal(*shape, seed=i) for i, shape in enumerate(((32, 64), (16, 64), (32, 16))))
    exact = torch.from_numpy(left).to(dtype).double() @ torch.from_numpy(right).to(dtype).double().T
    exact += torch.from_numpy(out).double()
    assert torch.equal(by_triton(left, right, out, "ieee", dtype), exact.float())


def test_batched_products_equal_single_ones() -> None:
    left, right = normal(3, 16, 32), normal(3, 32, 16, seed=1)
    together = product(left, right, np.zeros((3, 16, 16), np.float32))
    apart = [product(*pair, np.zeros((16, 16), np.float32)) for pair in zip(left, right, strict=True)]
    np.testing.assert_array_equal(together, np.stack(apart))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(256, 256, 33), (61, 23, 40), (16, 16, 512), (512, 3, 7), (1, 130, 64)])
def test_equal_rows_have_equal_products(shape: tuple[int, int, int], precision: str) -> None:
    """On either side and at every position; rows twice as large have products twice as large."""
    m, n, k = shape
    left, right = np.tile(normal(1, k), (m, 1)), np.tile(normal(1, k, seed=1), (n, 1))
    left[::2] *= 2.0
    got = product(left, right.T, np.zeros((m, n), np.float32), precision)
    got[::2] /= 2.0
    assert (got == got[0, 0]).all()


def test_tf32_truncates_the_operands() -> None:
    left, right, out = (normal(*shape, seed=i) for i, shape in enumerate(((32, 64), (16, 64), (32, 16))))
    exact = left.astype(np.float64) @ right.T.astype(np.float64) + out
    errors = {
        precision: np.abs(by_triton(left, right, out, precision, torch.float32).numpy() - exact).max()
        for precision in PRECISIONS
    }
    assert errors["ieee"] < 1e-6 and 1e-3 < errors["tf32"] < 5e-2
    cut = [(each.view(np.uint32) & 0xFFFFE000).view(np.float32) for each in (left, right)]
    of_cut = product(cut[0], cut[1].T, out)
    np.testing.assert_array_equal(product(left, right.T, out, "tf32"), of_cut)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_infinity_and_nan_stay_in_their_rows_and_columns(precision: str) -> None:
    left, right, out = normal(16, 32), normal(16, 32, seed=1), np.zeros((16, 16), np.float32)
    left[3, 4], right[5, 6] = np.inf, np.nan
    got, usual = product(left, right.T, out, precision), np.delete(np.arange(16), 5)
    assert np.isinf(got[3, usual]).all() and np.isnan(got[:, 5]).all()
    assert np.isfinite(got[np.ix_(np.delete(np.arange(16), 3), usual)]).all()


# Products of contrastive tiles, each with a bug.
@triton.jit
def _without_last_features(left, right, i, j, depth, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    total = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for start in range(0, depth - BLOCK_K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a, b = load_features(left, i, k, depth), load_features(right, j, k, depth)
        total = tl.dot(a.to(DOT), tl.trans(b.to(DOT)), total, input_precision=PRECISION)
    return total


@triton.jit
def _of_the_next_column(left, right, i, j, depth, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    k = tl.arange(0, 32)
    a, b = load_features(left, i, k, depth), load_features(right, j + 1, k, depth)
    return tl.dot(a.to(DOT), tl.trans(b.to(DOT)), input_precision=PRECISION)


@triton.jit
def _scaled(left, right, i, j, depth, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    k = tl.arange(0, 32)
    a, b = load_features(left, i, k, depth), load_features(right, j, k, depth)
    return tl.dot(a.to(DOT), tl.trans(b.to(DOT)), input_precision=PRECISION) * 1.00001


@triton.jit
def _in_tf32(left, right, i, j, depth, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    k = tl.arange(0, 32)
    a, b = load_features(left, i, k, depth), load_features(right, j, k, depth)
    return tl.dot(a.to(DOT), tl.trans(b.to(DOT)), input_precision="tf32")


@pytest.mark.parametrize("fault", [_without_last_features, _of_the_next_column, _scaled, _in_tf32])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_kernel_bug_is_detected(fault: object, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from softmask.kernels import contrastive, contrastive_backward

    case = cases.contrastive(7)
    check_errors("triton", torch.float32, case)
    monkeypatch.setattr(contrastive if where == "forward" else contrastive_backward, "multiply", fault)
    with pytest.raises(AssertionError, match="error .*, in PyTorch"):
        check_errors("triton", torch.float32, case)
