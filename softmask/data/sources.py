"""Open the shards or JSON lists that `data.train` names."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from braceexpand import braceexpand

from softmask.data.records import DataError, LeftOut, Record, SampleError, Source, clean_caption
from softmask.data.shards import ShardSource
from softmask.lfs import NOT_THE_FILE, is_pointer

logger = logging.getLogger("softmask.data")


def open_source(data: str | Sequence[str], *, image_root: str = "") -> Source:
    """Open tar shards or JSON lists.

    Args:
        data: a path, a glob, a brace pattern ("cc3m-{000000..000331}.tar") or a sequence of these. Names that end in
            .json are ALBEF's lists `[{"image": path, "caption": str or [str, ...]}, ...]`.
        image_root: folder of the image paths in lists; empty: the folder of each list.

    Raises:
        DataError: one line that names the pattern, file or entry that is wrong.
    """
    patterns = [data] if isinstance(data, str | os.PathLike) else list(data)
    if not patterns or not all(map(os.fspath, patterns)):
        raise DataError("no data: expected shards (a path, glob or brace pattern) or a .json list, got nothing")
    paths = [path for pattern in patterns for path in expand_pattern(os.fspath(pattern))]
    for path in paths:
        _refuse_other_kinds(path)
    if repeated := [path for path, count in Counter(map(os.path.realpath, paths)).items() if count > 1]:
        logger.warning(
            "%d files are named more than once and are read as often, such as %s", len(repeated), repeated[0]
        )
    lists = [path for path in paths if path.endswith(".json")]
    if lists and len(lists) != len(paths):
        raise DataError(f"shards and JSON lists cannot be mixed: got {lists[0]} and {len(paths) - len(lists)} others")
    return JsonSource(lists, image_root=image_root) if lists else ShardSource(paths)


OTHER_KINDS = {
    ".jsonl": "put all entries into one list: jq -s . FILE.jsonl > FILE.json",
    ".ndjson": "put all entries into one list: jq -s . FILE.ndjson > FILE.json",
    ".csv": "write a JSON list of {image, caption}, or shards (img2dataset reads CSV)",
    ".tsv": "write a JSON list of {image, caption}, or shards (img2dataset reads TSV)",
    ".txt": "write a JSON list of {image, caption}, or shards",
    ".parquet": "convert it to shards with img2dataset",
    ".json.gz": "unpack it first: gunzip",
    ".tar.gz": "unpack it first: gunzip",
    ".tgz": "unpack it first: gunzip",
    ".tar.zst": "unpack it first: zstd -d",
    ".zip": "pack its files with tar --sort=name instead",
}


def _refuse_other_kinds(path: str) -> None:
    for ending, advice in OTHER_KINDS.items():
        if path.lower().endswith(ending):
            raise DataError(f"{path}: expected a tar shard or a .json list, got {ending}; {advice}")


def expand_pattern(pattern: str) -> list[str]:
    """The files that a path, glob or brace pattern names, in order. Raises DataError if one is missing."""
    pattern = os.path.expanduser(pattern)
    if os.path.isfile(pattern):
        return [pattern]
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:  # unbalanced braces; the stubs do not know the class
        raise DataError(f"{pattern}: {error}") from None
    return [path for name in names for path in _existing(name)]


def _existing(name: str) -> list[str]:
    if os.path.isfile(name):
        return [name]
    if os.path.isdir(name):
        raise DataError(f"{name} is a folder, expected a file, a glob such as {name}/*.tar or a brace pattern")
    if not glob.has_magic(name):
        raise DataError(f"{name} does not exist")
    found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
    if not found:
        raise DataError(f"no file matches {name}")
    return found


class _Texts:
    """Many strings in two buffers, which forked workers share without copying."""

    def __init__(self, texts: Sequence[str]):
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")


class JsonSource:
    """ALBEF's JSON lists. Every caption is a sample; captions of the same image share `image_id`."""

    def __init__(self, paths: Sequence[str], *, image_root: str = ""):
        images: dict[str, int] = {}
        content = hashlib.sha256()
        captions: list[str] = []
        ids: list[int] = []
        self.problems: list[str] = []
        for path in paths:
            folder = os.path.expanduser(image_root) or os.path.dirname(os.path.abspath(path))
            left_out = LeftOut()
            for image, texts in _entries(path, left_out):
                image_id = images.setdefault(os.path.normpath(os.path.join(folder, image)), len(images))
                content.update(json.dumps([os.path.normpath(image), texts]).encode())
                captions += texts
                ids += [image_id] * len(texts)
            if left_out.count:
                self.problems.append(f"{path} has {left_out.count} entries that cannot be used, {left_out}")
        for line in self.problems:
            logger.warning("%s", line)
        if not captions:
            detail = f" ({self.problems[0]})" if self.problems else ""
            raise DataError(f"no captioned images in {', '.join(paths)}{detail}")
        self.paths, self.images = list(paths), len(images)
        self.digest = content.hexdigest()
        self.group_sizes = np.array([len(captions)], np.int64)
        self._captions, self._images = _Texts(captions), _Texts(list(images))
        self.image_ids = np.array(ids, np.int64)

    def __len__(self) -> int:
        return len(self.image_ids)

    def read(self, index: int, *, extra: bool = False) -> Record:
        """Sample `index` in [0, len). Raises SampleError if its caption or image cannot be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        image_id = int(self.image_ids[index])
        path = self._images[image_id]
        caption = clean_caption(self._captions[index], path)
        try:
            with open(path, "rb") as file:
                image = file.read()
        except OSError as error:
            raise SampleError(path, f"cannot be read ({error.strerror})") from None
        except ValueError as error:  # a zero byte in the path
            raise SampleError(path, f"cannot be read ({error})") from None
        return Record(image, caption, image_id, path, {"image": path, "caption": caption} if extra else None)

    def captions(self) -> Iterator[str]:
        """All readable captions in order."""
        for index in range(len(self)):
            try:
                yield clean_caption(self._captions[index], "")
            except SampleError:
                continue  # reported when the sample itself is read


def _entries(path: str, left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    """Image path and captions of every usable entry; others are counted. Raises DataError if the file is not a list."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        if is_pointer(text[:100].encode("utf-8", "surrogatepass")):
            raise DataError(f"{path} {NOT_THE_FILE}")
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of entries, got {type(entries).__name__}{_layout(entries)}")
    for number, entry in enumerate(entries):
        try:
            image, captions = _entry(entry)
        except ValueError as error:
            left_out.add(f"entry {number}: {error}")
            continue
        texts = [text for text in captions if isinstance(text, str)]
        if len(texts) < len(captions):
            left_out.add(f'entry {number}: "caption" must be a text or a list of texts, got {captions!r:.80}')
        if texts:
            yield image, texts


def _entry(entry: object) -> tuple[str, list]:
    """Image path and captions, which may include other types. Raises ValueError for an unusable entry."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, got {type(entry).__name__}")
    image, caption = entry.get("image"), entry.get("caption")
    captions = [caption] if isinstance(caption, str) else caption
    if not isinstance(image, str) or not image:
        raise ValueError(f'"image" must be a path, got {image!r:.80}')
    if not isinstance(captions, list) or not captions:
        raise ValueError(f'"caption" must be a text or a list of texts, got {caption!r:.80}')
    return image, captions


def _layout(tree: object) -> str:
    """Advice for known formats that are not lists."""
    if not isinstance(tree, dict) or not isinstance(tree.get("images"), list):
        return ""
    if isinstance(tree.get("annotations"), list):
        return (
            ' with "images" and "annotations", as COCO\'s: write one entry {"image": file_name, "caption": caption} '
            "for every annotation, with the file_name of its image_id"
        )
    return (
        ' with "images", as Karpathy\'s splits: write one entry {"image": filepath/filename, "caption": [raw, ...]} '
        "for every image of the split, from its sentences"
    )
