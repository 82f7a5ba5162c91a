"""The gallery of retrieval: images and captions, shared over ranks.

A rank keeps the tokens of the images that it encodes, and later matches these; features and captions travel to all.
Every rank encodes the captions, which costs little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softmask.data import DataError, TokenBatch
from softmask.evaluation import metrics
from softmask.evaluation.one_pass import Encoded, Measure, measure_one
from softmask.evaluation.readers import Entry, Reader, Scorer
from softmask.training.config import ConfigError

HALF = {"fp32": torch.float16, "fp16": torch.float16, "bf16": torch.bfloat16}  # precision of training -> on the host


@dataclass
class Piece:
    """Consecutive images of the gallery, encoded together by one rank; the other ranks have no tokens of theirs."""

    rows: slice
    tokens: Tensor | None  # [B, P, D]


@dataclass
class Gallery:
    """Encoded images, each once, and captions. Pairs with equal ids belong together.

    Tokens are kept only if the model has ITM, which needs them.
    """

    captions: list[str]
    images: list[int]  # number of each image's first sample in the source
    image_ids: Tensor  # [I] int64
    caption_ids: Tensor  # [C] int64
    pieces: list[Piece]
    image_features: Tensor  # [I, d]
    cut: int  # number of truncated captions
    text_tokens: Tensor | None  # [C, T, D]
    text_features: Tensor  # [C, d]
    attention_mask: Tensor  # [C, T] bool, on the host
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

    def moved(self, tokens: Tensor) -> Tensor:
        """Kept tokens on the device, as they were encoded."""
        return tokens.to(self.text_features)


def matches(scorer: Scorer) -> bool:
    """Whether the model has ITM."""
    return scorer.config.find_task().matches_pairs


def kept(scorer: Scorer, tokens: Tensor) -> Tensor | None:
    """Tokens as they wait for re-ranking; None without ITM.

    Raises:
        ConfigError: they exceed the range of the host's half precision.
    """
    if not matches(scorer):
        return None
    if scorer.gallery == "device":
        return tokens
    half = tokens.to("cpu", HALF[scorer.config.train.precision])
    if not half.isfinite().all():
        raise ConfigError(f"--gallery host: the model's tokens exceed {half.dtype}; take --gallery device")
    return half


@torch.no_grad()
def encode_captions(scorer: Scorer, captions: Sequence[str]) -> tuple[Tensor | None, Tensor, TokenBatch]:
    """Tokens [C, T, D] (None if they are not kept), features [C, d], and the tokenized captions."""
    batch = scorer.tokens(captions)
    tokens, features = [], []
    for ids, mask in zip(
        batch.input_ids.split(scorer.batch_size), batch.attention_mask.split(scorer.batch_size), strict=True
    ):
        token, feature = scorer.model.encode_text(ids.to(scorer.device), mask.to(scorer.device))
        tokens.append(kept(scorer, token))
        features.append(feature)
    some = [token for token in tokens if token is not None]
    return torch.cat(some) if some else None, torch.cat(features), batch


@dataclass
class Label:
    """A sample without its image."""

    index: int
    caption: str
    image_id: int
    unseen: bool


def labels(entries: Sequence[Entry]) -> list[Label]:
    return [Label(one.index, one.caption, one.image_id, one.unseen) for one in entries]


@dataclass
class Told:
    """What a piece tells all ranks: its samples and its images."""

    labels: list[Label]
    image_ids: list[int]
    first: list[int]  # numbers of the images' first samples
    features: Tensor | None  # [B, d], on the CPU; None without images


class Collect(Measure[Told]):
    """The gallery: every image once, by image_id, and every caption. Keeps tokens where they are encoded, no pixels.

    Raises:
        DataError: no readable sample.
    """

    gallery = True

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._tokens: dict[int, Tensor | None] = {}  # of this rank's pieces, by their first image's id

    def look(self, seen: Encoded) -> Told:
        first = seen.first
        self._tokens[first[0].image_id] = kept(self.scorer, seen.tokens)
        ids, numbers = [one.image_id for one in first], [one.index for one in first]
        return Told(labels(seen.samples), ids, numbers, seen.features.cpu())

    def note(self, entries: Sequence[Entry]) -> Told:
        return Told(labels(entries), [], [], None)

    def result(self, found: Sequence[Told]) -> Any:
        known = sorted((label for one in found for label in one.labels), key=lambda label: label.index)
        if not known:
            raise DataError("no readable sample for the retrieval gallery")
        image_ids = [number for one in found for number in one.image_ids]
        unseen_ids = {label.image_id for label in known if label.unseen}
        captions = [label.caption for label in known]
        features = [one.features for one in found if one.features is not None]
        text_tokens, text_features, read = encode_captions(self.scorer, captions)
        return Gallery(
            captions=captions,
            images=[number for one in found for number in one.first],
            image_ids=torch.tensor(image_ids),
            caption_ids=torch.tensor([label.image_id for label in known]),
            pieces=self._pieces(found),
            image_features=torch.cat(features).to(self.scorer.device),
            text_tokens=text_tokens,
            text_features=text_features,
            attention_mask=read.attention_mask,
            unseen_images=torch.tensor([number in unseen_ids for number in image_ids]),
            unseen_captions=torch.tensor([label.unseen for label in known]),
            cut=int(read.cut.sum()),
        )

    def _pieces(self, found: Sequence[Told]) -> list[Piece]:
        pieces, start = [], 0
        for one in found:
            if one.image_ids:
                stop = start + len(one.image_ids)
                pieces.append(Piece(slice(start, stop), self._tokens.get(one.image_ids[0])))
                start = stop
        return pieces


def build_gallery(scorer: Scorer, reader: Reader, *, pairs: int = 0) -> Gallery:
    """The gallery of the first `pairs` readable samples (0: all). All ranks call it together.

    Raises:
        DataError: no readable sample.
    """
    return measure_one(scorer, reader, Collect(scorer), pairs=pairs)
