"""The gradients of word_attention: of query, key, value, grad_output and value_bias, in three launches.

The forward pass leaves the words' rows of the attention, A, and of A relu(grad_output (v + bias)^T), C, so that nothing
is multiplied twice. A program per map goes back through the normalization and sums over keys what the gradient of the
softmax subtracts. A program per head and tile of keys then reads them and their values once, goes through the rows, and
writes the gradients of its keys and values and its part of the rows' gradients. The last launch adds these parts up by
token: several words may name one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._launch import Configs, config, factor_dots, launch, readable
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
    strides,
    types,
)

BLOCK_TOKENS = 32
# ELEMENTS: of the rows whose sums a program takes at once, at least one row.
MAPS_BACKWARD: Configs = {0: {"ELEMENTS": 1 << 16}, 80: {"ELEMENTS": 1 << 13, "num_warps": 8, "num_stages": 1}}
KEYS_BACKWARD: Configs = {
    0: {"BLOCK_KEYS": 512, "TILE_BYTES": 1 << 20},
    80: {"BLOCK_KEYS": 64, "TILE_BYTES": 1 << 13, "num_warps": 4, "num_stages": 1},
}
# Where the loop over rows is one: what it keeps takes registers.
KEYS_BACKWARD_OF_MANY: Configs = {0: KEYS_BACKWARD[0], 80: KEYS_BACKWARD[80] | {"BLOCK_KEYS": 32}}
ADD_UP: Configs = {0: {"BLOCK_PARTS": 64}, 80: {"BLOCK_PARTS": 16, "num_warps": 4, "num_stages": 1}}


@triton.jit
def _maps_backward(
    grad, raw, index, weighted, at_map, means,
    heads, words, subtokens, size, prefix, pitch,
    NORMALIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a map: the gradient at each of the rows that it averages, and by row its sum over keys, times C."""
    batch, word = (tl.program_id(0) // words).to(tl.int64), tl.program_id(0) % words
    position = tl.arange(0, BLOCK)
    live = position < size
    place = tl.program_id(0).to(tl.int64) * size + position
    g = tl.load(grad + place, mask=live, other=0.0)
    if NORMALIZE != "none":
        g = gradient(g, tl.load(raw + place, mask=live, other=0.0), live, NORMALIZE)
    count = 0
    for i in range(subtokens):
        count += (tl.load(index + tl.program_id(0).to(tl.int64) * subtokens + i) >= 0).to(tl.int32)
    g = g / (tl.maximum(count, 1) * heads)
    tl.store(at_map + place, g, mask=live)
    for first in range(0, heads * subtokens, BLOCK_ROWS):
        one = first + tl.arange(0, BLOCK_ROWS)
        row = ((batch * heads + one // subtokens) * words + word) * subtokens + one % subtokens
        mask = (one < heads * subtokens)[:, None] & live[None, :]
        c = tl.load(weighted + row[:, None] * pitch + (prefix + position)[None, :], mask=mask, other=0.0)
        tl.store(means + row, tl.sum(c * g[None, :], 1), mask=one < heads * subtokens)


@triton.jit
def _keys_backward(
    query, key, index, value, grad_output, bias, ignore, at_map, weighted, attention, means,
    query_parts, grad_parts, bias_parts, key_grad, value_grad,
    rows, subtokens, tokens, keys, prefix, pitch, scale,
    query_batch, query_head, query_token, key_batch, key_head, key_token,
    value_batch, value_head, value_token, grad_batch, grad_head, grad_token, ignore_batch,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    VALUE_DOT: tl.constexpr, VALUE_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    tiles, heads = tl.cdiv(keys, BLOCK_KEYS), tl.num_programs(1)
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    head = tl.program_id(1).to(tl.int64)
    pair = batch * heads + head
    query = of_head(query, batch, head, query_batch, query_head)
    key = of_head(key, batch, head, key_batch, key_head)
    if value is not None:
        value = of_head(value, batch, head, value_batch, value_head)
        grad_output = of_head(grad_output, batch, head, grad_batch, grad_head)
    if bias is not None:
        bias += head * VALUE_WIDTH
    at_map += batch * (rows // subtokens) * (keys - prefix)
    position = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    if ignore is not None:
        ignore += batch * ignore_batch
    kept = kept_keys(ignore, position, keys)
    k, v = load_keys(key, value, position, kept, key_token, value_token, WIDTH, VALUE_WIDTH, BLOCK_WIDTH, BLOCK_VALUE)
    in_map = position >= prefix  # the columns of prefix tokens are dropped, and so is a NaN of their values
    if value is not None:
        v = tl.where(in_map[:, None], v, 0.0)
    k_grad = tl.zeros([BLOCK_KEYS, BLOCK_WIDTH], tl.float32)
    v_grad = tl.zeros([BLOCK_KEYS, BLOCK_VALUE], tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        live = row < rows
        token = tl.load(index + batch * rows + row, mask=live, other=-1)
        read = (token >= 0) & (token < tokens)
        place = pair * rows + row
        mean = tl.load(means + place, mask=live, other=0.0)
        mask = live[:, None] & (position < keys)[None, :]
        c = tl.load(weighted + place[:, None] * pitch + position[None, :], mask=mask, other=0.0)
        a = c
        if value is not None:
            a = tl.load(attention + place[:, None] * pitch + position[None, :], mask=mask, other=0.0)
            c = tl.where(in_map[None, :], c, 0.0)
        of_map = (row // subtokens)[:, None] * (keys - prefix) + (position - prefix)[None, :]
        g = tl.load(at_map + of_map, mask=mask & in_map[None, :], other=0.0)
        at_logit = ((c * g - a * mean[:, None]) * scale).to(DOT)  # [BLOCK_ROWS, BLOCK_KEYS]
        q = load_rows(query, token, query_token, read, WIDTH, BLOCK_WIDTH)
        k_grad = tl.dot(tl.trans(at_logit), q.to(DOT), k_grad, input_precision=PRECISION)
        q_grad = tl.dot(at_logit, k.to(DOT), input_precision=PRECISION)
        store_rows(query_parts, place * tiles + tile, live, q_grad, WIDTH, BLOCK_WIDTH)
        if value is not None:
            at_gate = tl.where(c <= 0, 0.0, a * g)  # lets NaN through
            d_out = load_rows(grad_output, token, grad_token, read, VALUE_WIDTH, BLOCK_VALUE)
            v_grad = tl.dot(
                tl.trans(at_gate).to(VALUE_DOT), d_out.to(VALUE_DOT), v_grad, input_precision=VALUE_PRECISION
            )
            d_out_grad = tl.dot(at_gate.to(VALUE_DOT), v.to(VALUE_DOT), input_precision=VALUE_PRECISION)
            if bias is not None:
                d_out_grad += tl.sum(at_gate, 1)[:, None] * load_width(bias, VALUE_WIDTH, BLOCK_VALUE)[None, :]
            store_rows(grad_parts, place * tiles + tile, live, d_out_grad, VALUE_WIDTH, BLOCK_VALUE)
    store_rows(key_grad + pair * keys * WIDTH, position, position < keys, k_grad, WIDTH, BLOCK_WIDTH)
    if value is not None:
        value_grad += pair * keys * VALUE_WIDTH
        store_rows(value_grad, position, position < keys, v_grad, VALUE_WIDTH, BLOCK_VALUE)
    if bias is not None:
        bias_parts += (head * tl.num_programs(0) + tl.program_id(0)) * VALUE_WIDTH
        column = tl.arange(0, BLOCK_VALUE)
        tl.store(bias_parts + column, tl.sum(v_grad, 0), mask=column < VALUE_WIDTH)


@triton.jit
def _add_rows(
    out, by_row, index, first, rows, tiles, tokens,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Writes tokens from first on, each the sum over the parts [rows, tiles, WIDTH] of the rows that name it."""
    token = first + tl.arange(0, BLOCK_TOKENS)
    total = tl.zeros([BLOCK_TOKENS, BLOCK], tl.float32)
    for first_part in range(0, rows * tiles, BLOCK_PARTS):
        part = first_part + tl.arange(0, BLOCK_PARTS)
        named = tl.load(index + part // tiles, mask=part < rows * tiles, other=-1)
        here = (named >= first) & (named < first + BLOCK_TOKENS)
        names = (token[:, None] == named[None, :]).to(tl.float32)
        total = tl.dot(names, load_rows(by_row, part, WIDTH, here, WIDTH, BLOCK), total, input_precision="ieee")
    store_rows(out, token, token < tokens, total, WIDTH, BLOCK)


@triton.jit
def _add_parts(out, parts, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """Writes the sum of rows."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        total += tl.sum(load_rows(parts, part, WIDTH, part < count, WIDTH, BLOCK), 0)
    column = tl.arange(0, BLOCK)
    tl.store(out + column, total, mask=column < WIDTH)


@triton.jit
def _add_up(
    index, query_parts, grad_parts, bias_parts, query_grad, d_out_grad, bias_grad,
    rows, tokens, tiles, parts,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Of one head and some tokens of a caption: the gradients of query and grad_output; of one head: the bias'."""
    blocks, heads = tl.cdiv(tokens, BLOCK_TOKENS), tl.num_programs(1)
    batch, first = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK_TOKENS
    head = tl.program_id(1).to(tl.int64)
    pair = batch * heads + head
    index += batch * rows
    query_grad, query_parts = query_grad + pair * tokens * WIDTH, query_parts + pair * rows * tiles * WIDTH
    _add_rows(query_grad, query_parts, index, first, rows, tiles, tokens, WIDTH, BLOCK_WIDTH, BLOCK_TOKENS, BLOCK_PARTS)
    if grad_parts is not None:
        d_out_grad, grad_parts = (
            d_out_grad + pair * tokens * VALUE_WIDTH,
            grad_parts + pair * rows * tiles * VALUE_WIDTH,
        )
        _add_rows(
            d_out_grad, grad_parts, index, first, rows, tiles, tokens,
            VALUE_WIDTH, BLOCK_VALUE, BLOCK_TOKENS, BLOCK_PARTS,
        )  # fmt: skip
    if bias_parts is not None:  # alone: Triton before 3.7 would go on to compile the rest of a condition
        if tl.program_id(0) == 0:
            bias_parts += head * parts * VALUE_WIDTH
            _add_parts(bias_grad + head * VALUE_WIDTH, bias_parts, parts, VALUE_WIDTH, BLOCK_VALUE, BLOCK_PARTS)


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
    """Gradients of query, key, value, grad_output and value_bias each of its tensor's type (empty, of
    query's type, where that is None); raw and kept are what forward kept. Ignored keys have no attention in kept."""
    given = (query, key, value, grad_output, value_bias)
    gradients = [query.new_empty((0,)) if tensor is None else tensor.new_empty(tensor.shape) for tensor in given]
    query_grad, key_grad, value_grad, d_out_grad, bias_grad = gradients
    (batch, heads, tokens, width), keys = query.shape, key.shape[2]
    rows = word_index[0].numel() if batch else 0
    if batch * rows == 0:
        return tuple(one.zero_() for one in gradients)
    index = word_index.contiguous()
    at_map, means = _through_maps(grad.contiguous(), raw, kept[0], index, num_prefix_tokens, normalize)
    query, key, value, grad_output, ignore = readable(query, key, value, grad_output, key_padding_mask)
    bias = None if value_bias is None else value_bias.contiguous()
    table = KEYS_BACKWARD_OF_MANY if rows > 1 else KEYS_BACKWARD
    pair = None if value is None else (grad_output, value)
    chosen = options(table, key, value) | types(factor_dots, (query, key), pair)
    tiles = triton.cdiv(keys, chosen["BLOCK_KEYS"])
    query_parts = means.new_empty((batch, heads, rows, tiles, width))
    grad_parts = None if value is None else means.new_empty((batch, heads, rows, tiles, value.shape[3]))
    bias_parts = None if bias is None else means.new_empty((heads, batch * tiles, bias.shape[1]))
    launch(
        _keys_backward, (batch * tiles, heads),
        query, key, index, value, grad_output, bias, ignore, at_map, kept[0], None if value is None else kept[1], means,
        query_parts, grad_parts, bias_parts, key_grad, value_grad,
        rows, word_index.shape[2], tokens, keys, num_prefix_tokens, kept.shape[4], scale,
        *strides(query, key, value, grad_output, ignore), BLOCK_ROWS=BLOCK_ROWS, **chosen,
    )  # fmt: skip
    widths = ("WIDTH", "VALUE_WIDTH", "BLOCK_WIDTH", "BLOCK_VALUE")
    launch(
        _add_up, (batch * triton.cdiv(tokens, BLOCK_TOKENS), heads),
        index, query_parts, grad_parts, bias_parts, query_grad, d_out_grad, bias_grad,
        rows, tokens, tiles, batch * tiles,
        BLOCK_TOKENS=BLOCK_TOKENS, **{name: chosen[name] for name in widths}, **config(ADD_UP, key),
    )  # fmt: skip
    return tuple(gradients)


def _through_maps(
    grad: Tensor, raw: Tensor, weighted: Tensor, index: Tensor, prefix: int, normalize: str
) -> tuple[Tensor, Tensor]:
    """The gradient at a map's rows, [B, W, P - prefix], and by row its sum over keys, times C: [B, H, rows]."""
    (batch, words, size), (_, heads, _, pitch), subtokens = grad.shape, weighted.shape, index.shape[2]
    at_map, means = grad.new_empty(grad.shape), weighted.new_empty(weighted.shape[:3])
    chosen, block = config(MAPS_BACKWARD, grad), triton.next_power_of_2(size)
    at_once = max(1, chosen.pop("ELEMENTS") // block)
    launch(
        _maps_backward, (batch * words,),
        grad, raw, index, weighted, at_map, means, heads, words, subtokens, size, prefix, pitch,
        NORMALIZE=normalize, BLOCK_ROWS=min(at_once, triton.next_power_of_2(heads * subtokens)), BLOCK=block, **chosen,
    )  # fmt: skip
    return at_map, means
