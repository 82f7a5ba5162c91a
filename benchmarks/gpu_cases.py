"""The calls that gpu_report measures: every op's kernels, forward and backward, at a real size and at a small one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softmask.kernels import soft_mask

Size = dict[str, int]


@dataclass(frozen=True)
class Call:
    """One direction of an op: ``run`` launches its kernels on the tensors of ``inputs``.

    fewest: bytes and floating-point operations that no kernel avoids: each input once, each result once, and the
    products by their definition.
    """

    op: str
    direction: str
    inputs: Callable[[Size, torch.dtype, str], dict[str, Any]]
    run: Callable[..., Any]
    size: Size
    small: Size
    fewest: Callable[[Size, int], tuple[float, float]]

    @property
    def name(self) -> str:
        return f"{self.op} {self.direction}"


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _soft_mask(size: Size, dtype: torch.dtype, device: str) -> dict[str, Any]:
    batch, tokens, width = size["B"], size["P"], size["D"]
    return {
        "features": _random((batch, tokens, width), dtype, device),
        "maps": _random((batch, tokens - 1), torch.float32, device),
    }


def _soft_mask_bytes(streams: int) -> Callable[[Size, int], tuple[float, float]]:
    def fewest(size: Size, itemsize: int) -> tuple[float, float]:
        maps = size["B"] * (size["P"] - 1) * 4
        return streams * size["B"] * size["P"] * size["D"] * itemsize + (2 if streams > 2 else 1) * maps, 0.0

    return fewest


SOFT_MASK = {"B": 64, "P": 577, "D": 768}
SOFT_MASK_SMALL = {"B": 1, "P": 577, "D": 768}

CALLS = [
    Call(
        "soft_mask",
        "forward",
        _soft_mask,
        lambda features, maps: soft_mask.forward(features, maps, 1.0, "minmax", 1),
        SOFT_MASK,
        SOFT_MASK_SMALL,
        _soft_mask_bytes(2),
    ),
    Call(
        "soft_mask",
        "backward",
        _soft_mask,
        lambda features, maps: soft_mask.backward(features, features, maps, 1.0, "minmax", 1, True),
        SOFT_MASK,
        SOFT_MASK_SMALL,
        _soft_mask_bytes(3),
    ),
]
