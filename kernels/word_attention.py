"""word_attention: rows of the attention, or of Grad-CAM, at the tokens of words, and no other row.

Two launches, as in flash decoding. A program of the first holds one tile of one head's keys and values and loops over
the words' rows. It reads query and grad_output at those tokens only, and writes exp(logit - top), times
relu(grad_output (v + bias)^T), with the tile's largest logit and its sum of exponentials. A program of the second makes
one map: it computes the softmax's denominators from the largest logits and sums, adds up heads and sub-tokens, and
normalizes. Every key and value is read once; between the launches there is one number per key, head and row. For the
gradient (word_attention_backward), these rows are kept, divided by their denominators, with and without the relu's
product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._launch import Configs, cdiv, config, dots, launch, next_power_of_2, readable, strides
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
    types,
)
from softmask.kernels.word_attention_backward import backward

__all__ = ["backward", "forward"]

FORWARD: Configs = {
    0: {"BLOCK_KEYS": 512, "TILE_BYTES": 1 << 20},
    80: {"BLOCK_KEYS": 64, "TILE_BYTES": 1 << 14, "num_warps": 4, "num_stages": 1},
}
# ELEMENTS: of the heads that a program adds to its map at once, in one or two kinds of rows; at least one head.
COMBINE: Configs = {0: {"ELEMENTS": 1 << 16}, 80: {"ELEMENTS": 1 << 13, "num_warps": 16, "num_stages": 1}}


@triton.jit
def _fwd_kernel(
    query_ptr, key_ptr, index_ptr, value_ptr, grad_output_ptr, bias_ptr, padding_ptr,
    weighted_ptr, attention_ptr, tile_max_ptr, tile_sum_ptr,
    num_rows, num_tokens, num_keys, pitch, scale,
    query_strides, key_strides, value_strides, grad_output_strides, stride_mb,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    VALUE_DOT: tl.constexpr, VALUE_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    stride_qb, stride_qh, stride_qt = query_strides
    stride_kb, stride_kh, stride_kp = key_strides
    stride_vb, stride_vh, stride_vp = value_strides
    stride_ob, stride_oh, stride_ot = grad_output_strides
    tiles = tl.cdiv(num_keys, BLOCK_KEYS)
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    head = tl.program_id(1).to(tl.int64)
    query_ptr = of_head(query_ptr, batch, head, stride_qb, stride_qh)
    key_ptr = of_head(key_ptr, batch, head, stride_kb, stride_kh)
    if value_ptr is not None:
        value_ptr = of_head(value_ptr, batch, head, stride_vb, stride_vh)
        grad_output_ptr = of_head(grad_output_ptr, batch, head, stride_ob, stride_oh)
    if bias_ptr is not None:
        bias_ptr += head * VALUE_WIDTH
    if padding_ptr is not None:
        padding_ptr += batch * stride_mb
    position = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    kept = kept_keys(padding_ptr, position, num_keys)
    key, value = load_keys(
        key_ptr, value_ptr, position, kept, stride_kp, stride_vp, WIDTH, VALUE_WIDTH, BLOCK_WIDTH, BLOCK_VALUE
    )
    for first in range(0, num_rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        token, read, factor = load_tokens(index_ptr + batch * num_rows, row, num_rows, num_tokens, scale)
        if tl.max(token, 0) >= 0:
            query = load_rows(query_ptr, token, stride_qt, read, WIDTH, BLOCK_WIDTH)
            logit = product(query, key, DOT, PRECISION) * factor[:, None]  # [BLOCK_ROWS, BLOCK_KEYS]
            logit = tl.where(kept[None, :], logit, float("-inf"))
            highest = tl.max(logit, 1)
            exponential = tl.exp(logit - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
            total = tl.sum(exponential, 1)
            place = (batch * tl.num_programs(1) + head) * num_rows + row
            mask = (token >= 0)[:, None] & (position < pitch)[None, :]
            place_of_keys = place[:, None] * pitch + position[None, :]
            if attention_ptr is not None:
                tl.store(attention_ptr + place_of_keys, exponential, mask=mask)
            if value_ptr is not None:
                grad_output = load_rows(grad_output_ptr, token, stride_ot, read, VALUE_WIDTH, BLOCK_VALUE)
                gate = product(grad_output, value, VALUE_DOT, VALUE_PRECISION)
                if bias_ptr is not None:
                    bias = load_width(bias_ptr, VALUE_WIDTH, BLOCK_VALUE)
                    gate += tl.sum(grad_output.to(tl.float32) * bias[None, :], 1)[:, None]
                exponential *= tl.where(gate < 0, 0.0, gate)  # lets NaN through
            tl.store(tile_max_ptr + place * tiles + tile, highest, mask=token >= 0)
            tl.store(tile_sum_ptr + place * tiles + tile, total, mask=token >= 0)
            tl.store(weighted_ptr + place_of_keys, exponential, mask=mask)


@triton.jit
def _fwd_combine_kernel(
    weighted_ptr, attention_ptr, tile_max_ptr, tile_sum_ptr, index_ptr, maps_ptr, raw_ptr,
    num_heads, num_words, num_subtokens, num_keys, prefix, num_tiles, pitch,
    NORMALIZE: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    batch, word = (tl.program_id(0) // num_words).to(tl.int64), tl.program_id(0) % num_words
    num_rows, tile = num_words * num_subtokens, tl.arange(0, BLOCK_TILES)
    position = tile[:, None] * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)[None, :]
    map_ = tl.zeros([BLOCK_TILES, BLOCK_KEYS], tl.float32)
    count = 0
    for subtoken in range(num_subtokens):
        row = word * num_subtokens + subtoken
        named = tl.load(index_ptr + batch * num_rows + row) >= 0
        count += named.to(tl.int32)
        if named or KEEP:
            for first in range(0, num_heads, BLOCK_HEADS):
                head = first + tl.arange(0, BLOCK_HEADS)
                by_head = (batch * num_heads + head) * num_rows + row
                place = by_head[:, None] * num_tiles + tile[None, :]
                mask = (named & (head < num_heads))[:, None] & (tile < num_tiles)[None, :]
                top = tl.load(tile_max_ptr + place, mask=mask, other=float("-inf"))
                total = tl.load(tile_sum_ptr + place, mask=mask, other=0.0)
                highest = tl.max(top, 1)
                highest = tl.where(highest == float("-inf"), 0.0, highest)
                weight = tl.exp(top - highest[:, None])  # [BLOCK_HEADS, BLOCK_TILES]
                total = tl.sum(weight * total, 1)
                weight = (weight / tl.where(total == 0, 1.0, total)[:, None])[:, :, None]
                mask = (head < num_heads)[:, None, None] & (position < pitch)[None, :, :]
                place = by_head[:, None, None] * pitch + position[None, :, :]
                by_key = tl.load(weighted_ptr + place, mask=mask & named, other=0.0) * weight
                map_ += tl.sum(by_key, 0)
                if KEEP:
                    tl.store(weighted_ptr + place, by_key, mask=mask)
                if attention_ptr is not None:
                    by_key = tl.load(attention_ptr + place, mask=mask & named, other=0.0) * weight
                    tl.store(attention_ptr + place, by_key, mask=mask)
    map_ = tl.reshape(map_ / (tl.maximum(count, 1) * num_heads), [BLOCK_TILES * BLOCK_KEYS])
    position = tl.arange(0, BLOCK_TILES * BLOCK_KEYS)
    live = (position >= prefix) & (position < num_keys)
    place = tl.program_id(0).to(tl.int64) * (num_keys - prefix) + position - prefix
    low, divisor = extent(map_, live, NORMALIZE)
    tl.store(maps_ptr + place, (map_ - low) / divisor, mask=live)
    if raw_ptr is not None:
        tl.store(raw_ptr + place, map_, mask=live)


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
    """query, grad_output [B, H, T, E], key, value [B, H, P, E], value_bias [H, E], each with its own type, word_index
    [B, W, S] -> maps [B, W, P - prefix], and what backward takes, all fp32 and empty without keep: the maps before
    normalization (empty if there is none), and the words' rows of the attention, preceded by their products with
    relu(grad_output v^T) if values are given, [1 or 2, B, H, W S, P rounded up to a multiple of 16]."""
    (batch, heads, tokens, _), keys = query.shape, key.shape[2]
    words, subtokens = word_index.shape[1:]
    rows = words * subtokens
    maps = query.new_empty((batch, words, keys - num_prefix_tokens), dtype=torch.float32)
    raw = maps.new_empty(maps.shape if keep and normalize != "none" else (0,))
    pitch = 16 * cdiv(keys, 16)  # so that rows are whole vector stores
    both = keep and value is not None
    by_row = maps.new_empty((2 if both else 1, batch, heads, rows, pitch))
    kept = by_row if keep else maps.new_empty((0,))
    if batch * rows == 0:
        return maps.zero_(), raw.zero_(), kept
    query, key, value, grad_output, padding = readable(query, key, value, grad_output, key_padding_mask)
    bias = None if value_bias is None else value_bias.contiguous()
    index = word_index.contiguous()
    pair = None if value is None else (grad_output, value)
    chosen = options(FORWARD, key, value) | types(dots, (query, key), pair)
    block_keys = chosen["BLOCK_KEYS"]
    tiles = cdiv(keys, block_keys)
    rows_of = (by_row[0], by_row[1] if both else None)
    tile_max, tile_sum = (maps.new_empty((batch, heads, rows, tiles)) for _ in range(2))
    floating = {one.dtype for one in (query, key, value, grad_output) if one is not None}
    one_row = floating == {torch.float32} and chosen["PRECISION"] == "ieee"
    launch(
        _fwd_kernel, (batch * tiles, heads),
        query, key, index, value, grad_output, bias, padding, *rows_of, tile_max, tile_sum,
        rows, tokens, keys, pitch, scale,
        *(strides(tensor, 3) for tensor in (query, key, value, grad_output)),
        0 if padding is None else padding.stride(0),
        BLOCK_ROWS=1 if one_row else BLOCK_ROWS, **chosen,
    )  # fmt: skip
    combine, block_tiles = config(COMBINE, key), next_power_of_2(tiles)
    at_once = max(1, combine.pop("ELEMENTS") // (block_tiles * block_keys * len(by_row)))
    launch(
        _fwd_combine_kernel, (batch * words,),
        *rows_of, tile_max, tile_sum, index, maps, raw if raw.numel() else None,
        heads, words, subtokens, keys, num_prefix_tokens, tiles, pitch,
        NORMALIZE=normalize, KEEP=keep, updates=keep, BLOCK_HEADS=min(at_once, next_power_of_2(max(1, heads))),
        BLOCK_TILES=block_tiles, BLOCK_KEYS=block_keys, **combine,
    )  # fmt: skip
    return maps, raw, kept
