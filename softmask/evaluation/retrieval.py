"""Retrieval in both directions: a gallery of encoded images and captions, ranked by ITC and re-ranked by ITM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from softmask.data import DataError, TokenBatch
from softmask.evaluation import metrics, ranks
from softmask.evaluation.readers import Sample, Scorer, batches, pixels


@dataclass
class Gallery:
    """Encoded images, each once, and captions. Pairs with equal ids belong together.

    Tokens are kept only if the model has ITM, which needs them.
    """

    captions: list[str]
    images: list[int]  # number of each image's first sample in the source
    image_ids: Tensor  # [I] int64
    caption_ids: Tensor  # [C] int64
    image_tokens: Tensor | None  # [I, P, D]
    image_features: Tensor  # [I, d]
    cut: int  # number of truncated captions
    text_tokens: Tensor | None  # [C, T, D]
    text_features: Tensor  # [C, d]
    attention_mask: Tensor  # [C, T] bool
    unseen_images: Tensor  # [I] bool: some sample of the image has an unseen object
    unseen_captions: Tensor  # [C] bool

    @property
    def relevant(self) -> Tensor:
        """Right pairs [I, C] bool."""
        return metrics.right_answers(self.image_ids, self.caption_ids)

    @property
    def similarity(self) -> Tensor:
        """Cosine similarities [I, C] fp32, on the CPU."""
        return (self.image_features @ self.text_features.T).float().cpu()


@dataclass
class EncodedBatches:
    """Collects features and, `with_tokens`, tokens of images or captions, batch by batch."""

    with_tokens: bool
    tokens: list[Tensor] = field(default_factory=list)  # [B, T, D]
    features: list[Tensor] = field(default_factory=list)  # [B, d]

    def add(self, tokens: Tensor, feature: Tensor) -> None:
        self.features.append(feature)
        if self.with_tokens:
            self.tokens.append(tokens)

    def cat(self) -> tuple[Tensor | None, Tensor]:
        return torch.cat(self.tokens) if self.with_tokens else None, torch.cat(self.features)


def matches(scorer: Scorer) -> bool:
    """Whether the model has ITM."""
    return scorer.config.find_task().matches_pairs


@torch.no_grad()
def encode_captions(scorer: Scorer, captions: Sequence[str]) -> tuple[Tensor | None, Tensor, TokenBatch]:
    """Tokens [C, T, D] (None if they are not kept), features [C, d], and the tokenized captions."""
    batch = scorer.tokens(captions)
    ids = batch.input_ids.to(scorer.device).split(scorer.batch_size)
    masks = batch.attention_mask.to(scorer.device).split(scorer.batch_size)
    texts = EncodedBatches(matches(scorer))
    for one, mask in zip(ids, masks, strict=True):
        texts.add(*scorer.model.encode_text(one, mask))
    return *texts.cat(), batch


@torch.no_grad()
def build_gallery(scorer: Scorer, samples: Iterable[Sample]) -> Gallery:
    """Encodes every image once, by image_id, and every caption. Keeps no pixels.

    Raises:
        DataError: no readable sample.
    """
    captions: list[str] = []
    caption_ids: list[int] = []
    first_samples: dict[int, int] = {}
    unseen: list[bool] = []
    images = EncodedBatches(matches(scorer))
    for batch in tqdm(batches(samples, scorer.batch_size), desc="encoding", disable=None, leave=False):
        captions += [sample.caption for sample in batch]
        caption_ids += [sample.image_id for sample in batch]
        unseen += [sample.unseen for sample in batch]
        new = []
        for sample in batch:
            if first_samples.setdefault(sample.image_id, sample.index) == sample.index:
                new.append(sample)
        if new:
            images.add(*scorer.model.encode_image(pixels(scorer, new)))
    if not captions:
        raise DataError("no readable sample for the retrieval gallery")
    image_tokens, image_features = images.cat()
    text_tokens, text_features, read = encode_captions(scorer, captions)
    unseen_ids = {number for number, is_unseen in zip(caption_ids, unseen, strict=True) if is_unseen}
    return Gallery(
        captions=captions,
        images=list(first_samples.values()),
        image_ids=torch.tensor(list(first_samples)),
        caption_ids=torch.tensor(caption_ids),
        image_tokens=image_tokens,
        image_features=image_features,
        text_tokens=text_tokens,
        text_features=text_features,
        attention_mask=read.attention_mask.to(scorer.device),
        unseen_images=torch.tensor([number in unseen_ids for number in first_samples]),
        unseen_captions=torch.tensor(unseen),
        cut=int(read.cut.sum()),
    )


RerankBy = Literal["match", "difference", "match+itc"]
"""The score that re-ranks: the logit of a match, as in ALBEF's evaluation; that minus the logit of no match; or that
plus the cosine similarity of the features, as in BLIP's and LAVIS's."""


@torch.no_grad()
def match_scores(scorer: Scorer, gallery: Gallery, wanted: Tensor, *, by: RerankBy = "match") -> Tensor:
    """ITM scores [I, C] fp32 of the wanted pairs [I, C] bool; NaN elsewhere.

    Raises:
        ValueError: the gallery has no tokens.
    """
    image_tokens, text_tokens = gallery.image_tokens, gallery.text_tokens
    if image_tokens is None or text_tokens is None:
        raise ValueError(
            "gallery: expected tokens of images and captions, got features only; the task must set matches_pairs"
        )
    model, scores = scorer.matcher, torch.full(wanted.shape, torch.nan)

    def match(rows: range) -> Tensor:
        """Scores of the wanted pairs of some images, whose keys and values are projected once."""
        pairs = wanted[rows.start : rows.stop].nonzero().to(scorer.device)
        texts = pairs[:, 1]
        logits = model.match(
            image_tokens[rows.start : rows.stop],
            text_tokens[texts],
            gallery.attention_mask[texts],
            kv_index=pairs[:, 0],
        )
        value = logits[:, 1] - logits[:, 0] if by == "difference" else logits[:, 1]
        return value.float().cpu()

    pieces = _in_image_order(wanted.sum(1).tolist(), scorer.batch_size)
    shown = tqdm(pieces, desc="matching", disable=True if ranks.rank() else None, leave=False)
    for rows, values in zip(pieces, ranks.share_out(shown, match), strict=True):
        scores[rows.start : rows.stop][wanted[rows.start : rows.stop]] = values
    return scores + gallery.similarity if by == "match+itc" else scores


def _in_image_order(pairs: Sequence[int], most: int) -> list[range]:
    """Consecutive images that are matched together: as many as have at most `most` pairs, or a single one."""
    found: list[range] = []
    first, total = 0, 0
    for number, count in enumerate(pairs):
        if total and total + count > most:
            found.append(range(first, number))
            first, total = number, 0
        total += count
    return [*found, range(first, len(pairs))] if total else found


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


def retrieval(scorer: Scorer, samples: Iterable[Sample], *, rerank: int, by: RerankBy = "match") -> dict:
    """The metrics.json section: R@1/5/10 in both directions by ITC and by ITM, chance, and the gallery's size.

    If the gallery has unseen objects, "unseen" holds the same figures of the queries with one, among all answers.
    """
    gallery = build_gallery(scorer, samples)
    ranking = rank_both_ways(scorer, gallery, rerank=rerank, by=by)
    found = _recalls(ranking)
    itm = {"rerank": rerank, "rerank_by": by, "itm": found.pop("itm")} if "itm" in found else {}
    sizes = {"samples": len(gallery.captions), "images": len(gallery.images), "cut": gallery.cut}
    result = sizes | found | itm
    if gallery.unseen_captions.any():
        queries = {"i2t": gallery.unseen_images, "t2i": gallery.unseen_captions}
        apart = _recalls({way: rank.of(queries[way]) for way, rank in ranking.items()})
        result["unseen"] = {"samples": int(queries["t2i"].sum()), "images": int(queries["i2t"].sum()), **apart}
    return result
