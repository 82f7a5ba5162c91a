"""Examples of downstream tasks: pictures in files, a text, and what the model should answer."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from softmask.data.records import DataError, LeftOut, Record, SampleError, clean_caption, read_picture
from softmask.data.texts import Texts

logger = logging.getLogger("softmask.data")
LOOKED_AT = 16  # examples whose pictures decide how a data set is laid out on this disk


@dataclass(frozen=True)
class Example:
    """One example of a task's file.

    Attributes:
        pictures: paths, absolute or relative to the image root, in the task's order.
        text: question, statement or caption; empty if the task has none.
        target: what the model should answer, in JSON's types; None in a file without answers.
        key: the example's name in the file, which a file of predictions repeats.
        unseen: it holds something that training never shows (`"unseen": true`); its figures stand apart.
    """

    pictures: tuple[str, ...]
    text: str
    target: Any = None
    key: Any = None
    unseen: bool = False


class ExampleSource:
    """A `Source` (records.py) of examples; those of the same first picture share `image_id`.

    Attributes:
        unanswered: number of examples without a target.

    Args:
        examples: in the order of the files.
        paths: the files.
        image_root: folder of relative paths; empty: the folder of the first file.
        left_out: file -> its entries that cannot be used.

    Raises:
        DataError: no usable example.
    """

    def __init__(
        self, examples: Iterable[Example], *, paths: Sequence[str], image_root: str, left_out: dict[str, LeftOut]
    ) -> None:
        self.unanswered = 0
        numbers: dict[str, int] = {}
        rows: list[str] = []
        ids: list[int] = []
        for example in examples:
            rows.append(json.dumps(astuple(example), ensure_ascii=False))
            ids.append(numbers.setdefault(os.path.normpath(example.pictures[0]), len(numbers)))
            self.unanswered += example.target is None
        self.problems = [
            f"{path} has {left.count} entries that cannot be used, {left}" for path, left in left_out.items() if left
        ]
        for line in self.problems:
            logger.warning("%s", line)
        if not rows:
            detail = f" ({self.problems[0]})" if self.problems else ""
            raise DataError(f"no example in {', '.join(paths)}{detail}")
        self.paths = list(paths)
        self.digest = hashlib.sha256("\n".join(rows).encode("utf-8", "surrogatepass")).hexdigest()
        self.group_sizes = np.array([len(rows)], np.int64)
        self._rows, self._folder = Texts(rows), root_of(paths, image_root)
        self.image_ids, self.images = np.array(ids, np.int64), len(numbers)

    def __len__(self) -> int:
        return len(self.image_ids)

    def example(self, index: int) -> Example:
        """Example `index` in [0, len), without its pictures."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        pictures, *rest = json.loads(self._rows[index])
        return Example(tuple(pictures), *rest)

    def read(self, index: int, *, extra: bool = False) -> Record:
        """Example `index` with its pictures' bytes. Raises SampleError if one cannot be read."""
        example = self.example(index)
        paths = [os.path.join(self._folder, picture) for picture in example.pictures]
        text = clean_caption(example.text, paths[0]) if example.text else ""
        first, *others = map(read_picture, paths)
        record = Record(first, text, int(self.image_ids[index]), paths[0], more_images=tuple(others))
        return replace(record, target=example.target, key=example.key, unseen=example.unseen)

    def captions(self) -> Iterator[str]:
        """All readable texts in order."""
        for index in range(len(self)):
            try:
                yield clean_caption(self.example(index).text, "")
            except SampleError:
                continue  # reported when the example itself is read, or without a text


def root_of(paths: Sequence[str], image_root: str) -> str:
    """The folder of relative pictures."""
    return os.path.expanduser(image_root) or os.path.dirname(os.path.abspath(paths[0]))


def choose_layout(folder: str, candidates: Iterable[Sequence[str]]) -> int:
    """Which of a picture's possible paths this disk has: the number of the first that exists for one of the first
    LOOKED_AT pictures, 0 if none does.

    candidates: for each picture its possible paths, in one order for all.
    """
    for _, paths in zip(range(LOOKED_AT), candidates, strict=False):
        for number, path in enumerate(paths):
            if os.path.isfile(os.path.join(folder, path)):
                return number
    return 0
