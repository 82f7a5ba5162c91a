"""Tables of captioned images through open_source."""

from __future__ import annotations

import csv

import pytest

from softmask.data import DataError, SampleError, open_source
from tests.support.format_files import write_pictures

ROWS = [("images/a.png", "one"), ("images/b.png", 'two, "three"'), ("images/a.png", "four\nlines")]


def write_table(path, rows, *, header=("filepath", "title"), separator=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return str(path)


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv", "\t"), ("A.CSV", ",")])
def test_table_is_read(tmp_path, name, separator):
    a, b = write_pictures(tmp_path, "images/a.png", "images/b.png").values()
    source = open_source(write_table(tmp_path / name, ROWS, separator=separator))
    records = [source.read(number) for number in range(3)]
    assert [record.caption for record in records] == list(source.captions()) == [caption for _, caption in ROWS]
    assert [record.image_bytes for record in records] == [a, b, a]
    assert [record.image_id for record in records] == [0, 1, 0] and source.images == 2, "captions of one image"
    assert source.problems == []


def test_columns_are_named(tmp_path):
    rows = [("x", "one", "a.png"), ("y", "two", "b.png")]
    path = write_table(tmp_path / "a.csv", rows, header=("id", " text ", "image"))
    source = open_source(path, image_column="image", caption_column="text", image_root="/pictures")
    assert list(source.captions()) == ["one", "two"]
    with pytest.raises(SampleError, match=r"/pictures/b\.png: cannot be read"):
        source.read(1)


def test_missing_column_is_named_with_those_present(tmp_path):
    path = write_table(tmp_path / "a.csv", ROWS, header=("filepath", "caption"))
    with pytest.raises(
        DataError, match=r"a\.csv: .*got 'filepath, caption' without \"title\"; .*caption_column"
    ) as error:
        open_source(path)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match='without "path"'):
        open_source(path, image_column="path", caption_column="caption")
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DataError, match="got '' without \"filepath\""):
        open_source(path)


def test_unusable_row_is_left_out_and_named(tmp_path):
    (tmp_path / "a.csv").write_text('filepath,title\na.png,"one\nline"\n\nb.png\n,two\nc.png,three,four\nd.png,five\n')
    source = open_source(str(tmp_path / "a.csv"))
    assert list(source.captions()) == ["one\nline", "five"]
    (problem,) = source.problems
    assert "a.csv has 3 entries that cannot be used" in problem
    assert "line 5: expected 2 fields, got 1" in problem
    (tmp_path / "a.csv").write_text("filepath,title\n ,one\na.png,two\n")
    assert 'line 2: "filepath" is empty' in open_source(str(tmp_path / "a.csv")).problems[0]


def test_big_fields_byte_order_mark_and_other_line_ends(tmp_path):
    long = "word " * 40_000  # csv's own limit is 131,072 characters
    (tmp_path / "a.csv").write_bytes(f"filepath,title\r\na.png,{long}\r\nb.png,two\r\n".encode("utf-8-sig"))
    assert list(open_source(str(tmp_path / "a.csv")).captions()) == [long.strip(), "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"filepath,title\na.png,\xff\n", r"a\.csv is not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid x", r"a\.csv is a pointer of git-lfs"),
        (b"filepath,title\n", r"no captioned images in .*a\.csv"),
        (b"PAR1\x15\x04", 'expected the columns "filepath" and "title"'),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        open_source(str(tmp_path / "a.csv"))
    assert "\n" not in str(error.value)


def test_tables_and_shards_are_not_mixed(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match="shards and lists cannot be mixed"):
        open_source([write_table(tmp_path / "a.csv", ROWS), str(tmp_path / "a.tar")])
