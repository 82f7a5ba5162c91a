"""Retrieval and grounding metrics as pure functions of tensors.

Retrieval computes R@k from a score matrix [queries, gallery] and a matrix of right answers. The pointing game asks
whether the maximum of a word's map over the patches lies inside the object's mask over the pixels (Zhang et al.,
"Top-down Neural Attention by Excitation Backprop", 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RECALL_AT = (1, 5, 10)
ROWS = 256  # queries at a time: COCO's matrices have 125 million scores, and a copy in fp64 takes 1 GB


def right_answers(query_ids: Tensor, gallery_ids: Tensor) -> Tensor:
    """Pairs of query and gallery item with equal image ids. [Q] and [G] int64 -> [Q, G] bool."""
    return query_ids[:, None] == gallery_ids[None, :]


def best_ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """Number of wrong items at or above the best right one; 0 is a hit at R@1. [Q, G], [Q, G] bool -> [Q] int64.

    Ties count as above, so a model that scores all items alike gets no hit.

    Raises:
        ValueError: shapes differ, a score is not finite, or a query has no right answer.
    """
    if scores.shape != relevant.shape or scores.dim() != 2:
        raise ValueError(f"relevant must be [Q, G] like scores, got {list(relevant.shape)} for {list(scores.shape)}")
    if not _by_rows(lambda some: some.isfinite().all(1), scores).all():
        bad = int((~torch.isfinite(scores)).sum())
        raise ValueError(f"scores must be finite, got {bad} NaN or infinite of {scores.numel()}")
    if not relevant.any(dim=1).all():
        row = int((~relevant.any(dim=1)).nonzero()[0])
        raise ValueError(f"relevant must hold a right answer for every query, got none for query {row}")
    return _by_rows(_best_ranks, scores, relevant)


def _best_ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~relevant).sum(dim=1)


def _by_rows(function: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """The function's results for some rows of the matrices at a time."""
    return torch.cat([function(*some) for some in zip(*(matrix.split(ROWS) for matrix in matrices), strict=True)])


def recall(scores: Tensor, relevant: Tensor, *, ks: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """R@k, the share of queries with a right answer among the first k: {"r1": fraction, "r5": ..., "r10": ...}."""
    ranks = best_ranks(scores, relevant)
    return {f"r{k}": (ranks < k).double().mean().item() for k in ks}


def chance_recall(relevant: Tensor, *, ks: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """R@k of a random order: the mean over queries of 1 - C(G - p, k) / C(G, k), with p right answers among G items."""
    gallery = relevant.shape[1]
    wrong = gallery - relevant.sum(dim=1).double()  # [Q]
    chance = {}
    for k in ks:
        drawn = torch.arange(min(k, gallery), dtype=torch.float64)
        all_wrong = ((wrong[:, None] - drawn).clamp(min=0) / (gallery - drawn)).prod(dim=1)
        chance[f"r{k}"] = (1 - all_wrong).mean().item()
    return chance


def top_candidates(scores: Tensor, k: int) -> Tensor:
    """Mask of the k best items per row, ties to the lower position. [Q, G] -> [Q, G] bool, min(k, G) per row."""

    def chosen(some: Tensor) -> Tensor:
        order = some.argsort(dim=1, descending=True, stable=True)[:, :k]
        return torch.zeros_like(some, dtype=torch.bool).scatter_(1, order, True)

    return _by_rows(chosen, scores)


def rerank(scores: Tensor, candidates: Tensor, match: Tensor) -> Tensor:
    """Scores that rank candidates by `match`, then all others by `scores`. All [Q, G] -> [Q, G] fp64.

    `match` is read at the candidates only. Every candidate is lifted above the best first-stage score of its row.
    """
    return _by_rows(_rerank, scores, candidates, match)


def _rerank(scores: Tensor, candidates: Tensor, match: Tensor) -> Tensor:
    scores, match = scores.double(), match.double()
    lowest = match.masked_fill(~candidates, torch.inf).amin(dim=1, keepdim=True)
    floor = scores.amax(dim=1, keepdim=True) + 1
    return torch.where(candidates, match - lowest + floor, scores)


def tokens_of_span(offsets: Tensor, span: Sequence[int]) -> list[int]:
    """Positions of the tokens that overlap the characters [start, end) of the caption, from offsets [T, 2].

    Special tokens and padding have empty spans and never overlap. Returns no position if the phrase or its end was
    truncated, because half a phrase is not the phrase.
    """
    start, end = span
    if int(offsets[:, 1].max()) < end:
        return []
    overlap = (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 1] > offsets[:, 0])
    return overlap.nonzero().flatten().tolist()


def stack_words(words: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Token positions of each caption's words as word_index [B, W, S] int64, padded with -1; W and S are at least 1."""
    width = max([len(row) for row in words], default=0) or 1
    depth = max([len(word) for row in words for word in row], default=0) or 1
    index = torch.full((len(words), width, depth), -1, dtype=torch.int64)
    for b, row in enumerate(words):
        for w, word in enumerate(row):
            index[b, w, : len(word)] = torch.tensor(word, dtype=torch.int64)
    return index


def upsample_maps(maps: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Maps over patches to maps over pixels, bilinear (align_corners=False). [W, gh * gw] -> [W, h, w] fp32."""
    if maps.dim() != 2 or maps.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"maps must be [W, {grid[0]} * {grid[1]}] for the grid {grid}, got {list(maps.shape)}")
    planes = maps.float().reshape(-1, 1, *grid)
    return F.interpolate(planes, size=size, mode="bilinear", align_corners=False)[:, 0]


def peak(plane: Tensor) -> tuple[int, int] | None:
    """Pixel (row, column) of the maximum of a map [h, w]; None if the map is constant.

    Bilinear upsampling repeats the border outside the outermost patch centres, so a maximum in a border patch becomes a
    plateau up to the image's edge. Among equal pixels, the one nearest to the middle of the image is taken: on all four
    sides, this is the centre of the patch.

    Raises:
        ValueError: the map holds NaN or infinity.
    """
    if not torch.isfinite(plane).all():
        raise ValueError("a word's map must be finite, got NaN or infinity")
    if plane.amin() == plane.amax():
        return None
    ties = (plane == plane.amax()).nonzero()
    middle = (torch.tensor(plane.shape, dtype=torch.float64) - 1) / 2
    distance = (ties.double().cpu() - middle).square().sum(dim=1)
    row, column = ties[int(distance.argmin())].tolist()
    return row, column


def pointing_hit(plane: Tensor, mask: Tensor) -> bool:
    """Whether the peak of a map [h, w] lies inside the mask [h, w] bool. A constant map is a miss."""
    if plane.shape != mask.shape:
        raise ValueError(f"mask must have the map's size {list(plane.shape)}, got {list(mask.shape)}")
    point = peak(plane)
    return point is not None and bool(mask[point])
