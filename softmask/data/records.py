"""Records of a source of captioned images, and the errors of sources."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class DataError(RuntimeError):
    """The data as a whole cannot be used. The message is one line that says what, where and why."""


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
    """Entries that are not used: their number and the name of the first."""

    count: int = 0
    first: str = ""

    def __bool__(self) -> bool:
        return self.count > 0

    def add(self, name: bytes | str, count: int = 1) -> None:
        if not self.count:
            self.first = name if isinstance(name, str) else name.decode("utf-8", "replace")
        self.count += count

    def __str__(self) -> str:
        return f"left out; the first is {self.first!r}"


@dataclass
class Record:
    """One caption and its image, still encoded.

    All captions of an image share `image_id`. `extra` is the parsed .json of the sample, or the entry of a JSON list,
    if requested. The other fields are those of examples of downstream tasks (formats/examples.py).
    """

    image_bytes: bytes
    caption: str
    image_id: int
    name: str
    extra: dict | None = None
    more_images: tuple[bytes, ...] = ()
    target: Any = None
    key: Any = None
    unseen: bool = False


class Source(Protocol):
    """Captioned images by number. Sources are picklable and may be read from forked or spawned processes."""

    paths: list[str]  # shards or lists
    group_sizes: np.ndarray  # [groups] int64: sizes of consecutive runs of samples that are stored together (shards)
    image_ids: np.ndarray  # [n], equal for captions of one image
    problems: list[str]  # a line for everything that is wrong without making the rest unusable
    images: int  # number of images
    digest: str  # of the content, wherever it is stored

    def __len__(self) -> int: ...

    def read(self, index: int, *, extra: bool = False) -> Record:
        """Sample `index`. Raises SampleError if it cannot be used."""
        ...

    def captions(self) -> Iterator[str]:
        """All readable captions in order."""
        ...


def read_picture(path: str) -> bytes:
    """The bytes of a picture's file. Raises SampleError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SampleError(path, f"cannot be read ({error.strerror})") from None
    except ValueError as error:  # a zero byte in the path
        raise SampleError(path, f"cannot be read ({error})") from None


def clean_caption(raw: bytes | str, name: str) -> str:
    """The caption without surrounding white space. Raises SampleError if it is empty or not UTF-8."""
    try:
        # Encoding finds lone surrogates, which come from JSON escapes and which no tokenizer accepts.
        caption = raw.decode("utf-8") if isinstance(raw, bytes) else raw.encode("utf-8").decode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise SampleError(name, f"caption is not UTF-8 ({error.reason} at {error.start})") from None
    caption = caption.strip().strip("\0\ufeff").strip()
    if not caption:
        raise SampleError(name, "caption is empty")
    return caption
