"""The order of samples, a function of (seed, epoch, position)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

SHUFFLE_WINDOW = 65_536

Captions = Literal["all", "random"]
"""What an epoch reads: every caption, or every image with one of its captions (ALBEF)."""


@dataclass
class BatchPlan:
    """The samples of one micro-batch."""

    epoch: int
    position: int  # of the first sample in the epoch
    indices: np.ndarray  # [B] int64, samples of the source


def epoch_order(group_sizes: np.ndarray, *, seed: int, epoch: int, window: int = SHUFFLE_WINDOW) -> np.ndarray:
    """Permutation [sum(group_sizes)] int64: groups (shards) in random order, samples shuffled within consecutive groups
    that together hold at least `window` samples. Reading stays local; up to `window` samples are shuffled in full."""
    generator = np.random.default_rng([seed, epoch])
    starts = np.cumsum(group_sizes) - group_sizes
    groups = generator.permutation(len(group_sizes))
    order = np.concatenate([np.arange(starts[g], starts[g] + group_sizes[g]) for g in groups])
    ends = np.cumsum(group_sizes[groups])
    begin = 0
    for end in ends:
        if end - begin >= window or end == len(order):
            generator.shuffle(order[begin:end])
            begin = end
    return order


class Images:
    """Samples grouped by image. An image belongs to the group (shard) of its first caption."""

    def __init__(self, group_sizes: np.ndarray, image_ids: np.ndarray):
        self._samples = np.argsort(image_ids, kind="stable")  # [n], by image
        _, starts = np.unique(image_ids[self._samples], return_index=True)
        by_place = np.argsort(self._samples[starts], kind="stable")
        ends = np.append(starts[1:], len(image_ids))
        self._starts, self._counts = starts[by_place], (ends - starts)[by_place]  # [images]
        bounds = np.searchsorted(self._samples[self._starts], np.cumsum(group_sizes))
        self.group_sizes = np.diff(bounds, prepend=0)

    def captions(self, images: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
        """A random sample of each image."""
        share = np.random.default_rng([seed, epoch, 1]).random(len(self._starts))[images]
        return self._samples[self._starts[images] + (share * self._counts[images]).astype(np.int64)]


@dataclass
class Plans:
    """The sampler of the DataLoader: endless plans of one rank, from micro-batch `start` on.

    Micro-batch i of rank r takes the positions [(i * world_size + r) * B, + B) of its epoch.
    """

    group_sizes: np.ndarray
    image_ids: np.ndarray
    captions: Captions
    batch_size: int
    rank: int
    world_size: int
    seed: int
    start: int

    def __post_init__(self) -> None:
        self._images = Images(self.group_sizes, self.image_ids) if self.captions == "random" else None
        self._groups = self.group_sizes if self._images is None else self._images.group_sizes
        self.per_epoch = int(self._groups.sum())
        self.batches_per_epoch = self.per_epoch // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[BatchPlan]:
        epoch, batch = divmod(self.start, self.batches_per_epoch)
        while True:
            order = self._order(epoch)
            for number in range(batch, self.batches_per_epoch):
                first = (number * self.world_size + self.rank) * self.batch_size
                yield BatchPlan(epoch, first, order[first : first + self.batch_size].copy())
            epoch, batch = epoch + 1, 0

    def _order(self, epoch: int) -> np.ndarray:
        order = epoch_order(self._groups, seed=self.seed, epoch=epoch)
        return order if self._images is None else self._images.captions(order, seed=self.seed, epoch=epoch)
