"""Endless batches of captioned images that depend only on (seed, epoch, position).

Two ranks with B/2 read what one rank with B reads, and a run resumes at any micro-batch at no cost.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from softmask.batch import Batch
from softmask.data.cleaning import plain_words
from softmask.data.order import BatchPlan, Captions, Plans
from softmask.data.records import DataError, Record, SampleError, Source
from softmask.data.text import CaptionTokenizer
from softmask.data.transforms import TrainTransform, decode_image, normalize_images

ATTEMPTS = 32  # unreadable samples in a row that end a run
DOUBT = 20.0  # see check_bad_share

FinishBatch = Callable[[Batch, Sequence[Record], CaptionTokenizer], Batch]


@dataclass
class DataConfig:
    """The `data:` section of a run's configuration."""

    train: str | tuple[str, ...] = ""  # path, glob or brace pattern of shards, or a JSON list; or several of these
    val: str | tuple[str, ...] = ""  # as train: what train.validate_every measures
    image_root: str = ""  # of the image paths in JSON lists; empty: the list's folder
    tokenizer: str = ""  # folder of a Hugging Face tokenizer; empty: a WordPiece is trained on the captions
    vocab_size: int = 4096  # of that WordPiece
    captions: Captions = "all"  # captions of an image per epoch: all, or a random one
    clean_captions: bool = False  # as ALBEF does, see cleaning.py
    append_sep: bool = True  # end captions with [SEP]; ALBEF does not
    max_length: int = 25  # tokens, [CLS] and [SEP] included
    image_size: int = 256
    # Images in evaluation: the whole image resized to a square (ALBEF), or its middle square (open_clip); "auto": as
    # the method's base does.
    eval_resize: Literal["auto", "squash", "crop"] = "auto"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    rand_augment: bool = False  # ALBEF's RandAugment(2, 7) without colour operations
    distort: bool = True  # SoftMask++'s colour jitter, grayscale and blur, set by the next keys
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    keep_named_colors: bool = False  # no hue shift and no grayscale where the caption names a colour
    jitter_probability: float = 0.8
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_radius: tuple[float, float] = (0.1, 2.0)  # standard deviation in pixels of a 224-pixel image
    blank: bool = False  # grey pictures instead of the data's: what texts tell by themselves
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    workers: int = 0
    max_bad_share: float = 0.01  # largest share of unreadable samples, see check_bad_share

    def __post_init__(self) -> None:
        self.image_root, self.tokenizer = os.path.expanduser(self.image_root), os.path.expanduser(self.tokenizer)
        expected = {
            "vocab_size": (self.vocab_size >= 7, "at least 7"),
            "max_length": (self.max_length >= 2 + self.append_sep, f"at least {2 + self.append_sep}"),
            "image_size": (self.image_size >= 1, "at least 1"),
            "workers": (self.workers >= 0, "at least 0"),
            "crop_scale": (0 < self.crop_scale[0] <= self.crop_scale[1] <= 1, "0 < low <= high <= 1"),
            "blur_radius": (0 <= self.blur_radius[0] <= self.blur_radius[1], "0 <= low <= high"),
            "jitter": (min(self.jitter) >= 0 and self.jitter[3] <= 0.5, "none negative, hue at most 0.5"),
            "std": (min(self.std) > 0, "positive numbers"),
        }
        shares = [f.name for f in fields(self) if f.name.endswith("_probability")] + ["max_bad_share"]
        expected |= {name: (0 <= getattr(self, name) <= 1, "a number in [0, 1]") for name in shares}
        for name, (right, description) in expected.items():
            if not right:
                raise ValueError(f"data.{name}: expected {description}, got {getattr(self, name)}")

    @property
    def reading(self) -> dict[str, Any]:
        """Keyword arguments of `CaptionTokenizer.__call__`."""
        return {"max_length": self.max_length, "append_sep": self.append_sep, "clean": self.clean_captions}


