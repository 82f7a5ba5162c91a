"""The gradients of word_attention: of query, key, value, grad_output and value_bias, in three launches.

A program per map goes back through the normalization. A program per head and block of rows goes through the keys twice:
first for the gradient of grad_output and for the sum over keys in the softmax's gradient, then for the query's. Last, a
program per tile of keys goes through the rows and writes the gradients of its keys and values, then those of its share
of the tokens: several words may name one token, whose gradient adds up over their rows. The bias' gradient adds up over
captions, which one program of a head does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._launch import Configs, launch, readable
from softmask.kernels._normalize import gradient
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
    store_rows,
    strides,
)

BLOCK_TOKENS, BLOCK_PARTS = 16, 64
ROWS_BACKWARD: Configs = {
    0: {"BLOCK_KEYS": 512, "TILE_BYTES": 1 << 20},
    80: {"BLOCK_KEYS": 32, "TILE_BYTES": 1 << 13, "num_warps": 4, "num_stages": 2},
    90: {"BLOCK_KEYS": 32, "TILE_BYTES": 1 << 13, "num_warps": 4, "num_stages": 1},
}
KEYS_BACKWARD: Configs = {
    0: {"BLOCK_KEYS": 512, "TILE_BYTES": 1 << 20},
    80: {"BLOCK_KEYS": 32, "TILE_BYTES": 1 << 13, "num_warps": 4, "num_stages": 1},
    90: {"BLOCK_KEYS": 32, "TILE_BYTES": 1 << 13, "num_warps": 4, "num_stages": 3},
}


@triton.jit
def _normalize_backward(grad, raw, at_raw, size, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr):
    position = tl.arange(0, BLOCK)
    live = position < size
    place = tl.program_id(0).to(tl.int64) * size + position
    d_norm = tl.load(grad + place, mask=live, other=0.0)
    c = tl.load(raw + place, mask=live, other=0.0)
    tl.store(at_raw + place, gradient(d_norm, c, live, NORMALIZE), mask=live)


@triton.jit
def _load_words(
    query, grad_output, bias, index, row, rows, tokens, heads, subtokens, scale, query_token, grad_token,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_SUBTOKENS: tl.constexpr,
):  # fmt: skip
    """Of rows: q, grad_output, grad_output bias^T, the logits' factor, and share: what a row counts in its map's mean,
    0 where it names no token."""
    token, read, factor = load_tokens(index, row, rows, tokens, scale)
    q = load_rows(query, token, query_token, read, WIDTH, BLOCK_WIDTH)
    d_out, at_bias = q, tl.zeros(row.shape, tl.float32)
    if grad_output is not None:
        d_out = load_rows(grad_output, token, grad_token, read, VALUE_WIDTH, BLOCK_VALUE)
    if bias is not None:
        at_bias = tl.sum(d_out.to(tl.float32) * load_width(bias, VALUE_WIDTH, BLOCK_VALUE)[None, :], 1)
    subtoken = tl.arange(0, BLOCK_SUBTOKENS)
    mask = (row < rows)[:, None] & (subtoken < subtokens)[None, :]
    of_word = tl.load(index + (row // subtokens * subtokens)[:, None] + subtoken[None, :], mask=mask, other=-1)
    count = tl.sum((of_word >= 0).to(tl.float32), 1)
    share = tl.where(token >= 0, 1.0 / (tl.maximum(count, 1.0) * heads), 0.0)
    return q, d_out, at_bias, factor, share


@triton.jit
def _logits(
    q, k, d_out, v, at_bias, factor, share, kept, at_raw, word, position, keys, prefix,
    GRADCAM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits [rows, keys], the gradient at the attention, and that at grad_output (v + bias)^T over the attention."""
    mask = (share > 0)[:, None] & ((position >= prefix) & (position < keys))[None, :]
    place = word[:, None] * (keys - prefix) + (position - prefix)[None, :]
    at_attention = tl.load(at_raw + place, mask=mask, other=0.0) * share[:, None]
    at_gate = at_attention
    logit = tl.where(kept[None, :], product(q, k, DOT, PRECISION) * factor[:, None], float("-inf"))
    if GRADCAM:
        gate = product(d_out, v, DOT, PRECISION) + at_bias[:, None]
        at_gate = tl.where(gate > 0, at_attention, 0.0)
        at_attention *= tl.where(gate < 0, 0.0, gate)
    return logit, at_attention, at_gate


