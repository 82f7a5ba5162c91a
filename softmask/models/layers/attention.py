"""Attention over packed captions by the library that the configuration names. Soft masks need
`ops.soft_mask_attention` instead."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softmask.models.layers.packing import Packing


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    library: str,
    queries: Packing,
    keys: Packing,
    causal: bool = False,
    visible: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``softmax(query key^T / sqrt(E)) value`` within each sequence.

    query [S, H, E] of N sequences packed as `queries`; key, value [S', H, E] packed as `keys`, at least one token in
    each sequence. Returns [S, H, E]. `causal`: queries and keys are the same tokens, and none sees a later one.
    `visible` [N, T, P] bool: the keys that each query sees, at least one, in place of `causal`; padding is not among
    them. "sdpa" and "eager" compute on padded copies; the other libraries take packed tokens and have no `visible`, for
    which "sdpa" takes their place.
    """
    library = "sdpa" if visible is not None and library != "eager" else library
    if library == "flash_attn":
        return _flash_attn(query, key, value, queries, keys, causal, dropout)
    if library == "xformers":
        return _xformers(query, key, value, queries, keys, causal, dropout)
    query, key, value = (
        packing.pad(x).transpose(1, 2) for packing, x in ((queries, query), (keys, key), (keys, value))
    )
    mask = None if keys.is_full else keys.mask[:, None, None]  # [N, 1, 1, P]
    if visible is not None:
        mask = visible[:, None]
    elif causal:
        past = torch.ones(queries.length, keys.length, dtype=torch.bool, device=query.device).tril()
        mask = past if mask is None else mask & past
    if library == "sdpa":
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    else:
        mixed = _eager(query, key, value, mask, dropout)
    return queries.pack(mixed.transpose(1, 2))


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """query [N, H, T, E], key, value [N, H, P, E], mask [N, 1, 1 or T, P] -> [N, H, T, E]."""
    logits = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    logits = logits if mask is None else logits.masked_fill(~mask, float("-inf"))
    return F.dropout(logits.softmax(-1), dropout) @ value


def _flash_attn(
    query: Tensor, key: Tensor, value: Tensor, queries: Packing, keys: Packing, causal: bool, dropout: float
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=queries.cu_seqlens,
        cu_seqlens_k=keys.cu_seqlens,
        max_seqlen_q=queries.length,
        max_seqlen_k=keys.length,
        dropout_p=dropout,
        causal=causal,
    )


def _xformers(
    query: Tensor, key: Tensor, value: Tensor, queries: Packing, keys: Packing, causal: bool, dropout: float
) -> Tensor:
    """xformers needs the lengths on the host, so this waits for the device."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha import BlockDiagonalCausalMask, BlockDiagonalMask

    lengths = [packing.cu_seqlens.diff().tolist() for packing in (queries, keys)]
    bias = (BlockDiagonalCausalMask if causal else BlockDiagonalMask).from_seqlens(*lengths)
    return memory_efficient_attention(query[None], key[None], value[None], attn_bias=bias, p=dropout)[0]
