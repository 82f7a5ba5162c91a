"""Random access to WebDataset tar shards through an index of byte positions.

A shard is an uncompressed tar. Members that follow each other and share the name up to the first dot of the file name
are one sample (webdataset's rule): KEY.jpg/.jpeg/.png/.webp with KEY.txt, or KEY.json with a "caption"; .txt wins.
The headers of a shard are read once; the positions are kept in a cache file named by the shard's path, size and time.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from softmask.data.records import DataError, Record, SampleError, clean_caption

logger = logging.getLogger("softmask.data")

BLOCK = 512
PARTS = {b"jpg": "image", b"jpeg": "image", b"png": "image", b"webp": "image", b"txt": "txt", b"json": "json"}
# Positions count blocks of 512 bytes, so that 32 bits reach 2 TiB; position 0 (always a header) means "no such member".
SAMPLE = np.dtype([(part + field, "<u4") for part in ("image", "txt", "json") for field in ("_block", "_size")])
CACHE_VERSION = 1
OPEN_FILES = 64


class BrokenTarError(Exception):
    """The archive cannot be followed any further."""


def _number(field: bytes) -> int:
    """A tar header's number: octal text, or big-endian binary when the first bit is set (GNU)."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
    return _integer(field.partition(b"\0")[0].strip() or b"0", base=8)


def _integer(text: bytes, *, base: int = 10) -> int:
    try:
        return int(text, base)
    except ValueError:
        raise BrokenTarError(f"has a damaged header, with {text!r} for a number") from None


def _header_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _check_header(header: bytes, offset: int) -> None:
    if len(header) < BLOCK:
        raise BrokenTarError(f"ends at byte {offset + len(header)} without a tar's closing zeros")
    stored = header[148:156].strip(b" \0")
    if not stored.isdigit() or _number(stored) != sum(header) - sum(header[148:156]) + 8 * 32:
        where = f"has no tar header at byte {offset}" if offset else "is no uncompressed tar"
        raise BrokenTarError(where)


def _pax_records(payload: bytes) -> dict[bytes, bytes]:
    """The "LENGTH KEY=VALUE\\n" records of a pax header."""
    records: dict[bytes, bytes] = {}
    while match := re.match(rb"(\d+) ([^=]+)=", payload):
        length = int(match[1])
        if length <= match.end():
            break
        records[match[2]] = payload[match.end() : length - 1]
        payload = payload[length:]
    return records


