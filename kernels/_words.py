"""What the kernels of word_attention share: rows of its tensors, their products, and the settings of their launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._launch import Configs, config

BLOCK_ROWS = MIN_WIDTH = 16  # the least that a product takes


@triton.jit
def load_rows(tensor, row, row_stride, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a tensor, zeros where they are not live: [rows, BLOCK]."""
    column = tl.arange(0, BLOCK)
    mask = live[:, None]
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(tensor + row[:, None].to(tl.int64) * row_stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(tensor, row, live, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = live[:, None]
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    tl.store(tensor + row[:, None].to(tl.int64) * WIDTH + column[None, :], values, mask=mask)


@triton.jit
def load_width(tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One row, fp32: [BLOCK]."""
    column = tl.arange(0, BLOCK)
    return tl.load(tensor + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def product(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T. A single row without tensor cores: padding it to their tile would be nearly all of the work."""
    if a.shape[0] == 1:
        result = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)[None, :]
    else:  # no early return: Triton 3.3 would compile what follows it
        result = tl.dot(a.to(DOT), tl.trans(b.to(DOT)), input_precision=PRECISION)
    return result


@triton.jit
def load_tokens(index, row, rows, tokens, scale):
    """The rows' tokens, negative for none; which to read; their logits' factor, NaN for a token beyond the text."""
    token = tl.load(index + row, mask=row < rows, other=-1)
    return token, (token >= 0) & (token < tokens), tl.where(token < tokens, scale, float("nan"))


@triton.jit
def kept_keys(ignore, position, keys):
    """Which keys take part, [BLOCK_KEYS]; others are not read, for 0 times NaN is NaN."""
    kept = position < keys
    if ignore is not None:
        kept = kept & (tl.load(ignore + position, mask=kept, other=1).to(tl.int32) == 0)
    return kept


@triton.jit
def load_keys(
    key, value, position, kept, key_token, value_token,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """Keys and values at positions, zeros where not kept: 0 times NaN is NaN. Keys twice where there are no values."""
    k = load_rows(key, position, key_token, kept, WIDTH, BLOCK_WIDTH)
    v = k
    if value is not None:
        v = load_rows(value, position, value_token, kept, VALUE_WIDTH, BLOCK_VALUE)
    return k, v


@triton.jit
def of_head(tensor, batch, head, batch_stride, head_stride):
    """A tensor from one caption and head on. One at a time: before Triton 3.7 no helper may return None in a tuple."""
    return tensor + batch * batch_stride + head * head_stride


def strides(
    query: Tensor, key: Tensor, value: Tensor | None, grad_output: Tensor | None, ignore: Tensor | None
) -> list[int]:
    """Of captions, heads and tokens, as the kernels take them."""
    by_tensor = [(0, 0, 0) if one is None else one.stride()[:3] for one in (query, key, value, grad_output)]
    return [*sum(by_tensor, ()), 0 if ignore is None else ignore.stride(0)]


def options(table: Configs, key: Tensor, value: Tensor | None) -> dict[str, Any]:
    """Constants of the kernels that go through keys. Wider heads take shorter tiles."""
    chosen, width = config(table, key), key.shape[3]
    size = max(one.element_size() for one in (key, value) if one is not None)
    value_width = 0 if value is None else value.shape[3]
    block, block_value = (max(MIN_WIDTH, triton.next_power_of_2(one)) for one in (width, value_width))
    fit = chosen.pop("TILE_BYTES") // (max(block, block_value) * size)
    chosen["BLOCK_KEYS"] = max(16, min(chosen["BLOCK_KEYS"], fit))
    sizes = {"WIDTH": width, "VALUE_WIDTH": value_width, "BLOCK_WIDTH": block, "BLOCK_VALUE": block_value}
    return chosen | sizes


def types(choose: Callable[..., dict[str, Any]], *pairs: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    """What `choose`, dots or factor_dots, says of the products with queries and keys, and of those with grad_output and
    values: each has the type of its own two tensors."""
    own, of_values = (pairs[0] if pair is None else pair for pair in pairs)
    chosen, second = choose(*own), choose(*of_values)
    return chosen | {"VALUE_DOT": second["DOT"], "VALUE_PRECISION": second["PRECISION"]}
