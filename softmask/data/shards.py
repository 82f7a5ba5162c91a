"""Random access to WebDataset tar shards through an index of byte positions (shard_index.py)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
from numpy.lib.recfunctions import drop_fields

from softmask.data.records import DataError, Record, SampleError, clean_caption
from softmask.data.shard_index import SAMPLE, ShardIndex, index_shard, split_name
from softmask.data.tar import BLOCK, header_name

logger = logging.getLogger("softmask.data")

OPEN_FILES = 64


class OpenFiles:
    """The most recently used files of this process, read by position, so that forked processes may share them."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()

    def __reduce__(self):
        return OpenFiles, ()  # a spawned process opens its own

    def read(self, path: str, offset: int, size: int) -> bytes:
        file = self._files.pop(path, None) or open(path, "rb", buffering=0)  # noqa: SIM115
        self._files[path] = file
        while len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        return os.pread(file.fileno(), size, offset)

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()


class ShardSource:
    """The samples of tar shards, in the order of `paths`; every caption is one.

    Captions whose images have the same bytes share `image_id`, the number of the first of them. 12 million samples take
    390 MB.

    Raises:
        DataError: no usable sample.
    """

    def __init__(self, paths: Sequence[str], *, threads: int = 8):
        self.paths = [os.fspath(path) for path in paths]
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(index_shard, self.paths))
        self.problems = list(_problems(self.paths, found))
        for line in self.problems:
            logger.warning("%s", line)
        self.group_sizes = np.array([len(index.samples) for index in found], np.int64)
        self._ends = np.cumsum(self.group_sizes)
        samples = np.concatenate([index.samples for index in found]) if found else np.empty(0, SAMPLE)
        self._files = OpenFiles()
        if not len(samples):
            detail = f" ({'; '.join(self.problems[:2])})" if self.problems else ""
            raise DataError(f"no captioned images in {len(self.paths)} shards, {self.paths[:1]}{detail}")
        _, first, of_sample = np.unique(samples["digest"], return_index=True, return_inverse=True)
        self.image_ids = first[of_sample].astype(np.uint32)  # [n]
        self._samples = drop_fields(samples, "digest", usemask=False)
        self.images = len(first)
        self.digest = hashlib.sha256("".join(index.digest for index in found).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int, *, extra: bool = False) -> Record:
        """Sample `index` in [0, len). Raises SampleError if its caption or .json cannot be used."""
        path, row = self._locate(index)
        shard = os.path.basename(path)
        # The header before the image holds its name.
        start, size = (int(row["image_block"]) - 1) * BLOCK, BLOCK + int(row["image_size"])
        data = self._bytes(path, start, size, f"{shard}:#{index}")
        name = f"{shard}:{split_name(header_name(data[:BLOCK]))[0].decode('utf-8', 'replace')}"
        caption = self._caption(path, row, name)
        parsed = self._json(path, row, name) if extra and row["json_block"] else None
        return Record(data[BLOCK:], caption, int(self.image_ids[index]), name, parsed)

    def captions(self) -> Iterator[str]:
        """All readable captions in order."""
        for index in range(len(self)):
            try:
                yield self._caption(*self._locate(index), name=f"#{index}")
            except SampleError:
                continue  # reported when the sample itself is read

    def _locate(self, index: int) -> tuple[str, np.void]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.paths[int(np.searchsorted(self._ends, index, side="right"))], self._samples[index]

    def _bytes(self, path: str, offset: int, size: int, name: str) -> bytes:
        try:
            data = self._files.read(path, offset, size)
        except OSError as error:
            raise SampleError(name, f"cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise SampleError(name, f"has {len(data)} of {size} bytes: the shard is shorter than when it was indexed")
        return data

    def _json(self, path: str, row: np.void, name: str) -> dict:
        raw = self._bytes(path, int(row["json_block"]) * BLOCK, int(row["json_size"]), name)
        try:
            parsed = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise SampleError(name, f".json is malformed ({error})") from None
        if not isinstance(parsed, dict):
            raise SampleError(name, f".json holds a {type(parsed).__name__}, expected an object")
        return parsed

    def _caption(self, path: str, row: np.void, name: str) -> str:
        line = int(row["line"])
        if row["txt_block"]:
            text = self._bytes(path, int(row["txt_block"]) * BLOCK, int(row["txt_size"]), name)
            return clean_caption(text.split(b"\n")[line - 1] if line else text, name)
        caption = self._json(path, row, name).get("caption")
        if isinstance(caption, list) and caption:
            caption = caption[max(line - 1, 0)]
        if not isinstance(caption, str):
            raise SampleError(name, f'.json has no text under "caption" but {type(caption).__name__}')
        return clean_caption(caption, name)


def _problems(paths: Sequence[str], found: Sequence[ShardIndex]) -> Iterator[str]:
    """A line for each problem of a shard, and one for the unused members of all shards."""
    for path, index in zip(paths, found, strict=True):
        for problem in index.problems():
            yield f"{path} {problem}"
    unread = [(path, index.others) for path, index in zip(paths, found, strict=True) if index.others.count]
    if unread:
        count, (path, first) = sum(others.count for _, others in unread), unread[0]
        yield (
            f"{count} members of {len(unread)} shards are not read (links, extensions other than images, .txt and "
            f".json, or duplicates in a sample); the first is {first.first!r} of {path}"
        )
