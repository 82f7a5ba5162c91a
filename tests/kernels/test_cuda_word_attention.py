"""word_attention's CUDA C++ kernels, on the host: errors against fp64, layouts, orders of threads, planted faults."""

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


def of_words(size: int, words: int, subtokens: int, **options: object) -> Case:
    """A case with other words: some are padding, and several name the same token."""
    case = cases.word_attention(size, **options)
    index = torch.randint(-1, 5, (3, words, subtokens), generator=torch.Generator().manual_seed(6))
    return replace(case, fixed=case.fixed | {"word_index": index})


# A thread multiplies one row or eight; a block holds the statistics of 64 rows, here of three heads, and 128 keys.
EDGES = [
    of_words(130, 1, 1),
    of_words(129, 2, 25, normalize="minmax", masked=True),
    of_words(19, 11, 1, normalize="sum"),
    of_words(257, 3, 3, masked=True, normalize="max"),
]


@pytest.fixture
def on_host() -> Iterator[None]:
    with backend_on_host(Kernels("word_attention")):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", cases.SIZES)
def test_errors(size: int, dtype: torch.dtype, on_host: None) -> None:
    options = [{"gradcam": gradcam, "masked": masked} for gradcam in (True, False) for masked in (True, False)]
    options += [{"normalize": normalize} for normalize in NORMALIZATIONS[:3]]
    check_errors("cuda", dtype, *(cases.word_attention(size, **chosen) for chosen in options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_at_the_edges_of_blocks(dtype: torch.dtype, on_host: None) -> None:
    check_errors("cuda", dtype, *EDGES)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "permuted": lambda x: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    "a part of wider rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "not aligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "of odd width": lambda x: x[..., :23],
    "expanded over captions": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_errors_of_layouts(layout: str, dtype: torch.dtype, on_host: None) -> None:
    given = []
    for case in (cases.word_attention(63, masked=True), of_words(63, 1, 1)):

        def call(value_bias: Tensor, *, of: Case = case, **tensors: Tensor) -> Tensor:
            laid_out = {name: LAYOUTS[layout](one) if one.is_floating_point() else one for name, one in tensors.items()}
            return of.call(**laid_out, value_bias=value_bias[:, : laid_out["value"].shape[-1]])

        given.append(replace(case, call=call))
    check_errors("cuda", dtype, *given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_mixed_types(dtype: torch.dtype, on_host: None) -> None:
    """Inputs of several types are multiplied in fp32; each gradient has its input's type."""
    case = cases.word_attention(33)

    def call(value: Tensor, **tensors: Tensor) -> Tensor:
        return case.call(value=value if value.dtype == torch.float64 else value.half(), **tensors)

    check_errors("cuda", dtype, replace(case, call=call))


@pytest.mark.parametrize("order", ORDERS[1:])
def test_order_of_threads_changes_no_bit(order: str) -> None:
    for case in EDGES:
        found = []
        for one in (ORDERS[0], order):
            with backend_on_host(Kernels("word_attention", order=one)):
                found.append(outcome("cuda", case.cast(torch.float32)))
        for name, value in found[0].items():
            assert value.isfinite().all() and torch.equal(found[1][name], value), name


def test_ignored_and_prefix_keys_are_not_read(on_host: None) -> None:
    case = cases.word_attention(33, masked=True).cast(torch.float32)
    clean = outcome("cuda", case)
    ignored = case.fixed["key_padding_mask"][:, None, :, None]
    case.leaves["key"] = case.leaves["key"].masked_fill(ignored, float("nan"))
    case.leaves["value"] = case.leaves["value"].masked_fill(ignored, float("nan"))
    case.leaves["value"][:, :, 0] = float("nan")
    for name, value in outcome("cuda", case).items():
        assert torch.equal(value, clean[name]), name


def test_token_beyond_the_text_gives_nan(on_host: None) -> None:
    """The public function refuses it, if it need not wait for a GPU."""
    query, key = torch.rand(1, 2, 3, 8), torch.rand(1, 2, 5, 8)
    index = torch.tensor([[[0], [3]]])
    maps, *_ = torch.ops.softmask.cuda_word_attention(query, key, index, None, None, None, None, 1.0, 0, "none", False)
    assert maps[0, 0].isfinite().all() and maps[0, 1].isnan().all()


@pytest.mark.parametrize(("captions", "words"), [(0, 2), (2, 0)])
def test_without_words(captions: int, words: int, on_host: None) -> None:
    tensors = [torch.rand(captions, 2, count, 8).requires_grad_() for count in (3, 5, 5, 3)]
    query, key, value, grad_output = tensors
    index = torch.zeros(captions, words, dtype=torch.int64)
    options = {"value": value, "grad_output": grad_output, "differentiable": True}
    with softmask.backend("cuda"):
        maps = ops.word_attention(query, key, index, **options)
    assert maps.shape == (captions, words, 5)
    for gradient in torch.autograd.grad(maps.sum(), tensors):
        assert gradient.eq(0).all()


@pytest.mark.parametrize("gradcam", [True, False])
def test_opcheck(gradcam: bool, on_host: None) -> None:
    case = cases.word_attention(9, gradcam=gradcam, masked=True).cast(torch.float32)
    given = [case.leaves.get(name) for name in ("value", "grad_output", "value_bias")]
    inputs = (case.leaves["query"], case.leaves["key"], case.fixed["word_index"], *given)
    inputs += (case.fixed["key_padding_mask"], 0.3, 1, "minmax")
    maps, *kept = torch.ops.softmask.cuda_word_attention(*inputs, True)
    torch.library.opcheck(torch.ops.softmask.cuda_word_attention_backward, (torch.rand_like(maps), *kept, *inputs))
    for one in inputs[:2]:
        one.requires_grad_()
    torch.library.opcheck(torch.ops.softmask.cuda_word_attention, (*inputs, True))


FAULTS = {
    "no barrier after a chunk": ("__syncthreads();  // the chunk is written", ""),
    "no barrier before the next chunk": ("__syncthreads();  // the chunk is read", ""),
    "no barrier after the statistics": ("__syncthreads();  // statistics are written", ""),
    "no barrier after the map": ("__syncthreads();  // statistics are read, and the map is written", ""),
    "no barrier before the map is normalized": ("__syncthreads();  // the map is read", ""),
    "no barrier after the map's gradient": ("__syncthreads();  // d_raw is written", ""),
    "no barrier after the slots' sums": ("__syncthreads();  // the slots' sums are written", ""),
    "no barrier before the next slots' sums": ("__syncthreads();  // the slots' sums are read", ""),
    "no barrier after the warps' sums": ("__syncthreads();  // the warps' sums are written", ""),
    "tail tile left out": ("problem.heads * cdiv(problem.pitch, kKeys)", "problem.heads * (problem.pitch / kKeys)"),
    "last key left out": ("position >= problem.keys", "position >= problem.keys - 1"),
    "ignored keys not masked": ("problem.ignored == nullptr", "true"),
    "last slot not added": ("s < kSlots", "s < kSlots - 1"),
    "parts of the heads not added": ("first == 0 ? sum : *place + sum", "sum"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cuda_host.planted("word_attention", FAULTS, tmp_path_factory.mktemp("planted"))


def check_edges(library: ctypes.CDLL) -> None:
    with backend_on_host(Kernels("word_attention", library)):
        check_errors("cuda", torch.float32, *EDGES)


def test_sound_without_a_fault(faulty: ctypes.CDLL) -> None:
    faulty.set_fault(0)
    check_edges(faulty)


@pytest.mark.parametrize("number", range(1, len(FAULTS) + 1), ids=list(FAULTS))
def test_fault_is_found(number: int, faulty: ctypes.CDLL) -> None:
    """A check of the tests above fails."""
    faulty.set_fault(number)
    with pytest.raises(AssertionError, match="error"):
        check_edges(faulty)
