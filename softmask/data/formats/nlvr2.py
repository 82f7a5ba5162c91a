"""NLVR2: is a sentence true of a pair of pictures? Official JSON lines and ALBEF's JSON list.

Official: `{"identifier": "train-10171-2-0", "sentence": text, "label": "True" or "False"}`, and "directory" in train.
An identifier names the split, the set of pictures, the pair and the sentence; the pair's pictures are
`train-10171-2-img0.png` and `train-10171-2-img1.png`, left and right.
ALBEF's: `[{"images": [left, right], "sentence": text, "label": "True" or "False"}]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from softmask.data.formats.entries import open_lists, text_of
from softmask.data.formats.examples import Example, ExampleSource

LABELS = {"False": 0, "True": 1}
ALBEF_FOLDERS = ("", "nlvr2/", "images/")


def open_nlvr2(paths: Sequence[str], *, image_root: str = "") -> ExampleSource:
    """The examples of one or several files; the target is 1 for true, 0 for false, None without a label.

    Raises:
        DataError: a file that is none of the two formats, or no usable example.
    """
    return open_lists(paths, _example, image_root=image_root)


def sentence_of(identifier: str) -> str:
    """Which sentence an official example is about: the identifier without its pair.

    Consistency is the share of sentences whose examples are all answered rightly. Source: NLVR2's `eval/metrics.py`.
    """
    split, images, _, sentence = identifier.split("-")
    return f"{split}-{images}-{sentence}"


def _example(entry: dict[str, Any], number: int) -> tuple[Example, Sequence[str]]:
    """The example, and the possible starts of its pictures' paths. Raises ValueError for an unusable entry."""
    if "identifier" in entry:
        pictures, starts = _official_pictures(entry)
    elif "images" in entry:
        pictures, starts = _listed_pictures(entry["images"]), ALBEF_FOLDERS
    else:
        raise ValueError(f'expected "identifier" or "images", got {", ".join(entry)!r:.80}')
    text, label = text_of(entry, "sentence"), entry.get("label")
    name = str(label) if isinstance(label, bool | str) else label
    if name is not None and name not in tuple(LABELS):
        raise ValueError(f'"label" must be True or False, got {label!r:.80}')
    target = None if name is None else LABELS[name]
    key, unseen = entry.get("identifier", number), entry.get("unseen") is True
    return Example(pictures, text, target, key, unseen), starts


def _official_pictures(entry: dict[str, Any]) -> tuple[tuple[str, ...], Sequence[str]]:
    identifier = text_of(entry, "identifier")
    if identifier.count("-") != 3:
        raise ValueError(f'"identifier" must be split-set-pair-sentence, got {identifier!r:.80}')
    pair, split = identifier.rpartition("-")[0], identifier.partition("-")[0]
    inner = f"{split}/{entry['directory']}/" if "directory" in entry else f"{split}/"
    starts = ("", f"{split}/", inner, "images/", f"images/{split}/", f"images/{inner}")
    return (f"{pair}-img0.png", f"{pair}-img1.png"), starts


def _listed_pictures(pictures: Any) -> tuple[str, ...]:
    paths = pictures if isinstance(pictures, list) else []
    if len(paths) != 2 or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f'"images" must be two paths, got {pictures!r:.80}')
    return tuple(paths)
