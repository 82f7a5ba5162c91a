"""Kernels as PyTorch ops: loads the C++ extension, says why there may be none, and registers shapes and gradients."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from softmask.ops import _transforms


def _load() -> str | None:
    """Load the extension; returns why there is none."""
    if importlib.util.find_spec("softmask._C") is None:
        return "the C++ extension softmask._C is not built (installing with a C++ compiler builds it)"
    try:
        importlib.import_module("softmask._C")
    except ImportError as error:  # built for another torch: say so and go on without
        warnings.warn(f"softmask's C++ extension does not load, PyTorch is used instead: {error}", stacklevel=2)
        return f"the C++ extension softmask._C does not load: {error}"
    return None


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What kernels compute in, and return where the result is not of the inputs' type."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def of_one_type(*tensors: Tensor | None) -> list[Tensor | None]:
    """As they are where they agree, else all in fp32, or fp64 where one of them is."""
    types = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(types) <= 1:
        return list(tensors)
    common = torch.float64 if torch.float64 in types else torch.float32
    return [None if tensor is None else tensor.to(common) for tensor in tensors]


def scalar(value: Tensor | float, *, like: Tensor) -> Tensor:
    """A number as the 0-dim tensor that kernels take, so that no value is part of a compiled graph."""
    if isinstance(value, Tensor):
        return value.to(like.device)
    return torch.full((), value, dtype=torch.float64, device=like.device)


OTHERWISE = "softmask.backend('reference') has PyTorch's"
"""What an error of a kernel says to do instead."""

MISSING = _load()
"""Why there are no C++ kernels; None where they are loaded."""

Kernels = dict[str, Callable]
"""Backend -> the PyTorch op that runs its kernel."""


def register(
    name: str,
    *,
    fake: Callable,
    setup: Callable | None = None,
    backward: Callable | None = None,
    backward_fake: Callable | None = None,
    flops: Callable[..., int] | None = None,
    backward_flops: Callable[..., int] | None = None,
    public_name: str | None = None,
    backends: tuple[str, ...] = ("cpp", "triton"),
) -> Kernels:
    """The op ``name``, and where it has a gradient ``name_backward``, by each of backends: shapes and autograd.

    The C++ extension defines softmask::name. In Triton softmask::triton_name has the signature of fake, which is fully
    annotated, and runs `forward` of kernels/name.py; its gradient runs `backward`. ``backward(ctx, run, *grads)`` calls
    run, the op of the same backend. A second derivative raises, where autograd would otherwise be silently wrong.
    flops, backward_flops: floating-point operations of the products, 2 for a multiplication and an addition, of the
    op's arguments with shapes for tensors; torch.utils.flop_counter asks for them.
    """
    kernels = {}
    for backend in backends:
        if backend == "triton":
            full = _define_triton(f"triton_{name}", name, "forward", fake)
            if backward_fake is not None:
                _define_triton(f"triton_{name}_backward", name, "backward", backward_fake)
        elif MISSING is None:
            full = f"softmask::{name}"
            torch.library.register_fake(full)(fake)
            if backward_fake is not None:
                torch.library.register_fake(f"{full}_backward")(backward_fake)
        else:
            continue
        if backward is not None:
            _register_gradient(full, setup, backward, public_name or name, backend)
        for which, count in ((full, flops), (f"{full}_backward", backward_flops)):
            if count is not None:
                register_flop_formula(_op(which).overloadpacket)(_of_shapes(count))
        kernels[backend] = _op(full)
    return kernels


def _op(full: str) -> Callable:
    return getattr(torch.ops.softmask, full.removeprefix("softmask::")).default


def _of_shapes(count: Callable[..., int]) -> Callable[..., int]:
    def formula(*arguments: object, out_shape: object = None, **_: object) -> int:
        return count(*arguments)

    return formula


def _define_triton(name: str, module: str, function: str, fake: Callable) -> str:
    """Kernels are imported when they first run: until then nothing here needs Triton."""

    def run(*args: object) -> object:
        return getattr(importlib.import_module(f"softmask.kernels.{module}"), function)(*args)

    full = f"softmask::{name}"
    schema = torch.library.infer_schema(fake, mutates_args=())
    torch.library.custom_op(full, run, mutates_args=(), schema=schema).register_fake(fake)
    return full


def _register_gradient(full: str, setup: Callable, backward: Callable, public_name: str, backend: str) -> None:
    def run_backward(ctx, *grads: Tensor) -> tuple:
        acting = _transforms.acting_on(grad for grad in grads if grad is not None)
        if acting is not None:
            raise RuntimeError(f"{public_name}: the {backend} kernel's gradient has no rule for {acting}; {OTHERWISE}")
        return backward(ctx, _op(f"{full}_backward"), *grads)

    def refuse(ctx, *grads: Tensor) -> None:
        raise RuntimeError(f"{public_name}: the {backend} kernel has no second derivative; {OTHERWISE}")

    torch.library.register_autograd(full, run_backward, setup_context=setup)
    torch.library.register_autograd(f"{full}_backward", refuse)


def keep(ctx, *tensors: Tensor | None) -> None:
    """Save tensors for the backward pass, those made in inference mode too."""
    ctx.save_for_backward(*map(_transforms.saveable, tensors))


def wanted(ctx, *by_input: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of an op's inputs, in their order, without those that nobody asked for."""
    return tuple(gradient if asked else None for gradient, asked in zip(by_input, ctx.needs_input_grad, strict=True))
