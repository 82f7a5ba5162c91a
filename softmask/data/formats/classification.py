"""Classified images: a folder of a subfolder per class (ImageFolder), or WebDataset shards with .cls.

`classnames.txt` names the classes, one a line, in the order of the sorted subfolders or of the numbers in .cls. It lies
in the folder of the images or shards or in its parent, as CLIP_benchmark has it, and with it
`zeroshot_classification_templates.txt`: prompts such as `a photo of a {c}.`, where `{c}` is the name. Without it a
subfolder's own name, with `_` as space, is the class's.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence

from softmask.data.formats.class_shards import ClassShardSource
from softmask.data.formats.entries import read_lines
from softmask.data.formats.examples import Example, ExampleSource
from softmask.data.records import DataError, LeftOut
from softmask.data.shard_index import COMPRESSED, PLAIN

logger = logging.getLogger("softmask.data")
CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
ENDINGS = tuple(f".{ending.decode()}" for ending in COMPRESSED + PLAIN)


class ImageFolderSource(ExampleSource):
    """Images of subfolders.

    Args:
        folder: of the subfolders.
        classes: names of the classes.
        numbers: subfolder -> number of its class, or None for one that is left out.

    Raises:
        DataError: no image.
    """

    def __init__(self, folder: str, *, classes: list[str], numbers: dict[str, int | None]) -> None:
        left_out = LeftOut()
        examples = list(_examples(folder, numbers, left_out))
        super().__init__(examples, paths=[folder], image_root=folder, left_out={folder: left_out})
        self.classes = list(classes)


def open_classification(
    paths: Sequence[str], *, image_root: str = "", names: list[str] | None = None
) -> ImageFolderSource | ClassShardSource:
    """The images of a folder of subfolders or of shards; a record's target is the number of its class in `classes`.

    Args:
        paths: one folder, or shards.
        image_root: where the folder is, if it is not where its path says.
        names: of the classes that the model knows; images of others are left out and counted.

    Raises:
        DataError: neither a folder nor shards, names that do not fit, or no usable image.
    """
    paths = [os.path.expanduser(path) for path in paths]
    if len(paths) == 1 and paths[0].lower().endswith(".tar"):
        return _open_shards(paths, names)
    if len(paths) == 1:
        inside = os.path.join(os.path.expanduser(image_root), paths[0])
        return _open_folder(paths[0] if os.path.isdir(paths[0]) else inside, names)
    if other := [path for path in paths if not path.lower().endswith(".tar")]:
        raise DataError(f"{other[0]}: expected one folder of a subfolder per class, or shards (.tar), got {len(paths)}")
    return _open_shards(paths, names)


def read_templates(path: str) -> list[str]:
    """The prompts of a file, one a line, with `{c}` for the name of a class.

    Raises:
        DataError: a line without `{c}` or with several, or no line.
    """
    templates = []
    for number, line in enumerate(read_lines(path), start=1):
        if line.count("{c}") != 1:
            raise DataError(f"{path}, line {number}: expected {{c}} once, for the name of the class, got {line!r:.80}")
        templates.append(line)
    return templates


def beside(path: str, name: str) -> str | None:
    """The file `name` in the folder `path`, or in its parent; None if neither has it."""
    folder = os.path.abspath(path)
    candidates = (os.path.join(folder, name), os.path.join(os.path.dirname(folder), name))
    return next((one for one in candidates if os.path.isfile(one)), None)


def _open_folder(folder: str, names: list[str] | None) -> ImageFolderSource:
    expected = "expected a folder of a subfolder per class, or shards (.tar)"
    try:
        with os.scandir(folder) as found:
            subfolders = sorted(one.name for one in found if one.is_dir() and not one.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: {expected}, got none: {error.strerror}") from None
    if not subfolders:
        raise DataError(f"{folder}: {expected}, got a folder without subfolders")
    own = [subfolder.replace("_", " ") for subfolder in subfolders]
    if file := beside(folder, CLASSNAMES):
        own = _class_names(file)
        if len(own) != len(subfolders):
            raise DataError(
                f"{file} names {len(own)} classes, but {folder} has {len(subfolders)} subfolders; write a line for each"
            )
    numbers = dict(zip(subfolders, _numbers(own, names), strict=True))
    return ImageFolderSource(folder, classes=own if names is None else names, numbers=numbers)


def _open_shards(paths: Sequence[str], names: list[str] | None) -> ClassShardSource:
    file = beside(os.path.dirname(os.path.abspath(paths[0])), CLASSNAMES)
    if file is None and names is None:
        raise DataError(
            f"{paths[0]}: expected {CLASSNAMES} in the folder of the shards or in its parent, got none; "
            "write it, one name a line, in the order of the numbers in .cls"
        )
    if file is None:
        text = "%s: without %s, the numbers in .cls are taken to be those of the %d known classes"
        logger.warning(text, paths[0], CLASSNAMES, len(names or ()))
    own = _class_names(file) if file else list(names or ())
    return ClassShardSource(paths, classes=own if names is None else names, numbers=_numbers(own, names))


def _class_names(path: str) -> list[str]:
    names = read_lines(path)
    if "" in names:
        raise DataError(f"{path}, line {names.index('') + 1}: expected the name of a class, got an empty line")
    return names


def _numbers(own: Sequence[str], names: list[str] | None) -> list[int | None]:
    """Number in `names` of every class of `own`; None for one that is not there."""
    if names is None or list(own) == names:
        return list(range(len(own)))
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(
            f"the known classes hold {repeated[0]!r} more than once, so data of other classes cannot be matched by name"
        )
    known = {name: number for number, name in enumerate(names)}
    return [known.get(name) for name in own]


def _examples(folder: str, numbers: dict[str, int | None], left_out: LeftOut) -> Iterator[Example]:
    for subfolder, number in numbers.items():
        if number is None:
            left_out.add(f"{subfolder}: of no known class")
            continue
        pictures = list(_pictures(os.path.join(folder, subfolder), left_out))
        if not pictures:
            left_out.add(f"{subfolder}: without a picture")
        for picture in pictures:
            path = os.path.relpath(picture, folder)
            yield Example((path,), "", number, path)


def _pictures(folder: str, left_out: LeftOut) -> Iterator[str]:
    """Paths of all pictures in a folder and below, in order; other files are counted, hidden ones are not."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for file in sorted(files):
            if file.lower().endswith(ENDINGS) and not file.startswith("."):
                yield os.path.join(place, file)
            elif not file.startswith("."):
                left_out.add(f"{os.path.join(place, file)}: no picture by its ending")
