"""soft_mask: features scaled by one minus a map, each read once and written once.

A program holds a tile of tokens of one image and goes through the image's maps. It reads each map as a whole for its
normalization: a few hundred numbers beside a tile of some thousands. Backward, the same tiles give the gradient of the
features, and by chunks of the width the gradient at the normalized maps, which a second launch, a program per map, adds
up and takes through the normalization.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._launch import Configs, config, last_contiguous, launch
from softmask.kernels._normalize import extent, gradient

MAX_BLOCK_WIDTH = 1024
# BLOCK_TOKENS of features of two bytes; those of four take half as many.
FORWARD: Configs = {0: {"BLOCK_TOKENS": 64}, 80: {"BLOCK_TOKENS": 16, "num_warps": 16, "num_stages": 1}}
BACKWARD: Configs = {0: {"BLOCK_TOKENS": 64}, 80: {"BLOCK_TOKENS": 8, "num_warps": 16, "num_stages": 1}}


@triton.jit
def _weight(map_row, patches, prefix, strength, token, tokens, NORMALIZE: tl.constexpr, BLOCK_PATCHES: tl.constexpr):
    """1 - strength * norm(map) at the tokens, 1 at prefix tokens: [BLOCK_TOKENS]."""
    i_patch = tl.arange(0, BLOCK_PATCHES)
    live = i_patch < patches
    low, divisor = 0.0, 1.0
    if NORMALIZE != "none":
        low, divisor = extent(tl.load(map_row + i_patch, mask=live, other=0.0).to(tl.float32), live, NORMALIZE)
    masked = (token >= prefix) & (token < tokens)
    c = tl.load(map_row + token - prefix, mask=masked, other=0.0).to(tl.float32)
    return tl.where(masked, 1.0 - strength * ((c - low) / divisor), 1.0)


@triton.jit
def _forward(
    features, maps, out,
    words, tokens, width, patches, prefix, strength,
    features_batch, features_token, maps_batch, maps_word,
    NORMALIZE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_PATCHES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    live = (token < tokens)[:, None] & (column < width)[None, :]  # [BLOCK_TOKENS, BLOCK_WIDTH]
    place = batch * features_batch + token[:, None].to(tl.int64) * features_token + column[None, :]
    x = tl.load(features + place, mask=live, other=0.0).to(tl.float32)
    for word in range(words):
        map_row = maps + batch * maps_batch + word * maps_word
        weight = _weight(map_row, patches, prefix, strength, token, tokens, NORMALIZE, BLOCK_PATCHES)
        row = (batch * words + word) * tokens + token
        tl.store(out + row[:, None] * width + column[None, :], x * weight[:, None], mask=live)


@triton.jit
def _backward(
    grad, features, maps, features_grad, at_norm,
    batches, words, tokens, width, patches, prefix, strength,
    features_batch, features_token, maps_batch, maps_word,
    NORMALIZE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_PATCHES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = chunk * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    live = (token < tokens)[:, None] & (column < width)[None, :]  # [BLOCK_TOKENS, BLOCK_WIDTH]
    total = tl.zeros([BLOCK_TOKENS, BLOCK_WIDTH], tl.float32)
    if at_norm is not None:
        place = batch * features_batch + token[:, None].to(tl.int64) * features_token + column[None, :]
        x = tl.load(features + place, mask=live, other=0.0).to(tl.float32)
    for word in range(words):
        row = (batch * words + word) * tokens + token
        d_out = tl.load(grad + row[:, None] * width + column[None, :], mask=live, other=0.0).to(tl.float32)
        if features_grad is not None:
            map_row = maps + batch * maps_batch + word * maps_word
            weight = _weight(map_row, patches, prefix, strength, token, tokens, NORMALIZE, BLOCK_PATCHES)
            total += d_out * weight[:, None]
        if at_norm is not None:
            d_norm = -strength * tl.sum(d_out * x, 1)  # [BLOCK_TOKENS]
            map_index = (chunk * batches + batch) * words + word
            masked = (token >= prefix) & (token < tokens)
            tl.store(at_norm + map_index * patches + token - prefix, d_norm, mask=masked)
    if features_grad is not None:
        row = batch * tokens + token
        tl.store(features_grad + row[:, None] * width + column[None, :], total, mask=live)


@triton.jit
def _maps_backward(
    at_norm, maps, maps_grad, chunks, words, patches, maps_batch, maps_word,
    NORMALIZE: tl.constexpr, BLOCK_PATCHES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)  # of the map
    patch = tl.arange(0, BLOCK_PATCHES)
    live = patch < patches
    d_norm = tl.zeros([BLOCK_PATCHES], tl.float32)
    for chunk in range(chunks):
        row = (chunk * tl.num_programs(0) + index) * patches
        d_norm += tl.load(at_norm + row + patch, mask=live, other=0.0)
    row = index // words * maps_batch + index % words * maps_word
    c = tl.load(maps + row + patch, mask=live, other=0.0).to(tl.float32)
    tl.store(maps_grad + index * patches + patch, gradient(d_norm, c, live, NORMALIZE), mask=live)


def _tile(table: Configs, features: Tensor) -> dict[str, int]:
    options = config(table, features)
    return options | {"BLOCK_TOKENS": options["BLOCK_TOKENS"] * 2 // features.element_size()}


def _block_width(width: int) -> int:
    return min(triton.next_power_of_2(max(width, 1)), MAX_BLOCK_WIDTH)


def _by_word(maps: Tensor) -> Tensor:
    """[B, W, P'], neighbouring patches neighbours in memory."""
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
        _forward,
        (batch * triton.cdiv(tokens, options["BLOCK_TOKENS"]), triton.cdiv(width, block_width)),
        features, by_word, out,
        words, tokens, width, patches, num_prefix_tokens, strength,
        *features.stride()[:2], *by_word.stride()[:2],
        NORMALIZE=normalize, BLOCK_WIDTH=block_width, BLOCK_PATCHES=triton.next_power_of_2(patches), **options,
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
    """Gradients of features (empty without features_grad) and of maps (empty where no features are given)."""
    grad, by_word = grad.contiguous(), _by_word(maps)
    batch, words, patches = by_word.shape
    tokens, width = grad.shape[-2:]
    at_features = grad.new_empty((batch, tokens, width) if features_grad else (0,))
    at_maps = maps.new_empty(maps.shape if features is not None else (0,))
    options = _tile(BACKWARD, grad)
    block_width = _block_width(width)
    chunks, block_patches = triton.cdiv(width, block_width), triton.next_power_of_2(patches)
    at_norm = None
    if features is not None:
        features = last_contiguous(features)
        at_norm = grad.new_empty((chunks, batch, words, patches), dtype=torch.float32)
    launch(
        _backward,
        (batch * triton.cdiv(tokens, options["BLOCK_TOKENS"]), chunks),
        grad, features, by_word, at_features if features_grad else None, at_norm,
        batch, words, tokens, width, patches, num_prefix_tokens, strength,
        *((0, 0) if features is None else features.stride()[:2]), *by_word.stride()[:2],
        NORMALIZE=normalize, BLOCK_WIDTH=block_width, BLOCK_PATCHES=block_patches, **options,
    )  # fmt: skip
    if features is not None:
        launch(
            _maps_backward, (batch * words,),
            at_norm, by_word, at_maps, chunks, words, patches, *by_word.stride()[:2],
            NORMALIZE=normalize, BLOCK_PATCHES=block_patches,
        )  # fmt: skip
    return at_features, at_maps
