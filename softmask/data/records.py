"""What a source of captioned images hands out, and how its failures are named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class DataError(RuntimeError):
    """The data cannot be used as a whole; the message is one line that says what, where and why."""


class SampleError(DataError):
    """One sample cannot be used: `name` says which, `reason` why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = " ".join(reason.split())

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass
class LeftOut:
    """How many, and the name of the first."""

    count: int = 0
    first: str = ""

    def add(self, name: bytes | str, count: int = 1) -> None:
        if not self.count:
            self.first = name if isinstance(name, str) else name.decode("utf-8", "replace")
        self.count += count

    def __str__(self) -> str:
        return f"left out; the first is {self.first!r}"


@dataclass
class Record:
    """One caption and its image, still encoded.

    `image_id` is shared by all captions of one image. `extra` is the sample's parsed .json (or the entry of a
    JSON list) when it was asked for, otherwise None.
    """

    image_bytes: bytes
    caption: str
    image_id: int
    name: str
    extra: dict | None = None


class Source(Protocol):
    """Captions by number. Sources are picklable and may be read from forked or spawned processes.

    `group_sizes` [groups] int64: sizes of the consecutive runs of samples that lie together on disk (shards).
    `image_ids` [n]: equal for captions of one image. `images`: their number, each counted once. `problems`: a line
    per thing that was wrong but left the rest usable. `digest`: of what the data is, wherever it lies. `paths`: of its
    shards or lists.
    """

    paths: list[str]
    group_sizes: np.ndarray
    image_ids: np.ndarray
    problems: list[str]
    images: int
    digest: str

    def __len__(self) -> int: ...

    def read(self, index: int, *, extra: bool = False) -> Record:
        """Sample `index`. Raises SampleError where it cannot be used."""
        ...

    def captions(self) -> Iterator[str]:
        """All readable captions in order."""
        ...


def clean_caption(raw: bytes | str, name: str) -> str:
    """The caption without surrounding white space. Raises SampleError where it is empty or not UTF-8."""
    try:
        # encoding finds lone surrogates, which JSON escapes can smuggle into a str and no tokenizer accepts
        caption = raw.decode("utf-8") if isinstance(raw, bytes) else raw.encode("utf-8").decode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise SampleError(name, f"caption is not UTF-8 ({error.reason} at {error.start})") from None
    caption = caption.strip().strip("\0\ufeff").strip()
    if not caption:
        raise SampleError(name, "caption is empty")
    return caption