def tar_members(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Name, position and size of every regular member. Raises BrokenTarError where the archive breaks off.

    `tarfile` needs three times as long, which matters for the 36 million members of CC12M.
    """
    end = os.fstat(file.fileno()).st_size
    offset, pax = 0, {}
    while True:
        header = os.pread(file.fileno(), BLOCK, offset)
        if len(header) == BLOCK and not any(header):
            return
        _check_header(header, offset)
        kind = header[156:157]
        name = pax.get(b"path", _header_name(header))
        size = _integer(pax[b"size"]) if b"size" in pax else _number(header[124:136])
        start = offset + BLOCK
        if start + size > end:
            raise BrokenTarError(f"ends inside its member {name.decode('utf-8', 'replace')!r}")
        if kind in b"xL":
            payload = os.pread(file.fileno(), size, start)
            pax |= {b"path": payload.rstrip(b"\0")} if kind == b"L" else _pax_records(payload)
        elif kind != b"g":
            pax = {}
            if kind in b"07\0":
                yield name, start, size
        offset = start + -(-size // BLOCK) * BLOCK


def _split_name(name: bytes) -> tuple[bytes, bytes]:
    folder, slash, base = name.rpartition(b"/")
    stem, _, extension = base.partition(b".")
    return folder + slash + stem, extension.lower()


def scan_shard(path: str) -> tuple[np.ndarray, list[str]]:
    """Index of one shard: its samples [n] (dtype SAMPLE) and, for everything wrong with it, a line without its name."""
    rows: list[tuple[int, ...]] = []
    uncaptioned: list[bytes] = []
    key, parts = None, {}

    def close_sample() -> None:
        if "image" in parts and ("txt" in parts or "json" in parts):
            rows.append(tuple(n for part in ("image", "txt", "json") for n in parts.get(part, (0, 0))))
        elif "image" in parts:
            uncaptioned.append(key)

    broken = None
    with open(path, "rb") as file:
        try:
            for name, start, size in tar_members(file):
                member_key, extension = _split_name(name)
                if member_key != key:
                    close_sample()
                    key, parts = member_key, {}
                if extension in PARTS:
                    parts.setdefault(PARTS[extension], (start // BLOCK, size))
        except BrokenTarError as error:
            broken = str(error)
    if broken is None or len(parts) > 1:  # a picture whose caption is beyond the break is no mistake of its own
        close_sample()
    problems = [f"{broken}: the {len(rows)} samples before are used"] if broken else []
    if uncaptioned:
        first = uncaptioned[0].decode("utf-8", "replace")
        problems.append(f"has {len(uncaptioned)} pictures without .txt or .json, left out; the first is {first!r}")
    return np.array(rows, SAMPLE), problems


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softmask" / "shard-index"


def _cache_file(path: str) -> Path:
    stat = os.stat(path)
    identity = f"{CACHE_VERSION}|{os.path.abspath(path)}|{stat.st_size}|{stat.st_mtime_ns}"
    return cache_folder() / f"{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()[:40]}.npz"


def _load_cache(file: Path) -> tuple[np.ndarray, list[str]] | None:
    """A cache file is the SHA-256 of what follows it, then an .npz."""
    try:
        stored = file.read_bytes()
    except OSError:  # most often there is none yet; where the folder is out of reach, `_store_cache` says so
        return None
    digest, content = stored[:32], stored[32:]
    if hashlib.sha256(content).digest() != digest:
        logger.warning("the index cache %s is damaged and is built anew", file)
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return arrays["samples"], arrays["problems"].tolist()


def _store_cache(file: Path, samples: np.ndarray, problems: list[str]) -> None:
    content = io.BytesIO()
    np.savez(content, samples=samples, problems=np.array(problems, dtype=np.str_))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as temporary:
            temporary.write(hashlib.sha256(content.getvalue()).digest() + content.getvalue())
        os.replace(temporary.name, file)  # atomic: ranks index the same shards at the same time
    except OSError as error:
        _warn_once(f"the shard index cannot be kept in {file.parent} ({error.strerror})")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def index_shard(path: str) -> tuple[np.ndarray, list[str]]:
    """`scan_shard` through the cache; the lines name the shard. Raises DataError when it cannot be opened."""
    try:
        file = _cache_file(path)
        found = _load_cache(file)
        if found is None:
            found = scan_shard(path)
            _store_cache(file, *found)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return found[0], [f"{path} {problem}" for problem in found[1]]


class OpenFiles:
    """The most recently used files of this process, read by position (which forked processes may share)."""

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
    """The samples of tar shards, in the order of `paths`; `image_id` is the number of the sample.

    12 million samples take 290 MB. Raises DataError where nothing usable is found.
    """

    def __init__(self, paths: Sequence[str], *, threads: int = 8):
        self.paths = [os.fspath(path) for path in paths]
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(index_shard, self.paths))
        self.problems = [line for _, problems in found for line in problems]
        for line in self.problems:
            logger.warning("%s", line)
        self.group_sizes = np.array([len(samples) for samples, _ in found], np.int64)
        self._ends = np.cumsum(self.group_sizes)
        self._samples = np.concatenate([samples for samples, _ in found]) if found else np.empty(0, SAMPLE)
        self._files = OpenFiles()
        if not len(self._samples):
            detail = f" ({self.problems[0]})" if self.problems else ""
            raise DataError(f"no captioned pictures in {len(self.paths)} shards, {self.paths[:1]}{detail}")

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int, *, extra: bool = False) -> Record:
        """Sample `index` in [0, len). Raises SampleError where its caption or .json cannot be used."""
        path, row = self._locate(index)
        shard = os.path.basename(path)
        # the header before the picture holds its name
        start, size = (int(row["image_block"]) - 1) * BLOCK, BLOCK + int(row["image_size"])
        data = self._bytes(path, start, size, f"{shard}:#{index}")
        name = f"{shard}:{_split_name(_header_name(data[:BLOCK]))[0].decode('utf-8', 'replace')}"
        caption = self._caption(path, row, name)
        parsed = self._json(path, row, name) if extra and row["json_block"] else None
        return Record(data[BLOCK:], caption, index, name, parsed)

    def captions(self) -> Iterator[str]:
        """All readable captions in order."""
        for index in range(len(self)):
            try:
                yield self._caption(*self._locate(index), name=f"#{index}")
            except SampleError:
                continue  # named when the sample itself is read

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
        if row["txt_block"]:
            return clean_caption(self._bytes(path, int(row["txt_block"]) * BLOCK, int(row["txt_size"]), name), name)
        caption = self._json(path, row, name).get("caption")
        if not isinstance(caption, str):
            raise SampleError(name, f'.json has no text under "caption" but {type(caption).__name__}')
        return clean_caption(caption, name)
