"""Samples, and the model that scores them, for evaluation and report.

Unreadable samples are skipped and named. Batches keep the order of the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol, TypeGuard, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from softmask.data import DataConfig, Record, SampleError, TokenBatch, decode_image, eval_transform
from softmask.data.loader import require_words
from softmask.data.transforms import middle_box
from softmask.training.config import Config

R = TypeVar("R")
GalleryPlace = Literal["device", "host"]


class Model(Protocol):
    """Methods of a task's model that every evaluation section and the report use."""

    @property
    def patch_grid(self) -> tuple[int, int]: ...
    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]: ...
    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


class Matcher(Protocol):
    """A model that scores image-text pairs (ITM): `match` reads what `image_keys` computes once for an image."""

    def image_keys(self, image_tokens: Tensor) -> Any: ...
    def match(self, keys: Any, text_tokens: Tensor, attention_mask: Tensor, *, kv_index: Tensor) -> Tensor: ...


class WordMapper(Protocol):
    """A model that maps words to regions of images, or of their tokens."""

    def word_maps(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        word_index: Tensor,
        *,
        kind: str,
        normalize: str | None,
        kv_index: Tensor | None = None,
    ) -> Tensor: ...


class Reconstructor(Protocol):
    """A model that reconstructs hidden patches from a caption; `hidden_patches` reads images, or their tokens."""

    @property
    def patch_grid(self) -> tuple[int, int]: ...
    @property
    def patch_size(self) -> int: ...
    def hidden_patches(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor: ...
    def reconstruct(self, images: Tensor, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor: ...


def is_model(model: object) -> TypeGuard[Model]:
    """Whether the model has the methods that evaluation needs."""
    return _has(model, "patch_grid", "encode_image", "encode_text", "parameters")


def _is_matcher(model: object) -> TypeGuard[Matcher]:
    return _has(model, "image_keys", "match")


def _is_word_mapper(model: object) -> TypeGuard[WordMapper]:
    return _has(model, "word_maps")


def _is_reconstructor(model: object) -> TypeGuard[Reconstructor]:
    return _has(model, "patch_grid", "patch_size", "hidden_patches", "reconstruct")


def _has(model: object, *names: str) -> bool:
    # From Python 3.12 on, isinstance with a protocol does not see submodules of an nn.Module.
    return all(hasattr(model, name) for name in names)


@dataclass
class Scorer:
    """A model with its tokenizer and configuration.

    Attributes:
        model: in evaluation mode, on `device`.
        tokenizer: captions -> TokenBatch.
        config: the run's; its `data:` section has the image size, normalization and max_length.
        batch_size: images, captions, beams or pairs per batch.
        gallery: where tokens of images and captions wait for re-ranking; on the host in half precision.
    """

    model: Model
    tokenizer: Any
    config: Config
    device: torch.device = torch.device("cpu")
    batch_size: int = 64
    gallery: GalleryPlace = "device"

    def tokens(self, captions: Sequence[str]) -> TokenBatch:
        return self.tokenizer(captions, **self.config.data.reading)

    @property
    def matcher(self) -> Matcher:
        """The model. Raises TypeError if it cannot match pairs."""
        if _is_matcher(self.model):
            return self.model
        raise self._lacks("image_keys or match")

    @property
    def word_mapper(self) -> WordMapper:
        """The model. Raises TypeError if it cannot map words."""
        if _is_word_mapper(self.model):
            return self.model
        raise self._lacks("word_maps")

    @property
    def reconstructor(self) -> Reconstructor:
        """The model. Raises TypeError if it cannot reconstruct patches."""
        if _is_reconstructor(self.model):
            return self.model
        raise self._lacks("patch_size, hidden_patches and reconstruct")

    def _lacks(self, methods: str) -> TypeError:
        return TypeError(f"{type(self.model).__name__} lacks {methods}, which this evaluation section needs")


@dataclass(kw_only=True)
class Entry:
    """A sample before its image is decoded.

    Attributes:
        index: number in the source.
        objects: from the sample's .json; None if it has none.
        bad_objects: place -> error of all unusable objects, shared by all samples of a reader.
    """

    index: int
    name: str
    caption: str
    image_id: int
    objects: list | None
    bad_objects: dict[str, str] = field(default_factory=dict)

    @property
    def unseen(self) -> bool:
        """Whether an object is marked `"unseen": true`: it occurs in test alone."""
        return any(isinstance(entry, dict) and entry.get("unseen") is True for entry in self.objects or ())


@dataclass(kw_only=True)
class Sample(Entry):
    """One caption and its image.

    Attributes:
        image: RGB, at the stored size.
        crop: the model sees the middle of the image only.
    """

    image: Image.Image
    crop: bool = False

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the part that the model sees."""
        return middle_box(self.image.size) if self.crop else (0, 0, *self.image.size)

    @property
    def seen(self) -> Image.Image:
        """The part of the image that the model sees."""
        return self.image.crop(self.box) if self.crop else self.image


@dataclass
class Reader:
    """Reads samples of a source.

    Attributes:
        skipped: number -> error of every unreadable sample.
        bad_objects: place -> error of every unusable object.
    """

    source: Any
    data: DataConfig = field(default_factory=DataConfig)
    skipped: dict[int, str] = field(default_factory=dict)
    bad_objects: dict[str, str] = field(default_factory=dict)

    def read(self, indices: Iterable[int]) -> Iterator[Sample]:
        """The readable samples among these. Captions of an image that follow each other share its decoded picture."""
        last: tuple[int, Image.Image] | None = None
        for entry, encoded in self.entries(indices):
            if last is None or last[0] != entry.image_id:
                image = self.decode(entry, encoded)
                if image is None:
                    continue
                last = entry.image_id, image
            yield self.sample(entry, last[1])

    def entries(self, indices: Iterable[int]) -> Iterator[tuple[Entry, bytes]]:
        """What is known of these samples before decoding, and their encoded images."""
        for index in indices:
            if index in self.skipped:
                continue
            try:
                record = self.source.read(index, extra=True)
                if self.data.clean_captions:
                    require_words(record)
            except SampleError as error:
                self.skipped[index] = str(error)
                continue
            entry = Entry(
                index=index,
                name=record.name,
                caption=record.caption,
                image_id=record.image_id,
                objects=self._objects(record),
                bad_objects=self.bad_objects,
            )
            yield entry, record.image_bytes

    def decode(self, entry: Entry, encoded: bytes) -> Image.Image | None:
        """The entry's image; None, and an entry of `skipped`, if it cannot be decoded."""
        try:
            return decode_image(encoded)
        except ValueError as error:
            self.skipped[entry.index] = f"{entry.name}: {error}"
            return None

    def sample(self, entry: Entry, image: Image.Image) -> Sample:
        return Sample(**vars(entry), image=image, crop=self.data.eval_resize == "crop")

    def _objects(self, record: Record) -> list | None:
        objects = (record.extra or {}).get("objects")
        if objects is None or isinstance(objects, list):
            return objects
        self.bad_objects[f"{record.name}: objects"] = f"expected a list, got {type(objects).__name__}"
        return None

    def all(self) -> Iterator[Sample]:
        return self.read(range(len(self.source)))


def batches(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def pixels(scorer: Scorer, samples: Sequence[Sample]) -> Tensor:
    """Normalized square images [B, 3, S, S] on the scorer's device."""
    transform = eval_transform(scorer.config.data)
    return torch.stack([transform(sample.image) for sample in samples]).to(scorer.device)
