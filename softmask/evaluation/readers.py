"""A trained model's scores and maps on captioned images: what evaluate.py counts and report.py shows.

Reading never stops at a broken sample: it is left out and named. Everything runs under `torch.no_grad()`, in batches,
and keeps the order of the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from softmask.data import DataConfig, SampleError, decode_image, eval_transform
from softmask.data.loader import require_words
from softmask.data.transforms import middle_box
from softmask.training.config import Config


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
    """A model with all it needs to look at images and captions.

    Attributes:
        model: in evaluation mode, on `device`.
        tokenizer: captions -> TokenBatch.
        config: the run's; its `data:` section holds image size, normalization and max_length.
        batch_size: images, captions, beams or pairs at a time.
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
    """One caption and its image (RGB, at the stored size); `index` is its number in the source."""

    index: int
    name: str
    image: Image.Image
    caption: str
    image_id: int
    objects: list | None
    bad_objects: dict[str, str] = field(default_factory=dict)  # of all the reader's samples: where -> what is wrong
    crop: bool = False

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of what the model looks at."""
        return middle_box(self.image.size) if self.crop else (0, 0, *self.image.size)

    @property
    def seen(self) -> Image.Image:
        """The part of the image that the model looks at."""
        return self.image.crop(self.box) if self.crop else self.image


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
                image = decode_image(record.image_bytes)
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
            yield Sample(index, record.name, image, record.caption, record.image_id, objects, self.bad_objects, crop)

    def all(self) -> Iterator[Sample]:
        return self.read(range(len(self.source)))


def batches(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def each_image_once(samples: Iterable[Sample], captions: dict[int, list[str]]) -> Iterator[Sample]:
    """The first sample of every image; `captions` gets all that each has, by image_id, in the same order."""
    for sample in samples:
        is_new = sample.image_id not in captions
        captions.setdefault(sample.image_id, []).append(sample.caption)
        if is_new:
            yield sample


def pixels(scorer: Scorer, samples: Sequence[Sample]) -> Tensor:
    """Normalized square images [B, 3, S, S] on the scorer's device."""
    transform = eval_transform(scorer.config.data)
    return torch.stack([transform(sample.image) for sample in samples]).to(scorer.device)
