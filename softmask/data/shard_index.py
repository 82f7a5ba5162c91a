"""The index of a tar shard: positions of its samples' parts, which images are equal, and what was left out.

Consecutive members that share their path up to the first dot of the file name are one sample (webdataset's rule): an
image with KEY.txt, where every line is a caption, or with KEY.json, whose "caption" is a text or a list of texts. .txt
takes precedence. A shard is scanned once; the index is kept in a cache file named by the shard's path, size and time.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from softmask.data.records import DataError, LeftOut
from softmask.data.tar import BLOCK, BrokenTarError, tar_members
from softmask.files import cache_folder, write_atomically

logger = logging.getLogger("softmask.data")

COMPRESSED = b"jpg jpeg jpe jfif png apng webp avif avifs jp2 j2k gif qoi".split()
PLAIN = b"bmp dib tif tiff ppm pgm pbm pnm tga".split()
PARTS = {name: "image" for name in COMPRESSED + PLAIN} | {b"txt": "txt", b"json": "json"}
PIECE = 1024  # bytes from the middle and from the end that identify a compressed image, together with its size
# Positions count blocks of 512 bytes, so that 32 bits reach 2 TiB; position 0, always a header, means "no such member".
# A sample is one caption: `line` is its number from 1, or 0 if it is the only one. Equal `digest`: the same image.
SAMPLE = np.dtype(
    [(part + of, "<u4") for part in ("image", "txt", "json") for of in ("_block", "_size")]
    + [("line", "<u4"), ("digest", "<u8")]
)
SORT = "; image and caption of a sample must follow each other, as tar --sort=name packs them"
CACHE_VERSION = 5


@dataclass
class ShardIndex:
    """The samples [n] (dtype SAMPLE) of a shard, what is wrong with it, and what is left out."""

    samples: np.ndarray
    broken: str = ""  # where and how the archive breaks off, if it does
    digest: str = ""  # of the captions' bytes and the images' digests
    images: LeftOut = field(default_factory=LeftOut)  # without a caption
    captions: LeftOut = field(default_factory=LeftOut)  # .txt or .json without an image
    others: LeftOut = field(default_factory=LeftOut)  # members that are neither, links, second images

    def problems(self) -> list[str]:
        """A line, without the shard's name, for each problem."""
        found = [f"{self.broken}: the {len(self.samples)} samples before are used"] if self.broken else []
        if self.images.count:
            found.append(f"has {self.images.count} images without .txt or .json, {self.images}")
        if self.captions.count:
            line = (
                f"has {self.captions.count} captions without an image, left out; the first is {self.captions.first!r}"
            )
            apart = self.images.count and not len(self.samples)
            found.append(line + SORT * bool(apart))
        return found


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """A member's sample, and its extension: what follows the first dot of the file name."""
    folder, slash, base = name.rpartition(b"/")
    stem, _, extension = base.partition(b".")
    return folder + slash + stem, extension.lower()


def scan_shard(path: str) -> ShardIndex:
    """Index the members of a shard."""
    with open(path, "rb") as file:
        return _Scan(file).index()


