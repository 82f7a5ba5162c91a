"""The gradients of word_attention, with respect to query, key, value, grad_output and value_bias, in three launches.

Forward keeps the words' rows of the attention, A, and of C = A relu(grad_output (v + bias)^T), so that no product is
computed twice. First, a program per map goes back through the normalization and computes the sums over keys that the
softmax's gradient subtracts. Then a program per head and tile of keys reads its keys and values once, loops over the
rows, and writes the gradients of its keys and values and its part of the rows' gradients. The last launch sums these
parts by token, because several words may name the same one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._launch import Configs, cdiv, config, factor_dots, launch, next_power_of_2, readable, strides
from softmask.kernels._normalize import gradient
from softmask.kernels._words import (
    BLOCK_ROWS,
    kept_keys,
    load_keys,
    load_rows,
    load_width,
    of_head,
    options,
    store_rows,
    types,
)

BLOCK_TOKENS = 32
# ELEMENTS: of the rows that a program sums at once; at least one row.
MAPS_BACKWARD: Configs = {0: {"ELEMENTS": 1 << 16}, 80: {"ELEMENTS": 1 << 13, "num_warps": 8, "num_stages": 1}}
KEYS_BACKWARD: Configs = {
    0: {"BLOCK_KEYS": 512, "TILE_BYTES": 1 << 20},
    80: {"BLOCK_KEYS": 64, "TILE_BYTES": 1 << 13, "num_warps": 4, "num_stages": 1},
}
# With several rows, their loop needs registers for what it keeps.
KEYS_BACKWARD_OF_MANY: Configs = {0: KEYS_BACKWARD[0], 80: KEYS_BACKWARD[80] | {"BLOCK_KEYS": 32}}
ADD_UP: Configs = {0: {"BLOCK_PARTS": 64}, 80: {"BLOCK_PARTS": 16, "num_warps": 4, "num_stages": 1}}


@triton.jit
def _bwd_maps_kernel(
    d_maps_ptr, raw_ptr, index_ptr, weighted_ptr, d_rows_ptr, mean_ptr,
    num_heads, num_words, num_subtokens, map_size, num_prefix, pitch,
    NORMALIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For a map: the gradient with respect to each of the rows that it averages and, per row, the sum over keys of that
    times C."""
    batch, word = (tl.program_id(0) // num_words).to(tl.int64), tl.program_id(0) % num_words
    position = tl.arange(0, BLOCK)
    live = position < map_size
    place = tl.program_id(0).to(tl.int64) * map_size + position
    d_map = tl.load(d_maps_ptr + place, mask=live, other=0.0)
    if NORMALIZE != "none":
        d_map = gradient(d_map, tl.load(raw_ptr + place, mask=live, other=0.0), live, NORMALIZE)
    count = 0
    for subtoken in range(num_subtokens):
        count += (tl.load(index_ptr + tl.program_id(0).to(tl.int64) * num_subtokens + subtoken) >= 0).to(tl.int32)
    d_map = d_map / (tl.maximum(count, 1) * num_heads)
    tl.store(d_rows_ptr + place, d_map, mask=live)
    for first in range(0, num_heads * num_subtokens, BLOCK_ROWS):
        one = first + tl.arange(0, BLOCK_ROWS)
        row = (batch * num_heads + one // num_subtokens) * num_words + word
        row = row * num_subtokens + one % num_subtokens
        mask = (one < num_heads * num_subtokens)[:, None] & live[None, :]
        weighted = tl.load(weighted_ptr + row[:, None] * pitch + (num_prefix + position)[None, :], mask=mask, other=0.0)
        tl.store(mean_ptr + row, tl.sum(weighted * d_map[None, :], 1), mask=one < num_heads * num_subtokens)


@triton.jit
def _load_kept(
    weighted_ptr, attention_ptr, d_rows_ptr, place, row, position, live, in_map,
    num_subtokens, num_keys, num_prefix, pitch,
):  # fmt: skip
    """(weighted attention, attention, gradient of the maps) of rows at keys: [BLOCK_ROWS, BLOCK_KEYS] each."""
    mask = live[:, None] & (position < num_keys)[None, :]
    weighted = tl.load(weighted_ptr + place[:, None] * pitch + position[None, :], mask=mask, other=0.0)
    attention = weighted
    if attention_ptr is not None:
        attention = tl.load(attention_ptr + place[:, None] * pitch + position[None, :], mask=mask, other=0.0)
        weighted = tl.where(in_map[None, :], weighted, 0.0)
    of_map = (row // num_subtokens)[:, None] * (num_keys - num_prefix) + (position - num_prefix)[None, :]
    d_map = tl.load(d_rows_ptr + of_map, mask=mask & in_map[None, :], other=0.0)
    return weighted, attention, d_map


@triton.jit
def _value_gradients(
    d_gate, value, bias_ptr, grad_output, d_value,
    VALUE_WIDTH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """(d_value plus the rows' share, the rows' gradient of grad_output); d_gate is the gradient of grad_output's
    product with the values."""
    d_value = tl.dot(tl.trans(d_gate).to(DOT), grad_output.to(DOT), d_value, input_precision=PRECISION)
    d_grad_output = tl.dot(d_gate.to(DOT), value.to(DOT), input_precision=PRECISION)
    if bias_ptr is not None:
        d_grad_output += tl.sum(d_gate, 1)[:, None] * load_width(bias_ptr, VALUE_WIDTH, BLOCK_VALUE)[None, :]
    return d_value, d_grad_output


@triton.jit
def _tokens_of(index_ptr, batch, row, num_rows, num_tokens):
    """(token of each row, whether the row exists, whether it has a token)."""
    live = row < num_rows
    token = tl.load(index_ptr + batch * num_rows + row, mask=live, other=-1)
    return token, live, (token >= 0) & (token < num_tokens)


@triton.jit
def _store_bias_part(d_bias_parts_ptr, d_value, head, VALUE_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr):
    """Stores this program's part of one head's bias gradient: the sum of d_value over keys."""
    d_bias_parts_ptr += (head * tl.num_programs(0) + tl.program_id(0)) * VALUE_WIDTH
    column = tl.arange(0, BLOCK_VALUE)
    tl.store(d_bias_parts_ptr + column, tl.sum(d_value, 0), mask=column < VALUE_WIDTH)


@triton.jit
def _bwd_keys_kernel(
    query_ptr, key_ptr, index_ptr, value_ptr, grad_output_ptr, bias_ptr, padding_ptr,
    d_rows_ptr, weighted_ptr, attention_ptr, mean_ptr, d_query_parts_ptr, d_grad_output_parts_ptr, d_bias_parts_ptr,
    d_key_ptr, d_value_ptr, num_rows, num_subtokens, num_tokens, num_keys, num_prefix, pitch, scale,
    query_strides, key_strides, value_strides, grad_output_strides, stride_mb, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, VALUE_DOT: tl.constexpr,
    VALUE_PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """The gradients of one head's tile of keys and values, and its part of the rows' gradients."""
    tiles, heads = tl.cdiv(num_keys, BLOCK_KEYS), tl.num_programs(1)
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    head = tl.program_id(1).to(tl.int64)
    pair = batch * heads + head
    query_ptr = of_head(query_ptr, batch, head, query_strides[0], query_strides[1])
    key_ptr = of_head(key_ptr, batch, head, key_strides[0], key_strides[1])
    if value_ptr is not None:
        value_ptr = of_head(value_ptr, batch, head, value_strides[0], value_strides[1])
        grad_output_ptr = of_head(grad_output_ptr, batch, head, grad_output_strides[0], grad_output_strides[1])
    if bias_ptr is not None:
        bias_ptr += head * VALUE_WIDTH
    d_rows_ptr += batch * (num_rows // num_subtokens) * (num_keys - num_prefix)
    position = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    if padding_ptr is not None:
        padding_ptr += batch * stride_mb
    key, value = load_keys(
        key_ptr, value_ptr, position, kept_keys(padding_ptr, position, num_keys), key_strides[2], value_strides[2],
        WIDTH, VALUE_WIDTH, BLOCK_WIDTH, BLOCK_VALUE,
    )  # fmt: skip
    in_map = position >= num_prefix  # maps leave out prefix columns, even if their values are NaN
    if value_ptr is not None:
        value = tl.where(in_map[:, None], value, 0.0)
    d_key, d_value = tl.zeros([BLOCK_KEYS, BLOCK_WIDTH], tl.float32), tl.zeros([BLOCK_KEYS, BLOCK_VALUE], tl.float32)
    for first in range(0, num_rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        token, live, read = _tokens_of(index_ptr, batch, row, num_rows, num_tokens)
        place = pair * num_rows + row
        mean = tl.load(mean_ptr + place, mask=live, other=0.0)
        weighted, attention, d_map = _load_kept(
            weighted_ptr, attention_ptr, d_rows_ptr, place, row, position, live, in_map,
            num_subtokens, num_keys, num_prefix, pitch,
        )  # fmt: skip
        d_logit = ((weighted * d_map - attention * mean[:, None]) * scale).to(DOT)  # [BLOCK_ROWS, BLOCK_KEYS]
        query = load_rows(query_ptr, token, query_strides[2], read, WIDTH, BLOCK_WIDTH)
        d_key = tl.dot(tl.trans(d_logit), query.to(DOT), d_key, input_precision=PRECISION)
        d_query = tl.dot(d_logit, key.to(DOT), input_precision=PRECISION)
        store_rows(d_query_parts_ptr, place * tiles + tile, live, d_query, WIDTH, BLOCK_WIDTH)
        if value_ptr is not None:
            d_gate = tl.where(weighted <= 0, 0.0, attention * d_map)  # lets NaN through
            grad_output = load_rows(grad_output_ptr, token, grad_output_strides[2], read, VALUE_WIDTH, BLOCK_VALUE)
            d_value, d_grad_output = _value_gradients(
                d_gate, value, bias_ptr, grad_output, d_value, VALUE_WIDTH, VALUE_DOT, VALUE_PRECISION, BLOCK_VALUE
            )
            store_rows(d_grad_output_parts_ptr, place * tiles + tile, live, d_grad_output, VALUE_WIDTH, BLOCK_VALUE)
    store_rows(d_key_ptr + pair * num_keys * WIDTH, position, position < num_keys, d_key, WIDTH, BLOCK_WIDTH)
    if value_ptr is not None:
        d_value_ptr += pair * num_keys * VALUE_WIDTH
        store_rows(d_value_ptr, position, position < num_keys, d_value, VALUE_WIDTH, BLOCK_VALUE)
    if bias_ptr is not None:
        _store_bias_part(d_bias_parts_ptr, d_value, head, VALUE_WIDTH, BLOCK_VALUE)


@triton.jit
def _add_rows(
    out_ptr, parts_ptr, index_ptr, first, num_rows, num_tiles, num_tokens,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Writes tokens from `first` on, each the sum of the parts [rows, tiles, WIDTH] of the rows that name it."""
    token = first + tl.arange(0, BLOCK_TOKENS)
    total = tl.zeros([BLOCK_TOKENS, BLOCK], tl.float32)
    for first_part in range(0, num_rows * num_tiles, BLOCK_PARTS):
        part = first_part + tl.arange(0, BLOCK_PARTS)
        named = tl.load(index_ptr + part // num_tiles, mask=part < num_rows * num_tiles, other=-1)
        here = (named >= first) & (named < first + BLOCK_TOKENS)
        names = (token[:, None] == named[None, :]).to(tl.float32)
        total = tl.dot(names, load_rows(parts_ptr, part, WIDTH, here, WIDTH, BLOCK), total, input_precision="ieee")
    store_rows(out_ptr, token, token < num_tokens, total, WIDTH, BLOCK)


@triton.jit
def _add_parts(out_ptr, parts_ptr, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """Writes the sum of `count` parts."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        total += tl.sum(load_rows(parts_ptr, part, WIDTH, part < count, WIDTH, BLOCK), 0)
    column = tl.arange(0, BLOCK)
    tl.store(out_ptr + column, total, mask=column < WIDTH)


@triton.jit
def _bwd_sum_kernel(
    index_ptr, d_query_parts_ptr, d_grad_output_parts_ptr, d_bias_parts_ptr, d_query_ptr, d_grad_output_ptr, d_bias_ptr,
    num_rows, num_tokens, num_tiles, num_parts,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """For a head and some tokens of a caption, the gradients of query and grad_output; for a head, that of the bias."""
    blocks, heads = tl.cdiv(num_tokens, BLOCK_TOKENS), tl.num_programs(1)
    batch, first = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK_TOKENS
    head = tl.program_id(1).to(tl.int64)
    pair = batch * heads + head
    index_ptr += batch * num_rows
    d_query_ptr += pair * num_tokens * WIDTH
    d_query_parts_ptr += pair * num_rows * num_tiles * WIDTH
    _add_rows(
        d_query_ptr, d_query_parts_ptr, index_ptr, first, num_rows, num_tiles, num_tokens,
        WIDTH, BLOCK_WIDTH, BLOCK_TOKENS, BLOCK_PARTS,
    )  # fmt: skip
    if d_grad_output_parts_ptr is not None:
        d_grad_output_ptr += pair * num_tokens * VALUE_WIDTH
        d_grad_output_parts_ptr += pair * num_rows * num_tiles * VALUE_WIDTH
        _add_rows(
            d_grad_output_ptr, d_grad_output_parts_ptr, index_ptr, first, num_rows, num_tiles, num_tokens,
            VALUE_WIDTH, BLOCK_VALUE, BLOCK_TOKENS, BLOCK_PARTS,
        )  # fmt: skip
    if d_bias_parts_ptr is not None:  # nested: Triton before 3.7 compiles both sides of `and`
        if tl.program_id(0) == 0:
            d_bias_parts_ptr += head * num_parts * VALUE_WIDTH
            d_bias_ptr += head * VALUE_WIDTH
            _add_parts(d_bias_ptr, d_bias_parts_ptr, num_parts, VALUE_WIDTH, BLOCK_VALUE, BLOCK_PARTS)


def backward(
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
    """Gradients of query, key, value, grad_output and value_bias, each with its tensor's type (empty and with query's
    type for None); raw and kept are from forward. Ignored keys have no attention in kept."""
    given = (query, key, value, grad_output, value_bias)
    gradients = [query.new_empty((0,)) if tensor is None else tensor.new_empty(tensor.shape) for tensor in given]
    d_query, d_key, d_value, d_grad_output, d_bias = gradients
    (batch, heads, tokens, width), keys = query.shape, key.shape[2]
    rows = word_index[0].numel() if batch else 0
    if batch * rows == 0:
        return tuple(one.zero_() for one in gradients)
    index = word_index.contiguous()
    d_rows, means = _through_maps(grad.contiguous(), raw, kept[0], index, num_prefix_tokens, normalize)
    query, key, value, grad_output, padding = readable(query, key, value, grad_output, key_padding_mask)
    bias = None if value_bias is None else value_bias.contiguous()
    table = KEYS_BACKWARD_OF_MANY if rows > 1 else KEYS_BACKWARD
    pair = None if value is None else (grad_output, value)
    chosen = options(table, key, value) | types(factor_dots, (query, key), pair)
    tiles = cdiv(keys, chosen["BLOCK_KEYS"])
    query_parts = means.new_empty((batch, heads, rows, tiles, width))
    grad_output_parts = None if value is None else means.new_empty((batch, heads, rows, tiles, value.shape[3]))
    bias_parts = None if bias is None else means.new_empty((heads, batch * tiles, bias.shape[1]))
    launch(
        _bwd_keys_kernel, (batch * tiles, heads),
        query, key, index, value, grad_output, bias, padding,
        d_rows, kept[0], None if value is None else kept[1], means,
        query_parts, grad_output_parts, bias_parts, d_key, d_value,
        rows, word_index.shape[2], tokens, keys, num_prefix_tokens, kept.shape[4], scale,
        *(strides(tensor, 3) for tensor in (query, key, value, grad_output)),
        0 if padding is None else padding.stride(0), BLOCK_ROWS=BLOCK_ROWS, **chosen,
    )  # fmt: skip
    widths = ("WIDTH", "VALUE_WIDTH", "BLOCK_WIDTH", "BLOCK_VALUE")
    launch(
        _bwd_sum_kernel, (batch * cdiv(tokens, BLOCK_TOKENS), heads),
        index, query_parts, grad_output_parts, bias_parts, d_query, d_grad_output, d_bias,
        rows, tokens, tiles, batch * tiles,
        BLOCK_TOKENS=BLOCK_TOKENS, **{name: chosen[name] for name in widths}, **config(ADD_UP, key),
    )  # fmt: skip
    return tuple(gradients)


def _through_maps(
    grad: Tensor, raw: Tensor, weighted: Tensor, index: Tensor, prefix: int, normalize: str
) -> tuple[Tensor, Tensor]:
    """The gradient with respect to a map's rows, [B, W, P - prefix], and per row the sum over keys of that times C, [B,
    H, rows]."""
    (batch, words, size), (_, heads, _, pitch), subtokens = grad.shape, weighted.shape, index.shape[2]
    d_rows, means = grad.new_empty(grad.shape), weighted.new_empty(weighted.shape[:3])
    chosen, block = config(MAPS_BACKWARD, grad), next_power_of_2(size)
    at_once = max(1, chosen.pop("ELEMENTS") // block)
    launch(
        _bwd_maps_kernel, (batch * words,),
        grad, raw, index, weighted, d_rows, means, heads, words, subtokens, size, prefix, pitch,
        NORMALIZE=normalize, BLOCK_ROWS=min(at_once, next_power_of_2(heads * subtokens)), BLOCK=block, **chosen,
    )  # fmt: skip
    return d_rows, means
