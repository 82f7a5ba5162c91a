"""soft_mask_attention: flash attention to images that pairs share, each pair with its own weights of their tokens.

Forward, one launch: a program holds a tile of text of one pair and head, streams its image's keys and values once, and
applies the pair's weights to logits and probabilities: no pair's keys or values exist. An index that names no image
names one without keys. Backward, three launches, from the inputs alone: the forward's tiles stream keys and values
twice, for the softmax's statistics and for the query's gradient; a program per image, head and tile of keys goes
through the image's pairs in their order, found in the index itself, and writes the gradients of keys and values once;
parts of the bias's gradient are added up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._launch import launch, readable
from softmask.kernels._words import kept_keys
from softmask.kernels.soft_mask_attention_tables import (
    FORWARD,
    FORWARD_SINGLE,
    factors_of,
    key_backward_tables,
    options_of,
    query_backward_tables,
)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
MAX_BLOCK_PAIRS = 1024  # of the index, in registers beside the gradients
BIAS = {"BLOCK_ROWS": 64, "BLOCK_WIDTH": 64}


@triton.jit
def _place(index, images, pairs, tokens, keys, BLOCK_TOKENS: tl.constexpr):
    """(head, pair, tile of text, image, its keys) of this program: close in time where they may share an image."""
    tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    tile = tl.program_id(0) % tiles
    pair = (tl.program_id(0) // tiles % pairs).to(tl.int64)
    head = (tl.program_id(0) // tiles // pairs).to(tl.int64)
    image = pair
    if index is not None:
        image = tl.load(index + pair)
        keys = tl.where((image >= 0) & (image < images), keys, 0)
    return head, pair, tile, image, keys


@triton.jit
def _tile(start, stride, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to the rows from start on and which of them to touch: [rows, BLOCK]."""
    row, column = tl.arange(0, live.shape[0]), tl.arange(0, BLOCK)
    mask = live[:, None]
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    return start + row[:, None] * stride + column[None, :], mask


