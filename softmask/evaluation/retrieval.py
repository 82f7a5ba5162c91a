"""Retrieval in both directions: a gallery of images and captions (gallery.py), ranked by ITC and re-ranked by ITM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from softmask.evaluation import metrics, ranks
from softmask.evaluation.gallery import Collect, Gallery, Piece, Told, matches
from softmask.evaluation.readers import Scorer

RerankBy = Literal["match", "difference", "match+itc"]
"""The score that re-ranks: the logit of a match, as in ALBEF's evaluation; that minus the logit of no match; or that
plus the cosine similarity of the features, as in BLIP's and LAVIS's."""


@torch.no_grad()
def match_scores(scorer: Scorer, gallery: Gallery, wanted: Tensor, *, by: RerankBy = "match") -> Tensor:
    """ITM scores [I, C] fp32 of the wanted pairs [I, C] bool; NaN elsewhere. A rank matches the images that it has
    encoded.

    Raises:
        ValueError: the gallery has no tokens.
    """
    if gallery.text_tokens is None:
        raise ValueError(
            "gallery: expected tokens of images and captions, got features only; the task must set matches_pairs"
        )
    own = {number: piece for number, piece in enumerate(gallery.pieces) if piece.tokens is not None}
    total = sum(int(wanted[piece.rows].sum()) for piece in own.values())
    with tqdm(total=total, desc="matching", unit="pair", disable=True if ranks.rank() else None, leave=False) as shown:
        found = {n: _match_piece(scorer, gallery, piece, wanted[piece.rows], by, shown) for n, piece in own.items()}
    scores = torch.full(wanted.shape, torch.nan)
    for piece, values in zip(gallery.pieces, ranks.merge(found), strict=True):
        scores[piece.rows][wanted[piece.rows]] = values
    return scores.add_(gallery.similarity) if by == "match+itc" else scores


def _match_piece(scorer: Scorer, gallery: Gallery, piece: Piece, wanted: Tensor, by: RerankBy, shown: tqdm) -> Tensor:
    """Scores of the wanted pairs [B, C] of a piece, row by row. An image's keys and values are projected once, and no
    pass has more than `batch_size` pairs."""
    model, values = scorer.matcher, [torch.empty(0)]
    assert piece.tokens is not None and gallery.text_tokens is not None
    for rows in _in_image_order(wanted.sum(1).tolist(), scorer.batch_size):
        keys = model.image_keys(gallery.moved(piece.tokens[rows]))
        pairs = wanted[rows].nonzero()
        for some in pairs.chunk(math.ceil(len(pairs) / scorer.batch_size)):
            image, text = some.T
            logits = model.match(
                keys,
                gallery.moved(gallery.text_tokens[text.to(gallery.text_tokens.device)]),
                gallery.attention_mask[text].to(scorer.device),
                kv_index=image.to(scorer.device),
            )
            value = logits[:, 1] - logits[:, 0] if by == "difference" else logits[:, 1]
            values.append(value.float().cpu())
            shown.update(len(some))
    return torch.cat(values)


def _in_image_order(pairs: Sequence[int], most: int) -> list[list[int]]:
    """Images with pairs, in groups whose keys and values are projected together: as many as have at most `most` pairs,
    or a single one."""
    found: list[list[int]] = []
    total = most
    for number, count in enumerate(pairs):
        if not count:
            continue
        if total + count > most:
            found.append([])
            total = 0
        found[-1].append(number)
        total += count
    return found


@dataclass
class Ranking:
    """First-stage (ITC) scores and, if the model has ITM, re-ranked ones; rows are queries."""

    itc: Tensor
    itm: Tensor | None
    relevant: Tensor

    def of(self, queries: Tensor) -> Ranking:
        """The rows of some queries, over the same gallery. queries: [Q] bool."""
        return Ranking(self.itc[queries], None if self.itm is None else self.itm[queries], self.relevant[queries])


def rank_both_ways(scorer: Scorer, gallery: Gallery, *, rerank: int, by: RerankBy = "match") -> dict[str, Ranking]:
    """Rankings i2t [I, C] and t2i [C, I]: ITM re-ranks the `rerank` best of every row by ITC. Fuses each pair once."""
    similarity, relevant = gallery.similarity, gallery.relevant
    if not matches(scorer):
        return {"i2t": Ranking(similarity, None, relevant), "t2i": Ranking(similarity.T, None, relevant.T)}
    by_image = metrics.top_candidates(similarity, rerank)
    by_text = metrics.top_candidates(similarity.T, rerank)
    match = match_scores(scorer, gallery, by_image | by_text.T, by=by)
    return {
        "i2t": Ranking(similarity, metrics.rerank(similarity, by_image, match), relevant),
        "t2i": Ranking(similarity.T, metrics.rerank(similarity.T, by_text, match.T), relevant.T),
    }


def _recalls(ranking: dict[str, Ranking]) -> dict[str, dict]:
    """R@1/5/10 by stage and direction: "itc", "chance", and "itm" if the model has ITM."""
    found = {
        "itc": {way: metrics.recall(rank.itc, rank.relevant) for way, rank in ranking.items()},
        "chance": {way: metrics.chance_recall(rank.relevant) for way, rank in ranking.items()},
    }
    itm = {way: metrics.recall(rank.itm, rank.relevant) for way, rank in ranking.items() if rank.itm is not None}
    return found | {"itm": itm} if itm else found


class Recalls(Collect):
    """The metrics.json section: R@1/5/10 in both directions by ITC and by ITM, chance, and the gallery's size.

    If the gallery has unseen objects, "unseen" holds the same figures of the queries with one, among all answers.
    """

    def __init__(self, scorer: Scorer, *, rerank: int, by: RerankBy = "match") -> None:
        super().__init__(scorer)
        self.rerank, self.by = rerank, by

    def result(self, found: Sequence[Told]) -> dict:
        gallery: Gallery = super().result(found)
        scorer = self.scorer
        ranking = rank_both_ways(scorer, gallery, rerank=self.rerank, by=self.by)
        recalls = _recalls(ranking)
        itm = {}
        if "itm" in recalls:
            options = {"rerank": self.rerank, "rerank_by": self.by, "gallery": scorer.gallery}
            itm = options | {"itm": recalls.pop("itm")}
        sizes = {"samples": len(gallery.captions), "images": len(gallery.images), "cut": gallery.cut}
        result = sizes | recalls | itm
        if gallery.unseen_captions.any():
            queries = {"i2t": gallery.unseen_images, "t2i": gallery.unseen_captions}
            apart = _recalls({way: rank.of(queries[way]) for way, rank in ranking.items()})
            result["unseen"] = {"samples": int(queries["t2i"].sum()), "images": int(queries["i2t"].sum()), **apart}
        return result
