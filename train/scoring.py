"""A trained model's scores and maps on captioned pictures: what evaluate.py counts and report.py shows.

Reading never stops at a broken sample: it is left out and named. Everything runs under `torch.no_grad()`, in batches,
and keeps the order of the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from softmask.data import DataConfig, DataError, SampleError, TokenBatch, decode_image, eval_transform, rle
from softmask.data.loader import require_words
from softmask.data.transforms import middle_box
from softmask.train import metrics
from softmask.train.config import Config


class Model(Protocol):
    """What is asked of a model here; `softmask.models.SoftMaskPP` has it, `SyCoCa` but `match` and `word_maps`."""

    patch_grid: tuple[int, int]

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]: ...
    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]: ...
    def match(
        self, image_tokens: Tensor, text_tokens: Tensor, attention_mask: Tensor, *, kv_index: Tensor
    ) -> Tensor: ...
    def word_maps(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        word_index: Tensor,
        *,
        kind: str,
        normalize: str | None,
    ) -> Tensor: ...


@dataclass
class Scorer:
    """A model with all it needs to look at pictures and captions.

    Attributes:
        model: in evaluation mode, on `device`.
        tokenizer: captions -> TokenBatch.
        config: the run's; its `data:` section holds image size, normalization and max_length.
        batch_size: pictures, captions, beams or pairs at a time.
    """

    model: Model
    tokenizer: Any
    config: Config
    device: torch.device = torch.device("cpu")
    batch_size: int = 64

    def tokens(self, captions: Sequence[str]):
        return self.tokenizer(captions, **self.config.data.reading)


@dataclass
class Sample:
    """One caption and its picture (RGB, at the stored size); `index` is its number in the source."""

    index: int
    name: str
    picture: Image.Image
    caption: str
    image_id: int
    objects: list | None
    bad_objects: dict[str, str] = field(default_factory=dict)  # of all the reader's samples: where -> what is wrong
    crop: bool = False

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of what the model looks at."""
        return middle_box(self.picture.size) if self.crop else (0, 0, *self.picture.size)

    @property
    def seen(self) -> Image.Image:
        """The part of the picture that the model looks at."""
        return self.picture.crop(self.box) if self.crop else self.picture


@dataclass
class Reader:
    """Samples of a source in order, as `data` looks at them; `skipped` collects one line for each that cannot be read,
    `bad_objects` the objects that cannot be used."""

    source: Any
    data: DataConfig = field(default_factory=DataConfig)
    skipped: dict[int, str] = field(default_factory=dict)
    bad_objects: dict[str, str] = field(default_factory=dict)

    def read(self, indices: Iterable[int]) -> Iterator[Sample]:
        for index in indices:
            if index in self.skipped:
                continue
            try:
                record = self.source.read(index, extra=True)
                if self.data.clean_captions:
                    require_words(record)
                picture = decode_image(record.image_bytes)
            except SampleError as error:
                self.skipped[index] = str(error)
                continue
            except ValueError as error:
                self.skipped[index] = f"{record.name}: {error}"
                continue
            objects = (record.extra or {}).get("objects")
            if objects is not None and not isinstance(objects, list):
                self.bad_objects[f"{record.name}: objects"] = f"expected a list, got {type(objects).__name__}"
                objects = None
            crop = self.data.eval_resize == "crop"
            yield Sample(index, record.name, picture, record.caption, record.image_id, objects, self.bad_objects, crop)

    def all(self) -> Iterator[Sample]:
        return self.read(range(len(self.source)))