@triton.jit
def _rows_backward(
    query, key, index, value, grad_output, bias, ignore, at_raw, tops, totals, means, query_rows, grad_rows, bias_parts,
    rows, subtokens, tokens, keys, prefix, scale,
    query_batch, query_head, query_token, key_batch, key_head, key_token,
    value_batch, value_head, value_token, grad_batch, grad_head, grad_token, ignore_batch,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, DOT: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_SUBTOKENS: tl.constexpr,
):  # fmt: skip
    """Of a block of rows: the softmax's statistics, and the gradients of query, grad_output and bias."""
    blocks, heads = tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(1)
    batch, head = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_row = (batch * heads + head) * rows
    query, key, value, grad_output, bias, ignore = of_head(
        batch, head, query, key, value, grad_output, bias, ignore,
        query_batch, query_head, key_batch, key_head, value_batch, value_head, grad_batch, grad_head, ignore_batch,
        VALUE_WIDTH,
    )  # fmt: skip
    q, d_out, at_bias, factor, share = _load_words(
        query, grad_output, bias, index + batch * rows, row, rows, tokens, heads, subtokens, scale,
        query_token, grad_token, WIDTH, VALUE_WIDTH, BLOCK_WIDTH, BLOCK_VALUE, BLOCK_SUBTOKENS,
    )  # fmt: skip
    word = row // subtokens
    at_raw += batch * (rows // subtokens) * (keys - prefix)
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    mean = tl.zeros([BLOCK_ROWS], tl.float32)
    gate_total = tl.zeros([BLOCK_ROWS], tl.float32)
    d_out_grad = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    for first in range(0, keys, BLOCK_KEYS):
        position = first + tl.arange(0, BLOCK_KEYS)
        k, v = load_keys(
            key, value, position, keys, key_token, value_token, WIDTH, VALUE_WIDTH, BLOCK_WIDTH, BLOCK_VALUE
        )
        logit, at_attention, at_gate = _logits(
            q, k, d_out, v, at_bias, factor, share, kept_keys(ignore, position, keys), at_raw, word, position, keys,
            prefix, value is not None, DOT, PRECISION,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(logit, 1))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key yet: exp(-inf - 0), not NaN
        e = tl.exp(logit - anchor[:, None])
        shrink = tl.exp(top - anchor)
        top = new_top
        total = total * shrink + tl.sum(e, 1)
        mean = mean * shrink + tl.sum(e * at_attention, 1)
        if value is not None:
            at_gate *= e
            gate_total = gate_total * shrink + tl.sum(at_gate, 1)
            d_out_grad = tl.dot(
                at_gate.to(FACTOR), v.to(FACTOR), d_out_grad * shrink[:, None], input_precision=PRECISION
            )
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.where(total == 0, 1.0, total)
    mean, gate_total, d_out_grad = mean / total, gate_total / total, d_out_grad / total[:, None]
    q_grad = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for first in range(0, keys, BLOCK_KEYS):
        position = first + tl.arange(0, BLOCK_KEYS)
        k, v = load_keys(
            key, value, position, keys, key_token, value_token, WIDTH, VALUE_WIDTH, BLOCK_WIDTH, BLOCK_VALUE
        )
        logit, at_attention, at_gate = _logits(
            q, k, d_out, v, at_bias, factor, share, kept_keys(ignore, position, keys), at_raw, word, position, keys,
            prefix, value is not None, DOT, PRECISION,
        )  # fmt: skip
        attention = tl.exp(logit - top[:, None]) / total[:, None]
        at_logit = attention * (at_attention - mean[:, None]) * scale
        q_grad = tl.dot(at_logit.to(FACTOR), k.to(FACTOR), q_grad, input_precision=PRECISION)
    live = row < rows
    tl.store(tops + first_row + row, top, mask=live)
    tl.store(totals + first_row + row, total, mask=live)
    tl.store(means + first_row + row, mean, mask=live)
    store_rows(query_rows + first_row * WIDTH, row, live, q_grad, WIDTH, BLOCK_WIDTH)
    if bias is not None:
        d_out_grad += gate_total[:, None] * load_width(bias, VALUE_WIDTH, BLOCK_VALUE)[None, :]
        bias_parts += (head * tl.num_programs(0) + tl.program_id(0)) * VALUE_WIDTH
        column = tl.arange(0, BLOCK_VALUE)
        tl.store(bias_parts + column, tl.sum(gate_total[:, None] * d_out.to(tl.float32), 0), mask=column < VALUE_WIDTH)
    if value is not None:
        store_rows(grad_rows + first_row * VALUE_WIDTH, row, live, d_out_grad, VALUE_WIDTH, BLOCK_VALUE)


@triton.jit
def _add_rows(
    out, by_row, index, first, rows, tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_TOKENS: tl.constexpr
):
    """Writes tokens from first on, each the sum over the rows that name it."""
    token = first + tl.arange(0, BLOCK_TOKENS)
    total = tl.zeros([BLOCK_TOKENS, BLOCK], tl.float32)
    for first_row in range(0, rows, BLOCK_TOKENS):
        row = first_row + tl.arange(0, BLOCK_TOKENS)
        named = tl.load(index + row, mask=row < rows, other=-1)
        part = load_rows(by_row, row, WIDTH, named >= 0, WIDTH, BLOCK)
        names = (token[:, None] == named[None, :]).to(tl.float32)
        total = tl.dot(names, part, total, input_precision="ieee")
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
def _keys_backward(
    query, key, index, value, grad_output, bias, ignore, at_raw, tops, totals, means, query_rows, grad_rows, bias_parts,
    query_grad, key_grad, value_grad, d_out_grad, bias_grad,
    rows, subtokens, tokens, keys, prefix, parts, scale,
    query_batch, query_head, query_token, key_batch, key_head, key_token,
    value_batch, value_head, value_token, grad_batch, grad_head, grad_token, ignore_batch,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, DOT: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_SUBTOKENS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    tiles, heads = tl.cdiv(keys, BLOCK_KEYS), tl.num_programs(1)
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    head = tl.program_id(1).to(tl.int64)
    pair = batch * heads + head
    query, key, value, grad_output, bias, ignore = of_head(
        batch, head, query, key, value, grad_output, bias, ignore,
        query_batch, query_head, key_batch, key_head, value_batch, value_head, grad_batch, grad_head, ignore_batch,
        VALUE_WIDTH,
    )  # fmt: skip
    index += batch * rows
    at_raw += batch * (rows // subtokens) * (keys - prefix)
    position = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    k, v = load_keys(key, value, position, keys, key_token, value_token, WIDTH, VALUE_WIDTH, BLOCK_WIDTH, BLOCK_VALUE)
    kept = kept_keys(ignore, position, keys)
    k_grad = tl.zeros([BLOCK_KEYS, BLOCK_WIDTH], tl.float32)
    v_grad = tl.zeros([BLOCK_KEYS, BLOCK_VALUE], tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        q, d_out, at_bias, factor, share = _load_words(
            query, grad_output, bias, index, row, rows, tokens, heads, subtokens, scale, query_token, grad_token,
            WIDTH, VALUE_WIDTH, BLOCK_WIDTH, BLOCK_VALUE, BLOCK_SUBTOKENS,
        )  # fmt: skip
        logit, at_attention, at_gate = _logits(
            q, k, d_out, v, at_bias, factor, share, kept, at_raw, row // subtokens, position, keys, prefix,
            value is not None, DOT, PRECISION,
        )  # fmt: skip
        live, place = row < rows, pair * rows + row
        top = tl.load(tops + place, mask=live, other=0.0)
        total = tl.load(totals + place, mask=live, other=1.0)
        mean = tl.load(means + place, mask=live, other=0.0)
        attention = tl.exp(logit - top[:, None]) / total[:, None]
        at_logit = attention * (at_attention - mean[:, None]) * scale
        k_grad = tl.dot(tl.trans(at_logit).to(FACTOR), q.to(FACTOR), k_grad, input_precision=PRECISION)
        if value is not None:
            v_grad = tl.dot(
                tl.trans(at_gate * attention).to(FACTOR), d_out.to(FACTOR), v_grad, input_precision=PRECISION
            )
    store_rows(key_grad + pair * keys * WIDTH, position, position < keys, k_grad, WIDTH, BLOCK_WIDTH)
    if value is not None:
        value_grad += pair * keys * VALUE_WIDTH
        store_rows(value_grad, position, position < keys, v_grad, VALUE_WIDTH, BLOCK_VALUE)
    query_grad, query_rows = query_grad + pair * tokens * WIDTH, query_rows + pair * rows * WIDTH
    for first in range(tile * BLOCK_TOKENS, tokens, tiles * BLOCK_TOKENS):
        _add_rows(query_grad, query_rows, index, first, rows, tokens, WIDTH, BLOCK_WIDTH, BLOCK_TOKENS)
    if value is not None:
        d_out_grad, grad_rows = d_out_grad + pair * tokens * VALUE_WIDTH, grad_rows + pair * rows * VALUE_WIDTH
        for first in range(tile * BLOCK_TOKENS, tokens, tiles * BLOCK_TOKENS):
            _add_rows(d_out_grad, grad_rows, index, first, rows, tokens, VALUE_WIDTH, BLOCK_VALUE, BLOCK_TOKENS)
    if bias is not None and tl.program_id(0) == 0:
        bias_parts += head * parts * VALUE_WIDTH
        _add_parts(bias_grad + head * VALUE_WIDTH, bias_parts, parts, VALUE_WIDTH, BLOCK_VALUE, BLOCK_PARTS)


def _options(table: Configs, key: Tensor, value: Tensor | None, subtokens: int) -> dict[str, Any]:
    chosen = options(table, key, value)
    chosen |= {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_SUBTOKENS": triton.next_power_of_2(subtokens)}
    # A product's computed factor, a probability say, can be too small for fp16.
    chosen["FACTOR"] = tl.float32 if key.dtype == torch.float16 else chosen["DOT"]
    chosen["PRECISION"] = chosen["PRECISION"] if key.dtype == torch.float32 else "tf32"
    return chosen


def backward(
    grad: Tensor,
    raw: Tensor,
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
    """Gradients of query, key, value, grad_output and value_bias (empty where an input is None)."""
    given = (query, key, value, grad_output, value_bias)
    gradients = [query.new_empty((0,) if tensor is None else tensor.shape) for tensor in given]
    (batch, heads, tokens, width), keys = query.shape, key.shape[2]
    words, subtokens = word_index.shape[1:]
    rows = words * subtokens
    if batch * rows == 0:
        return tuple(one.zero_() for one in gradients)
    at_raw, index = _through_normalization(grad.contiguous(), raw, normalize), word_index.contiguous()
    query, key, value, grad_output, ignore = readable(query, key, value, grad_output, key_padding_mask)
    bias = None if value_bias is None else value_bias.contiguous()
    of_rows, of_keys = (_options(table, key, value, subtokens) for table in (ROWS_BACKWARD, KEYS_BACKWARD))
    parts = batch * triton.cdiv(rows, BLOCK_ROWS)
    tensors = (query, key, index, value, grad_output, bias, ignore, at_raw)
    statistics = [at_raw.new_empty((batch, heads, rows)) for _ in range(3)]
    query_rows = at_raw.new_empty((batch, heads, rows, width))
    grad_rows = None if value is None else at_raw.new_empty((batch, heads, rows, value.shape[3]))
    bias_parts = None if bias is None else at_raw.new_empty((heads, parts, bias.shape[1]))
    scratch = (*statistics, query_rows, grad_rows, bias_parts)
    lengths = strides(query, key, value, grad_output, ignore)
    launch(
        _rows_backward, (parts, heads),
        *tensors, *scratch, rows, subtokens, tokens, keys, num_prefix_tokens, scale, *lengths, **of_rows,
    )  # fmt: skip
    launch(
        _keys_backward, (batch * triton.cdiv(keys, of_keys["BLOCK_KEYS"]), heads),
        *tensors, *scratch, *gradients, rows, subtokens, tokens, keys, num_prefix_tokens, parts, scale, *lengths,
        BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_PARTS=BLOCK_PARTS, **of_keys,
    )  # fmt: skip
    return tuple(gradients)


def _through_normalization(grad: Tensor, raw: Tensor, normalize: str) -> Tensor:
    """The gradient at the maps before their normalization."""
    if normalize == "none":
        return grad
    at_raw, size = grad.new_empty(grad.shape), grad.shape[2]
    block = triton.next_power_of_2(size)
    launch(
        _normalize_backward, (grad.shape[0] * grad.shape[1],), grad, raw, at_raw, size, NORMALIZE=normalize, BLOCK=block
    )
    return at_raw
