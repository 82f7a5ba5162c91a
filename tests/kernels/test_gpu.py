"""Triton and CUDA C++ kernels on a real GPU: values, bits, CUDA graphs, torch.compile, memory. Skipped without a
device; those of CUDA C++ also where they are not built."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import softmask
from softmask import ops
from softmask.ops import _library
from tests.support import kernel_cases as cases
from tests.support.kernel_cases import Case, check_errors, outcome

pytestmark = pytest.mark.gpu
MIB = 2**20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IN_CUDA = ("soft_mask", "word_attention")
needs_cuda = pytest.mark.skipif(_library.CUDA_MISSING is not None, reason=str(_library.CUDA_MISSING))
KERNELS = [("triton", name) for name in cases.ALL]
KERNELS += [pytest.param("cuda", name, marks=needs_cuda) for name in IN_CUDA]
for_each_kernel = pytest.mark.parametrize(("backend", "name"), KERNELS)
for_each_op = pytest.mark.parametrize("name", cases.ALL)


@for_each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_against_fp64(backend: str, name: str, dtype: torch.dtype) -> None:
    check_errors(backend, dtype, cases.ALL[name].to("cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", cases.SIZES)
def test_errors_at_ragged_sizes(size: int, dtype: torch.dtype) -> None:
    given = [
        cases.word_attention(size, masked=True),
        cases.contrastive(size, gamma=2.0, with_ids=True, scale=100.0),
        cases.momentum_contrastive(min(size, 63), queue=size, gamma=2.0, transposed=True),
        cases.soft_mask_attention(size, masked=True),
        cases.soft_mask(size, words=3),
    ]
    for case in given:
        check_errors("triton", dtype, case.to("cuda"))


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", cases.SIZES)
def test_errors_of_cuda_at_ragged_sizes(size: int, dtype: torch.dtype) -> None:
    given = [cases.word_attention(size, masked=masked) for masked in (True, False)]
    given += [cases.soft_mask(size, words=words, width=width) for words in (3, 40) for width in (37, 40, 800)]
    for case in given:
        check_errors("cuda", dtype, case.to("cuda"))


@for_each_kernel
def test_small_case(backend: str, name: str) -> None:
    """Short enough for compute-sanitizer."""
    check_errors(backend, torch.float32, cases.SMALL[name].to("cuda"), upstreams=1)


@for_each_kernel
def test_every_element_is_written(backend: str, name: str, poisoned_memory) -> None:
    case = cases.ALL[name].cast(torch.float32).to("cuda")
    for key, value in outcome(backend, case).items():
        assert value.isfinite().all(), key


@for_each_kernel
def test_another_stream(backend: str, name: str) -> None:
    """The kernels run on the current stream: inputs that it has not written yet would be read too early on another."""
    case = cases.ALL[name].cast(torch.float32).to("cuda")
    expected = outcome(backend, case)
    late = case.cast(torch.float32)
    late.leaves = {key: leaf.clone() for key, leaf in case.leaves.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for key, leaf in late.leaves.items():
            leaf.zero_().add_(case.leaves[key])
        got = outcome(backend, late)
    torch.cuda.current_stream().wait_stream(side)
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


@for_each_op
def test_auto_takes_triton_and_bits_repeat(name: str) -> None:
    case = cases.ALL[name].cast(torch.float32).to("cuda")
    outcomes = [outcome(backend, case) for backend in ("auto", "triton", "triton")]
    for key, value in outcomes[0].items():
        assert all(torch.equal(value, other[key]) for other in outcomes[1:]), key


@needs_cuda
@pytest.mark.parametrize("name", IN_CUDA)
def test_bits_of_cuda_repeat(name: str) -> None:
    case = cases.ALL[name].cast(torch.float32).to("cuda")
    first, second = (outcome("cuda", case) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("select", ["high", "low"])
def test_attentive_mask(select: str) -> None:
    patches, tokens = (cases.normal(3, count, 33, seed=count).float().cuda() for count in (257, 9))
    by = {}
    for backend in ("reference", "triton"):
        with softmask.backend(backend):
            by[backend] = ops.attentive_mask(patches, tokens, ratio=0.3, select=select)
    assert torch.equal(by["reference"], by["triton"])


def step(case: Case, leaves: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    out = case.call(**leaves, **case.fixed)
    wanted = [name for name in leaves if name not in case.constants]
    gradients = torch.autograd.grad(out, [leaves[name] for name in wanted], upstream)
    return {"out": out.detach(), **dict(zip(wanted, gradients, strict=True))}


@for_each_kernel
def test_cuda_graph_replays_on_other_values(backend: str, name: str) -> None:
    """Fails if forward or backward synchronizes or keeps a value of the captured call."""
    with softmask.backend(backend):
        check_graph(cases.ALL[name].cast(torch.float32).to("cuda"))


def check_graph(case: Case) -> None:
    leaves = {key: leaf.clone().requires_grad_(key not in case.constants) for key, leaf in case.leaves.items()}
    upstream = torch.ones_like(case.call(**case.leaves, **case.fixed))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(case, leaves, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case, leaves, upstream)
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.mul_(0.9)
    graph.replay()
    torch.cuda.synchronize()
    expected = step(case, leaves, upstream)
    for key, value in expected.items():
        assert torch.equal(captured[key], value), key


@for_each_kernel
def test_compiles_to_one_graph(backend: str, name: str) -> None:
    torch.compiler.reset()
    case = cases.ALL[name].cast(torch.float32).to("cuda")
    compiled = replace(case, call=torch.compile(case.call, fullgraph=True))
    plain, got = outcome(backend, case), outcome(backend, compiled)
    for key, value in plain.items():
        torch.testing.assert_close(got[key], value)


def test_more_elements_than_32_bits_count() -> None:
    """The last image of 2 ** 31 elements and more: an offset of 32 bits would have become negative."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    images, tokens, width = 2100, 1025, 1024
    features = torch.ones(images, tokens, width, dtype=torch.bfloat16, device="cuda")
    maps = torch.zeros(images, tokens - 1, device="cuda")
    maps[-1] = 1.0
    with softmask.backend("triton"):
        masked = ops.soft_mask(features, maps, normalize=None)
    assert features.numel() > 2**31
    assert masked[-1, 1:].eq(0).all() and masked[-1, 0].eq(1).all() and masked[-2].eq(1).all()


