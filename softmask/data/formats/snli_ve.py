"""SNLI-VE: does a picture entail a sentence? Official JSON lines and ALBEF's JSON list.

Official: `{"Flickr30K_ID" or "Flikr30kID": "1234", "sentence2": text, "gold_label": label}`, picture `1234.jpg`.
ALBEF's: `[{"image": path, "sentence": text, "label": label}]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from softmask.data.formats.entries import open_lists, text_of
from softmask.data.formats.examples import Example, ExampleSource

LABELS = ("entailment", "neutral", "contradiction")
"""Names of the classes; the target is the number of one. A file without labels has none."""
PICTURE_KEYS = ("Flickr30K_ID", "Flikr30kID")
FOLDERS = ("", "flickr30k_images/", "flickr30k-images/", "images/")


def open_snli_ve(paths: Sequence[str], *, image_root: str = "") -> ExampleSource:
    """The examples of one or several files.

    Raises:
        DataError: a file that is none of the two formats, or no usable example.
    """
    return open_lists(paths, _example, image_root=image_root)


def _example(entry: dict[str, Any], number: int) -> tuple[Example, Sequence[str]]:
    """The example, and the possible starts of its picture's path. Raises ValueError for an unusable entry."""
    official = next((key for key in PICTURE_KEYS if key in entry), None)
    picture = f"{entry[official]}.jpg" if official else entry.get("image")
    if not isinstance(picture, str) or not picture:
        raise ValueError(f'expected "image" or "{PICTURE_KEYS[0]}", got {", ".join(entry)!r:.80}')
    text_key, label_key = ("sentence2", "gold_label") if official else ("sentence", "label")
    text, label = text_of(entry, text_key), entry.get(label_key)
    if label is not None and label not in LABELS:
        raise ValueError(f'"{label_key}" must be {", ".join(LABELS)}, got {label!r:.80}')
    target = None if label is None else LABELS.index(label)
    return Example((picture,), text, target, entry.get("pairID", number), entry.get("unseen") is True), FOLDERS
