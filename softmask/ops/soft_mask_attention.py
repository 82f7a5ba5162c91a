"""Cross-attention to soft-masked images, with keys and values projected once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softmask import reference
from softmask.ops import _checks
from softmask.ops._backend import run
from softmask.ops._fused import soft_mask_attention as fused
from softmask.ops._transforms import constant


def soft_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_weight: Tensor | None = None,
    kv_index: Tensor | None = None,
    value_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The attention over keys and values of soft-masked image tokens, computed exactly from unmasked projections:
    ``a = softmax_p(key_weight_p (q . k_p) scale)``, ``out = sum_p a_p key_weight_p v_p + (sum_p a_p) value_bias``.

    Args:
        query: [N, H, T, E]; fp32, fp16, bf16 or fp64, as all floating arguments.
        key: [B, H, P, E], projected WITHOUT bias from unmasked image tokens (the keys' bias drops out of the softmax).
        value: [B, H, P, V], likewise.
        key_weight: [N, P], 1 = keep, 0 = masked: the factors of :func:`soft_mask`, without gradient.
        kv_index: [N] int64, the image of each pair; None: pair n uses image n, and N = B.
        value_bias: [H, V], the value projection's bias.
        key_padding_mask: [B, P] bool over the images' tokens, True = ignore. If all keys of a row are ignored, it
            is zero.
        scale: default 1 / sqrt(E).

    Returns:
        [N, H, T, V] in the dtype of query, computed in fp32 (fp64 for fp64 inputs), differentiable in query, key,
        value and value_bias.

    Raises:
        ValueError: an argument is invalid; the message states what was expected and what was given.
    """
    _check(query, key, value, kv_index, value_bias, key_padding_mask)
    if key_weight is not None:
        _checks.shape("key_weight", key_weight, (len(query), key.shape[2]))
        _checks.dtype("key_weight", key_weight)
        _checks.device(query, key_weight=key_weight)
    if scale is not None:
        _checks.number("scale", scale)
    if kv_index is not None:
        _checks.positions("kv_index", kv_index, least=0, size=len(key))
    return run(
        "soft_mask_attention",
        reference.soft_mask_attention,
        fused.soft_mask_attention,
        query,
        key,
        value,
        floating=(query, key, value, value_bias),
        key_weight=constant(key_weight),
        kv_index=kv_index,
        value_bias=value_bias,
        key_padding_mask=key_padding_mask,
        scale=scale,
    )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_index: Tensor | None,
    value_bias: Tensor | None,
    key_padding_mask: Tensor | None,
) -> None:
    _checks.shape("query", query, ("N", "H", "T", "E"), H="head", E="feature")
    pairs, heads, _, width = query.shape
    _checks.shape("key", key, (pairs if kv_index is None else "B", heads, "P", width), P="image token")
    _checks.shape("value", value, (*key.shape[:3], "V"), V="feature")
    if kv_index is not None:
        _checks.shape("kv_index", kv_index, (pairs,))
        _checks.dtype("kv_index", kv_index, (torch.int64,))
    if value_bias is not None:
        _checks.shape("value_bias", value_bias, (heads, value.shape[3]))
        _checks.dtype("value_bias", value_bias)
    if key_padding_mask is not None:
        _checks.shape("key_padding_mask", key_padding_mask, (key.shape[0], key.shape[2]))
        _checks.dtype("key_padding_mask", key_padding_mask, (torch.bool,))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _checks.dtype(name, tensor)
    _checks.device(
        query, key=key, value=value, kv_index=kv_index, value_bias=value_bias, key_padding_mask=key_padding_mask
    )


class SoftMaskAttention(nn.Module):
    """:func:`soft_mask_attention` as a layer without parameters."""

    def __init__(self, *, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_weight: Tensor | None = None,
        kv_index: Tensor | None = None,
        value_bias: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        return soft_mask_attention(
            query,
            key,
            value,
            key_weight=key_weight,
            kv_index=kv_index,
            value_bias=value_bias,
            key_padding_mask=key_padding_mask,
            scale=self.scale,
        )

    def extra_repr(self) -> str:
        return f"scale={self.scale}"