def peak(call) -> float:
    """Peak memory of the call in MiB, beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def test_contrastive_loss_holds_no_logits() -> None:
    """For 16,384 pairs they would take 1 GiB."""
    image, text = (F.normalize(torch.randn(16384, 256, device="cuda"), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(14.0, device="cuda", requires_grad=True)
    assert peak(lambda: ops.focal_contrastive_loss(image, text, scale, gamma=2.0).backward()) < 128


def test_momentum_loss_holds_no_logits_and_copies_no_queue() -> None:
    """For 64 rows and 65,536 keys, logits would take 16 MiB a side, a copy of the queues 128 MiB."""
    names = ("image", "text", "image_teacher", "text_teacher")
    rows = {name: F.normalize(torch.randn(64, 256, device="cuda"), dim=-1) for name in names}
    queues = {
        name: F.normalize(torch.randn(65536, 256, device="cuda"), dim=-1) for name in ("image_queue", "text_queue")
    }
    for name in ("image", "text"):
        rows[name].requires_grad_()
    assert peak(lambda: ops.momentum_contrastive_loss(logit_scale=14.0, **rows, **queues, gamma=2.0).backward()) < 64


def test_word_maps_hold_one_attention_row_per_word() -> None:
    """Attention of all rows would take 100 MiB."""
    query, dout = torch.randn(2, 64, 12, 30, 64, device="cuda")
    key, value = torch.randn(2, 64, 12, 577, 64, device="cuda")
    index = torch.zeros(64, 1, dtype=torch.int64, device="cuda")
    assert peak(lambda: ops.word_attention(query, key, index, value=value, grad_output=dout)) < 8
