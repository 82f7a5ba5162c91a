"""The launch tables of soft_mask_attention, and how a launch reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softmask.kernels._launch import Configs, config, dots, factor_dots, next_power_of_2

# For heads up to 64 wide; wider heads use MANY_WARPS, and smaller tiles if the tables' would not fit registers.
HEAD_WIDTH, MANY_WARPS = 64, 8
FORWARD: Configs = {
    0: {"BLOCK_TOKENS": 64, "BLOCK_KEYS": 256},
    80: {"BLOCK_TOKENS": 64, "BLOCK_KEYS": 32, "num_warps": 4, "num_stages": 3},
    90: {"BLOCK_TOKENS": 64, "BLOCK_KEYS": 64, "num_warps": 4, "num_stages": 3},
}
QUERY_BACKWARD: Configs = {0: FORWARD[0], 80: FORWARD[80], 90: FORWARD[80] | {"num_stages": 2}}
KEY_BACKWARD: Configs = {
    0: FORWARD[0],
    80: {"BLOCK_TOKENS": 32, "BLOCK_KEYS": 32, "num_warps": 4, "num_stages": 3},
    90: {"BLOCK_TOKENS": 32, "BLOCK_KEYS": 64, "num_warps": 4, "num_stages": 3},
    100: {"BLOCK_TOKENS": 32, "BLOCK_KEYS": 64, "num_warps": 4, "num_stages": 2},
}
# fp32: IEEE products do not use tensor cores and need more registers.
FORWARD_SINGLE: Configs = {0: FORWARD[0], 80: {"BLOCK_TOKENS": 32, "BLOCK_KEYS": 16, "num_warps": 8, "num_stages": 2}}
QUERY_BACKWARD_SINGLE: Configs = {0: FORWARD[0], 80: FORWARD_SINGLE[80] | {"maxnreg": 64}, 90: FORWARD_SINGLE[80]}
KEY_BACKWARD_SINGLE: Configs = {
    0: FORWARD[0],
    80: {"BLOCK_TOKENS": 16, "BLOCK_KEYS": 32, "num_warps": 8, "num_stages": 3, "maxnreg": 128},
    90: {"BLOCK_TOKENS": 16, "BLOCK_KEYS": 32, "num_warps": 8, "num_stages": 4},
}
# For calls with other register needs than the usual one: padding, heads wider or narrower than 64.
QUERY_BACKWARD_PADDED: Configs = QUERY_BACKWARD | {
    90: QUERY_BACKWARD[90] | {"maxnreg": 160},
    100: QUERY_BACKWARD[90],
}
KEY_BACKWARD_PADDED: Configs = KEY_BACKWARD | {100: KEY_BACKWARD[100] | {"maxnreg": 200}}
KEY_BACKWARD_WIDE: Configs = KEY_BACKWARD | {90: KEY_BACKWARD[90] | {"BLOCK_TOKENS": 16}}
QUERY_BACKWARD_NARROW_SINGLE: Configs = QUERY_BACKWARD_SINGLE | {90: FORWARD_SINGLE[80] | {"num_warps": 4}}
KEY_BACKWARD_NARROW_SINGLE: Configs = KEY_BACKWARD_SINGLE | {90: KEY_BACKWARD_SINGLE[90] | {"num_stages": 3}}


def query_backward_tables(query: Tensor, value: Tensor, *, padded: bool) -> tuple[Configs, Configs]:
    """Tables for half precision and for fp32."""
    half = QUERY_BACKWARD_PADDED if padded else QUERY_BACKWARD
    if dots(query)["PRECISION"] == "tf32":
        return half, FORWARD_SINGLE
    return half, QUERY_BACKWARD_NARROW_SINGLE if _width(query, value) < HEAD_WIDTH else QUERY_BACKWARD_SINGLE


def key_backward_tables(query: Tensor, value: Tensor, *, padded: bool) -> tuple[Configs, Configs]:
    """Tables for half precision and for fp32."""
    width = _width(query, value)
    half = KEY_BACKWARD_WIDE if width > HEAD_WIDTH else KEY_BACKWARD_PADDED if padded else KEY_BACKWARD
    return half, KEY_BACKWARD_NARROW_SINGLE if width < HEAD_WIDTH else KEY_BACKWARD_SINGLE


def _width(query: Tensor, value: Tensor) -> int:
    return max(query.shape[3], value.shape[3])


def options_of(half: Configs, single: Configs, query: Tensor, key: Tensor, *values: Tensor) -> dict[str, Any]:
    """Constants of a launch, with blocks fitted to the problem. A product has its tensors' type, or fp32 if they
    differ."""
    in_single = torch.float32 in {tensor.dtype for tensor in (query, key, *values)}
    options = config(single if in_single else half, query) | dots(query, key) | {"VALUE_DOT": dots(*values)["DOT"]}
    width, value_width = query.shape[3], values[0].shape[3]
    blocks = {"BLOCK_WIDTH": _block(width), "BLOCK_VALUE": _block(value_width)}
    wider = max(blocks.values()) // HEAD_WIDTH
    options |= {"num_warps": MANY_WARPS, "maxnreg": None} if wider > 1 else {}
    fewer = max(1, wider if in_single else wider // 2)
    for name, size in (("BLOCK_TOKENS", query.shape[2]), ("BLOCK_KEYS", values[0].shape[2])):
        blocks[name] = max(16, min(options[name] // fewer, _block(size)))
    return options | blocks | {"WIDTH": width, "VALUE_WIDTH": value_width}


def factors_of(*tensors: Tensor, factor: str = "FACTOR", precision: str = "FACTOR_PRECISION") -> dict[str, Any]:
    """Type and precision of the tensors' products with probabilities and with gradients with respect to logits."""
    chosen = factor_dots(*tensors)
    return {factor: chosen["DOT"], precision: chosen["PRECISION"]}


def _block(size: int) -> int:
    """The next power of two, at least the smallest operand of tl.dot."""
    return max(16, next_power_of_2(size))
