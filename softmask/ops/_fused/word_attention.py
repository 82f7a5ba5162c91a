"""word_attention by kernels: csrc/cpu/word_attention.cpp, kernels/word_attention.py, csrc/cuda/word_attention.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from softmask.ops import _library, _transforms
from softmask.ops._library import Context, Gradients


def word_attention(
    backend: str,
    query: Tensor,
    key: Tensor,
    word_index: Tensor,
    *,
    value: Tensor | None,
    grad_output: Tensor | None,
    value_bias: Tensor | None,
    scale: float | None,
    key_padding_mask: Tensor | None,
    num_prefix_tokens: int,
    normalize: str | None,
) -> Tensor:
    maps, *_ = _KERNELS[backend](
        query,
        key,
        word_index if word_index.dim() == 3 else word_index.unsqueeze(-1),
        value,
        grad_output,
        value_bias,
        key_padding_mask,
        query.shape[-1] ** -0.5 if scale is None else scale,
        num_prefix_tokens,
        normalize or "none",
        _transforms.need_gradient((query, key, value, grad_output, value_bias)),
    )
    return maps


def _fake(
    query: Tensor,
    key: Tensor,
    word_index: Tensor,
    value: Tensor | None,
    grad_output: Tensor | None,
    value_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float,
    num_prefix_tokens: int,
    normalize: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The maps and, with keep, what the gradient needs: the maps before normalization, and the words' rows."""
    dtype = _library.compute_dtype(query, key, value, grad_output, value_bias)
    shape = (query.shape[0], word_index.shape[1], key.shape[2] - num_prefix_tokens)
    maps = query.new_empty(shape, dtype=dtype)
    raw = maps.new_empty(shape if keep and normalize != "none" else (0,))
    rows, pitch = word_index.shape[1] * word_index.shape[2], (key.shape[2] + 15) // 16 * 16
    kept = (1 if value is None else 2, *query.shape[:2], rows, pitch)
    return maps, raw, maps.new_empty(kept if keep else (0,))


def _backward_fake(
    grad: Tensor,
    raw: Tensor,
    kept: Tensor,
    query: Tensor,
    key: Tensor,
    word_index: Tensor,
    value: Tensor | None,
    grad_output: Tensor | None,
    value_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float,
    num_prefix_tokens: int,
    normalize: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None) -> Tensor:
        return query.new_empty((0,)) if tensor is None else tensor.new_empty(tensor.shape)

    return like(query), like(key), like(value), like(grad_output), like(value_bias)


def _setup(ctx: Context, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    """Keep the inputs and what the forward pass kept. Without `keep` the backward pass runs it again."""
    *tensors, ctx.scale, ctx.num_prefix_tokens, ctx.normalize, ctx.kept = inputs
    _library.keep(ctx, *tensors, *(output[1:] if ctx.kept else ()))


def _backward(ctx: Context, kernel: _library.Kernel, grad: Tensor, *_grad_kept: Tensor) -> Gradients:
    saved = _library.kept(ctx)
    inputs, kept = (*saved[:7], ctx.scale, ctx.num_prefix_tokens, ctx.normalize), saved[7:]
    if not ctx.kept:
        _, *kept = kernel.forward(*inputs, True)
    query, key, value, grad_output, value_bias = kernel.backward(grad, *kept, *inputs)
    return _library.wanted(ctx, query, key, None, value, grad_output, value_bias, *(None,) * 5)


def _flops(query: torch.Size, key: torch.Size, index: torch.Size, value: torch.Size | None, *_options: object) -> int:
    """The words' rows of logits and, for Grad-CAM, of the gradient at the attention."""
    return 2 * query[1] * index.numel() * key[2] * (key[3] + (0 if value is None else value[3]))


def _backward_flops(
    grad: torch.Size,
    raw: torch.Size,
    kept: torch.Size,
    query: torch.Size,
    key: torch.Size,
    index: torch.Size,
    value: torch.Size | None,
    *_options: object,
) -> int:
    """A product for each of a row's two factors; the rows themselves were kept."""
    return 2 * _flops(query, key, index, value)


_KERNELS = _library.register(
    "word_attention",
    fake=_fake,
    gradient=_library.Gradient(_setup, _backward, _backward_fake, _backward_flops),
    flops=_flops,
    in_cuda=True,
)
