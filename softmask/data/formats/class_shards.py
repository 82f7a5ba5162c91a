"""WebDataset shards of classified images: KEY.cls, the number of the class as text, beside KEY's image."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

from softmask.data.records import DataError, Record, SampleError
from softmask.data.shard_index import PARTS, ShardIndex, index_shard, split_name
from softmask.data.shards import OpenFiles
from softmask.data.tar import BLOCK, BrokenTarError, header_name, tar_members

logger = logging.getLogger("softmask.data")

LABELLED = np.dtype([("image_block", "<u4"), ("image_size", "<u4"), ("label", "<u4")])
THREADS = 8


class ClassShardSource:
    """A `Source` (records.py) of the classified images of tar shards, in the order of `paths`.

    Args:
        paths: the shards.
        classes: names of the classes.
        numbers: label in the shards -> number of its class, or None for one that is left out.

    Raises:
        DataError: no usable sample, or a shard cannot be read.
    """

    def __init__(self, paths: Sequence[str], *, classes: list[str], numbers: Sequence[int | None]) -> None:
        self.paths, self.classes = list(paths), list(classes)
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(functools.partial(index_shard, kind="cls", scan=scan_classes), self.paths))
        known = np.array([-1 if number is None else number for number in numbers], np.int64)
        self.problems: list[str] = []
        kept, targets = [], []
        for path, index in zip(self.paths, found, strict=True):
            labels = index.samples["label"].astype(np.int64)
            target = np.where(labels < len(known), known[np.minimum(labels, len(known) - 1)], -1)
            self.problems += _problems(path, index, labels[target < 0])
            kept.append(index.samples[target >= 0])
            targets.append(target[target >= 0])
        self.problems += _unread(self.paths, found)
        for line in self.problems:
            logger.warning("%s", line)
        self._samples, self._targets = np.concatenate(kept), np.concatenate(targets)
        if not len(self._samples):
            detail = f" ({self.problems[0]})" if self.problems else ""
            raise DataError(f"no image with a .cls in {len(self.paths)} shards, {self.paths[:1]}{detail}")
        self.group_sizes = np.array([len(samples) for samples in kept], np.int64)
        self._ends = np.cumsum(self.group_sizes)
        self.images = len(self._samples)
        self.image_ids = np.arange(self.images, dtype=np.int64)
        self.digest = hashlib.sha256("".join(index.digest for index in found).encode()).hexdigest()
        self._files = OpenFiles()

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int, *, extra: bool = False) -> Record:
        """Sample `index`, its target the number of its class. Raises SampleError if it cannot be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        path, row = self.paths[int(np.searchsorted(self._ends, index, side="right"))], self._samples[index]
        shard, size = os.path.basename(path), BLOCK + int(row["image_size"])
        try:
            # The header before the image holds its name.
            data = self._files.read(path, (int(row["image_block"]) - 1) * BLOCK, size)
        except OSError as error:
            raise SampleError(f"{shard}:#{index}", f"cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise SampleError(f"{shard}:#{index}", f"has {len(data)} of {size} bytes: the shard was cut")
        name = split_name(header_name(data[:BLOCK]))[0].decode("utf-8", "replace")
        return Record(data[BLOCK:], "", index, f"{shard}:{name}", target=int(self._targets[index]), key=name)

    def captions(self) -> Iterator[str]:
        """None: classified images have no captions."""
        return iter(())


def scan_classes(path: str) -> ShardIndex:
    """Index the images of a shard that have a .cls; `samples` are [n] of dtype LABELLED."""
    found = ShardIndex(np.empty(0, LABELLED))
    rows: list[tuple[int, int, int]] = []
    content = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for key, parts in _samples(file, found):
            if "image" not in parts or "cls" not in parts:
                (found.images if "image" in parts else found.captions).add(key)
                continue
            (start, size), (label_start, label_size) = parts["image"], parts["cls"]
            label = os.pread(file.fileno(), label_size, label_start).strip()
            if not label.isdigit() or len(label) > 9:
                found.captions.add(key + b".cls")
                continue
            content.update(b"%b %d %b;" % (key, size, label))
            rows.append((start // BLOCK, size, int(label)))
    found.samples, found.digest = np.array(rows, LABELLED), content.hexdigest()
    return found


def _samples(file: BinaryIO, found: ShardIndex) -> Iterator[tuple[bytes, dict[str, tuple[int, int]]]]:
    """Key, and position and size of the image and the .cls, of every sample that has one of them."""
    key, parts = b"", dict[str, tuple[int, int]]()
    try:
        for name, start, size in tar_members(file):
            stem, extension = split_name(name)
            part = "cls" if extension == b"cls" else PARTS.get(extension)
            if stem != key:
                if parts:
                    yield key, parts
                key, parts = stem, {}
            if part not in ("image", "cls") or start == 0 or part in parts or name.rpartition(b"/")[2][:2] == b"._":
                found.others.add(name)
            else:
                parts[part] = start, size
    except BrokenTarError as error:
        found.broken = str(error)
    if len(parts) > bool(found.broken):  # do not blame a part for one beyond the break
        yield key, parts


def _problems(path: str, index: ShardIndex, unknown: np.ndarray) -> Iterator[str]:
    """A line for each problem of a shard."""
    if index.broken:
        yield f"{path} {index.broken}: the samples before are used"
    if index.images:
        yield f"{path} has {index.images.count} images without .cls, {index.images}"
    if index.captions:
        yield f"{path} has {index.captions.count} .cls without an image or without a number, {index.captions}"
    if len(unknown):
        yield f"{path} has {len(unknown)} images of unknown classes, left out; the first is of class {unknown[0]}"


def _unread(paths: Sequence[str], found: Sequence[ShardIndex]) -> Iterator[str]:
    """One line for the unused members of all shards."""
    unread = [(path, index.others) for path, index in zip(paths, found, strict=True) if index.others]
    if unread:
        count, (path, first) = sum(others.count for _, others in unread), unread[0]
        yield (
            f"{count} members of {len(unread)} shards are not read (neither images nor .cls, or duplicates in a "
            f"sample); the first is {first.first!r} of {path}"
        )
