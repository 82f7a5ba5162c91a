"""Masks of the patches most relevant to a caption, and images without the masked patches."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor

from softmask import ops


@dataclass
class PatchMasks:
    """bool [B, P], the patches most relevant to the caption; None for a loss without masks."""

    kept: Tensor | None  # the caption decoder sees these alone
    hidden: Tensor | None  # these are reconstructed


@dataclass
class Draws:
    """What a step draws at random. A field that is given is used instead: for tests, benchmarks and comparisons."""

    patch_noise: Tensor | None = None  # [B, patches]; with `masks: random` the smallest come first


def attentive_masks(
    patches: Tensor, tokens: Tensor, padding: Tensor, *, ratios: Collection[float]
) -> dict[float, Tensor]:
    """For each ratio a mask bool [B, P] of the patches [B, P, D] most relevant to tokens [B, T, D]."""
    return {ratio: ops.attentive_mask(patches, tokens, ratio=ratio, token_padding_mask=padding) for ratio in ratios}


def random_masks(noise: Tensor, *, ratios: Collection[float]) -> dict[float, Tensor]:
    """For each ratio a mask bool [B, P] of that share of the patches, those with the smallest noise [B, P]."""
    rank = noise.argsort(dim=1).argsort(dim=1)
    return {ratio: rank < round(ratio * noise.shape[1]) for ratio in ratios}


def keep_patches(image: Tensor, kept: Tensor, *, ratio: float, num_prefix_tokens: int) -> Tensor:
    """image [B, P, D] -> [B, P', D]: prefix tokens and the patches `kept` [B, patches], `ratio` of each image."""
    rows, patches = kept.shape
    count = round(ratio * patches)
    index = torch.nonzero_static(kept.flatten(), size=rows * count)[:, 0]
    seen = image[:, num_prefix_tokens:].flatten(0, 1).index_select(0, index).unflatten(0, (rows, count))
    return torch.cat([image[:, :num_prefix_tokens], seen], dim=1)


def replace_patches(image: Tensor, hidden: Tensor, values: Tensor) -> Tensor:
    """image [B, P, D] with `values` [patches, D] in place of the hidden patches' tokens, `hidden` [B, patches]."""
    prefix = image.shape[1] - hidden.shape[1]
    patches = torch.where(hidden[..., None], values.to(image.dtype), image[:, prefix:])
    return torch.cat([image[:, :prefix], patches], dim=1)


def patch_positions(grid: tuple[int, int], width: int) -> Tensor:
    """[patches, width] sines and cosines of each patch's row and column, as in MAE's decoder.

    Raises:
        ValueError: the width is not a multiple of four.
    """
    if width % 4:
        raise ValueError(
            f"reconstruct_masking: 'tokens' needs an image encoder whose width is a multiple of 4, got {width}"
        )
    return build_sincos2d_pos_embed(list(grid), width)
