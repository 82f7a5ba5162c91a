"""The patches most relevant to a caption, and images without some of their patches."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor

from softmask import ops


@dataclass
class PatchMasks:
    """bool [B, P], None for a head without masks. Both hold the patches most relevant to the caption."""

    kept: Tensor | None  # the caption is told from these
    hidden: Tensor | None  # these are reconstructed


def attentive_masks(
    patches: Tensor, tokens: Tensor, padding: Tensor, *, ratios: Collection[float]
) -> dict[float, Tensor]:
    """ratio -> bool [B, P], that share of the patches [B, P, D], the most relevant to tokens [B, T, D]."""
    options = {"token_padding_mask": padding}
    return {ratio: ops.attentive_mask(patches, tokens, ratio=ratio, **options) for ratio in ratios}


def random_masks(patches: Tensor, *, ratios: Collection[float]) -> dict[float, Tensor]:
    """As `attentive_masks`, of a relevance that is drawn."""
    rank = torch.rand(patches.shape[:2], device=patches.device).argsort(dim=1).argsort(dim=1)
    return {ratio: rank < round(ratio * patches.shape[1]) for ratio in ratios}


def keep_patches(image: Tensor, kept: Tensor, *, ratio: float, num_prefix_tokens: int) -> Tensor:
    """image [B, P, D] -> [B, P', D]: prefix tokens and the patches of `kept` [B, patches], `ratio` of every image."""
    rows, patches = kept.shape
    count = round(ratio * patches)
    place = torch.nonzero_static(kept.flatten(), size=rows * count)[:, 0]
    seen = image[:, num_prefix_tokens:].flatten(0, 1).index_select(0, place).unflatten(0, (rows, count))
    return torch.cat([image[:, :num_prefix_tokens], seen], dim=1)


def replace_patches(image: Tensor, hidden: Tensor, values: Tensor) -> Tensor:
    """image [B, P, D] with `values` [patches, D] in place of the tokens of the patches `hidden` [B, patches]."""
    prefix = image.shape[1] - hidden.shape[1]
    patches = torch.where(hidden[..., None], values.to(image.dtype), image[:, prefix:])
    return torch.cat([image[:, :prefix], patches], dim=1)


def patch_positions(grid: tuple[int, int], width: int) -> Tensor:
    """[patches, width] sines and cosines of every patch's row and column, as in MAE's decoder.

    Raises:
        ValueError: the width is no multiple of four.
    """
    if width % 4:
        raise ValueError(f"reconstruct_masking: 'tokens' needs an image encoder's width of 4 n, got {width}")
    return build_sincos2d_pos_embed(list(grid), width)
