"""The C++ kernels: loads the extension and gives its ops shapes (for torch.compile) and gradients."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

import torch
from torch import Tensor

OPS = ("soft_mask",)
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


def soft_mask(
    features: Tensor, maps: Tensor, *, strength: float, normalize: str | None, num_prefix_tokens: int
) -> Tensor:
    return torch.ops.softmask.soft_mask(features, maps, strength, normalize or "none", num_prefix_tokens)


def _soft_mask_fake(features: Tensor, maps: Tensor, strength: float, normalize: str, num_prefix_tokens: int) -> Tensor:
    return features.new_empty((*maps.shape[:-1], *features.shape[1:]))


def _soft_mask_backward_fake(
    grad: Tensor,
    features: Tensor | None,
    maps: Tensor,
    strength: float,
    normalize: str,
    num_prefix_tokens: int,
    features_grad: bool,
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = grad.shape[0], grad.shape[-2], grad.shape[-1]
    return (
        grad.new_empty((batch, tokens, width) if features_grad else (0,)),
        maps.new_empty(maps.shape if features is not None else (0,)),
    )


def _soft_mask_setup(ctx, inputs: tuple, output: Tensor) -> None:
    features, maps, ctx.strength, ctx.normalize, ctx.num_prefix_tokens = inputs
    ctx.save_for_backward(features if ctx.needs_input_grad[1] else None, maps)


def _soft_mask_backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    features, maps = ctx.saved_tensors
    features_grad, maps_grad = torch.ops.softmask.soft_mask_backward(
        grad, features, maps, ctx.strength, ctx.normalize, ctx.num_prefix_tokens, ctx.needs_input_grad[0]
    )
    return (
        features_grad if ctx.needs_input_grad[0] else None,
        maps_grad if ctx.needs_input_grad[1] else None,
        None,
        None,
        None,
    )


def _no_second_backward(ctx, *grads: Tensor) -> None:
    raise RuntimeError("soft_mask: the C++ kernel has no second derivative; softmask.backend('reference') has")


MISSING = _load()
"""Why there are no C++ kernels; None where they are loaded."""

if MISSING is None:
    torch.library.register_fake("softmask::soft_mask")(_soft_mask_fake)
    torch.library.register_fake("softmask::soft_mask_backward")(_soft_mask_backward_fake)
    torch.library.register_autograd("softmask::soft_mask", _soft_mask_backward, setup_context=_soft_mask_setup)
    torch.library.register_autograd("softmask::soft_mask_backward", _no_second_backward)
