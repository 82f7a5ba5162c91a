"""Which backend runs an op: ``softmask.backend(name)``, or the environment variable SOFTMASK_BACKEND.

A selected backend that cannot run raises BackendError; only "auto" chooses for itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from softmask import kernels
from softmask.ops import _checks, _library, _transforms

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
ENVIRONMENT_VARIABLE = "SOFTMASK_BACKEND"
_KERNELS = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}

Device = torch.device | str


class BackendError(RuntimeError):
    """The selected backend cannot run this op on these inputs; the message says why."""


def _from_environment() -> str:
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"  # an empty value counts as unset
    _checks.one_of(ENVIRONMENT_VARIABLE, name, BACKENDS)
    return name


class _OfThread(threading.local):
    def __init__(self) -> None:  # once per thread; torch 2.11 would only see a class attribute
        self.name: str | None = None


# For compiled functions. torch.compile can guard on these, but not on the environment, nor on a context variable before
# torch 2.12.
_AT_IMPORT = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"  # validated on use, so that importing never fails
_of_thread = _OfThread()
_chosen: ContextVar[str | None] = ContextVar("softmask_backend", default=None)


def backend(name: str) -> AbstractContextManager[None]:
    """Run the ops inside the ``with`` block on one backend: "reference", "cpp", "triton", "cuda" or "auto" (default).

    Applies to the current thread or task. Enter it outside functions compiled by torch.compile. An op's gradient runs
    on the same backend as the op. Kernels support first derivatives in reverse mode only: under forward-mode AD and the
    transforms of torch.func, "auto" uses the reference and a selected kernel backend raises an error. The environment
    variable SOFTMASK_BACKEND sets the default; compiled functions use its value at the import of softmask.

    Raises:
        ValueError: unknown backend. BackendError is raised later, by an op that the backend cannot run.
    """
    _checks.one_of("backend", name, BACKENDS)
    return _use(name)


@contextmanager
def _use(name: str) -> Iterator[None]:
    token, before = _chosen.set(name), _of_thread.name
    _of_thread.name = name
    try:
        yield
    finally:
        _chosen.reset(token)
        _of_thread.name = before


def run(
    op: str,
    plain: Callable[..., Tensor],
    by_kernels: Callable[..., Tensor],
    *arguments: object,
    floating: Sequence[Tensor | None],
    kernel_pays: bool = True,
    **options: object,
) -> Tensor:
    """Run an op on the backend that `resolve` selects: by plain, the reference, or by_kernels(backend, ...)."""
    acting = _transforms.acting_on(one for one in (*arguments, *options.values()) if isinstance(one, Tensor))
    name = resolve(op, *floating, kernel_pays=kernel_pays, acting=acting)
    if name != "reference":
        return by_kernels(name, *arguments, **options)
    if torch.is_grad_enabled():  # kernels handle the tensors they save themselves
        arguments = tuple(_transforms.saveable(arguments))
        options = dict(zip(options, _transforms.saveable(options.values()), strict=True))
    return plain(*arguments, **options)


def resolve(op: str, *tensors: Tensor | None, kernel_pays: bool = True, acting: str | None = None) -> str:
    """The backend that runs op on the tensors' device. Raises BackendError if the selected one cannot.

    tensors: the op's floating-point inputs; kernels must support fp64 if any of them is fp64.
    kernel_pays: False if PyTorch is faster on these inputs according to benchmarks; "auto" then uses the reference.
    acting: a transform of the inputs that kernels do not support; "auto" then uses the reference.
    """
    name, given = named(), [tensor for tensor in tensors if tensor is not None]
    device, double = given[0].device, any(tensor.dtype == torch.float64 for tensor in given)
    dtype = torch.float64 if double else given[0].dtype
    if name == "auto":
        return choose(device, dtype, op=op) if kernel_pays and acting is None else "reference"
    reason = why_not(name, device, dtype, op=op)
    if reason is None and acting is not None and name != "reference":
        reason = f"its kernels have no rule for {acting}; {_library.OTHERWISE}"
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run {op}: {reason}")
    return name


def named() -> str:
    """The backend selected here: a name, or "auto"."""
    if torch.compiler.is_compiling():
        name = _of_thread.name or _AT_IMPORT
        _checks.one_of(ENVIRONMENT_VARIABLE, name, BACKENDS)
        return name
    return _chosen.get() or _from_environment()


def choose(device: Device, dtype: torch.dtype = torch.float32, *, op: str) -> str:
    """The backend that "auto" selects for an op."""
    return next(name for name in preferred(device) if why_not(name, device, dtype, op=op) is None)


def preferred(device: Device) -> tuple[str, ...]:
    """The order in which "auto" tries backends; the last one runs everywhere."""
    return (*_KERNELS.get(torch.device(device).type, ()), "reference")


def why_not(name: str, device: Device, dtype: torch.dtype = torch.float32, *, op: str) -> str | None:
    """Why a backend cannot run an op on a device for a dtype, or None if it can."""
    if name == "reference":
        return None
    if name == "cpp":
        return _why_not_cpp(device)
    if name == "triton":
        return kernels.why_not(torch.device(device), dtype)
    return _why_not_cuda(torch.device(device), dtype, op)


def _why_not_cpp(device: Device) -> str | None:
    kind = torch.device(device).type
    if kind != "cpu":
        return f"C++ kernels take CPU tensors, the inputs are on {kind}"
    return _library.MISSING


def _why_not_cuda(device: torch.device, dtype: torch.dtype, op: str) -> str | None:
    if op not in _library.CUDA_OPS:
        return f"only {' and '.join(_library.CUDA_OPS)} have CUDA C++ kernels"
    if device.type != "cuda":
        return f"CUDA C++ kernels take CUDA tensors, the inputs are on {device.type}"
    if dtype not in kernels.DTYPES:
        return f"CUDA C++ kernels take fp32, fp16 and bf16, the inputs are {str(dtype).removeprefix('torch.')}"
    if _library.CUDA_MISSING is None and torch.cuda.is_available():
        major = torch.cuda.get_device_properties(device).major
        if major < 8:
            return f"CUDA C++ kernels need a GPU of compute capability 8.0 or later, this one has {major}.x"
    return _library.CUDA_MISSING
