"""The backward kernels of soft_mask_attention: three launches that need only the inputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._attention import load_rows, logits, place, softmax_step, store_rows, tokens_first
from softmask.kernels._launch import cdiv, launch, next_power_of_2, readable, strides
from softmask.kernels._math import LOG2E
from softmask.kernels._words import kept_keys
from softmask.kernels.soft_mask_attention_tables import (
    factors_of,
    key_backward_tables,
    options_of,
    query_backward_tables,
)

MAX_BLOCK_PAIRS = 1024  # of the index at a time, in registers beside the gradients
BIAS = {"BLOCK_ROWS": 64, "BLOCK_WIDTH": 64}


@triton.jit
def _d_attention(
    d_out, value_ptr, stride_vp, kept, weight,
    VALUE_WIDTH: tl.constexpr, VALUE_DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """The gradient with respect to the probabilities of a tile of keys: [BLOCK_TOKENS, BLOCK_KEYS]."""
    value = load_rows(value_ptr, stride_vp, kept, VALUE_WIDTH, BLOCK_VALUE).to(VALUE_DOT)
    return tl.dot(d_out.to(VALUE_DOT), tl.trans(value), input_precision=PRECISION) * weight[None, :]


@triton.jit
def _bwd_query_kernel(
    d_out_ptr, query_ptr, key_ptr, value_ptr, weight_ptr, index_ptr, padding_ptr,
    d_query_ptr, highest_ptr, share_ptr, mean_ptr, d_bias_parts_ptr,
    num_images, num_pairs, num_heads, num_tokens, num_keys, scale,
    d_out_strides, query_strides, key_strides, value_strides, stride_wn, stride_mb,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    DOT: tl.constexpr, VALUE_DOT: tl.constexpr, PRECISION: tl.constexpr,
    FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """The query's gradient, in two passes over the keys, the first for the softmax's statistics; parts of the bias's
    gradient."""
    stride_on, stride_oh, stride_ot = d_out_strides
    stride_qn, stride_qh, stride_qt = query_strides
    stride_kb, stride_kh, stride_kp = key_strides
    stride_vb, stride_vh, stride_vp = value_strides
    head, pair, tile, image, num_keys = place(index_ptr, num_images, num_pairs, num_tokens, num_keys, BLOCK_TOKENS)
    token = tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    in_text = token < num_tokens
    first_token = tile.to(tl.int64) * BLOCK_TOKENS
    key_ptr += image * stride_kb + head * stride_kh
    value_ptr += image * stride_vb + head * stride_vh
    if weight_ptr is not None:
        weight_ptr += pair * stride_wn
    if padding_ptr is not None:
        padding_ptr += image * stride_mb
    query_ptr += pair * stride_qn + head * stride_qh + first_token * stride_qt
    d_out_ptr += pair * stride_on + head * stride_oh + first_token * stride_ot
    query = load_rows(query_ptr, stride_qt, in_text, WIDTH, BLOCK_WIDTH).to(DOT)
    d_out = load_rows(d_out_ptr, stride_ot, in_text, VALUE_WIDTH, BLOCK_VALUE)
    highest, share, mean, attends = _bwd_statistics(
        query, d_out, key_ptr, value_ptr, weight_ptr, padding_ptr, num_keys, scale, stride_kp, stride_vp,
        WIDTH, VALUE_WIDTH, DOT, VALUE_DOT, PRECISION, BLOCK_TOKENS, BLOCK_KEYS, BLOCK_WIDTH, BLOCK_VALUE,
    )  # fmt: skip
    row = (pair * num_heads + head) * num_tokens
    tl.store(highest_ptr + row + token, highest, mask=in_text)
    tl.store(share_ptr + row + token, share, mask=in_text)
    tl.store(mean_ptr + row + token, mean, mask=in_text)
    if d_bias_parts_ptr is not None:
        column = tl.arange(0, BLOCK_VALUE)
        d_bias = tl.sum(tl.where(attends[:, None], d_out.to(tl.float32), 0.0), 0)
        d_bias_parts_ptr += ((pair * tl.cdiv(num_tokens, BLOCK_TOKENS) + tile) * num_heads + head) * VALUE_WIDTH
        tl.store(d_bias_parts_ptr + column, d_bias, mask=column < VALUE_WIDTH)
    d_query = tl.zeros([BLOCK_TOKENS, BLOCK_WIDTH], tl.float32)
    for first in range(0, num_keys, BLOCK_KEYS):
        key, kept, weight, logit = logits(
            query, key_ptr, stride_kp, weight_ptr, padding_ptr, first, num_keys, scale,
            WIDTH, DOT, PRECISION, BLOCK_KEYS, BLOCK_WIDTH,
        )  # fmt: skip
        d_attention = _d_attention(
            d_out, value_ptr, stride_vp, kept, weight, VALUE_WIDTH, VALUE_DOT, PRECISION, BLOCK_VALUE
        )
        d_logit = tl.exp2(logit - highest[:, None]) * (d_attention - mean[:, None])  # share follows below
        factor = (d_logit * weight[None, :]).to(FACTOR)
        d_query = tl.dot(factor, key.to(FACTOR), d_query, input_precision=FACTOR_PRECISION)
        key_ptr += BLOCK_KEYS * stride_kp
        value_ptr += BLOCK_KEYS * stride_vp
    d_query_ptr += ((pair * num_tokens + first_token) * num_heads + head) * WIDTH
    store_rows(d_query_ptr, num_heads * WIDTH, d_query * (share * scale)[:, None], in_text, WIDTH, BLOCK_WIDTH)


@triton.jit
def _bwd_statistics(
    query, d_out, key_ptr, value_ptr, weight_ptr, padding_ptr, num_keys, scale, stride_kp, stride_vp,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    DOT: tl.constexpr, VALUE_DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """For each token: (highest logit, 1 / sum of exponentials, mean gradient of the probabilities, whether it has
    keys)."""
    highest = tl.full([BLOCK_TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_TOKENS], tl.float32)
    mean = tl.zeros([BLOCK_TOKENS], tl.float32)
    key_tile_ptr, value_tile_ptr = key_ptr, value_ptr
    for first in range(0, num_keys, BLOCK_KEYS):
        _, kept, weight, logit = logits(
            query, key_tile_ptr, stride_kp, weight_ptr, padding_ptr, first, num_keys, scale,
            WIDTH, DOT, PRECISION, BLOCK_KEYS, BLOCK_WIDTH,
        )  # fmt: skip
        d_attention = _d_attention(
            d_out, value_tile_ptr, stride_vp, kept, weight, VALUE_WIDTH, VALUE_DOT, PRECISION, BLOCK_VALUE
        )
        exponential, shrink, highest = softmax_step(logit, highest)
        total = total * shrink + tl.sum(exponential, 1)
        mean = mean * shrink + tl.sum(exponential * d_attention, 1)
        key_tile_ptr += BLOCK_KEYS * stride_kp
        value_tile_ptr += BLOCK_KEYS * stride_vp
    attends = total != 0  # NaN stays NaN
    highest = tl.where(attends, highest, float("inf"))  # without keys, probabilities are 0
    share = 1.0 / tl.where(attends, total, 1.0)  # separate from highest: adding its log would round it
    return highest, share, mean * share, attends


@triton.jit
def _load_statistics(highest_ptr, share_ptr, mean_ptr, row, token, in_text):
    """What the query's kernel stored for the tokens of a tile."""
    highest = tl.load(highest_ptr + row + token, mask=in_text, other=float("inf"))
    share = tl.load(share_ptr + row + token, mask=in_text, other=0.0)
    mean = tl.load(mean_ptr + row + token, mask=in_text, other=0.0)
    return highest, share, mean


