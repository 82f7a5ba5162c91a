"""soft_mask by kernels: csrc/cpu/soft_mask.cpp, kernels/soft_mask.py and csrc/cuda/soft_mask.cu."""

from __future__ import annotations

from torch import Tensor

from softmask.ops import _library
from softmask.ops._library import Context, Gradients


def soft_mask(
    backend: str, features: Tensor, maps: Tensor, *, strength: float, normalize: str | None, num_prefix_tokens: int
) -> Tensor:
    return _KERNELS[backend](features, maps, strength, normalize or "none", num_prefix_tokens)


def _fake(features: Tensor, maps: Tensor, strength: float, normalize: str, num_prefix_tokens: int) -> Tensor:
    return features.new_empty((*maps.shape[:-1], *features.shape[1:]))


def _backward_fake(
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


def _setup(ctx: Context, inputs: tuple, output: Tensor) -> None:
    features, maps, ctx.strength, ctx.normalize, ctx.num_prefix_tokens = inputs
    _library.keep(ctx, features if ctx.needs_input_grad[1] else None, maps)


def _backward(ctx: Context, kernel: _library.Kernel, grad: Tensor) -> Gradients:
    features, maps = _library.kept(ctx)
    features_grad, maps_grad = kernel.backward(
        grad, features, maps, ctx.strength, ctx.normalize, ctx.num_prefix_tokens, ctx.needs_input_grad[0]
    )
    return _library.wanted(ctx, features_grad, maps_grad, None, None, None)


_KERNELS = _library.register(
    "soft_mask", fake=_fake, gradient=_library.Gradient(_setup, _backward, _backward_fake), in_cuda=True
)
