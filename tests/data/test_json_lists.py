"""JSON lists: what is read, and how problems are reported."""

from __future__ import annotations

import json
import pickle

import pytest

from softmask.data import DataError, SampleError, open_source
from tests.support.data_files import make_image, write_shards


def write_list(folder, entries, name="list.json"):
    (folder / name).write_text(json.dumps(entries))
    return str(folder / name)


def test_json_list_is_read(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(2):
        (tmp_path / "images" / f"{number}.png").write_bytes(make_image(number))
    entries = [
        {"image": "images/0.png", "caption": [" one ", "two"]},
        {"image": "images/1.png", "caption": "three", "image_id": "x"},
        {"image": "./images/../images/0.png", "caption": "four"},
    ]
    source = open_source(write_list(tmp_path, entries))
    records = [source.read(i, extra=True) for i in range(4)]
    assert [r.caption for r in records] == list(source.captions()) == ["one", "two", "three", "four"]
    assert [r.image_id for r in records] == [0, 0, 1, 0], "captions of one image share its number"
    assert [r.image_bytes for r in records] == [make_image(n) for n in (0, 0, 1, 0)]
    assert source.group_sizes.tolist() == [4]
    assert pickle.loads(pickle.dumps(source)).read(2) == source.read(2)

    moved = tmp_path / "lists"
    moved.mkdir()
    elsewhere = write_list(moved, entries)
    assert open_source(elsewhere, image_root=str(tmp_path)).read(2).image_bytes == make_image(1)
    both = open_source(
        [elsewhere, write_list(moved, [{"image": "images/1.png", "caption": "five"}], "b.json")],
        image_root=str(tmp_path),
    )
    assert [both.read(i).image_id for i in range(5)] == [0, 0, 1, 0, 1]


def test_missing_image_is_a_sample_error(tmp_path):
    source = open_source(
        write_list(tmp_path, [{"image": "gone.png", "caption": "a"}, {"image": "x\0.png", "caption": "b"}])
    )
    with pytest.raises(SampleError, match=r"gone\.png: cannot be read \(No such file"):
        source.read(0)
    with pytest.raises(SampleError, match="cannot be read"):
        source.read(1)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (3, "expected an object, got int"),
        ({"caption": "b"}, '"image" must be a path, got None'),
        ({"image": "", "caption": "b"}, '"image" must be a path'),
        ({"image": "a", "caption": []}, '"caption" must be a text'),
        ({"image": "a", "caption": [None]}, '"caption" must be a text'),
        ({"image": "a", "caption": None}, '"caption" must be a text'),
        ({"image": "a"}, '"caption" must be a text'),
    ],
)
def test_bad_entry_is_left_out_and_named(tmp_path, entry, reason, caplog):
    (tmp_path / "a.png").write_bytes(make_image(0))
    good = {"image": "a.png", "caption": "one"}
    source = open_source(write_list(tmp_path, [good, entry, entry, good]))
    assert [source.read(i).caption for i in range(len(source))] == ["one", "one"]
    (problem,) = source.problems
    assert "list.json has 2 entries that cannot be used, left out; the first is 'entry 1: " in problem
    assert reason in problem and [r.getMessage() for r in caplog.records] == [problem]
    with pytest.raises(DataError, match="no captioned images in .*list.json .*entry 0"):
        open_source(write_list(tmp_path, [entry]))


def test_good_captions_of_an_entry_are_kept(tmp_path):
    source = open_source(write_list(tmp_path, [{"image": "a.png", "caption": ["one", None, "two"]}]))
    assert list(source.captions()) == ["one", "two"] and "entry 0: " in source.problems[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"image": "a"}, "expected a list of entries, got dict$"),
        ({"images": [{"sentences": []}], "dataset": "coco"}, 'expected entries with "split", got none'),
        ({"images": [], "annotations": []}, "as COCO's: write one entry"),
        ([], "no captioned images"),
    ],
)
def test_other_json_is_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as error:
        open_source(write_list(tmp_path, content))
    assert "list.json" in str(error.value)


def test_list_may_have_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text('[{"image": "a.png", "caption": "one"}]', encoding="utf-8-sig")
    assert list(open_source(str(tmp_path / "a.json")).captions()) == ["one"]
    (tmp_path / "a.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="a.json is a pointer of git-lfs"):
        open_source(str(tmp_path / "a.json"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json.gz", "a.parquet", "a.tar.gz", "a.TXT"])
def test_files_of_other_kinds_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{name}: expected a tar shard or a list \(\.json, \.csv, \.tsv\), got "):
        open_source(str(tmp_path / name))


def test_unreadable_json_list_is_refused(tmp_path):
    for content in (b"[{", b"\xff[]", b"[" * 100_000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.json is not JSON") as error:
            open_source(str(tmp_path / "a.json"))
        assert "\n" not in str(error.value)
    write_shards(tmp_path, 1, 1)
    with pytest.raises(DataError, match="mixed"):
        open_source([str(tmp_path / "a.json"), str(tmp_path / "train-000000.tar")])