class _BatchReader(Dataset[Batch | DataError]):
    """The dataset of the DataLoader: plans to batches, in the workers."""

    def __init__(
        self, source: Source, config: DataConfig, tokenizer: CaptionTokenizer, seed: int, finish: FinishBatch | None
    ):
        self.source, self.config, self.tokenizer, self.seed = source, config, tokenizer, seed
        self.finish = finish
        self.transform = TrainTransform(config)

    def __getitem__(self, plan: BatchPlan) -> Batch | DataError:
        try:
            return self._batch(plan)
        except DataError as error:
            return error  # raised in a worker, it would reach the user as a traceback

    def _batch(self, plan: BatchPlan) -> Batch:
        skipped: list[str] = []
        samples = [
            self._sample(int(index), f"{self.seed}/{plan.epoch}/{plan.position + offset}", skipped)
            for offset, index in enumerate(plan.indices)
        ]
        records = [record for record, _ in samples]
        tokens = self.tokenizer([record.caption for record in records], **self.config.reading)
        images = [image for _, images in samples for image in images]
        batch = Batch(
            images=normalize_images(images, self.config.mean, self.config.std),
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            word_ids=tokens.word_ids,
            image_id=torch.tensor([record.image_id for record in records], dtype=torch.int64),
            skipped=skipped,
            num_tokens=int(tokens.attention_mask.sum()),
        )
        return batch if self.finish is None else self.finish(batch, records, self.tokenizer)

    def _sample(self, index: int, seed: str, skipped: list[str]) -> tuple[Record, list[np.ndarray]]:
        """The sample, or if it is unreadable, another one drawn from `seed`."""
        replacements = random.Random(seed + "/replacement")
        for _ in range(ATTEMPTS):
            try:
                return self._read(index, random.Random(seed))
            except SampleError as error:
                skipped.append(str(error))
                index = replacements.randrange(len(self.source))
        raise DataError(f"{ATTEMPTS} samples in a row are unreadable, the last: {skipped[-1]}")

    def _read(self, index: int, rng: random.Random) -> tuple[Record, list[np.ndarray]]:
        """The record and its transformed pictures."""
        record = self.source.read(index)
        if self.config.clean_captions and record.caption:
            require_words(record)
        try:
            images = [decode_image(encoded) for encoded in (record.image_bytes, *record.more_images)]
        except ValueError as error:
            raise SampleError(record.name, str(error)) from None
        return record, [self.transform(image, rng, record.caption) for image in images]


class Loader:
    """Endless micro-batches of one rank, starting at micro-batch `start_batch` in every `iter`.

    The global random generators are not touched. `finish` adds to a batch, from its records, what a task reads beside
    images and captions; it runs in the workers.

    Raises:
        DataError: fewer samples than one batch of all ranks; while iterating, ATTEMPTS unreadable samples in a row.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        tokenizer: CaptionTokenizer,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_batch: int = 0,
        finish: FinishBatch | None = None,
    ):
        if batch_size < 1 or not 0 <= rank < world_size or seed < 0 or start_batch < 0:
            given = f"batch_size={batch_size}, rank={rank}, world_size={world_size}, {seed=}, {start_batch=}"
            raise ValueError(f"expected batch_size >= 1, 0 <= rank < world_size, seed, start_batch >= 0, got {given}")
        self.config = config
        self._plans = Plans(
            np.asarray(source.group_sizes), source.image_ids, config.captions, batch_size=batch_size, rank=rank,
            world_size=world_size, seed=seed, start=start_batch,
        )  # fmt: skip
        if not self._plans.batches_per_epoch:
            samples = f"{self._plans.per_epoch} {'samples' if config.captions == 'all' else 'images'}"
            raise DataError(f"{samples} are fewer than one batch of {world_size} x {batch_size}")
        self._reader = _BatchReader(source, config, tokenizer, seed, finish)
        self.batches_per_epoch = self._plans.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        # Threads do not survive a fork: without this, tokenizers warn in every worker.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        batches: DataLoader[Batch | DataError] = DataLoader(
            self._reader,
            sampler=self._plans,
            batch_size=None,
            num_workers=self.config.workers,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # DataLoader draws from it, not from the global generator
        )
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch


def require_words(record: Record) -> None:
    """Raise SampleError if cleaning leaves nothing of the caption."""
    if not plain_words(record.caption).text:
        raise SampleError(record.name, f"caption {record.caption!r:.60} has no words after cleaning")


def check_bad_share(bad: int, read: int, *, allowed: float, names: Sequence[str]) -> None:
    """Refuse data whose share of unreadable samples is above `allowed` beyond doubt.

    If the true share were `allowed`, `bad` of `read` samples would have a probability of at most e^-DOUBT, by
    Chernoff's bound.

    Raises:
        DataError: the share is too large; the message ends with `names`, the last unreadable samples.
    """
    share = bad / max(read, 1)
    if share <= allowed:
        return
    information = math.log(share / allowed) * share if allowed else math.inf
    if share < 1 and allowed < 1:
        information += (1 - share) * math.log((1 - share) / (1 - allowed))
    if read * information > DOUBT:
        raise DataError(
            f"{bad} of {read} samples are unreadable, more than data.max_bad_share={allowed:g}; the last: "
            f"{'; '.join(names)}"
        )


def _unchanged(batch: Any) -> Any:  # the stubs expect a list, which batch_size=None does not give
    return batch
