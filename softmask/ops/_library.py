"""The C++ extension: loads it, and says for which ops it has kernels and why there may be none."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

OPS = (
    "soft_mask",
    "word_attention",
    "focal_contrastive_loss",
    "momentum_contrastive_loss",
    "soft_mask_attention",
    "attentive_mask",
    "masked_patch_loss",
)
"""Ops that have a C++ kernel for the CPU."""


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
    if len(types) == 1:
        return list(tensors)
    common = torch.float64 if torch.float64 in types else torch.float32
    return [None if tensor is None else tensor.to(common) for tensor in tensors]


def scalar(value: Tensor | float, *, like: Tensor) -> Tensor:
    """A number as the 0-dim tensor that kernels take, so that no value is part of a compiled graph."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64, device=like.device)


MISSING = _load()
"""Why there are no C++ kernels; None where they are loaded."""


def register(
    name: str,
    *,
    fake: Callable,
    setup: Callable,
    backward: Callable,
    backward_fake: Callable,
    public_name: str | None = None,
) -> None:
    """Shapes and gradient of the op ``name`` and of ``name_backward``, where the extension is loaded.

    A second derivative raises, where autograd would otherwise be silently wrong.
    """

    def refuse(ctx, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{public_name or name}: the C++ kernel has no second derivative; softmask.backend('reference') has"
        )

    if MISSING is None:
        torch.library.register_fake(f"softmask::{name}")(fake)
        torch.library.register_fake(f"softmask::{name}_backward")(backward_fake)
        torch.library.register_autograd(f"softmask::{name}", backward, setup_context=setup)
        torch.library.register_autograd(f"softmask::{name}_backward", refuse)


def wanted(ctx, *by_input: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of an op's inputs, in their order, without those that nobody asked for."""
    return tuple(gradient if asked else None for gradient, asked in zip(by_input, ctx.needs_input_grad, strict=True))
