"""soft_mask's CUDA C++ kernels, on the host: errors against fp64, layouts, orders of threads, planted faults."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import softmask
from softmask import ops
from tests.support import cuda_host
from tests.support import kernel_cases as cases
from tests.support.cuda_host import ORDERS, Kernels, backend_on_host
from tests.support.kernel_cases import Case, check_errors, outcome

pytestmark = [cuda_host.needs_compiler, pytest.mark.usefixtures("poisoned_memory")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMALIZATIONS = ["minmax", "max", "sum", None]
# Rows of 37 elements are read one by one, those of 40 in packs of 16 bytes. A warp holds 768 elements of a row, and a
# block the weights of 32 words.
EDGES = [
    cases.soft_mask(9, words=67, normalize=None, width=40),
    cases.soft_mask(9, words=2, width=1544),
    cases.soft_mask(9, words=2, width=769),
    cases.soft_mask(17, prefix=0, normalize="sum"),
    cases.soft_mask(7, prefix=19, words=3, width=8),
]


@pytest.fixture
def on_host() -> Iterator[None]:
    with backend_on_host(Kernels("soft_mask")):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", cases.SIZES)
def test_errors(size: int, dtype: torch.dtype, on_host: None) -> None:
    options = [{"normalize": normalize, "width": 40} for normalize in NORMALIZATIONS]
    check_errors("cuda", dtype, *(cases.soft_mask(size, **chosen) for chosen in options), cases.soft_mask(size))


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_at_the_edges_of_blocks(dtype: torch.dtype, on_host: None) -> None:
    check_errors("cuda", dtype, *EDGES)


def in_layout(arrange: Callable[[Tensor], Tensor]) -> Case:
    """A case whose tensors are laid out by a function inside the differentiated call."""
    case = cases.soft_mask(19, words=3, width=40)
    return replace(case, call=lambda features, maps: case.call(arrange(features), maps=arrange(maps)))


LAYOUTS = {
    "permuted": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "a part of wider rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "not aligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "last dimension strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_errors_of_layouts(layout: str, dtype: torch.dtype, on_host: None) -> None:
    check_errors("cuda", dtype, in_layout(LAYOUTS[layout]))


@pytest.mark.parametrize("map_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_mixed_types(dtype: torch.dtype, map_dtype: torch.dtype, on_host: None) -> None:
    case = cases.soft_mask(19, words=2)
    mixed = replace(case, call=lambda features, maps: case.call(features, maps=maps.to(min_type(maps, map_dtype))))
    check_errors("cuda", dtype, mixed)


def min_type(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """dtype, but fp64 for the truth."""
    return tensor.dtype if tensor.dtype == torch.float64 else dtype


@pytest.mark.parametrize("order", ORDERS[1:])
def test_order_of_threads_changes_no_bit(order: str) -> None:
    for case in (cases.soft_mask(63, width=40), *EDGES):
        found = []
        for one in (ORDERS[0], order):
            with backend_on_host(Kernels("soft_mask", order=one)):
                found.append(outcome("cuda", case.cast(torch.float32)))
        for name, value in found[0].items():
            assert value.isfinite().all() and torch.equal(found[1][name], value), name


def test_upstream_gradient_of_any_layout(on_host: None) -> None:
    """That of a sum is expanded, with strides of 0."""
    case = cases.soft_mask(19, words=3, width=40).cast(torch.float32)
    by = {}
    for backend in ("reference", "cuda"):
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.leaves.items()}
        with softmask.backend(backend):
            out = case.call(**leaves)
        by[backend] = [
            torch.autograd.grad(scalar, list(leaves.values()), retain_graph=True)
            for scalar in (out.sum(), out[..., 3].sum(), out.transpose(1, 2)[:, ::2].square().sum())
        ]
    for expected, got in zip(by["reference"], by["cuda"], strict=True):
        torch.testing.assert_close(got, expected)


def test_empty_batches(on_host: None) -> None:
    with softmask.backend("cuda"):
        for batch, words, width in ((0, 2, 8), (2, 0, 8), (2, 2, 0)):
            features, maps = (
                torch.rand(batch, 5, width, requires_grad=True),
                torch.rand(batch, words, 4).requires_grad_(),
            )
            out = ops.soft_mask(features, maps)
            assert out.shape == (batch, words, 5, width)
            for gradient in torch.autograd.grad(out.sum(), (features, maps)):
                assert gradient.eq(0).all()


def test_opcheck(on_host: None) -> None:
    features, maps = torch.rand(2, 5, 8, requires_grad=True), torch.rand(2, 3, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.softmask.cuda_soft_mask, (features, maps, 0.7, "minmax", 1))
    arguments = (torch.rand(2, 3, 5, 8), features.detach(), maps.detach(), 0.7, "minmax", 1, True)
    torch.library.opcheck(torch.ops.softmask.cuda_soft_mask_backward, arguments)


FAULTS = {
    "no barrier after the weights": ("__syncthreads();  // weights of the tile are written", ""),
    "no barrier before the next weights": ("__syncthreads();  // weights of the tile are read", ""),
    "no backward barrier after the weights": ("__syncthreads();  // weights are written", ""),
    "no backward barrier before the next weights": ("__syncthreads();  // weights are read", ""),
    "tail tile one short": ("problem.tokens - first", "problem.tokens - first - 1"),
    "prefix tokens masked": ("token >= problem.prefix && token < problem.tokens", "token < problem.tokens"),
    "parts of the width not added": ("chunk == 0 ? product : *place + product", "product"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cuda_host.planted("soft_mask", FAULTS, tmp_path_factory.mktemp("planted"))


def test_sound_without_a_fault(faulty: ctypes.CDLL) -> None:
    faulty.set_fault(0)
    with backend_on_host(Kernels("soft_mask", faulty)):
        check_errors("cuda", torch.float32, *EDGES)


@pytest.mark.parametrize("number", range(1, len(FAULTS) + 1), ids=list(FAULTS))
def test_fault_is_found(number: int, faulty: ctypes.CDLL) -> None:
    """A check of the tests above fails."""
    faulty.set_fault(number)
    with backend_on_host(Kernels("soft_mask", faulty)), pytest.raises(AssertionError, match="error"):
        check_errors("cuda", torch.float32, *EDGES)
