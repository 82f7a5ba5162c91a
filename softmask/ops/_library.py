"""Kernels as PyTorch ops: loads the C++ and CUDA extensions and registers each op's schema, shapes and gradient."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import register_flop_formula

from softmask.ops import _transforms


def _load(language: str, module: str, remedy: str) -> str | None:
    """Load an extension. Returns why it is missing, or None once it is loaded."""
    if importlib.util.find_spec(module) is None:
        return f"the {language} extension {module} is not built ({remedy} builds it)"
    try:
        importlib.import_module(module)
    except ImportError as error:  # built for another torch: warn and continue without it
        warnings.warn(f"softmask's {language} extension does not load, its kernels are not used: {error}", stacklevel=2)
        return f"the {language} extension {module} does not load: {error}"
    return None


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The type kernels compute in: fp64 if any tensor is fp64, otherwise fp32."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def common_dtype(first: Tensor, *others: Tensor | None) -> torch.dtype:
    """The tensors' type if they share one, otherwise the type to compute in."""
    alike = all(other is None or other.dtype == first.dtype for other in others)
    return first.dtype if alike else compute_dtype(first, *others)


def scalar(value: Tensor | float, *, like: Tensor) -> Tensor | float:
    """A number, or a 0-dim tensor on the device of `like`."""
    return value.to(like.device) if isinstance(value, Tensor) else value


OTHERWISE = "softmask.backend('reference') has PyTorch's"
"""The advice at the end of kernels' error messages."""

MISSING = _load("C++", "softmask._C", "installing with a C++ compiler")
"""Why there are no C++ kernels, or None if they are loaded."""

CUDA_MISSING = _load("CUDA", "softmask._cuda", "installing with SOFTMASK_CUDA=1 and nvcc")
"""Why there are no CUDA C++ kernels, or None if they are loaded."""

CUDA_OPS: list[str] = []
"""Public names of the ops that have CUDA C++ kernels, whether these are built or not."""

_LIBRARY = torch.library.Library("softmask", "FRAGMENT")  # what Python registers


class Context(Protocol):
    """The autograd context of an op: saved tensors, and any attribute set by `setup`."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...


class Op:
    """One pass of an op on one backend.

    Called with plain tensors in eager mode, it runs the kernel under autograd, without PyTorch's dispatcher, whose
    Python registrations take longer than all else on the host. What has to see the op itself gets it from the
    dispatcher: torch.compile, modes, the profiler, tensor subclasses.

    Attributes:
        numbers: positions of 0-dim tensors that may be given as numbers. The schema has no such type, so a number
            becomes a tensor on its way to the dispatcher, which keeps its value out of compiled graphs.
    """

    def __init__(self, overload: OpOverload, kernel: Callable[..., Any], numbers: Sequence[str]) -> None:
        self.overload, self.kernel = overload, kernel
        names = [argument.name for argument in overload._schema.arguments]
        self.numbers = tuple(names.index(name) for name in numbers if name in names)
        self.function: type[torch.autograd.Function] | None = None  # None: without gradient

    def dispatch(self, *inputs: Any) -> Any:
        """Calls the op through PyTorch's dispatcher."""
        given = list(inputs)
        for place in self.numbers:
            if not isinstance(given[place], Tensor):
                given[place] = torch.full((), given[place], dtype=torch.float64, device=given[0].device)
        return self.overload(*given)

    def __call__(self, *inputs: Any) -> Any:
        if not _transforms.are_plain(inputs):
            return self.dispatch(*inputs)
        if self.function is not None and _transforms.need_gradient(inputs):
            return self.function.apply(*inputs, None)
        return self.kernel(*inputs)


Kernels = dict[str, Op]
"""An op's implementations by backend."""


class Kernel(NamedTuple):
    """A differentiable op of one backend, and the op of its gradient."""

    forward: Op
    backward: Op


Gradients = tuple[Tensor | None, ...]
"""One gradient per input of an op, None for inputs without one."""

Setup = Callable[[Context, tuple, Any], None]
"""``setup(ctx, inputs, output)`` saves what the backward pass needs."""


@dataclass(frozen=True)
class Gradient:
    """How an op is differentiated.

    backward: ``backward(ctx, kernel, *grads)`` returns the gradients of all inputs by the same backend's kernel.
    fake: the signature and output shapes of the op ``name_backward``.
    flops: as in :func:`register`, for ``name_backward``.
    """

    setup: Setup
    backward: Callable[..., Gradients]
    fake: Callable
    flops: Callable[..., int] | None = None


