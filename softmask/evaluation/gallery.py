"""The gallery of retrieval: images and captions, each read and encoded once, shared over ranks.

Whole images are dealt out in pieces that do not depend on the number of ranks. A rank keeps the tokens of the images
that it encodes, and later matches these; features and captions travel to all. Every rank encodes the captions, which
costs little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from softmask.data import DataError, TokenBatch
from softmask.evaluation import metrics
from softmask.evaluation.readers import Reader, Sample, Scorer, batches, each_image_once, pixels, share_samples
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


@dataclass
class Encoded:
    """What a piece tells all ranks: its samples and its new images."""

    labels: list[Label]
    image_ids: list[int]  # of the new images
    first: list[int]  # number of their first samples
    features: Tensor | None  # [B, d], on the CPU; None without new images


@dataclass
class _Images:
    """Reads and encodes images until there are enough samples."""

    scorer: Scorer
    reader: Reader
    encoded: list[Encoded] = field(default_factory=list)
    tokens: dict[int, Tensor | None] = field(default_factory=dict)  # of this rank's pieces, by their first image's id
    samples: int = 0

    def read(self, pairs: int) -> None:
        """The first `pairs` readable samples, read in turns: as many again as could not be read."""
        stop, total = 0, len(self.reader.source)
        while stop < total and self.samples < pairs:
            start, stop = stop, min(total, stop + pairs - self.samples)
            self._read_turn(range(start, stop))

    def _read_turn(self, indices: range) -> None:
        known = {number for one in self.encoded for number in one.image_ids}
        work = partial(self._encode, known=known)
        found = share_samples(self.reader, self._pieces(indices), work, show="encoding")
        self.samples += sum(len(one.labels) for one in found)
        self.encoded += found

    def _pieces(self, indices: range) -> list[list[int]]:
        """The samples of `batch_size` images each, in the order of the images' first samples."""
        by_image: dict[int, list[int]] = {}
        for index in indices:
            by_image.setdefault(int(self.reader.source.image_ids[index]), []).append(index)
        return [list(chain.from_iterable(some)) for some in batches(by_image.values(), self.scorer.batch_size)]

    def _encode(self, samples: list[Sample], *, known: set[int]) -> Encoded:
        labels = [Label(one.index, one.caption, one.image_id, one.unseen) for one in samples]
        new = [one for one in each_image_once(samples, {}) if one.image_id not in known]
        feature = self._encode_images(new) if new else None
        return Encoded(labels, [one.image_id for one in new], [one.index for one in new], feature)

    @torch.no_grad()
    def _encode_images(self, samples: list[Sample]) -> Tensor:
        tokens, feature = self.scorer.model.encode_image(pixels(self.scorer, samples))
        self.tokens[samples[0].image_id] = kept(self.scorer, tokens)
        return feature.cpu()

    def pieces(self) -> list[Piece]:
        """The new images of all pieces, in order."""
        found, start = [], 0
        for one in self.encoded:
            if one.image_ids:
                stop = start + len(one.image_ids)
                found.append(Piece(slice(start, stop), self.tokens.get(one.image_ids[0])))
                start = stop
        return found


def build_gallery(scorer: Scorer, reader: Reader, *, pairs: int = 0) -> Gallery:
    """Encodes every image of the first `pairs` readable samples (0: all) once, by image_id, and every caption. Keeps no
    pixels. All ranks call it together; unreadable samples are in every rank's `reader.skipped`.

    Raises:
        DataError: no readable sample.
    """
    images = _Images(scorer, reader)
    images.read(pairs or len(reader.source))
    labels = sorted((label for one in images.encoded for label in one.labels), key=lambda label: label.index)
    if not labels:
        raise DataError("no readable sample for the retrieval gallery")
    captions = [label.caption for label in labels]
    image_ids = [number for one in images.encoded for number in one.image_ids]
    unseen_ids = {label.image_id for label in labels if label.unseen}
    features = [one.features for one in images.encoded if one.features is not None]
    text_tokens, text_features, read = encode_captions(scorer, captions)
    return Gallery(
        captions=captions,
        images=[number for one in images.encoded for number in one.first],
        image_ids=torch.tensor(image_ids),
        caption_ids=torch.tensor([label.image_id for label in labels]),
        pieces=images.pieces(),
        image_features=torch.cat(features).to(scorer.device),
        text_tokens=text_tokens,
        text_features=text_features,
        attention_mask=read.attention_mask,
        unseen_images=torch.tensor([number in unseen_ids for number in image_ids]),
        unseen_captions=torch.tensor([label.unseen for label in labels]),
        cut=int(read.cut.sum()),
    )
