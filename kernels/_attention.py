"""What the kernels of soft_mask_attention share: a program's indices, its rows, logits and the softmax."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._math import LOG2E
from softmask.kernels._words import kept_keys


@triton.jit
def place(index_ptr, num_images, num_pairs, num_tokens, num_keys, BLOCK_TOKENS: tl.constexpr):
    """(head, pair, tile of text, image, number of its keys) of this program. Programs of an image run close
    together."""
    tiles = tl.cdiv(num_tokens, BLOCK_TOKENS)
    tile = tl.program_id(0) % tiles
    pair = (tl.program_id(0) // tiles % num_pairs).to(tl.int64)
    head = (tl.program_id(0) // tiles // num_pairs).to(tl.int64)
    image = pair
    if index_ptr is not None:
        image = tl.load(index_ptr + pair)
        num_keys = tl.where((image >= 0) & (image < num_images), num_keys, 0)
    return head, pair, tile, image, num_keys


@triton.jit
def _tile(start_ptr, stride, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(pointers to consecutive rows, mask): [rows, BLOCK] each."""
    row, column = tl.arange(0, live.shape[0]), tl.arange(0, BLOCK)
    mask = live[:, None]
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    return start_ptr + row[:, None] * stride + column[None, :], mask


@triton.jit
def load_rows(start_ptr, stride, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Loads consecutive rows, with zeros where they are not live: [rows, BLOCK]."""
    pointers, mask = _tile(start_ptr, stride, live, WIDTH, BLOCK)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(start_ptr, stride, values, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pointers, mask = _tile(start_ptr, stride, live, WIDTH, BLOCK)
    tl.store(pointers, values, mask=mask)


@triton.jit
def logits(
    query, key_ptr, stride_kp, weight_ptr, padding_ptr, first, num_keys, scale,
    WIDTH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """(keys, which are kept, their weights, base-2 logits with -inf where not kept) for a tile of keys."""
    position = first + tl.arange(0, BLOCK_KEYS)
    kept = kept_keys(padding_ptr, position, num_keys)
    key = load_rows(key_ptr, stride_kp, kept, WIDTH, BLOCK_WIDTH)
    weight = tl.full([BLOCK_KEYS], 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + position, mask=kept, other=0.0).to(tl.float32)
    logit = tl.dot(query, tl.trans(key.to(DOT)), input_precision=PRECISION) * (weight * scale * LOG2E)[None, :]
    return key, kept, weight, tl.where(kept[None, :], logit, float("-inf"))


@triton.jit
def softmax_step(logit, highest):
    """A step of the online softmax of rows [BLOCK_TOKENS]: (exponentials relative to the new maximum, factor for sums
    relative to the old one, new maximum)."""
    new_highest = tl.maximum(highest, tl.max(logit, 1))
    anchor = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # no key yet: exp2(-inf - 0), not NaN
    return tl.exp2(logit - anchor[:, None]), tl.exp2(highest - anchor), new_highest


def tokens_first(tensor: Tensor, width: int) -> Tensor:
    """An empty [N, H, T, width] laid out as [N, T, H, width]; not a view, which could not be changed in place."""
    first, heads, tokens, _ = tensor.shape
    columns, row = max(1, width), max(1, heads) * max(1, width)
    return tensor.new_empty_strided((first, heads, tokens, width), (max(1, tokens) * row, columns, row, 1))
