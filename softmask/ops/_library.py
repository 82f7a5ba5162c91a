"""Kernels as PyTorch ops: loads the C++ extension and registers each op's schema, shapes and gradient."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import register_flop_formula

from softmask.ops import _transforms


def _load() -> str | None:
    """Load the extension. Returns why it is missing, or None once it is loaded."""
    if importlib.util.find_spec("softmask._C") is None:
        return "the C++ extension softmask._C is not built (installing with a C++ compiler builds it)"
    try:
        importlib.import_module("softmask._C")
    except ImportError as error:  # built for another torch: warn and continue without it
        warnings.warn(f"softmask's C++ extension does not load, PyTorch is used instead: {error}", stacklevel=2)
        return f"the C++ extension softmask._C does not load: {error}"
    return None


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The type kernels compute in: fp64 if any tensor is fp64, otherwise fp32."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def common_dtype(first: Tensor, *others: Tensor | None) -> torch.dtype:
    """The tensors' type if they share one, otherwise the type to compute in."""
    alike = all(other is None or other.dtype == first.dtype for other in others)
    return first.dtype if alike else compute_dtype(first, *others)


def scalar(value: Tensor | float, *, like: Tensor) -> Tensor:
    """A number as a 0-dim tensor, which keeps its value out of compiled graphs."""
    if isinstance(value, Tensor):
        return value.to(like.device)
    return torch.full((), value, dtype=torch.float64, device=like.device)


OTHERWISE = "softmask.backend('reference') has PyTorch's"
"""The advice at the end of kernels' error messages."""

MISSING = _load()
"""Why there are no C++ kernels, or None if they are loaded."""


class Context(Protocol):
    """The autograd context of an op: saved tensors, and any attribute set by `setup`."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...


Kernels = dict[str, OpOverload]
"""An op's implementations by backend."""


class Kernel(NamedTuple):
    """A differentiable op of one backend, and the op of its gradient."""

    forward: OpOverload
    backward: OpOverload


Gradients = tuple[Tensor | None, ...]
"""One gradient per input of an op, None for inputs without one."""


@dataclass(frozen=True)
class Gradient:
    """How an op is differentiated.

    setup: ``setup(ctx, inputs, output)`` saves what the backward pass needs.
    backward: ``backward(ctx, kernel, *grads)`` returns the gradients of all inputs by the same backend's kernel.
    fake: the signature and output shapes of the op ``name_backward``.
    flops: as in :func:`register`, for ``name_backward``.
    """

    setup: Callable[[Context, tuple, Any], None]
    backward: Callable[..., Gradients]
    fake: Callable
    flops: Callable[..., int] | None = None


def register(
    name: str,
    *,
    fake: Callable,
    gradient: Gradient | None = None,
    flops: Callable[..., int] | None = None,
    public_name: str | None = None,
) -> Kernels:
    """Register the op ``name``, and ``name_backward`` if it has a gradient, for every backend.

    All backends share one signature, that of fake, and one autograd formula. The C++ extension defines
    ``softmask::name``. Triton's op is ``softmask::triton_name``: it runs `forward` of kernels/name.py, and
    ``softmask::triton_name_backward`` runs `backward`. Second derivatives raise an error; without it autograd would
    return wrong values.

    Args:
        fake: returns empty outputs; fully annotated, since Triton's schema is inferred from it.
        flops: floating-point operations of the op's products, given its arguments with shapes for tensors. A
            multiplication and an addition count as 2. torch.utils.flop_counter calls it.
        public_name: the public function's name, for error messages; default: name.
    """
    kernels = {}
    for backend, prefix in (("cpp", ""), ("triton", "triton_")):
        if backend == "cpp" and MISSING is not None:
            continue
        define = _define_triton if backend == "triton" else _define_cpp
        kernels[backend] = define(name, prefix, "forward", fake, flops)
        if gradient is not None:
            backward = define(name, prefix, "backward", gradient.fake, gradient.flops)
            _register_gradient(Kernel(kernels[backend], backward), gradient, public_name or name, backend)
    return kernels


def _define_cpp(name: str, prefix: str, direction: str, fake: Callable, flops: Callable[..., int] | None) -> OpOverload:
    op = _op(f"{prefix}{name}", direction, flops)
    torch.library.register_fake(op.name())(fake)
    return op


def _define_triton(
    name: str, prefix: str, direction: str, fake: Callable, flops: Callable[..., int] | None
) -> OpOverload:
    """Kernels are imported when they first run, so nothing before needs Triton."""

    def run(*args: object) -> object:
        return getattr(importlib.import_module(f"softmask.kernels.{name}"), direction)(*args)

    full = f"softmask::{prefix}{name}" + ("_backward" if direction == "backward" else "")
    schema = torch.library.infer_schema(fake, mutates_args=())
    torch.library.custom_op(full, run, mutates_args=(), schema=schema).register_fake(fake)
    return _op(f"{prefix}{name}", direction, flops)


def _op(name: str, direction: str, flops: Callable[..., int] | None) -> OpOverload:
    op = getattr(torch.ops.softmask, name + ("_backward" if direction == "backward" else "")).default
    if flops is not None:
        register_flop_formula(op.overloadpacket)(_of_shapes(flops))
    return op


def _of_shapes(count: Callable[..., int]) -> Callable[..., int]:
    def formula(*arguments: object, out_shape: object = None, **_: object) -> int:
        return count(*arguments)

    return formula


def _register_gradient(kernel: Kernel, gradient: Gradient, public_name: str, backend: str) -> None:
    def run_backward(ctx: Context, *grads: Tensor) -> Gradients:
        acting = _transforms.acting_on(grad for grad in grads if grad is not None)
        if acting is not None:
            raise RuntimeError(f"{public_name}: the {backend} kernel's gradient has no rule for {acting}; {OTHERWISE}")
        return gradient.backward(ctx, kernel, *grads)

    def refuse(ctx: Context, *grads: Tensor) -> None:
        raise RuntimeError(f"{public_name}: the {backend} kernel has no second derivative; {OTHERWISE}")

    torch.library.register_autograd(kernel.forward, run_backward, setup_context=gradient.setup)
    torch.library.register_autograd(kernel.backward, refuse)


def keep(ctx: Context, *tensors: Tensor | None) -> None:
    """Save tensors for the backward pass, including those created in inference mode."""
    ctx.save_for_backward(*(None if tensor is None else _transforms.saveable(tensor) for tensor in tensors))


def wanted(ctx: Context, *by_input: Tensor | None) -> Gradients:
    """The gradients of an op's inputs, in order, with None for those that are not needed."""
    return tuple(gradient if asked else None for gradient, asked in zip(by_input, ctx.needs_input_grad, strict=True))
