"""What the kernels of word_attention share: rows of its tensors, their products, and launch settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._launch import Configs, config, next_power_of_2

BLOCK_ROWS = MIN_WIDTH = 16  # the smallest operand of tl.dot


@triton.jit
def load_rows(tensor_ptr, row, stride_row, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Loads rows of a tensor, with zeros where they are not live: [rows, BLOCK]."""
    column = tl.arange(0, BLOCK)
    mask = live[:, None]
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(tensor_ptr + row[:, None].to(tl.int64) * stride_row + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(tensor_ptr, row, live, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = live[:, None]
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    tl.store(tensor_ptr + row[:, None].to(tl.int64) * WIDTH + column[None, :], values, mask=mask)


@triton.jit
def load_width(row_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Loads one row as fp32: [BLOCK]."""
    column = tl.arange(0, BLOCK)
    return tl.load(row_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def product(left, right, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """left right^T. A single row does not use tensor cores: nearly all of the work would be padding to their tile."""
    if left.shape[0] == 1:
        result = tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)[None, :]
    else:  # no early return: Triton 3.3 would compile what follows it
        result = tl.dot(left.to(DOT), tl.trans(right.to(DOT)), input_precision=PRECISION)
    return result


@triton.jit
def load_tokens(index_ptr, row, num_rows, num_tokens, scale):
    """(tokens of rows, negative for none; which rows to read; factors of logits, NaN for a token beyond the text)."""
    token = tl.load(index_ptr + row, mask=row < num_rows, other=-1)
    return token, (token >= 0) & (token < num_tokens), tl.where(token < num_tokens, scale, float("nan"))


@triton.jit
def kept_keys(padding_ptr, position, num_keys):
    """Which keys take part, [BLOCK_KEYS]. The others are not read, because 0 times NaN is NaN."""
    kept = position < num_keys
    if padding_ptr is not None:
        kept = kept & (tl.load(padding_ptr + position, mask=kept, other=1).to(tl.int32) == 0)
    return kept


@triton.jit
def load_keys(
    key_ptr, value_ptr, position, kept, stride_kp, stride_vp,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """Keys and values at positions (without values, keys twice), 0 where not kept, because 0 times NaN is NaN."""
    key = load_rows(key_ptr, position, stride_kp, kept, WIDTH, BLOCK_WIDTH)
    value = key
    if value_ptr is not None:
        value = load_rows(value_ptr, position, stride_vp, kept, VALUE_WIDTH, BLOCK_VALUE)
    return key, value


@triton.jit
def of_head(tensor_ptr, batch, head, stride_batch, stride_head):
    """A pointer to one caption and head of a tensor. One tensor per call, because before Triton 3.7 no helper may
    return None in a tuple."""
    return tensor_ptr + batch * stride_batch + head * stride_head


def options(table: Configs, key: Tensor, value: Tensor | None) -> dict[str, Any]:
    """Constants of the kernels that loop over keys. Wider heads use shorter tiles."""
    chosen, width = config(table, key), key.shape[3]
    size = max(one.element_size() for one in (key, value) if one is not None)
    value_width = 0 if value is None else value.shape[3]
    block, block_value = (max(MIN_WIDTH, next_power_of_2(one)) for one in (width, value_width))
    fit = chosen.pop("TILE_BYTES") // (max(block, block_value) * size)
    chosen["BLOCK_KEYS"] = max(16, min(chosen["BLOCK_KEYS"], fit))
    sizes = {"WIDTH": width, "VALUE_WIDTH": value_width, "BLOCK_WIDTH": block, "BLOCK_VALUE": block_value}
    return chosen | sizes


def types(choose: Callable[..., dict[str, Any]], *pairs: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    """Applies `choose` (dots or factor_dots) to the products with queries and keys, and to those with grad_output and
    values. Each has the type of its own two tensors."""
    own, of_values = (pairs[0] if pair is None else pair for pair in pairs)
    chosen, second = choose(*own), choose(*of_values)
    return chosen | {"VALUE_DOT": second["DOT"], "VALUE_PRECISION": second["PRECISION"]}
