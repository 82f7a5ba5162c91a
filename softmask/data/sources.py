"""Open the shards or lists that `data.train` names."""

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

from softmask.data.formats.karpathy import is_karpathy, karpathy_entries
from softmask.data.formats.tables import table_entries
from softmask.data.json_files import read_json
from softmask.data.records import DataError, LeftOut, Record, SampleError, Source, clean_caption, read_picture
from softmask.data.shards import ShardSource
from softmask.data.texts import Texts

logger = logging.getLogger("softmask.data")

LISTS = (".json", ".csv", ".tsv")
IMAGE_COLUMN, CAPTION_COLUMN = "filepath", "title"  # open_clip's


def open_source(
    data: str | Sequence[str],
    *,
    image_root: str = "",
    split: str = "train",
    image_column: str = IMAGE_COLUMN,
    caption_column: str = CAPTION_COLUMN,
) -> Source:
    """Open tar shards or lists of captioned images.

    Args:
        data: a path, a glob, a brace pattern ("cc3m-{000000..000331}.tar") or a sequence of these. Names that end in
            .json are ALBEF's lists `[{"image": path, "caption": str or [str, ...]}, ...]` or Karpathy's splits, those
            in .csv and .tsv tables.
        image_root: folder of the image paths in lists; empty: the folder of each list.
        split: of Karpathy's splits; "train" includes "restval".
        image_column: name of a table's column of image paths.
        caption_column: name of a table's column of captions.

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
    lists = [path for path in paths if path.lower().endswith(LISTS)]
    if lists and len(lists) != len(paths):
        raise DataError(f"shards and lists cannot be mixed: got {lists[0]} and {len(paths) - len(lists)} others")
    if not lists:
        return ShardSource(paths)
    return ListSource(
        lists, image_root=image_root, split=split, image_column=image_column, caption_column=caption_column
    )


OTHER_KINDS = {
    ".jsonl": "put all entries into one list: jq -s . FILE.jsonl > FILE.json",
    ".ndjson": "put all entries into one list: jq -s . FILE.ndjson > FILE.json",
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
            raise DataError(f"{path}: expected a tar shard or a list ({', '.join(LISTS)}), got {ending}; {advice}")


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


class ListSource:
    """Lists and tables. Every caption is a sample; captions of the same image share `image_id`.

    The arguments are `open_source`'s.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        image_root: str = "",
        split: str = "train",
        image_column: str = IMAGE_COLUMN,
        caption_column: str = CAPTION_COLUMN,
    ):
        images: dict[str, int] = {}
        content = hashlib.sha256()
        captions: list[str] = []
        ids: list[int] = []
        self.problems: list[str] = []
        for path in paths:
            folder = os.path.expanduser(image_root) or os.path.dirname(os.path.abspath(path))
            left_out = LeftOut()
            if path.lower().endswith(".json"):
                entries = _json_entries(path, folder, split, left_out)
            else:
                entries = table_entries(
                    path, image_column=image_column, caption_column=caption_column, left_out=left_out
                )
            for image, texts in entries:
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
        self._captions, self._images = Texts(captions), Texts(list(images))
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
        image = read_picture(path)
        return Record(image, caption, image_id, path, {"image": path, "caption": caption} if extra else None)

    def captions(self) -> Iterator[str]:
        """All readable captions in order."""
        for index in range(len(self)):
            try:
                yield clean_caption(self._captions[index], "")
            except SampleError:
                continue  # reported when the sample itself is read


def _json_entries(path: str, folder: str, split: str, left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    """Image path and captions of every usable entry; others are counted. Raises DataError for other JSON."""
    tree = read_json(path)
    if is_karpathy(tree):
        return karpathy_entries(path, tree, folder=folder, split=split, left_out=left_out)
    if isinstance(tree, list):
        return _listed_entries(tree, left_out)
    raise DataError(f"{path}: expected a list of entries, got {type(tree).__name__}{_layout(tree)}")


def _listed_entries(entries: list, left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
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
    """Advice for COCO's own format."""
    if not isinstance(tree, dict) or not {"images", "annotations"} <= tree.keys():
        return ""
    return (
        ' with "images" and "annotations", as COCO\'s: write one entry {"image": file_name, "caption": caption} '
        "for every annotation, with the file_name of its image_id"
    )
