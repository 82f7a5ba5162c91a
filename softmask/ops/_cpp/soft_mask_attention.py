"""soft_mask_attention in C++ (csrc/cpu/soft_mask_attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from softmask.ops import _library


def soft_mask_attention(
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
    dtype = query.dtype
    query, key, value, value_bias = _library.of_one_type(query, key, value, value_bias)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key_weight = None if key_weight is None else key_weight.detach()
    options = (key_weight, kv_index, value_bias, key_padding_mask, scale)
    return torch.ops.softmask.soft_mask_attention(query, key, value, *options).to(dtype)


def _tokens_first(tensor: Tensor) -> Tensor:
    """Empty, of the shape [N, H, T, E] and laid out as [N, T, H, E], as the projections around attention are."""
    first, heads, tokens, width = tensor.shape
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
    pairs, heads, tokens, _ = query.shape
    return query.new_empty((pairs, tokens, heads, value.shape[3])).transpose(1, 2)


def _backward_fake(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_weight: Tensor | None,
    kv_index: Tensor | None,
    value_bias: Tensor | None,
    *_options: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, width = value.shape[1], value.shape[3]
    bias = query.new_empty((0, heads, width), dtype=_library.compute_dtype(query))
    bias = bias if value_bias is None else value_bias.new_empty(value_bias.shape)
    return _tokens_first(query), _tokens_first(key), _tokens_first(value), bias


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.softmask.soft_mask_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    query, key, value, value_bias = gradients
    by_input = (query, key, value, None, None, value_bias, None, None)
    return tuple(gradient if needed else None for gradient, needed in zip(by_input, ctx.needs_input_grad, strict=True))


if _library.MISSING is None:
    torch.library.register_fake("softmask::soft_mask_attention")(_fake)
    torch.library.register_fake("softmask::soft_mask_attention_backward")(_backward_fake)
    torch.library.register_autograd("softmask::soft_mask_attention", _backward, setup_context=_setup)
    refuse = _library.no_second_derivative("soft_mask_attention")
    torch.library.register_autograd("softmask::soft_mask_attention_backward", refuse)