@triton.jit
def _load_rows(start, stride, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The rows from start on, zeros where they are not live: [rows, BLOCK]."""
    pointers, mask = _tile(start, stride, live, WIDTH, BLOCK)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store_rows(start, stride, values, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pointers, mask = _tile(start, stride, live, WIDTH, BLOCK)
    tl.store(pointers, values, mask=mask)


@triton.jit
def _logits(
    q, key, stride, weight, ignore, first, keys, scale,
    WIDTH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """(keys, which are kept, their weights, the rows' logits to the base 2: -inf where not kept) of a tile of keys."""
    position = first + tl.arange(0, BLOCK_KEYS)
    kept = kept_keys(ignore, position, keys)
    k = _load_rows(key, stride, kept, WIDTH, BLOCK_WIDTH)
    m = tl.full([BLOCK_KEYS], 1.0, tl.float32)
    if weight is not None:
        m = tl.load(weight + position, mask=kept, other=0.0).to(tl.float32)
    logit = tl.dot(q, tl.trans(k.to(DOT)), input_precision=PRECISION) * (m * scale * LOG2E)[None, :]
    return k, kept, m, tl.where(kept[None, :], logit, float("-inf"))


@triton.jit
def _softmax_step(logit, top):
    """(exponentials at the new maximum, what shrinks sums at the old one, the new maximum) of rows [BLOCK_TOKENS]."""
    new_top = tl.maximum(top, tl.max(logit, 1))
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key yet: exp2(-inf - 0), not NaN
    return tl.exp2(logit - anchor[:, None]), tl.exp2(top - anchor), new_top


@triton.jit
def _forward(
    query, key, value, weight, index, bias, ignore, out,
    images, pairs, heads, tokens, keys, scale,
    query_pair, query_head, query_token, key_image, key_head, key_token, value_image, value_head, value_token,
    weight_pair, ignore_image, bias_head,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    DOT: tl.constexpr, VALUE_DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    head, pair, tile, image, keys = _place(index, images, pairs, tokens, keys, BLOCK_TOKENS)
    first_token = tile.to(tl.int64) * BLOCK_TOKENS
    in_text = tl.arange(0, BLOCK_TOKENS) < tokens - tile * BLOCK_TOKENS
    key += image * key_image + head * key_head
    value += image * value_image + head * value_head
    if weight is not None:
        weight += pair * weight_pair
    if ignore is not None:
        ignore += image * ignore_image
    query += pair * query_pair + head * query_head + first_token * query_token
    q = _load_rows(query, query_token, in_text, WIDTH, BLOCK_WIDTH).to(DOT)
    top = tl.full([BLOCK_TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_TOKENS], tl.float32)
    mean = tl.zeros([BLOCK_TOKENS, BLOCK_VALUE], tl.float32)
    for first in range(0, keys, BLOCK_KEYS):
        _, kept, m, logit = _logits(
            q, key, key_token, weight, ignore, first, keys, scale, WIDTH, DOT, PRECISION, BLOCK_KEYS, BLOCK_WIDTH
        )
        e, shrink, top = _softmax_step(logit, top)
        v = _load_rows(value, value_token, kept, VALUE_WIDTH, BLOCK_VALUE).to(VALUE_DOT)
        mean = tl.dot((e * m[None, :]).to(VALUE_DOT), v, mean * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(e, 1)
        key += BLOCK_KEYS * key_token
        value += BLOCK_KEYS * value_token
    attends = total != 0  # NaN stays NaN
    mean = mean / tl.where(attends, total, 1.0)[:, None]
    if bias is not None:
        column = tl.arange(0, BLOCK_VALUE)
        b = tl.load(bias + head * bias_head + column, mask=column < VALUE_WIDTH, other=0.0).to(tl.float32)
        mean = tl.where(attends[:, None], mean + b[None, :], 0.0)
    out += ((pair * tokens + first_token) * heads + head) * VALUE_WIDTH
    _store_rows(out, heads * VALUE_WIDTH, mean, in_text, VALUE_WIDTH, BLOCK_VALUE)


@triton.jit
def _query_backward(
    grad, query, key, value, weight, index, ignore, query_grad, tops, shares, means, at_bias,
    images, pairs, heads, tokens, keys, scale, grad_pair, grad_head, grad_token,
    query_pair, query_head, query_token, key_image, key_head, key_token, value_image, value_head, value_token,
    weight_pair, ignore_image,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    DOT: tl.constexpr, VALUE_DOT: tl.constexpr, PRECISION: tl.constexpr,
    FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    head, pair, tile, image, keys = _place(index, images, pairs, tokens, keys, BLOCK_TOKENS)
    token = tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    in_text = token < tokens
    first_token = tile.to(tl.int64) * BLOCK_TOKENS
    key += image * key_image + head * key_head
    value += image * value_image + head * value_head
    if weight is not None:
        weight += pair * weight_pair
    if ignore is not None:
        ignore += image * ignore_image
    query += pair * query_pair + head * query_head + first_token * query_token
    grad += pair * grad_pair + head * grad_head + first_token * grad_token
    q = _load_rows(query, query_token, in_text, WIDTH, BLOCK_WIDTH).to(DOT)
    d_out = _load_rows(grad, grad_token, in_text, VALUE_WIDTH, BLOCK_VALUE)
    top = tl.full([BLOCK_TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_TOKENS], tl.float32)
    mean = tl.zeros([BLOCK_TOKENS], tl.float32)  # of the gradient at the probabilities, under them
    key_tile, value_tile = key, value
    for first in range(0, keys, BLOCK_KEYS):
        _, kept, m, logit = _logits(
            q, key_tile, key_token, weight, ignore, first, keys, scale, WIDTH, DOT, PRECISION, BLOCK_KEYS, BLOCK_WIDTH
        )
        v = _load_rows(value_tile, value_token, kept, VALUE_WIDTH, BLOCK_VALUE).to(VALUE_DOT)
        d_a = tl.dot(d_out.to(VALUE_DOT), tl.trans(v), input_precision=PRECISION) * m[None, :]
        e, shrink, top = _softmax_step(logit, top)
        total = total * shrink + tl.sum(e, 1)
        mean = mean * shrink + tl.sum(e * d_a, 1)
        key_tile += BLOCK_KEYS * key_token
        value_tile += BLOCK_KEYS * value_token
    attends = total != 0  # NaN stays NaN
    top = tl.where(attends, top, float("inf"))  # no key: probabilities of 0
    share = 1.0 / tl.where(attends, total, 1.0)  # kept apart from top, whose rounding would grow with the logits
    mean *= share
    row = (pair * heads + head) * tokens
    tl.store(tops + row + token, top, mask=in_text)
    tl.store(shares + row + token, share, mask=in_text)
    tl.store(means + row + token, mean, mask=in_text)
    if at_bias is not None:
        column = tl.arange(0, BLOCK_VALUE)
        d_bias = tl.sum(tl.where(attends[:, None], d_out.to(tl.float32), 0.0), 0)
        at_bias += ((pair * tl.cdiv(tokens, BLOCK_TOKENS) + tile) * heads + head) * VALUE_WIDTH
        tl.store(at_bias + column, d_bias, mask=column < VALUE_WIDTH)
    d_q = tl.zeros([BLOCK_TOKENS, BLOCK_WIDTH], tl.float32)
    for first in range(0, keys, BLOCK_KEYS):
        k, kept, m, logit = _logits(
            q, key, key_token, weight, ignore, first, keys, scale, WIDTH, DOT, PRECISION, BLOCK_KEYS, BLOCK_WIDTH
        )
        v = _load_rows(value, value_token, kept, VALUE_WIDTH, BLOCK_VALUE).to(VALUE_DOT)
        d_a = tl.dot(d_out.to(VALUE_DOT), tl.trans(v), input_precision=PRECISION) * m[None, :]
        d_logit = tl.exp2(logit - top[:, None]) * (d_a - mean[:, None])  # without share
        d_q = tl.dot((d_logit * m[None, :]).to(FACTOR), k.to(FACTOR), d_q, input_precision=FACTOR_PRECISION)
        key += BLOCK_KEYS * key_token
        value += BLOCK_KEYS * value_token
    query_grad += ((pair * tokens + first_token) * heads + head) * WIDTH
    _store_rows(query_grad, heads * WIDTH, d_q * (share * scale)[:, None], in_text, WIDTH, BLOCK_WIDTH)


@triton.jit
def _key_backward(
    grad, query, key, value, weight, index, ignore, tops, shares, means, key_grad, value_grad,
    pairs, heads, tokens, keys, scale, grad_pair, grad_head, grad_token,
    query_pair, query_head, query_token, key_image, key_head, key_token, value_image, value_head, value_token,
    weight_pair, ignore_image,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    DOT: tl.constexpr, VALUE_DOT: tl.constexpr, PRECISION: tl.constexpr,
    FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr, VALUE_FACTOR: tl.constexpr, VALUE_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(keys, BLOCK_KEYS)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    image = (tl.program_id(0) // tiles // heads).to(tl.int64)
    position = tl.program_id(0) % tiles * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    first_key = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_KEYS
    live = position < keys
    if ignore is not None:
        ignore += image * ignore_image
    kept = kept_keys(ignore, position, keys)
    key += image * key_image + head * key_head + first_key * key_token
    value += image * value_image + head * value_head + first_key * value_token
    query += head * query_head
    grad += head * grad_head
    k = _load_rows(key, key_token, kept, WIDTH, BLOCK_WIDTH)
    v = _load_rows(value, value_token, kept, VALUE_WIDTH, BLOCK_VALUE)
    d_k = tl.zeros([BLOCK_KEYS, BLOCK_WIDTH], tl.float32)
    d_v = tl.zeros([BLOCK_KEYS, BLOCK_VALUE], tl.float32)
    for first_pair in range(0, pairs, BLOCK_PAIRS):
        every = first_pair + tl.arange(0, BLOCK_PAIRS)
        ours = every == image
        if index is not None:
            ours = tl.load(index + every, mask=every < pairs, other=-1) == image
        pair, first = tl.min(tl.where(ours, every, pairs), 0), tl.full((), 0, tl.int32)
        # One loop over pairs and their tiles of text, without branches: the next tile's loads are started in time.
        for _ in range(tl.sum(ours.to(tl.int32), 0) * tl.cdiv(tokens, BLOCK_TOKENS)):
            n, at = pair.to(tl.int64), first.to(tl.int64)
            m = tl.full([BLOCK_KEYS], 1.0, tl.float32)
            if weight is not None:
                m = tl.load(weight + n * weight_pair + position, mask=kept, other=0.0).to(tl.float32)
            token = tl.arange(0, BLOCK_TOKENS)
            in_text = token < tokens - first
            row = (n * heads + head) * tokens + at
            q = _load_rows(query + n * query_pair + at * query_token, query_token, in_text, WIDTH, BLOCK_WIDTH)
            d_out = _load_rows(grad + n * grad_pair + at * grad_token, grad_token, in_text, VALUE_WIDTH, BLOCK_VALUE)
            top = tl.load(tops + row + token, mask=in_text, other=float("inf"))
            share = tl.load(shares + row + token, mask=in_text, other=0.0)
            mean = tl.load(means + row + token, mask=in_text, other=0.0)
            logit = tl.dot(k.to(DOT), tl.trans(q.to(DOT)), input_precision=PRECISION) * (m * scale * LOG2E)[:, None]
            logit = tl.where(kept[:, None], logit, float("-inf"))
            a = tl.exp2(logit - top[None, :]) * share[None, :]  # [BLOCK_KEYS, BLOCK_TOKENS]
            d_v = tl.dot(
                (a * m[:, None]).to(VALUE_FACTOR), d_out.to(VALUE_FACTOR), d_v, input_precision=VALUE_PRECISION
            )
            d_a = tl.dot(v.to(VALUE_DOT), tl.trans(d_out.to(VALUE_DOT)), input_precision=PRECISION) * m[:, None]
            d_logit = a * (d_a - mean[None, :])
            d_k = tl.dot((d_logit * m[:, None]).to(FACTOR), q.to(FACTOR), d_k, input_precision=FACTOR_PRECISION)
            first += BLOCK_TOKENS
            following = tl.min(tl.where(ours & (every > pair), every, pairs), 0)
            pair = tl.where(first < tokens, pair, following)
            first = tl.where(first < tokens, first, 0)
    # Zeros at ignored keys, also of a query that is NaN.
    d_k, d_v = tl.where(kept[:, None], d_k, 0.0), tl.where(kept[:, None], d_v, 0.0)
    row = (image * keys + first_key) * heads + head
    _store_rows(key_grad + row * WIDTH, heads * WIDTH, d_k * scale, live, WIDTH, BLOCK_WIDTH)
    _store_rows(value_grad + row * VALUE_WIDTH, heads * VALUE_WIDTH, d_v, live, VALUE_WIDTH, BLOCK_VALUE)


@triton.jit
def _bias_backward(at_bias, bias_grad, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        row = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        live = (row < rows)[:, None] & (column < width)[None, :]
        total += tl.load(at_bias + row[:, None] * width + column[None, :], mask=live, other=0.0)
    tl.store(bias_grad + column, tl.sum(total, 0), mask=column < width)


def _tokens_first(tensor: Tensor, width: int) -> Tensor:
    """Empty [N, H, T, width] laid out as [N, T, H, width]; no view, which could not be changed in place."""
    first, heads, tokens, _ = tensor.shape
    columns, row = max(1, width), max(1, heads) * max(1, width)
    return tensor.new_empty_strided((first, heads, tokens, width), (max(1, tokens) * row, columns, row, 1))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_weight: Tensor | None,
    kv_index: Tensor | None,
    value_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """query [N, H, T, E], key [B, H, P, E], value [B, H, P, V], each of its own type -> [N, H, T, V] of query's."""
    inputs = (query, key, value, key_weight, kv_index, value_bias, key_padding_mask)
    query, key, value, weight, index, bias, ignore = readable(*inputs)
    out = _tokens_first(query, value.shape[3])
    (pairs, heads, tokens, _), (images, _, keys, _) = query.shape, key.shape
    options = options_of(FORWARD, FORWARD_SINGLE, query, key, value)
    launch(
        _forward, (heads * pairs * triton.cdiv(tokens, options["BLOCK_TOKENS"]),),
        query, key, value, weight, index, bias, ignore, out,
        images, pairs, heads, tokens, keys, scale,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *(0 if tensor is None else tensor.stride(0) for tensor in (weight, ignore, bias)), **options,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_weight: Tensor | None,
    kv_index: Tensor | None,
    value_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and value_bias (empty and fp32 where there is none), each of its tensor's type."""
    inputs = (grad, query, key, value, key_weight, kv_index, key_padding_mask)
    grad, query, key, value, weight, index, ignore = readable(*inputs)
    query_grad, key_grad, value_grad = (_tokens_first(tensor, tensor.shape[3]) for tensor in (query, key, value))
    (pairs, heads, tokens, _), (images, _, keys, value_width) = query.shape, value.shape
    tables = query_backward_tables(query, value, padded=ignore is not None)
    options = options_of(*tables, query, key, value, grad) | factors_of(query, key)
    tiles = triton.cdiv(tokens, options["BLOCK_TOKENS"])
    biased = value_bias is not None
    statistics = [query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(3)]
    at_bias = query.new_empty((pairs * tiles if biased else 0, heads, value_width), dtype=torch.float32)
    strides = [length for tensor in (grad, query, key, value) for length in tensor.stride()[:3]]
    strides += [0 if tensor is None else tensor.stride(0) for tensor in (weight, ignore)]
    launch(
        _query_backward, (heads * pairs * tiles,),
        grad, query, key, value, weight, index, ignore, query_grad, *statistics, at_bias if biased else None,
        images, pairs, heads, tokens, keys, scale, *strides, **options,
    )  # fmt: skip
    tables = key_backward_tables(query, value, padded=ignore is not None)
    options = options_of(*tables, query, key, value, grad) | factors_of(query, key)
    options |= factors_of(grad, factor="VALUE_FACTOR", precision="VALUE_PRECISION")
    launch(
        _key_backward, (images * heads * triton.cdiv(keys, options["BLOCK_KEYS"]),),
        grad, query, key, value, weight, index, ignore, *statistics, key_grad, value_grad,
        pairs, heads, tokens, keys, scale, *strides,
        BLOCK_PAIRS=min(MAX_BLOCK_PAIRS, triton.next_power_of_2(max(1, pairs))), **options,
    )  # fmt: skip
    if not biased:
        return query_grad, key_grad, value_grad, at_bias
    bias_grad, width = value_bias.new_empty(value_bias.shape), heads * value_width
    launch(_bias_backward, (triton.cdiv(width, BIAS["BLOCK_WIDTH"]),), at_bias, bias_grad, len(at_bias), width, **BIAS)
    return query_grad, key_grad, value_grad, bias_grad