def register(
    name: str,
    *,
    fake: Callable,
    gradient: Gradient | None = None,
    flops: Callable[..., int] | None = None,
    numbers: Sequence[str] = (),
    public_name: str | None = None,
    in_cuda: bool = False,
) -> Kernels:
    """Register the op ``name``, and ``name_backward`` if it has a gradient, for every backend.

    All backends share one signature, that of fake, and one autograd formula. The C++ extension defines
    ``softmask::name``. Triton's op is ``softmask::triton_name``: it runs `forward` of kernels/name.py, and
    ``softmask::triton_name_backward`` runs `backward`. ``softmask::cuda_name`` is defined here and implemented by the
    CUDA extension. Second derivatives raise an error; without it autograd would return wrong values.

    Args:
        fake: returns empty outputs; fully annotated, since the schemas of Triton and CUDA are inferred from it.
        flops: floating-point operations of the op's products, given its arguments with shapes for tensors. A
            multiplication and an addition count as 2. torch.utils.flop_counter calls it.
        numbers: arguments that are 0-dim tensors in the schema, and may be given as numbers.
        public_name: the public function's name, for error messages; default: name.
        in_cuda: whether csrc/cuda has kernels of this op.
    """
    kernels = {}
    defined = [("triton", _define_triton)]
    if MISSING is None:
        defined.append(("cpp", _define_cpp))
    if in_cuda:
        CUDA_OPS.append(public_name or name)
        defined.append(("cuda", _define_cuda))
    for backend, define in defined:
        kernels[backend] = _counted(define(name, "forward", fake, numbers), flops)
        if gradient is not None:
            backward = _counted(define(name, "backward", gradient.fake, numbers), gradient.flops)
            _register_gradient(Kernel(kernels[backend], backward), gradient, public_name or name, backend)
    return kernels


def _counted(op: Op, flops: Callable[..., int] | None) -> Op:
    if flops is not None:
        register_flop_formula(op.overload.overloadpacket)(_of_shapes(flops))
    return op


def _define_cpp(name: str, direction: str, fake: Callable, numbers: Sequence[str]) -> Op:
    full = _full_name(name, direction)
    torch.library.register_fake(f"softmask::{full}")(fake)
    return _of_extension(full, numbers)


def _define_cuda(name: str, direction: str, fake: Callable, numbers: Sequence[str]) -> Op:
    """Without the extension the op has no implementation, but compiles on fake tensors."""
    full = f"cuda_{_full_name(name, direction)}"
    _define(full, fake)
    return _of_extension(full, numbers)


def _of_extension(full: str, numbers: Sequence[str]) -> Op:
    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.dispatch(*args)

    op = Op(_overload(full), run, numbers)
    return op


def _define_triton(name: str, direction: str, fake: Callable, numbers: Sequence[str]) -> Op:
    """Kernels are imported when they first run, so nothing before needs Triton."""

    def run(*args: Any) -> Any:
        if not launcher:
            launcher.append(getattr(importlib.import_module(f"softmask.kernels.{name}"), direction))
        return launcher[0](*args)

    launcher: list[Callable] = []
    full = f"triton_{_full_name(name, direction)}"
    _define(full, fake)
    _LIBRARY.impl(full, run, "CompositeExplicitAutograd")
    return Op(_overload(full), run, numbers)


def _define(full: str, fake: Callable) -> None:
    _LIBRARY.define(f"{full}{torch.library.infer_schema(fake, mutates_args=())}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"softmask::{full}")(fake)


def _overload(full: str) -> OpOverload:
    return getattr(torch.ops.softmask, full).default


def _full_name(name: str, direction: str) -> str:
    return f"{name}_backward" if direction == "backward" else name


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

    def refuse(ctx: Context, *grads: Tensor) -> NoReturn:
        raise RuntimeError(f"{public_name}: the {backend} kernel has no second derivative; {OTHERWISE}")

    _register_autograd(kernel.forward, gradient.setup, run_backward)
    _register_autograd(kernel.backward, None, refuse)


def _register_autograd(op: Op, setup: Setup | None, backward: Callable[..., Gradients]) -> None:
    """torch.library.register_autograd for ops without defaults and keyword arguments, in half its time per call."""

    def dispatch(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *given, keyset = inputs  # last, so that the positions in needs_input_grad are the op's
            output = op.kernel(*given) if keyset is None else dispatch(keyset, *given)
            if setup is not None:
                setup(ctx, tuple(given), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (*backward(ctx, *grads), None)

    def run(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        return Differentiable.apply(*inputs, keyset) if _transforms.need_gradient(inputs) else dispatch(keyset, *inputs)

    op.function = Differentiable
    _LIBRARY.impl(op.overload.name().removeprefix("softmask::"), run, "Autograd", with_keyset=True)


def keep(ctx: Context, *values: Tensor | float | None) -> None:
    """Save tensors and numbers for the backward pass, including tensors created in inference mode."""
    ctx.numbers = tuple(None if isinstance(one, Tensor) else one for one in values)
    ctx.save_for_backward(*_transforms.saveable(one if isinstance(one, Tensor) else None for one in values))


def kept(ctx: Context) -> tuple[Any, ...]:
    """What `keep` saved."""
    saved = zip(ctx.saved_tensors, ctx.numbers, strict=True)
    return tuple(number if tensor is None else tensor for tensor, number in saved)


def wanted(ctx: Context, *by_input: Tensor | None) -> Gradients:
    """The gradients of an op's inputs, in order, with None for those that are not needed."""
    needed = ctx.needs_input_grad[:-1]  # the last belongs to no input of the op
    return tuple(gradient if asked else None for gradient, asked in zip(by_input, needed, strict=True))
