"""RefCOCO, RefCOCO+ and RefCOCOg: which object does an expression name?

Three files, told apart by their content:

- instances: COCO's `{"images": [{"id", "file_name", "height", "width"}], "annotations": [{"id", "image_id", "bbox",
  "segmentation"}]}`, with polygons, run lengths or compressed run lengths;
- expressions: `[{"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent", "sent_id"}]}]`, the content of
  `refs(unc).p` as JSON. Loading a pickle runs code, so it is never done here. This converts one that you trust:
  `python -c "import json, pickle, sys; json.dump(pickle.load(sys.stdin.buffer), sys.stdout)" <'refs(unc).p' >refs.json`
- detections, if given, proposals in place of the annotations: COCO's results `[{"image_id", "bbox"}]`; MAttNet's
  `res101_coco_minus_refer_notime_dets.json`, `[{"image_id", "box", "det_id", "score", ...}]` (its tools/run_detect.py);
  or ALBEF's `dets.json`, `{image id: [[x, y, width, height, ...]]}` (its dataset/utils.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from softmask.data import rle
from softmask.data.formats.entries import id_of, placed, require_split, text_of, usable
from softmask.data.formats.examples import Example, ExampleSource, root_of
from softmask.data.json_files import read_json
from softmask.data.records import DataError, LeftOut

CONVERT = 'python -c "import json, pickle, sys; json.dump(pickle.load(sys.stdin.buffer), sys.stdout)"'
FOLDERS = ("", "train2014/", "images/", "images/train2014/", "images/mscoco/images/train2014/")
Id = int | str


def open_refcoco(paths: Sequence[str], *, image_root: str = "", split: str = "val") -> ExampleSource:
    """One example for every sentence of the split.

    The target is {"box": [x, y, w, h], "annotation": its id, "mask": COCO's uncompressed run lengths or None,
    "proposals": boxes of all annotations, or of all detections, of the image, "size": its [height, width]}.

    Raises:
        DataError: a file is missing or of another kind, there is no such split, no usable sentence, or detections of
            other images alone.
    """
    if pickles := [path for path in paths if path.endswith((".p", ".pkl"))]:
        raise DataError(
            f"{pickles[0]} is a pickle, expected JSON; if you trust it: {CONVERT} <'{pickles[0]}' >refs.json"
        )
    left_out = {path: LeftOut() for path in paths}
    trees = {path: read_json(path) for path in paths}
    kinds: dict[str, list[str]] = {"instances": [], "expressions": [], "detections": []}
    for path, tree in trees.items():
        kinds[_kind(path, tree)].append(path)
    if [len(kinds[kind]) for kind in ("instances", "expressions")] != [1, 1] or len(kinds["detections"]) > 1:
        got = ", ".join(f"{len(found)} of {kind}" for kind, found in kinds.items())
        raise DataError(f"expected one file of instances, one of expressions and at most one of detections, got {got}")
    (instances,), (expressions,) = kinds["instances"], kinds["expressions"]
    objects = _Objects.of(trees[instances], left_out[instances])
    for path in kinds["detections"]:
        objects.propose(path, trees[path], left_out[path])
    require_split(expressions, split, trees[expressions])
    wanted = [entry for entry in trees[expressions] if not isinstance(entry, dict) or entry.get("split") == split]
    made = usable(wanted, objects.examples, left_out[expressions])
    examples = placed([(one, FOLDERS) for group in made for one in group], root_of(paths, image_root))
    return ExampleSource(examples, paths=paths, image_root=image_root, left_out=left_out)


def _kind(path: str, tree: Any) -> str:
    if isinstance(tree, dict) and isinstance(tree.get("images"), list) and isinstance(tree.get("annotations"), list):
        return "instances"
    if isinstance(tree, dict) and any(isinstance(rows, list) and list in map(type, rows) for rows in tree.values()):
        return "detections"
    first = next((entry for entry in tree if isinstance(entry, dict)), {}) if isinstance(tree, list) else {}
    if "sentences" in first:
        return "expressions"
    if "bbox" in first or "box" in first:
        return "detections"
    got = f"entries with {', '.join(first)!r:.80}" if first else type(tree).__name__
    raise DataError(
        f'{path}: expected instances {{"images", "annotations"}}, expressions [{{"ann_id", "sentences"}}] or '
        f'detections [{{"image_id", "bbox" or "box"}}] or {{image id: boxes}}, got {got}'
    )


@dataclass
class _Boxed:
    image: Id
    box: list[float]
    segmentation: Any


@dataclass
class _Objects:
    """Images (file name, height, width) and annotations by id, and the proposals of every image."""

    images: dict[Id, tuple[str, int, int]]
    annotations: dict[Id, _Boxed]
    proposals: dict[Id, list[list[float]]]

    @staticmethod
    def of(tree: dict[str, Any], left_out: LeftOut) -> _Objects:
        images = dict(usable(tree["images"], _image, left_out))
        annotations = dict(usable(tree["annotations"], lambda one, n: (id_of(one, "id"), _boxed(one, n)), left_out))
        return _Objects(images, annotations, _by_image(annotations.values()))

    def propose(self, path: str, tree: Any, left_out: LeftOut) -> None:
        """Detections in place of the annotations. Raises DataError if all are of other images."""
        entries = tree
        if isinstance(tree, dict):  # JSON's keys are texts
            ids: dict[str, Id] = {str(name): name for name in self.images}
            entries = [
                {"image_id": ids.get(name, name), "bbox": row[:4] if isinstance(row, list) else row}
                for name, rows in tree.items()
                for row in (rows if isinstance(rows, list) else [rows])
            ]
        self.proposals = _by_image(usable(entries, _boxed, left_out))
        if self.proposals.keys().isdisjoint(self.images):
            some = f", such as {next(iter(self.proposals))!r}" if self.proposals else ""
            raise DataError(f"{path}: expected boxes of the instances' images, got {len(self.proposals)} others{some}")

    def examples(self, entry: dict[str, Any], number: int) -> list[Example]:
        """One for every sentence of an expression. Raises ValueError for an unusable entry."""
        name, sentences = id_of(entry, "ann_id"), entry.get("sentences")
        found = self.annotations.get(name)
        if found is None or found.image not in self.images:
            raise ValueError(f"annotation {name}, or its image, is not among the instances")
        if entry.get("image_id", found.image) != found.image:
            raise ValueError(f"annotation {name} is of image {found.image}, not of {entry['image_id']!r:.80}")
        if not isinstance(sentences, list) or not all(isinstance(one, dict) for one in sentences):
            raise ValueError(f'"sentences" must be a list of {{"sent": text}}, got {sentences!r:.80}')
        picture, height, width = self.images[found.image]
        target = {
            "box": found.box,
            "annotation": name,
            "mask": _mask(found.segmentation, height, width),
            "proposals": self.proposals.get(found.image, []),
            "size": [height, width],
        }
        reference, unseen = entry.get("ref_id", number), entry.get("unseen") is True
        return [
            Example((picture,), text_of(one, "sent"), target, one.get("sent_id", f"{reference}-{place}"), unseen)
            for place, one in enumerate(sentences)
        ]


def _image(entry: dict[str, Any], _number: int) -> tuple[Id, tuple[str, int, int]]:
    size = [entry.get("height"), entry.get("width")]
    if not all(type(length) is int and length > 0 for length in size):
        raise ValueError(f'"height" and "width" must be numbers of pixels, got {size!r:.80}')
    return id_of(entry, "id"), (text_of(entry, "file_name"), entry["height"], entry["width"])


def _boxed(entry: dict[str, Any], _number: int) -> _Boxed:
    key = "box" if "box" in entry else "bbox"
    box = entry.get(key)
    if not _numbers(box) or len(box) != 4 or min(box[2:]) <= 0:
        raise ValueError(f'"{key}" must be [x, y, width, height], got {box!r:.80}')
    return _Boxed(id_of(entry, "image_id"), box, entry.get("segmentation"))


def _by_image(found: Iterable[_Boxed]) -> dict[Id, list[list[float]]]:
    boxes: dict[Id, list[list[float]]] = {}
    for one in found:
        boxes.setdefault(one.image, []).append(one.box)
    return boxes


def _numbers(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(type(one) in (int, float) and math.isfinite(one) for one in values)


def _mask(segmentation: Any, height: int, width: int) -> dict[str, Any] | None:
    """Uncompressed run lengths of any of COCO's masks; None if there is none. Raises ValueError if it is malformed."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        return _drawn(segmentation, height, width)
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
    if isinstance(counts, str):
        counts = _decompressed(counts)
    if not _numbers(counts) or segmentation.get("size") != [height, width]:
        raise ValueError(f'"segmentation" must be run lengths of size {[height, width]}, got {segmentation!r:.80}')
    return rle.encode(rle.decode({"size": [height, width], "counts": counts}))


