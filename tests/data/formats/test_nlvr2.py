"""NLVR2's files: both formats, layouts of the pictures, and what is left out."""

from __future__ import annotations

import pytest

from softmask.data import DataError, SampleError
from softmask.data.formats.nlvr2 import open_nlvr2, sentence_of
from tests.support.format_files import write_json, write_lines, write_pictures

OFFICIAL = [
    {"identifier": "train-10-0-0", "sentence": "Two dogs.", "label": "True", "directory": 7},
    {"identifier": "train-10-0-1", "sentence": "A cat.", "label": "False", "directory": 7},
    {"identifier": "train-11-3-0", "sentence": "Birds.", "label": True, "directory": 8},
    {"identifier": "train-11-3-1", "sentence": "Fish.", "label": False, "directory": 8},
]
PICTURES = ["train-10-0-img0.png", "train-10-0-img1.png", "train-11-3-img0.png", "train-11-3-img1.png"]


def test_official_lines(tmp_path):
    pictures = write_pictures(tmp_path, *PICTURES)
    source = open_nlvr2([write_lines(tmp_path / "train.json", OFFICIAL)])
    records = [source.read(number) for number in range(4)]
    assert [record.target for record in records] == [1, 0, 1, 0]
    assert [type(record.target) for record in records] == [int] * 4
    assert [record.caption for record in records] == ["Two dogs.", "A cat.", "Birds.", "Fish."]
    assert [record.key for record in records] == [entry["identifier"] for entry in OFFICIAL]
    for record, (left, right) in zip(records, [PICTURES[:2], PICTURES[:2], PICTURES[2:], PICTURES[2:]], strict=True):
        assert (record.image_bytes, record.more_images) == (pictures[left], (pictures[right],))
    assert source.problems == []


@pytest.mark.parametrize(
    "place", ["{}", "train/{}", "train/{directory}/{}", "images/{}", "images/train/{}", "images/train/{directory}/{}"]
)
def test_layouts(tmp_path, place):
    names = [place.format(name, directory=7 if "-10-" in name else 8) for name in PICTURES]
    pictures = list(write_pictures(tmp_path / "root", *names).values())
    path = write_lines(tmp_path / "train.json", OFFICIAL)
    source = open_nlvr2([path], image_root=str(tmp_path / "root"))
    for number, (left, right) in ((0, pictures[:2]), (3, pictures[2:])):
        record = source.read(number)
        assert (record.image_bytes, record.more_images) == (left, (right,))


@pytest.mark.parametrize("place", ["{}", "dev/{}", "images/dev/{}"])
def test_layouts_without_directories(tmp_path, place):
    names = [place.format(f"dev-5-1-img{number}.png") for number in range(2)]
    left, right = write_pictures(tmp_path, *names).values()
    entries = [{"identifier": "dev-5-1-0", "sentence": "Two dogs.", "label": "False"}]
    record = open_nlvr2([write_lines(tmp_path / "dev.json", entries)]).read(0)
    assert (record.image_bytes, record.more_images, record.target) == (left, (right,), 0)


def test_missing_right_picture_is_a_sample_error(tmp_path):
    write_pictures(tmp_path, PICTURES[0])
    source = open_nlvr2([write_lines(tmp_path / "train.json", OFFICIAL)])
    with pytest.raises(SampleError, match=r"train-10-0-img1\.png: cannot be read"):
        source.read(0)


def test_albefs_list(tmp_path):
    left, right = write_pictures(tmp_path, "dev/a.png", "dev/b.png").values()
    entries = [
        {"images": ["dev/a.png", "dev/b.png"], "sentence": "Two dogs.", "label": "True"},
        {"images": ["dev/b.png", "dev/a.png"], "sentence": "A cat.", "label": "False", "unseen": True},
    ]
    source = open_nlvr2([write_json(tmp_path / "nlvr_dev.json", entries)])
    records = [source.read(number) for number in range(2)]
    assert [(record.image_bytes, record.more_images) for record in records] == [(left, (right,)), (right, (left,))]
    assert [(record.target, record.key, record.unseen) for record in records] == [(1, 0, False), (0, 1, True)]


def test_files_of_both_formats_and_one_without_labels(tmp_path):
    paths = [
        write_lines(tmp_path / "a.json", OFFICIAL[:1]),
        write_lines(tmp_path / "b.json", [{"identifier": "test1-0-1-0", "sentence": "Two dogs."}]),
        write_json(tmp_path / "c.json", [{"images": ["a", "b"], "sentence": "One.", "label": "False"}]),
    ]
    source = open_nlvr2(paths)
    assert [source.example(number).target for number in range(3)] == [1, None, 0] and source.problems == []


def test_sentences_for_consistency():
    """The official metric takes the pair out of the identifier."""
    assert sentence_of("test1-0-1-0") == sentence_of("test1-0-3-0")
    others = ["test1-0-1-0", "test1-0-1-1", "test1-1-1-0", "test2-0-1-0", "test1-10-1-0"]
    assert len({sentence_of(one) for one in others}) == len(others)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"identifier": "train-10-0", "sentence": "a", "label": "True"}, "must be split-set-pair-sentence"),
        ({"identifier": 5, "sentence": "a", "label": "True"}, '"identifier" must be a text, got 5'),
        ({"identifier": "train-10-0-0", "sentence": "a", "label": "maybe"}, "must be True or False, got 'maybe'"),
        ({"identifier": "train-10-0-0", "sentence": "a", "label": [True]}, r"must be True or False, got [True]"),
        ({"identifier": "train-10-0-0", "sentence": "", "label": "True"}, '"sentence" must be a text'),
        ({"identifier": "train-10-0-0", "sentence": "a"}, "train-10-0-0: without an answer"),
        ({"images": ["a"], "sentence": "a", "label": "True"}, "\"images\" must be two paths, got ['a']"),
        ({"images": ["a", None], "sentence": "a", "label": "True"}, '"images" must be two paths'),
        ({"image": "a", "sentence": "a"}, 'expected "identifier" or "images", got \'image, sentence\''),
        ([], "expected an object, got list"),
    ],
)
def test_unusable_entry_is_left_out_and_named(tmp_path, entry, reason):
    source = open_nlvr2([write_lines(tmp_path / "train.json", [OFFICIAL[0], entry, OFFICIAL[1], entry])])
    assert [source.example(number).target for number in range(len(source))] == [1, 0]
    (problem,) = source.problems
    assert "train.json has 2 entries" in problem and reason in problem.replace("\\'", "'")


def test_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(DataError, match='no example in .*a.json .*expected "identifier" or "images", got .*foo'):
        open_nlvr2([write_json(tmp_path / "a.json", [{"foo": 1}])])
