"""soft_mask: features scaled by one minus a map; every feature is read once, every result written once.

A program holds a tile of tokens of one image and loops over the image's maps. It reads each whole map for its
normalization: a few hundred numbers, beside thousands in a tile. In backward, the same tiles give the gradient of the
features and, for each chunk of the width, the gradient of the normalized maps. A second launch, with one program per
map, sums the chunks and goes back through the normalization.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._launch import Configs, cdiv, config, last_contiguous, launch, next_power_of_2, strides
from softmask.kernels._normalize import extent, gradient

MAX_BLOCK_WIDTH = 1024
# BLOCK_TOKENS: for features of two bytes; features of four bytes use half as many.
FORWARD: Configs = {0: {"BLOCK_TOKENS": 64}, 80: {"BLOCK_TOKENS": 16, "num_warps": 16, "num_stages": 1}}
BACKWARD: Configs = {0: {"BLOCK_TOKENS": 64}, 80: {"BLOCK_TOKENS": 8, "num_warps": 16, "num_stages": 1}}


@triton.jit
def _weight(
    map_ptr, num_patches, num_prefix, strength, token, num_tokens, NORMALIZE: tl.constexpr, BLOCK_PATCHES: tl.constexpr
):
    """1 - strength * norm(map) at the tokens, 1 at prefix tokens: [BLOCK_TOKENS]."""
    patch = tl.arange(0, BLOCK_PATCHES)
    live = patch < num_patches
    low, divisor = 0.0, 1.0
    if NORMALIZE != "none":
        low, divisor = extent(tl.load(map_ptr + patch, mask=live, other=0.0).to(tl.float32), live, NORMALIZE)
    masked = (token >= num_prefix) & (token < num_tokens)
    map_ = tl.load(map_ptr + token - num_prefix, mask=masked, other=0.0).to(tl.float32)
    return tl.where(masked, 1.0 - strength * ((map_ - low) / divisor), 1.0)


@triton.jit
def _fwd_kernel(
    features_ptr, maps_ptr, out_ptr,
    num_words, num_tokens, width, num_patches, num_prefix, strength,
    features_strides, maps_strides,
    NORMALIZE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_PATCHES: tl.constexpr,
):  # fmt: skip
    stride_fb, stride_fp = features_strides
    stride_mb, stride_mw = maps_strides
    tiles = tl.cdiv(num_tokens, BLOCK_TOKENS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    live = (token < num_tokens)[:, None] & (column < width)[None, :]  # [BLOCK_TOKENS, BLOCK_WIDTH]
    place = batch * stride_fb + token[:, None].to(tl.int64) * stride_fp + column[None, :]
    features = tl.load(features_ptr + place, mask=live, other=0.0).to(tl.float32)
    for word in range(num_words):
        map_ptr = maps_ptr + batch * stride_mb + word * stride_mw
        weight = _weight(map_ptr, num_patches, num_prefix, strength, token, num_tokens, NORMALIZE, BLOCK_PATCHES)
        row = (batch * num_words + word) * num_tokens + token
        tl.store(out_ptr + row[:, None] * width + column[None, :], features * weight[:, None], mask=live)


@triton.jit
def _bwd_kernel(
    d_out_ptr, features_ptr, maps_ptr, d_features_ptr, d_norm_parts_ptr,
    num_images, num_words, num_tokens, width, num_patches, num_prefix, strength,
    features_strides, maps_strides,
    NORMALIZE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_PATCHES: tl.constexpr,
):  # fmt: skip
    stride_fb, stride_fp = features_strides
    stride_mb, stride_mw = maps_strides
    tiles = tl.cdiv(num_tokens, BLOCK_TOKENS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = chunk * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    live = (token < num_tokens)[:, None] & (column < width)[None, :]  # [BLOCK_TOKENS, BLOCK_WIDTH]
    d_features = tl.zeros([BLOCK_TOKENS, BLOCK_WIDTH], tl.float32)
    if d_norm_parts_ptr is not None:
        place = batch * stride_fb + token[:, None].to(tl.int64) * stride_fp + column[None, :]
        features = tl.load(features_ptr + place, mask=live, other=0.0).to(tl.float32)
    for word in range(num_words):
        row = (batch * num_words + word) * num_tokens + token
        d_out = tl.load(d_out_ptr + row[:, None] * width + column[None, :], mask=live, other=0.0).to(tl.float32)
        if d_features_ptr is not None:
            map_ptr = maps_ptr + batch * stride_mb + word * stride_mw
            weight = _weight(map_ptr, num_patches, num_prefix, strength, token, num_tokens, NORMALIZE, BLOCK_PATCHES)
            d_features += d_out * weight[:, None]
        if d_norm_parts_ptr is not None:
            d_norm = -strength * tl.sum(d_out * features, 1)  # [BLOCK_TOKENS]
            map_index = (chunk * num_images + batch) * num_words + word
            masked = (token >= num_prefix) & (token < num_tokens)
            tl.store(d_norm_parts_ptr + map_index * num_patches + token - num_prefix, d_norm, mask=masked)
    if d_features_ptr is not None:
        row = batch * num_tokens + token
        tl.store(d_features_ptr + row[:, None] * width + column[None, :], d_features, mask=live)


@triton.jit
def _bwd_maps_kernel(
    d_norm_parts_ptr, maps_ptr, d_maps_ptr, num_chunks, num_words, num_patches, maps_strides,
    NORMALIZE: tl.constexpr, BLOCK_PATCHES: tl.constexpr,
):  # fmt: skip
    stride_mb, stride_mw = maps_strides
    index = tl.program_id(0).to(tl.int64)  # of the map
    patch = tl.arange(0, BLOCK_PATCHES)
    live = patch < num_patches
    d_norm = tl.zeros([BLOCK_PATCHES], tl.float32)
    for chunk in range(num_chunks):
        row = (chunk * tl.num_programs(0) + index) * num_patches
        d_norm += tl.load(d_norm_parts_ptr + row + patch, mask=live, other=0.0)
    row = index // num_words * stride_mb + index % num_words * stride_mw
    map_ = tl.load(maps_ptr + row + patch, mask=live, other=0.0).to(tl.float32)
    tl.store(d_maps_ptr + index * num_patches + patch, gradient(d_norm, map_, live, NORMALIZE), mask=live)


def _tile(table: Configs, features: Tensor) -> dict[str, int]:
    options = config(table, features)
    return options | {"BLOCK_TOKENS": options["BLOCK_TOKENS"] * 2 // features.element_size()}


def _block_width(width: int) -> int:
    return min(next_power_of_2(max(width, 1)), MAX_BLOCK_WIDTH)


def _by_word(maps: Tensor) -> Tensor:
    """maps as [B, W, P'], contiguous in the last dimension."""
    return last_contiguous(maps if maps.dim() == 3 else maps.unsqueeze(1))


def forward(features: Tensor, maps: Tensor, strength: float, normalize: str, num_prefix_tokens: int) -> Tensor:
    """features [B, P, D], maps [B, P'] or [B, W, P'] -> [B, P, D] or [B, W, P, D]."""
    batch, tokens, width = features.shape
    out = features.new_empty((*maps.shape[:-1], tokens, width))
    features, by_word = last_contiguous(features), _by_word(maps)
    _, words, patches = by_word.shape
    options = _tile(FORWARD, features)
    block_width = _block_width(width)
    launch(
        _fwd_kernel,
        (batch * cdiv(tokens, options["BLOCK_TOKENS"]), cdiv(width, block_width)),
        features, by_word, out,
        words, tokens, width, patches, num_prefix_tokens, strength,
        strides(features, 2), strides(by_word, 2),
        NORMALIZE=normalize, BLOCK_WIDTH=block_width, BLOCK_PATCHES=next_power_of_2(patches), **options,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    features: Tensor | None,
    maps: Tensor,
    strength: float,
    normalize: str,
    num_prefix_tokens: int,
    features_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of features (empty without features_grad) and of maps (empty if no features are given)."""
    grad, by_word = grad.contiguous(), _by_word(maps)
    batch, words, patches = by_word.shape
    tokens, width = grad.shape[-2:]
    d_features = grad.new_empty((batch, tokens, width) if features_grad else (0,))
    d_maps = maps.new_empty(maps.shape if features is not None else (0,))
    options = _tile(BACKWARD, grad)
    block_width = _block_width(width)
    chunks, block_patches = cdiv(width, block_width), next_power_of_2(patches)
    d_norm_parts = None
    if features is not None:
        features = last_contiguous(features)
        d_norm_parts = grad.new_empty((chunks, batch, words, patches), dtype=torch.float32)
    launch(
        _bwd_kernel,
        (batch * cdiv(tokens, options["BLOCK_TOKENS"]), chunks),
        grad, features, by_word, d_features if features_grad else None, d_norm_parts,
        batch, words, tokens, width, patches, num_prefix_tokens, strength,
        strides(features, 2), strides(by_word, 2),
        NORMALIZE=normalize, BLOCK_WIDTH=block_width, BLOCK_PATCHES=block_patches, **options,
    )  # fmt: skip
    if features is not None:
        launch(
            _bwd_maps_kernel, (batch * words,),
            d_norm_parts, by_word, d_maps, chunks, words, patches, strides(by_word, 2),
            NORMALIZE=normalize, BLOCK_PATCHES=block_patches,
        )  # fmt: skip
    return d_features, d_maps
