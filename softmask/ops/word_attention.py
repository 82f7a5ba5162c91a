"""Attention and Grad-CAM maps of selected words."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softmask import reference
from softmask.ops import _checks
from softmask.ops._backend import run
from softmask.ops._fused import word_attention as fused
from softmask.ops._transforms import constant


def word_attention(
    query: Tensor,
    key: Tensor,
    word_index: Tensor,
    *,
    value: Tensor | None = None,
    grad_output: Tensor | None = None,
    value_bias: Tensor | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    num_prefix_tokens: int = 0,
    normalize: str | None = None,
    differentiable: bool = False,
) -> Tensor:
    """Maps of words over image tokens: attention rows, or Grad-CAM inside a training step.

    Without grad_output, a map is the mean over heads and sub-tokens of the words' rows of A = softmax(scale * q k^T).
    With value and grad_output (the gradient of a score at the attention output, before the output projection) it is
    the mean of A * relu(grad_output (value + value_bias)^T), which is Grad-CAM on A. Only the words' rows are computed:
    no T x P matrix is stored and ``.grad`` is not touched::

        (grad_output,) = torch.autograd.grad(score.sum(), attention_output, retain_graph=True)
        maps = word_attention(query, key, word_index, value=value, grad_output=grad_output, num_prefix_tokens=1)

    Args:
        query: [B, H, T, E]; fp32, fp16, bf16 or fp64, as all floating arguments.
        key: [B, H, P, E].
        word_index: [B, W] or [B, W, S] int64, positions in T of each word or of its S sub-tokens, which are averaged.
            -1 is padding; a word of only -1 gives zeros.
        value: [B, H, P, V]; requires grad_output.
        grad_output: [B, H, T, V].
        value_bias: [H, V], added to value if values are stored without their bias.
        scale: default 1 / sqrt(E).
        key_padding_mask: [B, P] bool, True = ignore. If all keys of a row are ignored, it is zero.
        num_prefix_tokens: leading image tokens (CLS) to drop from the maps before normalization.
        normalize: None, "minmax", "max" or "sum", per map.
        differentiable: propagate gradients to query, key, value, value_bias and grad_output, for a loss on the maps.
            By default maps are constants.

    Returns:
        [B, W, P - num_prefix_tokens], fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: an argument is invalid; the message states what was expected and what was given.

    Source: ALBEF's word-wise Grad-CAM (arXiv 2107.07651); in training: SoftMask++ (arXiv 2304.00719).
    """
    _check(query, key, word_index, value, grad_output, value_bias, key_padding_mask)
    _check_options(scale, normalize, num_prefix_tokens, keys=key.shape[2])
    _checks.positions("word_index", word_index, least=-1, size=query.shape[2])
    if not differentiable:
        query, key = constant(query), constant(key)
        value, grad_output, value_bias = constant(value), constant(grad_output), constant(value_bias)
    return run(
        "word_attention", reference.word_attention, fused.word_attention, query, key, word_index,
        floating=(query, key, value, grad_output, value_bias), value=value, grad_output=grad_output,
        value_bias=value_bias, scale=scale, key_padding_mask=key_padding_mask, num_prefix_tokens=num_prefix_tokens,
        normalize=normalize,
    )  # fmt: skip


def _check_options(scale: float | None, normalize: str | None, num_prefix_tokens: int, *, keys: int) -> None:
    _checks.whole("num_prefix_tokens", num_prefix_tokens, least=0, most=keys - 1, of=f"of the {keys} keys")
    _checks.one_of("normalize", normalize, _checks.NORMALIZATIONS)
    if scale is not None:
        _checks.number("scale", scale)


def _check(
    query: Tensor,
    key: Tensor,
    word_index: Tensor,
    value: Tensor | None,
    grad_output: Tensor | None,
    value_bias: Tensor | None,
    key_padding_mask: Tensor | None,
) -> None:
    _checks.shape("query", query, ("B", "H", "T", "E"), H="head", T="token", E="feature")
    batch, heads, length, width = query.shape
    _checks.shape("key", key, (batch, heads, "P", width), P="image token")
    if word_index.dim() not in (2, 3) or len(word_index) != batch:
        _checks.fail("word_index", f"shape [{batch}, W] or [{batch}, W, S]", list(word_index.shape))
    _checks.dtype("word_index", word_index, (torch.int64,))
    if (value is None) != (grad_output is None):
        _checks.fail("value, grad_output", "both or neither", "grad_output alone" if value is None else "value alone")
    if value is not None:
        _checks.shape("value", value, (batch, heads, key.shape[2], "V"), V="feature")
        _checks.shape("grad_output", grad_output, (batch, heads, length, value.shape[3]))
    if value_bias is not None:
        if value is None:
            _checks.fail("value_bias", "None where no value is given", list(value_bias.shape))
        _checks.shape("value_bias", value_bias, (heads, value.shape[3]))
    if key_padding_mask is not None:
        _checks.shape("key_padding_mask", key_padding_mask, (batch, key.shape[2]))
        _checks.dtype("key_padding_mask", key_padding_mask, (torch.bool,))
    floating = {"query": query, "key": key, "value": value, "grad_output": grad_output, "value_bias": value_bias}
    for name, tensor in floating.items():
        if tensor is not None:
            _checks.dtype(name, tensor)
    _checks.device(query, word_index=word_index, key_padding_mask=key_padding_mask, **floating)


class WordAttention(nn.Module):
    """:func:`word_attention` as a layer without parameters."""

    def __init__(
        self,
        *,
        scale: float | None = None,
        num_prefix_tokens: int = 0,
        normalize: str | None = None,
        differentiable: bool = False,
    ) -> None:
        super().__init__()
        self.scale, self.num_prefix_tokens = scale, num_prefix_tokens
        self.normalize, self.differentiable = normalize, differentiable

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        word_index: Tensor,
        *,
        value: Tensor | None = None,
        grad_output: Tensor | None = None,
        value_bias: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        return word_attention(
            query,
            key,
            word_index,
            value=value,
            grad_output=grad_output,
            value_bias=value_bias,
            scale=self.scale,
            key_padding_mask=key_padding_mask,
            num_prefix_tokens=self.num_prefix_tokens,
            normalize=self.normalize,
            differentiable=self.differentiable,
        )

    def extra_repr(self) -> str:
        options = f"scale={self.scale}, num_prefix_tokens={self.num_prefix_tokens}, normalize={self.normalize!r}"
        return f"{options}, differentiable={self.differentiable}"
