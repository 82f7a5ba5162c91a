"""Soft masking of image tokens by word maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softmask import reference
from softmask.ops import _checks
from softmask.ops._backend import run
from softmask.ops._fused import soft_mask as fused


def soft_mask(
    features: Tensor,
    maps: Tensor,
    *,
    strength: float = 1.0,
    normalize: str | None = "minmax",
    num_prefix_tokens: int = 1,
) -> Tensor:
    """``out = features * (1 - strength * norm(map))``; prefix tokens are unchanged.

    Args:
        features: [B, P, D]; fp32, fp16, bf16 or fp64.
        maps: [B, P'] or, for W masked copies of each image, [B, W, P'], P' = P - num_prefix_tokens.
        strength: with 1, the highest patch of a normalized map becomes zero.
        normalize: "minmax", "max", "sum" or None, per map. With "minmax" a constant map masks nothing.
        num_prefix_tokens: leading tokens (CLS) that the maps do not cover.

    Returns:
        [B, P, D] or [B, W, P, D] in the dtype of features, computed in fp32 (fp64 for fp64 inputs), differentiable in
        features and maps.

    Raises:
        ValueError: an argument is invalid; the message states what was expected and what was given.

    Source: SoftMask++ (arXiv 2304.00719).
    """
    _checks.shape("features", features, ("B", "P", "D"))
    _checks.dtype("features", features)
    _checks.dtype("maps", maps)
    _checks.device(features, maps=maps)
    _checks.one_of("normalize", normalize, _checks.NORMALIZATIONS)
    _checks.number("strength", strength)
    batch, tokens, _ = features.shape
    _checks.whole("num_prefix_tokens", num_prefix_tokens, least=0, most=tokens - 1, of=f"of the {tokens} tokens")
    patches = tokens - num_prefix_tokens
    if maps.dim() not in (2, 3) or (maps.shape[0], maps.shape[-1]) != (batch, patches):
        _checks.fail("maps", f"shape [{batch}, {patches}] or [{batch}, W, {patches}]", list(maps.shape))
    # On the CPU PyTorch is as fast for one product of fp32 features. Kernels pay off for the map's gradient, several
    # maps, and types that PyTorch converts first.
    half = features.dtype in (torch.float16, torch.bfloat16)
    pays = features.device.type != "cpu" or half or maps.requires_grad or maps.dim() == 3
    return run(
        "soft_mask",
        reference.soft_mask,
        fused.soft_mask,
        features,
        maps,
        floating=(features, maps),
        kernel_pays=pays,
        strength=strength,
        normalize=normalize,
        num_prefix_tokens=num_prefix_tokens,
    )


class SoftMask(nn.Module):
    """:func:`soft_mask` as a layer without parameters."""

    def __init__(self, *, strength: float = 1.0, normalize: str | None = "minmax", num_prefix_tokens: int = 1) -> None:
        super().__init__()
        self.strength, self.normalize, self.num_prefix_tokens = strength, normalize, num_prefix_tokens

    def forward(self, features: Tensor, maps: Tensor) -> Tensor:
        return soft_mask(
            features,
            maps,
            strength=self.strength,
            normalize=self.normalize,
            num_prefix_tokens=self.num_prefix_tokens,
        )

    def extra_repr(self) -> str:
        return f"strength={self.strength}, normalize={self.normalize!r}, num_prefix_tokens={self.num_prefix_tokens}"
