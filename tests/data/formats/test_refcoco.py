"""RefCOCO's files: boxes, masks of every kind, proposals, splits, and what is left out."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

from softmask.data import DataError, SampleError, rle
from softmask.data.formats.refcoco import open_refcoco
from tests.support.format_files import write_json, write_pictures

H, W = 6, 8
SQUARE = np.zeros((H, W), bool)
SQUARE[1:4, 2:6] = True
POLYGON = [2, 1, 6, 1, 6, 4, 2, 4]


def annotation(key: int, image: int, segmentation=(), box=(2, 1, 4, 3)) -> dict:
    return {"id": key, "image_id": image, "bbox": list(box), "segmentation": segmentation, "category_id": 1}


def instances(*annotations) -> dict:
    names = {5: "COCO_train2014_000000000005.jpg", 6: "COCO_train2014_000000000006.jpg"}
    images = [{"id": key, "file_name": name, "height": H, "width": W} for key, name in names.items()]
    return {"info": {}, "images": images, "annotations": list(annotations), "categories": []}


def expression(key: int, image: int, *sentences: str, split="val", **more) -> dict:
    texts = [{"sent": text, "sent_id": 10 * key + n, "raw": text, "tokens": []} for n, text in enumerate(sentences)]
    return {"ref_id": key, "ann_id": key, "image_id": image, "split": split, "sentences": texts, **more}


OBJECTS = instances(annotation(1, 5), annotation(2, 5, box=(0, 0, 2.5, 2)), annotation(3, 6))
EXPRESSIONS = [
    expression(1, 5, "left dog", "the brown one"),
    expression(3, 6, "cat", split="testA"),
    expression(2, 5, "bird", unseen=True),
]


def write_all(folder, objects=OBJECTS, expressions=EXPRESSIONS, detections=None) -> list[str]:
    """Paths of the files, the instances last."""
    paths = [write_json(folder / "refs.json", expressions)]
    if detections is not None:
        paths.append(write_json(folder / "dets.json", detections))
    return [*paths, write_json(folder / "instances.json", objects)]


def test_sentences_of_a_split(tmp_path):
    (content, other) = write_pictures(tmp_path, *(one["file_name"] for one in OBJECTS["images"])).values()
    source = open_refcoco(write_all(tmp_path))
    records = [source.read(number) for number in range(len(source))]
    assert [record.caption for record in records] == ["left dog", "the brown one", "bird"]
    assert [record.key for record in records] == [10, 11, 20]
    assert [record.unseen for record in records] == [False, False, True]
    assert [record.image_bytes for record in records] == [content] * 3
    proposals = [[2, 1, 4, 3], [0, 0, 2.5, 2]]
    expected = {"box": [2, 1, 4, 3], "annotation": 1, "mask": None, "proposals": proposals, "size": [H, W]}
    assert records[0].target == records[1].target == expected
    assert records[2].target == expected | {"box": [0, 0, 2.5, 2], "annotation": 2}
    assert source.problems == [], "other splits were not asked for"
    assert open_refcoco(write_all(tmp_path), split="testA").read(0).image_bytes == other


@pytest.mark.parametrize("folder", ["", "train2014", "images", "images/train2014", "images/mscoco/images/train2014"])
def test_layouts(tmp_path, folder):
    (content,) = write_pictures(tmp_path / "root" / folder, OBJECTS["images"][0]["file_name"]).values()
    assert open_refcoco(write_all(tmp_path), image_root=str(tmp_path / "root")).read(0).image_bytes == content


def test_missing_picture_is_a_sample_error(tmp_path):
    with pytest.raises(SampleError, match=r"COCO_train2014_000000000005\.jpg: cannot be read"):
        open_refcoco(write_all(tmp_path)).read(0)


def mask_of(tmp_path, segmentation):
    objects = instances(annotation(1, 5, segmentation), annotation(2, 5))
    source = open_refcoco(write_all(tmp_path, objects))
    return source.example(0).target["mask"], source.problems


def test_masks_of_every_kind(tmp_path):
    from pycocotools import mask

    compressed = mask.encode(np.asfortranarray(SQUARE, np.uint8))
    as_text = {"size": [H, W], "counts": compressed["counts"].decode()}
    halves = [[2, 1, 4, 1, 4, 4, 2, 4], [4, 1, 6, 1, 6, 4, 4, 4]]
    for segmentation in (rle.encode(SQUARE), as_text, [POLYGON], halves):
        found, problems = mask_of(tmp_path, segmentation)
        assert found == {"size": [H, W], "counts": [13, 3, 3, 3, 3, 3, 3, 3, 14]} and problems == []
        assert (rle.decode(found) == SQUARE).all()
    assert mask_of(tmp_path, None) == (None, []) and mask_of(tmp_path, []) == (None, [])


def test_compressed_masks_are_those_of_pycocotools(tmp_path):
    from pycocotools import mask

    rng = np.random.default_rng(0)
    for height, width, share in ((1, 1, 0.5), (40, 30, 0.01), (40, 30, 0.5), (300, 200, 0.001), (200, 300, 0.999)):
        pixels = np.asfortranarray(rng.random((height, width)) < share, np.uint8)
        compressed = mask.encode(pixels)
        objects = instances(annotation(1, 5, {"size": [height, width], "counts": compressed["counts"].decode()}))
        objects["images"][0] |= {"height": height, "width": width}
        found = open_refcoco(write_all(tmp_path, objects, EXPRESSIONS[:1])).example(0).target["mask"]
        assert (rle.decode(found) == pixels).all()


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [W, H], "counts": rle.encode(SQUARE)["counts"]},
        {"size": [H, W], "counts": [1, 2]},
        {"size": [H, W], "counts": [-1, 49]},
        {"size": [H, W], "counts": [2**80, -(2**80) + 48]},
        {"size": [H, W], "counts": None},
        {"size": [H, W], "counts": "5"},  # pycocotools reads memory beyond it
        {"size": [H, W], "counts": "zz\x00"},
        {"size": [H, W], "counts": "é"},
        "text",
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, "6"]],
        [[1, 2, 3, 4, 5, 1e12]],
        [POLYGON, 3],
    ],
)
def test_unusable_mask_leaves_the_expression_out(tmp_path, segmentation):
    objects = instances(annotation(1, 5, segmentation), annotation(2, 5))
    source = open_refcoco(write_all(tmp_path, objects))
    assert [source.example(number).text for number in range(len(source))] == ["bird"]
    (problem,) = source.problems
    assert "refs.json has 1 entries that cannot be used" in problem


def test_polygons_without_pycocotools(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert mask_of(tmp_path, rle.encode(SQUARE))[0] == rle.encode(SQUARE)
    with pytest.raises(DataError, match="polygons need pycocotools: pip install pycocotools"):
        mask_of(tmp_path, [POLYGON])


def test_detections_replace_the_proposals(tmp_path):
    detections = [
        {"image_id": 5, "bbox": [0, 0, 1, 1], "score": 0.5, "category_id": 1},
        {"image_id": 6, "bbox": [1, 1, 2, 2], "score": 0.4},
        {"image_id": 5, "bbox": [3, 3, 1.5, 1], "score": 0.9},
        {"image_id": 5, "bbox": [3, 3, 0, 1], "score": 0.9},
    ]
    source = open_refcoco(write_all(tmp_path, detections=detections))
    assert [source.example(number).target["proposals"] for number in range(3)] == [[[0, 0, 1, 1], [3, 3, 1.5, 1]]] * 3
    (problem,) = source.problems
    assert "dets.json has 1 entries" in problem and '"bbox" must be [x, y, width, height], got [3, 3, 0, 1]' in problem
    source = open_refcoco(write_all(tmp_path, detections=detections[1:2]))
    assert source.example(0).target["proposals"] == []


def test_detections_of_mattnet_and_of_albef(tmp_path):
    """MAttNet's list has "box"; ALBEF's object has rows of four numbers and more under the ids as texts."""
    more = {"det_id": 0, "h5_id": 0, "category_id": 1, "category_name": "dog", "score": 0.7}
    mattnet = [{"image_id": 5, "box": [0, 0, 1, 1]} | more, {"image_id": 6, "box": [1, 1, 2, 2]} | more]
    albef = {"5": [[0, 0, 1, 1, 0.7, 3]], "6": [[1, 1, 2, 2]]}
    for detections in (mattnet, albef):
        source = open_refcoco(write_all(tmp_path, detections=detections), split="testA")
        assert source.example(0).target["proposals"] == [[1, 1, 2, 2]] and source.problems == []
    for detections, reason in (
        ([mattnet[0], mattnet[1] | {"box": [0, 0, 1]}], 'entry 1: "box" must be [x, y, width, height], got [0, 0, 1]'),
        ({"5": [[0, 0, 1, 1]], "6": [7]}, 'entry 1: "bbox" must be [x, y, width, height], got 7'),
    ):
        source = open_refcoco(write_all(tmp_path, detections=detections), split="testA")
        (problem,) = source.problems
        assert source.example(0).target["proposals"] == [] and reason in problem


@pytest.mark.parametrize("detections", [[{"image_id": 9, "bbox": [0, 0, 1, 1]}], {"9": [[0, 0, 1, 1]]}])
def test_detections_of_other_images_are_refused(tmp_path, detections):
    with pytest.raises(DataError, match=r"dets\.json: expected boxes of the instances' images, got 1 others, such as"):
        open_refcoco(write_all(tmp_path, detections=detections))


def test_unknown_split_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"refs\.json: expected one of the splits testA, val, got 'test'"):
        open_refcoco(write_all(tmp_path), split="test")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ann_id": 9}, "annotation 9, or its image, is not among the instances"),
        ({"ann_id": None}, '"ann_id" must be a number or a name, got None'),
        ({"image_id": 6}, "annotation 1 is of image 5, not of 6"),
        ({"sentences": None}, '"sentences" must be a list of {"sent": text}, got None'),
        ({"sentences": ["left dog"]}, '"sentences" must be a list of {"sent": text}'),
        ({"sentences": [{"sent": ""}]}, '"sent" must be a text'),
    ],
)
def test_unusable_expression_is_left_out_and_named(tmp_path, change, reason):
    source = open_refcoco(write_all(tmp_path, expressions=[EXPRESSIONS[2], expression(1, 5, "left dog") | change]))
    assert [source.example(number).text for number in range(len(source))] == ["bird"]
    (problem,) = source.problems
    assert "refs.json has 1 entries" in problem and f"entry 1: {reason}" in problem


@pytest.mark.parametrize(
    ("place", "change", "reason"),
    [
        ("images", {"height": 0}, '"height" and "width" must be numbers of pixels, got [0, 8]'),
        ("images", {"file_name": None}, '"file_name" must be a text'),
        ("annotations", {"bbox": [1, 2, 3]}, '"bbox" must be [x, y, width, height], got [1, 2, 3]'),
        ("annotations", {"bbox": [1, 2, 3, True]}, '"bbox" must be'),
        ("annotations", {"image_id": [5]}, '"image_id" must be a number or a name'),
    ],
)
def test_unusable_instance_is_left_out_and_named(tmp_path, place, change, reason):
    objects = instances(annotation(1, 5), annotation(3, 6))
    objects[place][0] |= change
    expressions = [expression(1, 5, "left dog"), expression(3, 6, "cat")]
    source = open_refcoco(write_all(tmp_path, objects, expressions))
    assert [source.example(number).text for number in range(len(source))] == ["cat"]
    refs, found = source.problems
    assert "annotation 1, or its image, is not among the instances" in refs
    assert "instances.json has 1 entries" in found and f"entry 0: {reason}" in found


def test_sentences_without_ids(tmp_path):
    expressions = [{"ann_id": 1, "split": "val", "sentences": [{"sent": "a"}, {"sent": "b"}]}]
    source = open_refcoco(write_all(tmp_path, expressions=expressions))
    assert [source.example(number).key for number in range(2)] == ["0-0", "0-1"]


def test_other_files_are_refused(tmp_path):
    refs, objects = write_all(tmp_path)
    other = write_json(tmp_path / "other.json", [{"caption": "a"}])
    for paths, message in (
        ([refs], "got 0 of instances, 1 of expressions, 0 of detections"),
        ([objects], "got 1 of instances, 0 of expressions, 0 of detections"),
        ([refs, objects, write_json(tmp_path / "more.json", OBJECTS)], "got 2 of instances, 1 of expressions"),
        ([refs, objects, other], "other.json: expected instances .* got entries with 'caption'"),
        ([refs, objects, write_json(tmp_path / "empty.json", [])], "empty.json: expected instances .* got list"),
        ([refs, objects, write_json(tmp_path / "none.json", {})], "none.json: expected instances .* got dict"),
    ):
        with pytest.raises(DataError, match=message) as error:
            open_refcoco(paths)
        assert "\n" not in str(error.value)


def test_pickle_is_refused_with_the_command_that_converts_it(tmp_path):
    _, objects = write_all(tmp_path)
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps(EXPRESSIONS))
    with pytest.raises(DataError, match=r"refs\(unc\)\.p is a pickle, expected JSON; if you trust it: ") as error:
        open_refcoco([str(path), objects])
    command = str(error.value).partition("if you trust it: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert len(open_refcoco([str(tmp_path / "refs.json"), objects])) == 3
