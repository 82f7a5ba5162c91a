"""Plain attention by the library that the configuration names. Soft masks are `ops.soft_mask_attention`'s."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

LIBRARIES = {"sdpa": "torch", "eager": "torch", "flash_attn": "flash_attn", "xformers": "xformers"}
"""What a configuration may name -> the package that it needs."""


def check_library(name: str) -> None:
    """ValueError where the name is unknown or its package is not installed."""
    if name not in LIBRARIES:
        raise ValueError(f"text.attention: expected one of {', '.join(map(repr, LIBRARIES))}, got {name!r}")
    if importlib.util.find_spec(LIBRARIES[name]) is None:
        raise ValueError(f"text.attention: {name!r} needs the package {LIBRARIES[name]}, which is not installed")


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, library: str, keep: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """``softmax(query key^T / sqrt(E)) value`` over the keys to keep.

    query [N, H, T, E], key, value [N, H, P, E], keep [N, P] bool, True = attend; every row keeps at least one key.
    Returns [N, H, T, E].
    """
    mask = None if keep is None else keep[:, None, None]  # [N, 1, 1, P]
    if library == "sdpa":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    if library == "eager":
        logits = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        logits = logits if mask is None else logits.masked_fill(~mask, float("-inf"))
        return F.dropout(logits.softmax(-1), dropout) @ value
    tokens_first = [states.transpose(1, 2) for states in (query, key, value)]  # [N, T, H, E]
    by = _flash_attn if library == "flash_attn" else _xformers
    return by(*tokens_first, keep, dropout).transpose(1, 2)


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    """Without a mask, since flash-attn has none: the kept keys are packed one after another."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if keep is None:
        return flash_attn_func(query, key, value, dropout_p=dropout)
    rows, length = query.shape[:2]
    starts = F.pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    out = flash_attn_varlen_func(
        query.flatten(0, 1),
        key[keep],
        value[keep],
        cu_seqlens_q=torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query.device),
        cu_seqlens_k=starts,
        max_seqlen_q=length,
        max_seqlen_k=key.shape[1],
        dropout_p=dropout,
    )
    return out.unflatten(0, (rows, length))


def _xformers(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    bias = None
    if keep is not None:
        rows, length, heads, _ = query.shape
        aligned = -(-key.shape[1] // 8) * 8  # xformers wants the bias's rows to start at multiples of 8
        bias = query.new_zeros((rows, 1, 1, aligned))[..., : key.shape[1]]
        bias = bias.masked_fill_(~keep[:, None, None], float("-inf")).expand(rows, heads, length, -1)
    return memory_efficient_attention(query, key, value, attn_bias=bias, p=dropout)
