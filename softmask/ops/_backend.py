"""Which backend runs an op: ``softmask.backend(name)``, or the environment variable SOFTMASK_BACKEND.

A backend that was named and cannot run raises BackendError; only "auto" chooses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from softmask import kernels
from softmask.ops import _checks, _library

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
ENVIRONMENT_VARIABLE = "SOFTMASK_BACKEND"
_KERNELS = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}


class BackendError(RuntimeError):
    """The named backend cannot run this op on these inputs; the text says why."""


def _from_environment() -> str:
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"  # set to nothing, as shells do, is not set
    _checks.one_of(ENVIRONMENT_VARIABLE, name, BACKENDS)
    return name


# For compiled functions: torch.compile guards on the context variable, and could not on the environment.
_AT_IMPORT = _from_environment()
_chosen: ContextVar[str | None] = ContextVar("softmask_backend", default=None)


def backend(name: str) -> AbstractContextManager[None]:
    """Run the ops inside the ``with`` by one backend: "reference", "cpp", "triton", "cuda", or "auto" (the default).

    Holds for the current thread or task. Enter it outside of functions under torch.compile. The gradient of an op is
    taken by the backend that ran it. The environment variable SOFTMASK_BACKEND sets the default; a function under
    torch.compile takes what it was when softmask was imported.

    Raises:
        ValueError: no backend of this name. BackendError is raised by an op that the named backend cannot run.
    """
    _checks.one_of("backend", name, BACKENDS)
    return _use(name)


@contextmanager
def _use(name: str) -> Iterator[None]:
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def resolve(op: str, *tensors: Tensor | None, kernel_pays: bool = True) -> str:
    """The backend that runs op on the device of the tensors; BackendError where the named one cannot.

    tensors: the op's floating ones, the first not None; an fp64 one decides what kernels must be able to take.
    kernel_pays: False where benchmarks found PyTorch to be faster at these inputs; "auto" then takes the reference.
    """
    name, device = named(), tensors[0].device.type
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if double else tensors[0].dtype
    if name == "auto":
        return choose(device, dtype) if kernel_pays else "reference"
    reason = why_not(name, device, dtype)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run {op}: {reason}")
    return name


def named() -> str:
    """The backend that is asked for here: a name, or "auto"."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return _AT_IMPORT if torch.compiler.is_compiling() else _from_environment()


def choose(device: str, dtype: torch.dtype = torch.float32) -> str:
    """What "auto" takes."""
    return next(name for name in preferred(device) if why_not(name, device, dtype) is None)


def preferred(device: str) -> tuple[str, ...]:
    """The order in which "auto" tries backends; the last one runs everywhere."""
    return (*_KERNELS.get(device, ()), "reference")


def why_not(name: str, device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a backend cannot run ops on a device, for inputs of a type; None where it can."""
    if name == "reference":
        return None
    if name == "cpp":
        return _why_not_cpp(device)
    if name == "triton":
        return kernels.why_not(device, dtype)
    return "there are no CUDA C++ kernels"


def _why_not_cpp(device: str) -> str | None:
    if device != "cpu":
        return f"C++ kernels take CPU tensors, the inputs are on {device}"
    return _library.MISSING