@triton.jit
def _bwd_key_value_kernel(
    d_out_ptr, query_ptr, key_ptr, value_ptr, weight_ptr, index_ptr, padding_ptr,
    highest_ptr, share_ptr, mean_ptr, d_key_ptr, d_value_ptr,
    num_pairs, num_heads, num_tokens, num_keys, scale,
    d_out_strides, query_strides, key_strides, value_strides, stride_wn, stride_mb,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    DOT: tl.constexpr, VALUE_DOT: tl.constexpr, PRECISION: tl.constexpr,
    FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr, VALUE_FACTOR: tl.constexpr, VALUE_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of an image's keys and values, from all pairs of the image."""
    stride_kb, stride_kh, stride_kp = key_strides
    stride_vb, stride_vh, stride_vp = value_strides
    tiles = tl.cdiv(num_keys, BLOCK_KEYS)
    head = (tl.program_id(0) // tiles % num_heads).to(tl.int64)
    image = (tl.program_id(0) // tiles // num_heads).to(tl.int64)
    position = tl.program_id(0) % tiles * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    first_key = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_KEYS
    live = position < num_keys
    if padding_ptr is not None:
        padding_ptr += image * stride_mb
    kept = kept_keys(padding_ptr, position, num_keys)
    key_ptr += image * stride_kb + head * stride_kh + first_key * stride_kp
    value_ptr += image * stride_vb + head * stride_vh + first_key * stride_vp
    d_key, d_value = _over_pairs(
        d_out_ptr, query_ptr, key_ptr, value_ptr, weight_ptr, index_ptr, highest_ptr, share_ptr, mean_ptr,
        image, head, position, kept, num_pairs, num_heads, num_tokens, scale,
        d_out_strides, query_strides, stride_kp, stride_vp, stride_wn,
        WIDTH, VALUE_WIDTH, DOT, VALUE_DOT, PRECISION, FACTOR, FACTOR_PRECISION, VALUE_FACTOR, VALUE_PRECISION,
        BLOCK_TOKENS, BLOCK_KEYS, BLOCK_WIDTH, BLOCK_VALUE, BLOCK_PAIRS,
    )  # fmt: skip
    # Gradients of ignored keys are 0 even if a query is NaN.
    d_key, d_value = tl.where(kept[:, None], d_key, 0.0), tl.where(kept[:, None], d_value, 0.0)
    row = (image * num_keys + first_key) * num_heads + head
    store_rows(d_key_ptr + row * WIDTH, num_heads * WIDTH, d_key * scale, live, WIDTH, BLOCK_WIDTH)
    store_rows(d_value_ptr + row * VALUE_WIDTH, num_heads * VALUE_WIDTH, d_value, live, VALUE_WIDTH, BLOCK_VALUE)


@triton.jit
def _over_pairs(
    d_out_ptr, query_ptr, key_ptr, value_ptr, weight_ptr, index_ptr, highest_ptr, share_ptr, mean_ptr,
    image, head, position, kept, num_pairs, num_heads, num_tokens, scale,
    d_out_strides, query_strides, stride_kp, stride_vp, stride_wn,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    DOT: tl.constexpr, VALUE_DOT: tl.constexpr, PRECISION: tl.constexpr,
    FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr, VALUE_FACTOR: tl.constexpr, VALUE_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, summed over the image's pairs: [BLOCK_KEYS, BLOCK_WIDTH], [BLOCK_KEYS,
    BLOCK_VALUE]."""
    stride_on, stride_oh, stride_ot = d_out_strides
    stride_qn, stride_qh, stride_qt = query_strides
    query_ptr += head * stride_qh
    d_out_ptr += head * stride_oh
    key = load_rows(key_ptr, stride_kp, kept, WIDTH, BLOCK_WIDTH)
    value = load_rows(value_ptr, stride_vp, kept, VALUE_WIDTH, BLOCK_VALUE)
    d_key = tl.zeros([BLOCK_KEYS, BLOCK_WIDTH], tl.float32)
    d_value = tl.zeros([BLOCK_KEYS, BLOCK_VALUE], tl.float32)
    for first_pair in range(0, num_pairs, BLOCK_PAIRS):
        every = first_pair + tl.arange(0, BLOCK_PAIRS)
        ours = every == image
        if index_ptr is not None:
            ours = tl.load(index_ptr + every, mask=every < num_pairs, other=-1) == image
        pair, first = tl.min(tl.where(ours, every, num_pairs), 0), tl.full((), 0, tl.int32)
        # One loop over pairs and their tiles of text, without branches, so that it prefetches the next tile.
        for _ in range(tl.sum(ours.to(tl.int32), 0) * tl.cdiv(num_tokens, BLOCK_TOKENS)):
            this_pair, first_token = pair.to(tl.int64), first.to(tl.int64)
            weight = tl.full([BLOCK_KEYS], 1.0, tl.float32)
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + this_pair * stride_wn + position, mask=kept, other=0.0).to(tl.float32)
            token = tl.arange(0, BLOCK_TOKENS)
            in_text = token < num_tokens - first
            row = (this_pair * num_heads + head) * num_tokens + first_token
            query_row_ptr = query_ptr + this_pair * stride_qn + first_token * stride_qt
            query = load_rows(query_row_ptr, stride_qt, in_text, WIDTH, BLOCK_WIDTH)
            d_out_row_ptr = d_out_ptr + this_pair * stride_on + first_token * stride_ot
            d_out = load_rows(d_out_row_ptr, stride_ot, in_text, VALUE_WIDTH, BLOCK_VALUE)
            highest, share, mean = _load_statistics(highest_ptr, share_ptr, mean_ptr, row, token, in_text)
            logit = tl.dot(key.to(DOT), tl.trans(query.to(DOT)), input_precision=PRECISION)
            logit = tl.where(kept[:, None], logit * (weight * scale * LOG2E)[:, None], float("-inf"))
            attention = tl.exp2(logit - highest[None, :]) * share[None, :]  # [BLOCK_KEYS, BLOCK_TOKENS]
            factor = (attention * weight[:, None]).to(VALUE_FACTOR)
            d_value = tl.dot(factor, d_out.to(VALUE_FACTOR), d_value, input_precision=VALUE_PRECISION)
            d_attention = tl.dot(value.to(VALUE_DOT), tl.trans(d_out.to(VALUE_DOT)), input_precision=PRECISION)
            d_logit = attention * (d_attention * weight[:, None] - mean[None, :])
            factor = (d_logit * weight[:, None]).to(FACTOR)
            d_key = tl.dot(factor, query.to(FACTOR), d_key, input_precision=FACTOR_PRECISION)
            first += BLOCK_TOKENS
            following = tl.min(tl.where(ours & (every > pair), every, num_pairs), 0)
            pair = tl.where(first < num_tokens, pair, following)
            first = tl.where(first < num_tokens, first, 0)
    return d_key, d_value


@triton.jit
def _bwd_bias_kernel(parts_ptr, d_bias_ptr, num_rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for first in range(0, num_rows, BLOCK_ROWS):
        row = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        live = (row < num_rows)[:, None] & (column < width)[None, :]
        total += tl.load(parts_ptr + row[:, None] * width + column[None, :], mask=live, other=0.0)
    tl.store(d_bias_ptr + column, tl.sum(total, 0), mask=column < width)


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
    """Gradients of query, key, value and value_bias (empty and fp32 if not given), each with its tensor's type."""
    inputs = (grad, query, key, value, key_weight, kv_index, key_padding_mask)
    d_out, query, key, value, weight, index, padding = readable(*inputs)
    d_query, d_key, d_value = (tokens_first(tensor, tensor.shape[3]) for tensor in (query, key, value))
    (pairs, heads, tokens, _), (images, _, keys, value_width) = query.shape, value.shape
    tables = query_backward_tables(query, value, padded=padding is not None)
    options = options_of(*tables, query, key, value, d_out) | factors_of(query, key)
    tiles = cdiv(tokens, options["BLOCK_TOKENS"])
    biased = value_bias is not None
    statistics = [query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(3)]
    d_bias_parts = query.new_empty((pairs * tiles if biased else 0, heads, value_width), dtype=torch.float32)
    all_strides = (
        *(strides(tensor, 3) for tensor in (d_out, query, key, value)),
        *(0 if tensor is None else tensor.stride(0) for tensor in (weight, padding)),
    )
    launch(
        _bwd_query_kernel, (heads * pairs * tiles,),
        d_out, query, key, value, weight, index, padding, d_query, *statistics, d_bias_parts if biased else None,
        images, pairs, heads, tokens, keys, scale, *all_strides, **options,
    )  # fmt: skip
    tables = key_backward_tables(query, value, padded=padding is not None)
    options = options_of(*tables, query, key, value, d_out) | factors_of(query, key)
    options |= factors_of(d_out, factor="VALUE_FACTOR", precision="VALUE_PRECISION")
    launch(
        _bwd_key_value_kernel, (images * heads * cdiv(keys, options["BLOCK_KEYS"]),),
        d_out, query, key, value, weight, index, padding, *statistics, d_key, d_value,
        pairs, heads, tokens, keys, scale, *all_strides,
        BLOCK_PAIRS=min(MAX_BLOCK_PAIRS, next_power_of_2(max(1, pairs))), **options,
    )  # fmt: skip
    if not biased:
        return d_query, d_key, d_value, d_bias_parts
    d_bias, width = value_bias.new_empty(value_bias.shape), heads * value_width
    programs = cdiv(width, BIAS["BLOCK_WIDTH"])
    launch(_bwd_bias_kernel, (programs,), d_bias_parts, d_bias, len(d_bias_parts), width, **BIAS)
    return d_query, d_key, d_value, d_bias