def _drawn(polygons: list[Any], height: int, width: int) -> dict[str, Any]:
    furthest = 10 * max(height, width)  # drawing takes memory by the length of the lines
    for polygon in polygons:
        if not _numbers(polygon) or len(polygon) < 6 or len(polygon) % 2 or max(map(abs, polygon)) > furthest:
            raise ValueError(f'"segmentation" must hold polygons [x, y, x, y, x, y, ...], got {polygon!r:.80}')
    try:
        from pycocotools import mask
    except ImportError:
        raise DataError("masks that are polygons need pycocotools: pip install pycocotools") from None
    return rle.encode(mask.decode(mask.merge(mask.frPyObjects(polygons, height, width))))


def _decompressed(text: str) -> list[int]:
    """Run lengths of COCO's compressed code.

    A number is a run of digits to base 32, the lowest first: the character's code less 48, of which bit 5 says that
    another digit follows and bit 4 of the last is the sign. From the fourth number on, it is the difference to the
    number two before. pycocotools decodes it, too, but fills what a short code leaves with arbitrary memory.
    Source: pycocotools `maskApi.c`, rleFrString.
    """
    counts: list[int] = []
    value = shift = 0
    for digit in (ord(character) - 48 for character in text):
        if not 0 <= digit < 64:
            raise ValueError(f'"counts" must be compressed run lengths, got {text!r:.80}')
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            value -= (digit & 16) << (shift - 4)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts
