"""Karpathy's splits of COCO and Flickr30K, `dataset_coco.json` and `dataset_flickr30k.json`.

`{"images": [{"filepath": "val2014", "filename", "split": train / restval / val / test, "sentences": [{"raw"}]}]}`.
Flickr30K's have no "filepath".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

from softmask.data.formats.entries import require_split, text_of, usable
from softmask.data.formats.examples import choose_layout
from softmask.data.records import LeftOut

ALSO = {"train": ("restval",)}
"""Splits that count as another. Source: every published result on Karpathy's COCO trains on both."""
FOLDERS = ("", "flickr30k_images/", "flickr30k-images/", "images/")


def is_karpathy(tree: object) -> TypeGuard[dict[str, list]]:
    """Whether a JSON file holds such splits; COCO's own files have "annotations" beside their images."""
    return isinstance(tree, dict) and isinstance(tree.get("images"), list) and "annotations" not in tree


def karpathy_entries(
    path: str, tree: dict[str, list], *, folder: str, split: str, left_out: LeftOut
) -> Iterator[tuple[str, list[str]]]:
    """Image path and captions of every usable image of the split.

    Raises:
        DataError: the file has no such split.
    """
    images = tree["images"]
    also = ALSO.get(split, ())
    require_split(path, split, images, also=also)

    def captioned(image: dict[str, Any], _number: int) -> tuple[list[str], list[str]] | None:
        if text_of(image, "split") not in (split, *also):
            return None
        name, captions = text_of(image, "filename"), _captions(image.get("sentences"))
        starts = (f"{image['filepath']}/", *FOLDERS) if image.get("filepath") else FOLDERS
        return [start + name for start in starts], captions

    made = [one for one in usable(images, captioned, left_out) if one is not None]
    layout = choose_layout(folder, (candidates for candidates, _ in made))
    for candidates, captions in made:
        yield candidates[layout], captions


def _captions(sentences: Any) -> list[str]:
    """Raises ValueError if there is none, or one is malformed."""
    listed = sentences if isinstance(sentences, list) else []
    if not listed or not all(isinstance(one, dict) and isinstance(one.get("raw"), str) for one in listed):
        raise ValueError(f'"sentences" must be a list of {{"raw": text}}, got {sentences!r:.80}')
    return [one["raw"] for one in listed]
