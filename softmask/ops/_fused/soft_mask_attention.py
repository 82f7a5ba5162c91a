"""soft_mask_attention by kernels: csrc/cpu/soft_mask_attention.cpp and kernels/soft_mask_attention.py."""

from __future__ import annotations

import torch
from torch import Tensor

from softmask.ops import _library
from softmask.ops._library import Context, Gradients


def soft_mask_attention(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_weight: Tensor | None,
    kv_index: Tensor | None,
    value_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key_weight = None if key_weight is None else key_weight.detach()
    kernel = _KERNELS[backend]
    return kernel(query, key, value, key_weight, kv_index, value_bias, key_padding_mask, scale)


def _tokens_first(tensor: Tensor, width: int) -> Tensor:
    """Empty [N, H, T, width] laid out as [N, T, H, width], like the projections around attention."""
    first, heads, tokens, _ = tensor.shape
    return tensor.new_empty((first, tokens, heads, width)).transpose(1, 2)


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_weight: Tensor | None,
    kv_index: Tensor | None,
    value_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    return _tokens_first(query, value.shape[3])


def _backward_fake(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_weight: Tensor | None,
    kv_index: Tensor | None,
    value_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, width = value.shape[1], value.shape[3]
    bias = query.new_empty((0, heads, width), dtype=_library.compute_dtype(query, key, value))
    bias = bias if value_bias is None else value_bias.new_empty(value_bias.shape)
    query, key, value = (_tokens_first(tensor, tensor.shape[3]) for tensor in (query, key, value))
    return query, key, value, bias


def _setup(ctx: Context, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    _library.keep(ctx, *tensors)


def _backward(ctx: Context, kernel: _library.Kernel, grad: Tensor) -> Gradients:
    query, key, value, value_bias = kernel.backward(grad, *_library.kept(ctx), ctx.scale)
    return _library.wanted(ctx, query, key, value, None, None, value_bias, None, None)


def _flops(query: torch.Size, key: torch.Size, value: torch.Size, *_options: object) -> int:
    """Logits, and the weighted sum of values."""
    return 2 * query[:3].numel() * key[2] * (key[3] + value[3])


def _backward_flops(grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_options: object) -> int:
    """The logits again, and the gradients at probabilities, query, key and value."""
    return 2 * query[:3].numel() * key[2] * (3 * key[3] + 2 * value[3])


_KERNELS = _library.register(
    "soft_mask_attention",
    fake=_fake,
    gradient=_library.Gradient(_setup, _backward, _backward_fake, _backward_flops),
    flops=_flops,
)
