"""word_attention: rows of the attention, or of Grad-CAM, at the tokens of words, and no other row.

Two launches, as in flash decoding. A program of the first holds one tile of one head's keys and values and goes through
the words' rows: it reads query and grad_output at those tokens alone, and writes exp(logit - top), times
relu(grad_output (v + bias)^T), with the tile's largest logit and the sum of its exponentials. A program of the second
makes one map: from tops and sums it has the softmax's denominators, adds up heads and sub-tokens, and normalizes. Every
key and value is read once; what lies between the launches is one number per key, head and row. For the gradient, which
is in word_attention_backward, these rows stay, over their denominators and with and without the relu's product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._launch import Configs, config, dots, launch, readable
from softmask.kernels._normalize import extent
from softmask.kernels._words import (
    BLOCK_ROWS,
    kept_keys,
    load_keys,
    load_rows,
    load_tokens,
    load_width,
    of_head,
    options,
    product,
    strides,
    types,
)
from softmask.kernels.word_attention_backward import backward

__all__ = ["backward", "forward"]

FORWARD: Configs = {
    0: {"BLOCK_KEYS": 512, "TILE_BYTES": 1 << 20},
    80: {"BLOCK_KEYS": 64, "TILE_BYTES": 1 << 14, "num_warps": 4, "num_stages": 1},
}
# ELEMENTS: of the heads that a program adds to its map at once, of one kind of rows or of two; at least one head.
COMBINE: Configs = {0: {"ELEMENTS": 1 << 16}, 80: {"ELEMENTS": 1 << 13, "num_warps": 16, "num_stages": 1}}


@triton.jit
def _forward(
    query, key, index, value, grad_output, bias, ignore, weighted, attention, tops, totals,
    rows, tokens, keys, pitch, scale,
    query_batch, query_head, query_token, key_batch, key_head, key_token,
    value_batch, value_head, value_token, grad_batch, grad_head, grad_token, ignore_batch,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    VALUE_DOT: tl.constexpr, VALUE_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(keys, BLOCK_KEYS)
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    head = tl.program_id(1).to(tl.int64)
    query = of_head(query, batch, head, query_batch, query_head)
    key = of_head(key, batch, head, key_batch, key_head)
    if value is not None:
        value = of_head(value, batch, head, value_batch, value_head)
        grad_output = of_head(grad_output, batch, head, grad_batch, grad_head)
    if bias is not None:
        bias += head * VALUE_WIDTH
    if ignore is not None:
        ignore += batch * ignore_batch
    position = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    kept = kept_keys(ignore, position, keys)
    k, v = load_keys(key, value, position, kept, key_token, value_token, WIDTH, VALUE_WIDTH, BLOCK_WIDTH, BLOCK_VALUE)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        token, read, factor = load_tokens(index + batch * rows, row, rows, tokens, scale)
        if tl.max(token, 0) >= 0:
            q = load_rows(query, token, query_token, read, WIDTH, BLOCK_WIDTH)
            logit = product(q, k, DOT, PRECISION) * factor[:, None]  # [BLOCK_ROWS, BLOCK_KEYS]
            logit = tl.where(kept[None, :], logit, float("-inf"))
            top = tl.max(logit, 1)
            e = tl.exp(logit - tl.where(top == float("-inf"), 0.0, top)[:, None])
            total = tl.sum(e, 1)
            place = (batch * tl.num_programs(1) + head) * rows + row
            mask = (token >= 0)[:, None] & (position < pitch)[None, :]
            at = place[:, None] * pitch + position[None, :]
            if attention is not None:
                tl.store(attention + at, e, mask=mask)
            if value is not None:
                d_out = load_rows(grad_output, token, grad_token, read, VALUE_WIDTH, BLOCK_VALUE)
                gate = product(d_out, v, VALUE_DOT, VALUE_PRECISION)
                if bias is not None:
                    b = load_width(bias, VALUE_WIDTH, BLOCK_VALUE)
                    gate += tl.sum(d_out.to(tl.float32) * b[None, :], 1)[:, None]
                e *= tl.where(gate < 0, 0.0, gate)  # lets NaN through
            tl.store(tops + place * tiles + tile, top, mask=token >= 0)
            tl.store(totals + place * tiles + tile, total, mask=token >= 0)
            tl.store(weighted + at, e, mask=mask)


@triton.jit
def _combine(
    weighted, attention, tops, totals, index, maps, raw,
    heads, words, subtokens, keys, prefix, tiles, pitch,
    NORMALIZE: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    batch, word = (tl.program_id(0) // words).to(tl.int64), tl.program_id(0) % words
    rows, tile = words * subtokens, tl.arange(0, BLOCK_TILES)
    position = tile[:, None] * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)[None, :]
    c = tl.zeros([BLOCK_TILES, BLOCK_KEYS], tl.float32)
    count = 0
    for i in range(subtokens):
        row = word * subtokens + i
        named = tl.load(index + batch * rows + row) >= 0
        count += named.to(tl.int32)
        if named or KEEP:
            for first in range(0, heads, BLOCK_HEADS):
                head = first + tl.arange(0, BLOCK_HEADS)
                by_head = (batch * heads + head) * rows + row
                place = by_head[:, None] * tiles + tile[None, :]
                mask = (named & (head < heads))[:, None] & (tile < tiles)[None, :]
                top = tl.load(tops + place, mask=mask, other=float("-inf"))
                total = tl.load(totals + place, mask=mask, other=0.0)
                highest = tl.max(top, 1)
                highest = tl.where(highest == float("-inf"), 0.0, highest)
                weight = tl.exp(top - highest[:, None])  # [BLOCK_HEADS, BLOCK_TILES]
                total = tl.sum(weight * total, 1)
                weight = (weight / tl.where(total == 0, 1.0, total)[:, None])[:, :, None]
                mask = (head < heads)[:, None, None] & (position < pitch)[None, :, :]
                place = by_head[:, None, None] * pitch + position[None, :, :]
                by_key = tl.load(weighted + place, mask=mask & named, other=0.0) * weight
                c += tl.sum(by_key, 0)
                if KEEP:
                    tl.store(weighted + place, by_key, mask=mask)
                if attention is not None:
                    by_key = tl.load(attention + place, mask=mask & named, other=0.0) * weight
                    tl.store(attention + place, by_key, mask=mask)
    c = tl.reshape(c / (tl.maximum(count, 1) * heads), [BLOCK_TILES * BLOCK_KEYS])
    position = tl.arange(0, BLOCK_TILES * BLOCK_KEYS)
    live = (position >= prefix) & (position < keys)
    place = tl.program_id(0).to(tl.int64) * (keys - prefix) + position - prefix
    low, divisor = extent(c, live, NORMALIZE)
    tl.store(maps + place, (c - low) / divisor, mask=live)
    if raw is not None:
        tl.store(raw + place, c, mask=live)


def forward(
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
    """query, grad_output [B, H, T, E], key, value [B, H, P, E], value_bias [H, E], each of its own type, word_index
    [B, W, S] -> maps [B, W, P - prefix], and what backward takes, all fp32 and empty without keep: the maps before
    normalization (empty where there is none) and the words' rows of the attention, before them times
    relu(grad_output v^T) where given, [1 or 2, B, H, W S, P up to 16s]."""
    (batch, heads, tokens, _), keys = query.shape, key.shape[2]
    words, subtokens = word_index.shape[1:]
    rows = words * subtokens
    maps = query.new_empty((batch, words, keys - num_prefix_tokens), dtype=torch.float32)
    raw = maps.new_empty(maps.shape if keep and normalize != "none" else (0,))
    pitch = 16 * triton.cdiv(keys, 16)  # rows of whole wide stores
    both = keep and value is not None
    by_row = maps.new_empty((2 if both else 1, batch, heads, rows, pitch))
    kept = by_row if keep else maps.new_empty((0,))
    if batch * rows == 0:
        return maps.zero_(), raw.zero_(), kept
    query, key, value, grad_output, ignore = readable(query, key, value, grad_output, key_padding_mask)
    bias = None if value_bias is None else value_bias.contiguous()
    index = word_index.contiguous()
    pair = None if value is None else (grad_output, value)
    chosen = options(FORWARD, key, value) | types(dots, (query, key), pair)
    block_keys = chosen["BLOCK_KEYS"]
    tiles = triton.cdiv(keys, block_keys)
    rows_of = (by_row[0], by_row[1] if both else None)
    tops, totals = (maps.new_empty((batch, heads, rows, tiles)) for _ in range(2))
    floating = {one.dtype for one in (query, key, value, grad_output) if one is not None}
    one_row = floating == {torch.float32} and chosen["PRECISION"] == "ieee"
    launch(
        _forward, (batch * tiles, heads),
        query, key, index, value, grad_output, bias, ignore, *rows_of, tops, totals,
        rows, tokens, keys, pitch, scale, *strides(query, key, value, grad_output, ignore),
        BLOCK_ROWS=1 if one_row else BLOCK_ROWS, **chosen,
    )  # fmt: skip
    combine, block_tiles = config(COMBINE, key), triton.next_power_of_2(tiles)
    at_once = max(1, combine.pop("ELEMENTS") // (block_tiles * block_keys * len(by_row)))
    launch(
        _combine, (batch * words,),
        *rows_of, tops, totals, index, maps, raw if raw.numel() else None,
        heads, words, subtokens, keys, num_prefix_tokens, tiles, pitch,
        NORMALIZE=normalize, KEEP=keep, updates=keep, BLOCK_HEADS=min(at_once, triton.next_power_of_2(max(1, heads))),
        BLOCK_TILES=block_tiles, BLOCK_KEYS=block_keys, **combine,
    )  # fmt: skip
    return maps, raw, kept
