"""attentive_mask: selects the patches of an image that are most, or least, relevant to its caption.

The first launch scores every patch. A program holds the cosine similarities of a tile of patches with all tokens (with
64 tokens at a time if there are more than 128), and streams both in chunks of the width: patches are read once, the few
tokens once per tile. Norms are accumulated along with the products, which are divided by them at the end. The second
launch ranks: a patch is selected if fewer than `count` patches of its image come before it. Comparing all pairs takes a
few hundred comparisons per patch, without a sort and without a result on the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._launch import Configs, cdiv, config, dots, last_contiguous, launch, next_power_of_2, strides

EPS: tl.constexpr = tl.constexpr(1e-12)  # as in F.normalize
MIN_BLOCK_TOKENS, MAX_BLOCK_TOKENS = 16, 128
# ROW_BYTES: of a chunk of the width, whatever the type. STAGES: chunks in flight. On Hopper one: Triton gives chunks
# that are used both by wgmma and elsewhere (the norms) too few buffers and overwrites them early
# (triton-lang/triton#6691).
SCORE: Configs = {
    0: {"BLOCK_PATCHES": 256, "ROW_BYTES": 256, "STAGES": 1},
    80: {"BLOCK_PATCHES": 128, "ROW_BYTES": 128, "STAGES": 2},
    90: {"BLOCK_PATCHES": 128, "ROW_BYTES": 128, "STAGES": 1},
    100: {"BLOCK_PATCHES": 128, "ROW_BYTES": 128, "STAGES": 3},
}
# On sm_80, IEEE products of fp32 leave few registers for the next chunk's loads if there are many tokens, or if rows
# are not a whole number of vectors.
SCORE_MANY_TOKENS: Configs = SCORE | {80: SCORE[80] | {"BLOCK_PATCHES": 64, "STAGES": 1}}
SCORE_UNALIGNED: Configs = SCORE | {80: SCORE[80] | {"STAGES": 1, "WARPS": 16}}
SELECT: Configs = {
    0: {"BLOCK_PATCHES": 256, "BLOCK_OTHERS": 256},
    80: {"BLOCK_PATCHES": 128, "BLOCK_OTHERS": 32, "num_warps": 4, "num_stages": 1},
}


@triton.jit
def _cosines(
    patch_ptrs, token_ptrs, live_patch, live_token, width,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Cosine similarities of the rows at patch_ptrs [BLOCK_PATCHES] and token_ptrs [BLOCK_TOKENS]: [BLOCK_PATCHES,
    BLOCK_TOKENS]."""
    products = tl.zeros([live_patch.shape[0], live_token.shape[0]], tl.float32)
    patch_square = tl.zeros([live_patch.shape[0]], tl.float32)
    token_square = tl.zeros([live_token.shape[0]], tl.float32)
    for start in tl.range(0, width, BLOCK_WIDTH, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_WIDTH)
        inside = (column < width)[None, :]
        patch = tl.load(patch_ptrs[:, None] + column[None, :], mask=live_patch[:, None] & inside, other=0.0)
        token = tl.load(token_ptrs[:, None] + column[None, :], mask=live_token[:, None] & inside, other=0.0)
        products = tl.dot(patch.to(DOT), tl.trans(token.to(DOT)), products, input_precision=PRECISION)
        patch, token = patch.to(tl.float32), token.to(tl.float32)
        patch_square += tl.sum(patch * patch, 1)
        token_square += tl.sum(token * token, 1)
    return products * _inverse_norm(token_square)[None, :] * _inverse_norm(patch_square)[:, None]


@triton.jit
def _inverse_norm(square):
    """Rounded to nearest, so that patches that differ by a power of two tie, as in PyTorch."""
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(square), EPS))