def batches(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def each_picture_once(samples: Iterable[Sample], captions: dict[int, list[str]]) -> Iterator[Sample]:
    """The first sample of every picture; `captions` gets all that each has, by image_id, in the same order."""
    for sample in samples:
        is_new = sample.image_id not in captions
        captions.setdefault(sample.image_id, []).append(sample.caption)
        if is_new:
            yield sample


def pixels(scorer: Scorer, samples: Sequence[Sample]) -> Tensor:
    """Normalized square pictures [B, 3, S, S] on the scorer's device."""
    transform = eval_transform(scorer.config.data)
    return torch.stack([transform(sample.picture) for sample in samples]).to(scorer.device)


# -- retrieval -------------------------------------------------------------------------------------


@dataclass
class Gallery:
    """Encoded pictures (each once) and captions; `image_ids` and `caption_ids` say which belong together. Tokens are
    kept where the model matches pairs by them."""

    captions: list[str]
    pictures: list[int]  # for each picture the number of its first sample in the source
    image_ids: Tensor  # [I] int64
    caption_ids: Tensor  # [C] int64
    image_tokens: Tensor | None  # [I, P, D]
    image_features: Tensor  # [I, d]
    cut: int  # captions that are longer than the text's length
    text_tokens: Tensor | None  # [C, T, D]
    text_features: Tensor  # [C, d]
    attention_mask: Tensor  # [C, T] bool

    @property
    def relevant(self) -> Tensor:
        """Right pairs [I, C] bool."""
        return metrics.right_answers(self.image_ids, self.caption_ids)

    @property
    def similarity(self) -> Tensor:
        """Cosine similarities [I, C] fp32, on the CPU."""
        return (self.image_features @ self.text_features.T).float().cpu()


@dataclass
class Encoded:
    """Tokens and features of pictures or captions, batch by batch; tokens of a model that matches pairs alone."""

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
    """Whether the model can say of a picture and a caption that they belong together (ITM)."""
    return hasattr(scorer.model, "match")


@torch.no_grad()
def encode_captions(scorer: Scorer, captions: Sequence[str]) -> tuple[Tensor | None, Tensor, TokenBatch]:
    """Tokens [C, T, D], where they are kept, features [C, d], and the captions as they were read."""
    batch = scorer.tokens(captions)
    ids = batch.input_ids.to(scorer.device).split(scorer.batch_size)
    masks = batch.attention_mask.to(scorer.device).split(scorer.batch_size)
    texts = Encoded(matches(scorer))
    for one, mask in zip(ids, masks, strict=True):
        texts.add(*scorer.model.encode_text(one, mask))
    return *texts.cat(), batch


@torch.no_grad()
def build_gallery(scorer: Scorer, samples: Iterable[Sample]) -> Gallery:
    """Encodes every picture once (equal image_id: the same picture) and every caption; keeps no pixels."""
    captions, caption_ids, pictures, images = [], [], {}, Encoded(matches(scorer))
    for batch in tqdm(batches(samples, scorer.batch_size), desc="encoding", disable=None, leave=False):
        captions += [sample.caption for sample in batch]
        caption_ids += [sample.image_id for sample in batch]
        new = []
        for sample in batch:
            if pictures.setdefault(sample.image_id, sample.index) == sample.index:
                new.append(sample)
        if new:
            images.add(*scorer.model.encode_image(pixels(scorer, new)))
    if not captions:
        raise DataError("no readable sample for the retrieval gallery")
    image_tokens, image_features = images.cat()
    text_tokens, text_features, read = encode_captions(scorer, captions)
    return Gallery(
        captions=captions,
        pictures=list(pictures.values()),
        image_ids=torch.tensor(list(pictures)),
        caption_ids=torch.tensor(caption_ids),
        image_tokens=image_tokens,
        image_features=image_features,
        text_tokens=text_tokens,
        text_features=text_features,
        attention_mask=read.attention_mask.to(scorer.device),
        cut=int(read.cut.sum()),
    )


RerankBy = Literal["match", "difference", "match+itc"]
"""What re-ranks: the logit of "match", as ALBEF's evaluation; that minus the logit of "no match"; or it plus the cosine
similarity of the features, as BLIP's and LAVIS's."""


@torch.no_grad()
def match_scores(scorer: Scorer, gallery: Gallery, wanted: Tensor, *, by: RerankBy = "match") -> Tensor:
    """Scores by ITM of the wanted pairs [I, C] bool; NaN elsewhere. -> [I, C] fp32"""
    scores = torch.full(wanted.shape, torch.nan)
    chunks = wanted.nonzero().split(scorer.batch_size)
    for pairs in tqdm(chunks, desc="matching", disable=None, leave=False):
        images, kv_index = pairs[:, 0].unique(return_inverse=True)
        images, texts = images.to(scorer.device), pairs[:, 1].to(scorer.device)
        logits = scorer.model.match(
            gallery.image_tokens[images],
            gallery.text_tokens[texts],
            gallery.attention_mask[texts],
            kv_index=kv_index.to(scorer.device),
        )
        value = logits[:, 1] - logits[:, 0] if by == "difference" else logits[:, 1]
        scores[pairs[:, 0], pairs[:, 1]] = value.float().cpu()
    return scores + gallery.similarity if by == "match+itc" else scores


@dataclass
class Ranking:
    """First-stage (ITC) and, where the model matches pairs, re-ranked (ITM) scores; rows are queries."""

    itc: Tensor
    itm: Tensor | None
    relevant: Tensor


def rank_both_ways(scorer: Scorer, gallery: Gallery, *, rerank: int, by: RerankBy = "match") -> dict[str, Ranking]:
    """i2t [I, C] and t2i [C, I]: the `rerank` best of every row by ITC, re-ranked by ITM. Each pair is fused once."""
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


# -- grounding -------------------------------------------------------------------------------------


@dataclass
class Word:
    """A word or phrase of a caption, its tokens and, where the json holds one, its object's mask [h, w] bool."""

    text: str
    span: tuple[int, int]
    tokens: list[int]
    mask: Tensor | None = None


def phrases(sample: Sample, offsets: Tensor) -> list[Word]:
    """The sample's object phrases; `tokens` is empty for those that the caption's truncation cut off.

    Entries that do not follow the documented format are counted in `bad_objects`.
    """
    words = []
    for number, entry in enumerate(sample.objects or []):
        try:
            words.append(_word(sample, entry, offsets))
        except ValueError as error:
            sample.bad_objects[f"{sample.name}: objects[{number}]"] = str(error)
    return words


def _word(sample: Sample, entry: Any, offsets: Tensor) -> Word:
    """Raises ValueError that says what is wrong with the entry."""
    try:
        text, (start, end) = entry["phrase"], entry["span"]
        if not (type(start) is type(end) is int and 0 <= start < end <= len(sample.caption)):
            raise ValueError(f"span {entry['span']} of a caption of {len(sample.caption)} characters")
        mask = torch.as_tensor(rle.decode(entry["mask"])).bool()  # of the stored picture
        found = sample.caption[start:end]
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"expected phrase, span [start, end] and mask {{size, counts}}: {reason}") from error
    if found != text:
        raise ValueError(f"span [{start}, {end}] of the caption is {found!r}, expected the phrase {text!r}")
    if mask.shape != (sample.picture.height, sample.picture.width):
        size = [sample.picture.height, sample.picture.width]
        raise ValueError(f"mask size {list(mask.shape)}, expected the picture's {size}")
    left, top, right, bottom = sample.box
    return Word(text, (start, end), metrics.tokens_of_span(offsets, (start, end)), mask[top:bottom, left:right])


@torch.no_grad()
def word_maps(
    scorer: Scorer,
    samples: Sequence[Sample],
    words: Sequence[Sequence[Word]],
    *,
    kind: str = "gradcam",
    normalize: str | None = None,
) -> list[Tensor]:
    """Maps of each sample's words over the patches. -> for each sample [W, gh * gw] fp32, on the CPU"""
    tokens = scorer.tokens([sample.caption for sample in samples])
    index = metrics.stack_words([[word.tokens for word in row] for row in words])
    maps = scorer.model.word_maps(
        pixels(scorer, samples),
        tokens.input_ids.to(scorer.device),
        tokens.attention_mask.to(scorer.device),
        index.to(scorer.device),
        kind=kind,
        normalize=normalize,
    )
    return [plane[: len(row)].float().cpu() for plane, row in zip(maps, words, strict=True)]
