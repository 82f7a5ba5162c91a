"""soft_mask_attention: flash attention to images that pairs share, with each pair's own weights of the image tokens.

Forward is one launch. A program holds a tile of text of one pair and head, streams its image's keys and values once,
and applies the pair's weights to logits and probabilities, so no keys or values per pair exist. An index that names no
image counts as an image without keys. Backward is three launches and needs only the inputs. First, the forward's tiles
stream keys and values twice, for the softmax's statistics and for the query's gradient. Then a program per image, head
and tile of keys loops over the image's pairs in order, which it finds in the index, and writes the gradients of keys
and values once. Last, the parts of the bias's gradient are summed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._attention import load_rows, logits, place, softmax_step, store_rows, tokens_first
from softmask.kernels._launch import cdiv, launch, readable, strides
from softmask.kernels.soft_mask_attention_backward import backward
from softmask.kernels.soft_mask_attention_tables import FORWARD, FORWARD_SINGLE, options_of

__all__ = ["backward", "forward"]


@triton.jit
def _fwd_kernel(
    query_ptr, key_ptr, value_ptr, weight_ptr, index_ptr, bias_ptr, padding_ptr, out_ptr,
    num_images, num_pairs, num_heads, num_tokens, num_keys, scale,
    query_strides, key_strides, value_strides, stride_wn, stride_mb, stride_bh,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    DOT: tl.constexpr, VALUE_DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    stride_qn, stride_qh, stride_qt = query_strides
    stride_kb, stride_kh, stride_kp = key_strides
    stride_vb, stride_vh, stride_vp = value_strides
    head, pair, tile, image, num_keys = place(index_ptr, num_images, num_pairs, num_tokens, num_keys, BLOCK_TOKENS)
    first_token = tile.to(tl.int64) * BLOCK_TOKENS
    in_text = tl.arange(0, BLOCK_TOKENS) < num_tokens - tile * BLOCK_TOKENS
    key_ptr += image * stride_kb + head * stride_kh
    value_ptr += image * stride_vb + head * stride_vh
    if weight_ptr is not None:
        weight_ptr += pair * stride_wn
    if padding_ptr is not None:
        padding_ptr += image * stride_mb
    query_ptr += pair * stride_qn + head * stride_qh + first_token * stride_qt
    query = load_rows(query_ptr, stride_qt, in_text, WIDTH, BLOCK_WIDTH).to(DOT)
    highest = tl.full([BLOCK_TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_TOKENS], tl.float32)
    mean = tl.zeros([BLOCK_TOKENS, BLOCK_VALUE], tl.float32)
    for first in range(0, num_keys, BLOCK_KEYS):
        _, kept, weight, logit = logits(
            query, key_ptr, stride_kp, weight_ptr, padding_ptr, first, num_keys, scale,
            WIDTH, DOT, PRECISION, BLOCK_KEYS, BLOCK_WIDTH,
        )  # fmt: skip
        exponential, shrink, highest = softmax_step(logit, highest)
        value = load_rows(value_ptr, stride_vp, kept, VALUE_WIDTH, BLOCK_VALUE).to(VALUE_DOT)
        weighted = (exponential * weight[None, :]).to(VALUE_DOT)
        mean = tl.dot(weighted, value, mean * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(exponential, 1)
        key_ptr += BLOCK_KEYS * stride_kp
        value_ptr += BLOCK_KEYS * stride_vp
    attends = total != 0  # NaN stays NaN
    mean = mean / tl.where(attends, total, 1.0)[:, None]
    if bias_ptr is not None:
        column = tl.arange(0, BLOCK_VALUE)
        bias = tl.load(bias_ptr + head * stride_bh + column, mask=column < VALUE_WIDTH, other=0.0).to(tl.float32)
        mean = tl.where(attends[:, None], mean + bias[None, :], 0.0)
    out_ptr += ((pair * num_tokens + first_token) * num_heads + head) * VALUE_WIDTH
    store_rows(out_ptr, num_heads * VALUE_WIDTH, mean, in_text, VALUE_WIDTH, BLOCK_VALUE)


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
    query, key, value, weight, index, bias, padding = readable(*inputs)
    out = tokens_first(query, value.shape[3])
    (pairs, heads, tokens, _), (images, _, keys, _) = query.shape, key.shape
    options = options_of(FORWARD, FORWARD_SINGLE, query, key, value)
    launch(
        _fwd_kernel, (heads * pairs * cdiv(tokens, options["BLOCK_TOKENS"]),),
        query, key, value, weight, index, bias, padding, out,
        images, pairs, heads, tokens, keys, scale,
        *(strides(tensor, 3) for tensor in (query, key, value)),
        *(0 if tensor is None else tensor.stride(0) for tensor in (weight, padding, bias)), **options,
    )  # fmt: skip
    return out
