"""Triton kernels with tensors of mixed types: each gradient has the type of its tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support import kernel_cases as cases
from tests.support.kernel_cases import outcome

pytestmark = [cases.needs_triton, pytest.mark.usefixtures("poisoned_memory", "fast_interpreter")]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
MIXTURES = [
    {"value_bias": FP32},
    {"value": FP32, "value_bias": FP32},
    {"query": FP32},
    {"key": FP32, "value": FP32},
    {"grad_output": FP32},
]


def soft_mask_attention(leaves: dict[str, Tensor], fixed: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    from softmask.kernels import soft_mask_attention as kernels

    query, key, value, bias = (leaves[name] for name in ("query", "key", "value", "value_bias"))
    arguments = (query, key, value, fixed["key_weight"], fixed["kv_index"], bias, fixed["key_padding_mask"], 40**-0.5)
    out = kernels.forward(*arguments)
    gradients = kernels.backward(upstream.to(out), *arguments)
    return {"out": out, **dict(zip(("query", "key", "value", "value_bias"), gradients, strict=True))}


def word_attention(leaves: dict[str, Tensor], fixed: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    from softmask.kernels import word_attention as kernels

    names = ("query", "key", "value", "grad_output", "value_bias")
    query, key, *others = (leaves[name] for name in names)
    arguments = (query, key, fixed["word_index"], *others, fixed["key_padding_mask"], 40**-0.5, 1, "minmax")
    maps, *kept = kernels.forward(*arguments, True)
    gradients = kernels.backward(upstream.to(maps), *kept, *arguments)
    return {"out": maps, **dict(zip(names, gradients, strict=True))}


@pytest.mark.parametrize("half", [BF16, FP16])
@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda mixture: "-".join(mixture))
@pytest.mark.parametrize("run", [soft_mask_attention, word_attention])
def test_gradients_of_mixed_input_types(run: object, mixture: dict[str, torch.dtype], half: torch.dtype) -> None:
    """Errors are compared with PyTorch's in the smaller type, or in fp32 for bf16, whose products are exact here."""
    case = (
        cases.soft_mask_attention(63, masked=True)
        if run is soft_mask_attention
        else cases.word_attention(63, normalize="minmax", masked=True)
    )
    leaves = {name: leaf.to(mixture.get(name, half)) for name, leaf in case.leaves.items()}
    if leaves.keys().isdisjoint(mixture):
        pytest.skip("no such tensor")
    case.leaves = leaves
    truth, plain = (outcome("reference", case.cast(dtype)) for dtype in (torch.float64, FP32 if half == BF16 else half))
    upstream = torch.randn(truth["out"].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    of_out = leaves["query"].dtype if run is soft_mask_attention else FP32
    for name, got in run(leaves, case.fixed, upstream).items():
        exact = truth[name]
        assert got.dtype == (of_out if name == "out" else leaves[name].dtype), name
        size, unit = exact.square().mean().sqrt(), torch.finfo(got.dtype).eps
        errors = [(one.double() - exact).square().mean().sqrt() / size for one in (got, plain[name])]
        # The upstream is rounded to the type of out, which allows one more rounding unit of that type.
        assert errors[0] <= 2 * errors[1] + unit + torch.finfo(of_out).eps, name


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("features", "queue"), [(FP32, BF16), (BF16, FP32), (FP32, FP16), (FP16, BF16)])
def test_queue_of_another_type_is_not_copied(features: torch.dtype, queue: torch.dtype, transposed: bool) -> None:
    from softmask.kernels._launch import Launch, hooked

    case = cases.momentum_contrastive(7, queue=130, gamma=2.0, transposed=transposed)
    case.leaves = {
        name: leaf.to(queue if name.endswith("queue") else FP32 if leaf.dim() == 0 else features)
        for name, leaf in case.leaves.items()
    }
    read: set[int] = set()

    def run(one: Launch) -> None:
        read.update(
            one.arguments[name].data_ptr() for name in ("image_queue_ptr", "text_queue_ptr") if name in one.arguments
        )
        one.run()

    with hooked(run):
        found = outcome("triton", case)
    assert read == {case.leaves[name].data_ptr() for name in ("image_queue", "text_queue")}
    truth, plain = (outcome("reference", case.cast(dtype)) for dtype in (torch.float64, FP32))
    for name, exact in truth.items():
        size, unit = exact.square().mean().sqrt(), torch.finfo(found[name].dtype).eps
        errors = [(one.double() - exact).square().mean().sqrt() / size for one in (found[name], plain[name])]
        assert errors[0] <= 2 * errors[1] + unit or exact.dim() == 0, name


def test_backward_after_a_forward_without_gradient_raises() -> None:
    from softmask.kernels import momentum_contrastive as kernels

    rows, numbers = cases.unit_rows(4, 7, 32, seed=0).float(), [torch.tensor(value) for value in (9.0, 0.4, 0.0)]
    given = (*rows, rows[2], rows[3], None, None, *numbers, None, None, None, 0)
    loss, at_scale, *gradients = kernels.forward(*given, False)
    with pytest.raises(RuntimeError, match=r"gradient=True returns, each \(7, 32\), got \(0,\) and \(0,\)"):
        kernels.backward(loss, rows[0], rows[1], numbers[0], at_scale, *gradients)
