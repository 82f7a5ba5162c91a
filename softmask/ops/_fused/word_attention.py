"""word_attention by kernels: csrc/cpu/word_attention.cpp and kernels/word_attention.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softmask.ops import _library


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
    floating = (query, key, value, grad_output, value_bias)
    if backend == "cpp":  # which reads a bias of any type beside them; Triton's kernels read each tensor in its own
        double = value_bias is not None and value_bias.dtype == torch.float64  # and so are the maps
        given = (query, key, value, grad_output, value_bias if double else None)
        query, key, value, grad_output, _ = _library.of_one_type(*given)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in floating)
    out = _KERNELS[backend](
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
        *(() if backend == "cpp" else (keep,)),
    )
    return out if isinstance(out, Tensor) else out[0]


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
) -> Tensor:
    shape = (query.shape[0], word_index.shape[1], key.shape[2] - num_prefix_tokens)
    return query.new_empty(shape, dtype=_library.compute_dtype(query))


def _backward_fake(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    word_index: Tensor,
    value: Tensor | None,
    grad_output: Tensor | None,
    value_bias: Tensor | None,
    *_options: object,
) -> tuple[Tensor, ...]:
    inputs = (query, key, value, grad_output, value_bias)
    return tuple(query.new_empty((0,)) if tensor is None else tensor.new_empty(tensor.shape) for tensor in inputs)


def _setup(ctx, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
    """Of Triton's op also what it kept for the gradient: without `keep` nothing, and then it is run again."""
    ctx.options, ctx.kept = inputs[7:10], not isinstance(output, Tensor) and inputs[10]
    _library.keep(ctx, *inputs[:7], *(output[1:] if ctx.kept else ()))


def _gradients(ctx, given: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    query, key, value, grad_output, value_bias = given
    others = [None] * (len(ctx.needs_input_grad) - 6)
    return _library.wanted(ctx, query, key, None, value, grad_output, value_bias, *others)


def _backward(ctx, run: Callable, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, run(grad, *ctx.saved_tensors, *ctx.options))


def _triton_backward(ctx, run: Callable, grad: Tensor, *_of_kept: Tensor) -> tuple[Tensor | None, ...]:
    inputs, kept = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    if not ctx.kept:
        _, *kept = _KERNELS["triton"](*inputs, *ctx.options, True)
    return _gradients(ctx, run(grad, *kept, *inputs, *ctx.options))


def _triton_fake(
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
    """The maps, and with keep what the gradient takes (kernels/word_attention.py)."""
    options = (scale, num_prefix_tokens, normalize)
    maps = _fake(query, key, word_index, value, grad_output, value_bias, key_padding_mask, *options)
    rows, pitch = word_index.shape[1] * word_index.shape[2], (key.shape[2] + 15) // 16 * 16
    raw = maps.new_empty(maps.shape if keep and normalize != "none" else (0,))
    by_row = (1 if value is None else 2, *query.shape[:2], rows, pitch)
    return maps, raw, maps.new_empty(by_row if keep else (0,))


def _triton_backward_fake(
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
    return _backward_fake(grad, query, key, word_index, value, grad_output, value_bias)


def _flops(query: torch.Size, key: torch.Size, index: torch.Size, value: torch.Size | None, *_options: object) -> int:
    """The words' rows of logits and, of Grad-CAM, of the gradient at them."""
    return 2 * query[1] * index.numel() * key[2] * (key[3] + (0 if value is None else value[3]))


def _backward_flops(grad: torch.Size, *inputs: object) -> int:
    """Every row once more and a product for each of its two factors."""
    return 3 * _flops(*inputs)


def _triton_backward_flops(grad: torch.Size, raw: torch.Size, kept: torch.Size, *inputs: object) -> int:
    """The rows were kept."""
    return 2 * _flops(*inputs)


def _register(backend: str, **functions: Callable) -> _library.Kernels:
    return _library.register("word_attention", setup=_setup, flops=_flops, backends=(backend,), **functions)


_KERNELS = _register(
    "cpp", fake=_fake, backward=_backward, backward_fake=_backward_fake, backward_flops=_backward_flops
) | _register(
    "triton",
    fake=_triton_fake,
    backward=_triton_backward,
    backward_fake=_triton_backward_fake,
    backward_flops=_triton_backward_flops,
)
