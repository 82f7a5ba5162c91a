"""SNLI-VE's files: both formats, layouts of the pictures, and what is left out."""

from __future__ import annotations

import pickle

import pytest

from softmask.data import DataError, SampleError
from softmask.data.formats.snli_ve import LABELS, open_snli_ve
from tests.support.format_files import write_json, write_lines, write_pictures

OFFICIAL = [
    {"Flickr30K_ID": "10", "sentence2": "A dog runs.", "gold_label": "entailment", "pairID": "10.jpg#0r1e"},
    {"Flikr30kID": "11", "sentence2": " A cat sleeps. ", "gold_label": "contradiction", "pairID": "11.jpg#0r1c"},
    {"Flickr30K_ID": "10", "sentence2": "It is late.", "gold_label": "neutral"},
]


def test_official_lines(tmp_path):
    pictures = write_pictures(tmp_path, "10.jpg", "11.jpg")
    source = open_snli_ve([write_lines(tmp_path / "train.jsonl", OFFICIAL)])
    records = [source.read(number) for number in range(3)]
    assert [record.target for record in records] == [0, 2, 1]
    assert [LABELS[record.target] for record in records] == [entry["gold_label"] for entry in OFFICIAL]
    assert [record.caption for record in records] == ["A dog runs.", "A cat sleeps.", "It is late."]
    assert [record.key for record in records] == ["10.jpg#0r1e", "11.jpg#0r1c", 2]
    assert [record.image_bytes for record in records] == [pictures["10.jpg"], pictures["11.jpg"], pictures["10.jpg"]]
    assert [record.image_id for record in records] == [0, 1, 0] == source.image_ids.tolist()
    assert source.images == 2 and source.problems == []
    assert list(source.captions()) == [record.caption for record in records]
    assert pickle.loads(pickle.dumps(source)).read(1) == records[1]


def test_albefs_list_and_several_files(tmp_path):
    pictures = write_pictures(tmp_path / "images", "flickr30k-images/10.jpg", "11.jpg")
    entries = [{"image": "flickr30k-images/10.jpg", "sentence": "A dog.", "label": "neutral", "unseen": True}]
    paths = [
        write_json(tmp_path / "a.json", entries),
        write_lines(tmp_path / "b.jsonl", [{**OFFICIAL[0], "Flickr30K_ID": "11"}]),
    ]
    source = open_snli_ve(paths, image_root=str(tmp_path / "images"))
    records = [source.read(number) for number in range(2)]
    assert [record.image_bytes for record in records] == list(pictures.values())
    assert [(record.target, record.unseen) for record in records] == [(1, True), (0, False)]
    assert source.paths == paths


@pytest.mark.parametrize("folder", ["flickr30k_images", "flickr30k-images", "images"])
def test_pictures_in_a_folder_of_their_own(tmp_path, folder):
    pictures = write_pictures(tmp_path / folder, "11.jpg")  # the first example's is missing
    source = open_snli_ve([write_lines(tmp_path / "dev.jsonl", OFFICIAL)])
    assert source.read(1).image_bytes == pictures["11.jpg"]
    with pytest.raises(SampleError, match=rf"{folder}/10\.jpg: cannot be read \(No such file"):
        source.read(0)


def test_lines_in_a_file_that_is_called_json(tmp_path):
    assert len(open_snli_ve([write_lines(tmp_path / "train.json", OFFICIAL)])) == 3


def test_file_without_labels(tmp_path):
    entries = [{key: value for key, value in entry.items() if key != "gold_label"} for entry in OFFICIAL]
    source = open_snli_ve([write_lines(tmp_path / "test.jsonl", entries)])
    assert [source.example(number).target for number in range(3)] == [None] * 3 and source.problems == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gold_label": "-"}, "entry 1: \"gold_label\" must be entailment, neutral, contradiction, got '-'"),
        ({"gold_label": ["neutral"]}, 'entry 1: "gold_label" must be'),
        ({"sentence2": " "}, "entry 1: \"sentence2\" must be a text, got ' '"),
        ({"sentence2": 3}, 'entry 1: "sentence2" must be a text, got 3'),
        ({"gold_label": None}, "10.jpg#0r1e: without an answer"),
    ],
)
def test_unusable_entry_is_left_out_and_named(tmp_path, change, reason):
    path = write_lines(tmp_path / "train.jsonl", [OFFICIAL[1], OFFICIAL[0] | change, OFFICIAL[2]])
    source = open_snli_ve([path])
    assert [source.example(number).target for number in range(len(source))] == [2, 1]
    (problem,) = source.problems
    assert problem.startswith(f"{path} has 1 entries that cannot be used") and reason in problem.replace("\\'", "'")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[3]", "expected an object, got int"),
        ('{"questions": [], "info": 1}', 'expected "image" or "Flickr30K_ID", got .*questions, info'),
        ("[", "is not JSON"),
        ('{"Flickr30K_ID": "1"}\n{', "line 2: is not JSON"),
        ("", "no example in"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        open_snli_ve([str(tmp_path / "a.json")])
    assert "a.json" in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read: No such file"):
        open_snli_ve([str(tmp_path / "none.jsonl")])
