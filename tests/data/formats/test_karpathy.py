"""Karpathy's splits of COCO and Flickr30K through open_source."""

from __future__ import annotations

import pickle

import pytest

from softmask.data import DataError, SampleError, open_source
from tests.support.format_files import write_json, write_pictures


def image(name: str, split: str, *captions: str, **more) -> dict:
    return {"filename": name, "split": split, "sentences": [{"raw": one, "tokens": []} for one in captions], **more}


COCO = {
    "dataset": "coco",
    "images": [
        image("a.jpg", "test", "a test", filepath="val2014", cocoid=1),
        image("b.jpg", "restval", "a rest ", "another", filepath="val2014", cocoid=2),
        image("c.jpg", "train", "a train", filepath="train2014", cocoid=3),
        image("d.jpg", "val", "a val", filepath="val2014", cocoid=4),
    ],
}
FLICKR = {"images": [image("1.jpg", "train", "one", imgid=0), image("2.jpg", "test", "two", "three", imgid=1)]}


def test_train_includes_restval(tmp_path):
    pictures = write_pictures(tmp_path, "val2014/a.jpg", "val2014/b.jpg", "train2014/c.jpg", "val2014/d.jpg")
    source = open_source(write_json(tmp_path / "dataset_coco.json", COCO))
    records = [source.read(number, extra=True) for number in range(3)]
    assert [record.caption for record in records] == list(source.captions()) == ["a rest", "another", "a train"]
    assert [record.image_id for record in records] == [0, 0, 1] and source.images == 2
    names = ["val2014/b.jpg", "val2014/b.jpg", "train2014/c.jpg"]
    assert [record.image_bytes for record in records] == [pictures[name] for name in names]
    assert records[2].extra == {"image": str(tmp_path / "train2014/c.jpg"), "caption": "a train"}
    assert source.problems == [], "entries of other splits are not left out, they were not asked for"
    assert pickle.loads(pickle.dumps(source)).read(2) == source.read(2)


@pytest.mark.parametrize(
    ("split", "captions"), [("val", ["a val"]), ("test", ["a test"]), ("restval", ["a rest ", "another"])]
)
def test_other_splits(tmp_path, split, captions):
    source = open_source(write_json(tmp_path / "dataset_coco.json", COCO), split=split)
    assert list(source.captions()) == [caption.strip() for caption in captions]


def test_digest_is_of_the_split(tmp_path):
    path = write_json(tmp_path / "dataset_coco.json", COCO)
    assert open_source(path).digest != open_source(path, split="val").digest
    assert open_source(path).digest == open_source(path).digest


@pytest.mark.parametrize("folder", ["val2014", "", "images"])
def test_coco_layouts(tmp_path, folder):
    (content,) = write_pictures(tmp_path / "root" / folder, "d.jpg").values()
    path = write_json(tmp_path / "dataset_coco.json", COCO)
    source = open_source(path, image_root=str(tmp_path / "root"), split="val")
    assert source.read(0).image_bytes == content


@pytest.mark.parametrize("folder", ["", "flickr30k_images", "flickr30k-images", "images"])
def test_flickr_layouts(tmp_path, folder):
    (content,) = write_pictures(tmp_path / folder, "2.jpg").values()
    source = open_source(write_json(tmp_path / "dataset_flickr30k.json", FLICKR), split="test")
    assert [source.read(number).image_bytes for number in range(2)] == [content, content]


def test_beside_a_list(tmp_path):
    paths = [
        write_json(tmp_path / "a.json", FLICKR),
        write_json(tmp_path / "b.json", [{"image": "1.jpg", "caption": "four"}]),
    ]
    source = open_source(paths)
    assert list(source.captions()) == ["one", "four"] and source.image_ids.tolist() == [0, 0]


def test_missing_picture_is_a_sample_error(tmp_path):
    source = open_source(write_json(tmp_path / "dataset_flickr30k.json", FLICKR))
    with pytest.raises(SampleError, match=r"1\.jpg: cannot be read"):
        source.read(0)


def test_unknown_split_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.json: expected one of the splits test, train, got 'dev'$"):
        open_source(write_json(tmp_path / "a.json", FLICKR), split="dev")
    with pytest.raises(DataError, match="expected one of the splits val, got 'train'"):
        open_source(write_json(tmp_path / "a.json", {"images": [image("1.jpg", "val", "one")]}))
    assert len(open_source(write_json(tmp_path / "a.json", {"images": [image("1.jpg", "restval", "one")]}))) == 1


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (3, "expected an object, got int"),
        ({"filename": "a", "sentences": [{"raw": "one"}]}, '"split" must be a text, got None'),
        ({"split": "train", "sentences": [{"raw": "one"}]}, '"filename" must be a text, got None'),
        ({"split": "train", "filename": "a"}, '"sentences" must be a list of {"raw": text}, got None'),
        ({"split": "train", "filename": "a", "sentences": []}, '"sentences" must be a list'),
        ({"split": "train", "filename": "a", "sentences": ["one"]}, '"sentences" must be a list'),
        ({"split": "train", "filename": "a", "sentences": [{"raw": "one"}, {"raw": None}]}, '"sentences" must be'),
    ],
)
def test_unusable_entry_is_left_out_and_named(tmp_path, entry, reason):
    source = open_source(write_json(tmp_path / "a.json", {"images": [entry, *FLICKR["images"]]}))
    assert list(source.captions()) == ["one"]
    (problem,) = source.problems
    assert "a.json has 1 entries that cannot be used" in problem and f"entry 0: {reason}" in problem