class _Scan:
    """One pass over a shard."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.rows: list[tuple[int, ...]] = []
        self.found = ShardIndex(np.empty(0, SAMPLE))
        self.key = b""
        self.parts: dict[str, tuple[int, int]] = {}
        self.plain = False  # the image's format is not compressed
        self.content = hashlib.blake2b(digest_size=16)

    def index(self) -> ShardIndex:
        try:
            for name, start, size in tar_members(self.file):
                self._member(name, start, size)
        except BrokenTarError as error:
            self.found.broken = str(error)
        if not self.found.broken or len(self.parts) > 1:  # do not blame an image for a caption beyond the break
            self._close_sample()
        self.found.samples = np.array(self.rows, SAMPLE)
        self.content.update(self.found.samples["digest"].tobytes())
        self.found.digest = self.content.hexdigest()
        return self.found

    def _member(self, name: bytes, start: int, size: int) -> None:
        base = name.rpartition(b"/")[2]
        if base.startswith(b"._") or not base:  # macOS stores a file's attributes beside it
            return self.found.others.add(name)
        key, extension = split_name(name)
        if key != self.key:
            self._close_sample()
            self.key, self.parts = key, {}
        part = PARTS.get(extension)
        if part is None or start == 0 or part in self.parts:
            return self.found.others.add(name)
        self.parts[part] = (start, size)
        if part == "image":
            self.plain = extension in PLAIN

    def _close_sample(self) -> None:
        parts = self.parts
        if "image" not in parts:
            if "txt" in parts or "json" in parts:
                self.found.captions.add(self.key)
            return
        if "txt" not in parts and "json" not in parts:
            return self.found.images.add(self.key)
        places = [n for part in ("image", "txt", "json") for n in self._place(part)]
        digest = self._digest(*parts["image"])
        self.rows += [(*places, line, digest) for line in self._lines()]

    def _place(self, part: str) -> tuple[int, int]:
        start, size = self.parts.get(part, (0, 0))
        return start // BLOCK, size

    def _lines(self) -> list[int]:
        """Numbers of the captions; [0] for a single one, and for one that is refused when it is read."""
        text = self._read("txt" if "txt" in self.parts else "json")
        self.content.update(len(text).to_bytes(8, "little") + text)
        if "txt" in self.parts:
            lines = [n for n, line in enumerate(text.split(b"\n"), start=1) if line.strip()]
        else:
            try:
                caption = json.loads(text)["caption"]
            except (ValueError, RecursionError, KeyError, TypeError):
                return [0]
            lines = list(range(1, len(caption) + 1)) if isinstance(caption, list) else []
        return lines if len(lines) > 1 else [0]

    def _read(self, part: str) -> bytes:
        start, size = self.parts[part]
        return os.pread(self.file.fileno(), size, start)

    def _digest(self, start: int, size: int) -> int:
        """Of all bytes of a small or uncompressed image, else of the size and two pieces of the bytes."""
        digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=8)
        if self.plain or size <= 2 * PIECE:
            pieces = [(start, size)]
        else:
            pieces = [(start + size // 2, PIECE), (start + size - PIECE, PIECE)]
        for at, length in pieces:
            digest.update(os.pread(self.file.fileno(), length, at))
        return int.from_bytes(digest.digest(), "little")


def _cache_file(path: str, kind: str) -> Path:
    stat = os.stat(path)
    identity = f"{CACHE_VERSION}|{os.path.abspath(path)}|{stat.st_size}|{stat.st_mtime_ns}{kind and '|' + kind}"
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
    return cache_folder("shard-index") / f"{digest[:40]}.npz"


LEFT_OUT = ("images", "captions", "others")


def _load_cache(file: Path) -> ShardIndex | None:
    """Read a cache file: the SHA-256 of the rest, then an .npz. None if it is missing or damaged."""
    try:
        stored = file.read_bytes()
    except OSError:  # mostly there is none yet; an unusable folder is reported by `_store_cache`
        return None
    digest, content = stored[:32], stored[32:]
    if hashlib.sha256(content).digest() != digest:
        logger.warning("the index cache %s is damaged and is rebuilt", file)
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        left_out = {name: LeftOut(int(arrays[name][0]), str(arrays[name][1])) for name in LEFT_OUT}
        return ShardIndex(arrays["samples"], str(arrays["broken"]), str(arrays["digest"]), **left_out)


def _store_cache(file: Path, index: ShardIndex) -> None:
    content = io.BytesIO()
    np.savez(
        content,
        samples=index.samples,
        broken=np.array(index.broken, np.str_),
        digest=np.array(index.digest, np.str_),
        images=_left_out_array(index.images),
        captions=_left_out_array(index.captions),
        others=_left_out_array(index.others),
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Several ranks index the same shards at the same time.
        write_atomically(file, hashlib.sha256(content.getvalue()).digest() + content.getvalue())
    except OSError as error:
        _warn_once(f"the shard index cannot be kept in {file.parent} ({error.strerror})")


def _left_out_array(left_out: LeftOut) -> np.ndarray:
    return np.array([str(left_out.count), left_out.first], np.str_)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def index_shard(path: str, *, kind: str = "", scan: Callable[[str], ShardIndex] | None = None) -> ShardIndex:
    """`scan_shard` with the cache. Raises DataError if the shard cannot be opened.

    Args:
        kind: name of another kind of samples.
        scan: what indexes them.
    """
    try:
        file = _cache_file(path, kind)
        found = _load_cache(file)
        if found is None:
            found = (scan or scan_shard)(path)
            _store_cache(file, found)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return found
