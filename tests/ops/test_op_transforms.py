"""Forward-mode AD, torch.func, inference mode and autocast around ops: kernels refuse what only the reference can."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import softmask
from tests.support import kernel_cases as cases
from tests.support.kernel_cases import Case, needs_cpp, outcome

pytestmark = [needs_cpp, pytest.mark.usefixtures("fast_interpreter")]
for_each_op = pytest.mark.parametrize("name", cases.SMALL)
KERNELS = ["cpp", pytest.param("triton", marks=cases.needs_triton)]
for_each_kernel = pytest.mark.parametrize("backend", KERNELS)


def function(case: Case) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The sum of what the case returns as a function of the leaves that take a gradient, and these leaves."""
    names = [name for name in case.leaves if name not in case.constants]

    def call(*given: Tensor) -> Tensor:
        return case.call(**case.leaves | dict(zip(names, given, strict=True)), **case.fixed).sum()

    return call, tuple(case.leaves[name] for name in names)


def gradients(call: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    given = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    return torch.autograd.grad(call(*given), given)


def directions(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(cases.normal(*leaf.shape, seed=seed).to(leaf) for seed, leaf in enumerate(leaves))


@for_each_op
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_auto_and_reference_support_transforms(name: str, backend: str) -> None:
    call, leaves = function(cases.SMALL[name].cast(torch.float64))
    along = directions(leaves)
    expected = gradients(call, leaves)
    slope = sum((one * other).sum() for one, other in zip(expected, along, strict=True))
    with softmask.backend(backend):
        torch.testing.assert_close(torch.func.jvp(call, leaves, along)[1], slope)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(leaf, tangent) for leaf, tangent in zip(leaves, along, strict=True)]
            torch.testing.assert_close(forward_ad.unpack_dual(call(*duals)).tangent, slope)
        got = torch.func.grad(call, tuple(range(len(leaves))))(*leaves)
        pairs = [torch.stack([leaf, 0.9 * leaf]) for leaf in leaves]
        batched = torch.func.vmap(call)(*pairs)
        each = torch.stack([call(*leaves), call(*(0.9 * leaf for leaf in leaves))])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(batched, each)


@for_each_op
@for_each_kernel
def test_named_kernels_refuse_transforms(name: str, backend: str) -> None:
    call, leaves = function(cases.SMALL[name].cast(torch.float32))
    message = f"backend '{backend}' cannot run .* no rule for .*; softmask.backend\\('reference'\\) has PyTorch's"
    with softmask.backend(backend), pytest.raises(softmask.BackendError, match=message):
        torch.func.jvp(call, leaves, leaves)
    with softmask.backend(backend), pytest.raises(softmask.BackendError, match=message):
        torch.func.grad(call)(*leaves)
    with softmask.backend(backend), pytest.raises(softmask.BackendError, match=message):
        torch.func.vmap(call)(*(leaf[None] for leaf in leaves))
    with softmask.backend(backend), forward_ad.dual_level(), pytest.raises(softmask.BackendError, match=message):
        call(forward_ad.make_dual(leaves[0], leaves[0]), *leaves[1:])


@for_each_op
def test_kernel_gradient_refuses_tangents(name: str) -> None:
    """Forward-over-reverse mode with the op called outside: the tangent would silently be 0."""
    call, leaves = function(cases.SMALL[name].cast(torch.float32))
    given = [leaf.clone().requires_grad_() for leaf in leaves]
    with softmask.backend("cpp"):
        out = call(*given)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="the cpp kernel's gradient has no rule for"):
        torch.autograd.grad(out, given, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


@for_each_op
def test_transforms_compile_to_one_graph(name: str) -> None:
    torch.compiler.reset()
    call, leaves = function(cases.SMALL[name].cast(torch.float64))
    every = tuple(range(len(leaves)))
    got = torch.compile(torch.func.grad(call, every), fullgraph=True, backend="eager")(*leaves)
    for one, other in zip(got, gradients(call, leaves), strict=True):
        torch.testing.assert_close(one, other)
    with softmask.backend("cpp"), pytest.raises(Exception, match="no rule for a transform of torch.func"):
        torch.compile(torch.func.grad(call), fullgraph=True, backend="eager")(*leaves)


@for_each_op
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_inputs_from_inference_mode_are_constants(name: str, backend: str) -> None:
    """The gradient of one input, all others from inference mode: autograd refuses to save those directly."""
    case = cases.SMALL[name].cast(torch.float32)
    plain = outcome(backend, case)
    with torch.inference_mode():
        made = {key: tensor.clone() for key, tensor in (case.leaves | case.fixed).items()}
    wanted = [leaf for leaf in case.leaves if leaf not in case.constants]
    for leaf in wanted[:1] if backend == "triton" else wanted:  # the interpreter is slow
        own = case.leaves[leaf].detach().requires_grad_()
        with softmask.backend(backend):
            out = case.call(**made | {leaf: own})
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        (gradient,) = torch.autograd.grad(out, own, upstream.to(out))
        torch.testing.assert_close(gradient, plain[leaf], msg=leaf)


@for_each_op
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradients_ignore_autocast(name: str, backend: str) -> None:
    """torch.compile traces the backward under the forward's autocast; in eager mode it may be called under one."""
    torch.compiler.reset()
    case = cases.SMALL[name].cast(torch.float32)
    call, leaves = function(case)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with softmask.backend(backend):
        expected = gradients(call, leaves)
        under = [leaf.clone().requires_grad_() for leaf in leaves]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = compiled(*under)
            inside = gradients(call, leaves)
        after = torch.autograd.grad(out, under)
    for got in (inside, after):
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)