@triton.jit
def _fwd_score_kernel(
    patches_ptr, tokens_ptr, padding_ptr, score_ptr,
    num_patches, num_tokens, width,
    patches_strides, tokens_strides, padding_strides,
    HIGH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, TOKEN_BLOCKS: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    stride_pb, stride_pp = patches_strides
    stride_tb, stride_tt = tokens_strides
    stride_mb, stride_mt = padding_strides
    tiles = tl.cdiv(num_patches, BLOCK_PATCHES)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    patch = tl.program_id(0) % tiles * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
    live_patch = patch < num_patches
    patch_ptrs = patches_ptr + batch * stride_pb + patch.to(tl.int64) * stride_pp
    relevance = tl.full([BLOCK_PATCHES], float("-inf"), tl.float32)
    for block in range(TOKEN_BLOCKS):  # usually one, without a loop
        token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        live_token = token < num_tokens
        token_ptrs = tokens_ptr + batch * stride_tb + token.to(tl.int64) * stride_tt
        cosine = _cosines(patch_ptrs, token_ptrs, live_patch, live_token, width, DOT, PRECISION, BLOCK_WIDTH, STAGES)
        cosine = tl.where(cosine == cosine, cosine, float("inf"))  # NaN ranks above all numbers, as in torch's sort
        if padding_ptr is not None:
            padding_ptrs = padding_ptr + batch * stride_mb + token * stride_mt
            live_token = live_token & (tl.load(padding_ptrs, mask=live_token, other=1) == 0)
        relevance = tl.maximum(relevance, tl.max(tl.where(live_token[None, :], cosine, float("-inf")), 1))
    tl.store(score_ptr + batch * num_patches + patch, relevance if HIGH else -relevance, mask=live_patch)


@triton.jit
def _fwd_select_kernel(
    score_ptr, selected_ptr, num_patches, count, BLOCK_PATCHES: tl.constexpr, BLOCK_OTHERS: tl.constexpr
):
    tiles = tl.cdiv(num_patches, BLOCK_PATCHES)
    row = (tl.program_id(0) // tiles).to(tl.int64) * num_patches
    patch = tl.program_id(0) % tiles * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
    live = patch < num_patches
    mine = tl.load(score_ptr + row + patch, mask=live, other=0.0)[:, None]
    rank = tl.zeros([BLOCK_PATCHES], tl.int32)
    for first in range(0, num_patches, BLOCK_OTHERS):
        other = first + tl.arange(0, BLOCK_OTHERS)
        # Beyond the last patch, -inf comes before no patch: it is never greater, and its position is never lower.
        theirs = tl.load(score_ptr + row + other, mask=other < num_patches, other=float("-inf"))[None, :]
        before = (theirs > mine) | ((theirs == mine) & (other[None, :] < patch[:, None]))
        rank += tl.sum(before.to(tl.int32), 1)
    tl.store(selected_ptr + row + patch, rank < count, mask=live)


def forward(patches: Tensor, tokens: Tensor, token_padding_mask: Tensor | None, count: int, high: bool) -> Tensor:
    """patches [B, P, D], tokens [B, T, D], token_padding_mask [B, T] -> bool [B, P], `count` selected per image."""
    patches, tokens = last_contiguous(patches), last_contiguous(tokens)
    batch, num_patches, width = patches.shape
    num_tokens = tokens.shape[1]
    score = patches.new_empty((batch, num_patches), dtype=torch.float32)
    selected = patches.new_empty((batch, num_patches), dtype=torch.bool)
    block_tokens = max(next_power_of_2(num_tokens), MIN_BLOCK_TOKENS)
    types, table = dots(patches, tokens), SCORE
    if types["DOT"] == tl.float32 and types["PRECISION"] == "ieee":
        if block_tokens == MAX_BLOCK_TOKENS:
            table = SCORE_MANY_TOKENS
        elif width % 4:
            table = SCORE_UNALIGNED
    options = config(table, patches)
    row_bytes, warps = options.pop("ROW_BYTES"), options.pop("WARPS", 8)
    if block_tokens > MAX_BLOCK_TOKENS:  # smaller tiles: the running maximum needs registers too
        block_tokens = MAX_BLOCK_TOKENS // 2
        options["BLOCK_PATCHES"] //= 2
    launch(
        _fwd_score_kernel, (batch * cdiv(num_patches, options["BLOCK_PATCHES"]),),
        patches, tokens, token_padding_mask, score,
        num_patches, num_tokens, width,
        strides(patches, 2), strides(tokens, 2), strides(token_padding_mask, 2),
        HIGH=high, **types,
        TOKEN_BLOCKS=cdiv(num_tokens, block_tokens), BLOCK_TOKENS=block_tokens,
        BLOCK_WIDTH=row_bytes // max(patches.element_size(), tokens.element_size()),
        num_warps=max(warps, block_tokens // 8), **options,
    )  # fmt: skip
    options = config(SELECT, patches)
    tiles = cdiv(num_patches, options["BLOCK_PATCHES"])
    launch(_fwd_select_kernel, (batch * tiles,), score, selected, num_patches, count, **options)
    return selected
