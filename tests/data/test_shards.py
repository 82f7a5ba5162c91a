"""Tar shards: what is read, and how problems are reported."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import webdataset

from softmask.data import DataError, SampleError, open_source, shard_index, shards
from softmask.data.tar import tar_members
from softmask.data.transforms import decode_image
from tests.support.data_files import CAPTION, make_image, sample, write_shards, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "softmask" / "shard-index"


def test_reads_what_img2dataset_writes(tmp_path):
    source = open_source(write_shards(tmp_path, 2, 3))
    assert len(source) == 6
    assert source.group_sizes.tolist() == [3, 3]
    assert source.problems == []
    for number in range(6):
        record = source.read(number)
        assert record.image_bytes == make_image(number)
        assert record.caption == f"{CAPTION} number {number}"
        assert record.name == f"train-00000{number // 3}.tar:{number:06d}"
        assert (record.image_id, record.extra) == (number, None)
    assert source.read(4, extra=True).extra == {"caption": "from the json", "number": 4}
    assert list(source.captions()) == [f"{CAPTION} number {n}" for n in range(6)]
    with pytest.raises(IndexError):
        source.read(6)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1700000000.25])
def test_agrees_with_tarfile_on_every_tar_format(tmp_path, form, mtime):
    long = "d/" * 20 + "n" * 90  # beyond the 100 bytes of the plain header: prefix, pax record or GNU long name
    names = ["a.jpg", f"{long}.png", "ü/é.txt", "b.c.txt"]
    path = write_tar(tmp_path / "a.tar", [(name, name.encode() * 99) for name in names], form=form, mtime=mtime)
    with tarfile.open(path) as tar:
        expected = [(m.name.encode(), m.offset_data, m.size) for m in tar]
    with open(path, "rb") as file:
        assert list(tar_members(file)) == expected


def test_groups_members_as_webdataset_does(tmp_path):
    """Keys with folders, extensions with dots and capitals, a folder entry, samples in any member order."""
    members = [
        ("x/1.txt", b"one"),
        ("x/1.JPG", make_image(1, form="JPEG")),
        ("x/1.seg.png", b"other"),
        ("y/1.webp", make_image(2, form="WEBP")),
        ("y/1.txt", b"two"),
        ("z.v2/1.jpeg", make_image(3, form="JPEG")),
        ("z.v2/1.json", json.dumps({"caption": "three"}).encode()),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    source = open_source(str(path))
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [source.read(i).name for i in range(len(source))] == [f"a.tar:{item['__key__']}" for item in theirs]
    assert [source.read(i).caption for i in range(3)] == ["one", "two", "three"]
    assert [source.read(i).image_bytes for i in range(3)] == [
        item[e] for item, e in zip(theirs, ("jpg", "webp", "jpeg"), strict=True)
    ]


def test_reads_shards_written_by_webdataset(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "folder/k1", "png": make_image(1), "txt": "a dodo"})
    record = open_source(str(tmp_path / "a.tar")).read(0)
    assert (record.caption, record.image_bytes, record.name) == ("a dodo", make_image(1), "a.tar:folder/k1")


@pytest.mark.parametrize(
    ("text", "reason"), [(b" \n\t ", "caption is empty"), (b"", "caption is empty"), (b"caf\xe9", "not UTF-8")]
)
def test_bad_caption_is_a_named_sample_error(tmp_path, text, reason):
    source = open_source(str(write_tar(tmp_path / "a.tar", [*sample(7), *sample(8, text)])))
    with pytest.raises(SampleError, match=rf"^a\.tar:000008: .*{reason}"):
        source.read(1)
    assert list(source.captions()) == [CAPTION]


@pytest.mark.parametrize(
    ("text", "reason"),
    [(b"{", "malformed"), (b"[1]", "list"), (b"{}", "NoneType"), (b'{"caption": 3}', "int"),
     (b'{"caption": ""}', "empty"), (b'{"caption": "\\ud800"}', "not UTF-8"), (b"\xff\xfe", "malformed")],
)  # fmt: skip
def test_bad_json_caption_is_a_named_sample_error(tmp_path, text, reason):
    source = open_source(str(write_tar(tmp_path / "a.tar", [("k.png", make_image(0)), ("k.json", text)])))
    with pytest.raises(SampleError, match=rf"^a\.tar:k: .*{reason}"):
        source.read(0)


@pytest.mark.parametrize("member", ["000002.png", "000002.txt"])
@pytest.mark.parametrize("cut", [513, 511, 1, 0])
def test_truncated_tar_keeps_the_samples_before(tmp_path, member, cut, caplog):
    """Cut inside a member's content, inside its header, after one byte of the header, and just before it."""
    path = write_tar(tmp_path / "a.tar", sample(0) + sample(1) + sample(2))
    with tarfile.open(path) as tar:
        last = tar.getmember(member).offset
    os.truncate(path, last + cut)
    source = open_source(str(path))
    assert [source.read(i).image_bytes for i in range(len(source))] == [make_image(0), make_image(1)]
    assert len(source.problems) == 1 and str(path) in source.problems[0]
    assert [r.getMessage() for r in caplog.records] == source.problems


def test_damage_in_the_middle_is_reported(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample(0) + sample(1))
    with tarfile.open(path) as tar:
        offset = tar.getmember("000001.png").offset
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    assert open_source([str(path), str(write_tar(tmp_path / "b.tar", sample(5)))]).problems == [
        f"{path} has no tar header at byte {offset}: the 1 samples before are used"
    ]


def test_image_without_caption_is_left_out_and_reported(tmp_path):
    source = open_source(
        str(write_tar(tmp_path / "a.tar", [*sample(0), ("x.png", make_image(1)), ("y.txt", b"only text")]))
    )
    assert len(source) == 1
    assert source.problems == [
        f"{tmp_path}/a.tar has 1 images without .txt or .json, left out; the first is 'x'",
        f"{tmp_path}/a.tar has 1 captions without an image, left out; the first is 'y'",
    ]


def test_captions_after_all_images_are_refused(tmp_path):
    members = sorted([*sample(0), *sample(1)], key=lambda member: not member[0].endswith(".png"))
    with pytest.raises(DataError, match="must follow each other, as tar --sort=name packs them"):
        open_source(str(write_tar(tmp_path / "a.tar", members)))


@pytest.mark.parametrize("kind", [".txt", ".json"])
def test_captions_without_images_are_counted(tmp_path, kind):
    members = [member for member in sample(1) if member[0].endswith(kind)]
    source = open_source(str(write_tar(tmp_path / "a.tar", [*sample(0), *members])))
    (problem,) = source.problems
    assert problem.endswith("a.tar has 1 captions without an image, left out; the first is '000001'")


def test_concatenated_shards_are_reported(tmp_path):
    one, two = (write_tar(tmp_path / f"{n}.tar", sample(n)).read_bytes() for n in range(2))
    (tmp_path / "both.tar").write_bytes(one + two)
    source = open_source(str(tmp_path / "both.tar"))
    assert len(source) == 1 and "has more data after its end at byte" in source.problems[0]


def test_files_named_twice_are_reported(tmp_path, caplog):
    path = str(write_tar(tmp_path / "a.tar", sample(0)))
    assert len(open_source([path, str(tmp_path / "*.tar")])) == 2
    assert "1 files are named more than once and are read as often" in caplog.text


@pytest.mark.parametrize("form", ["BMP", "GIF", "TIFF", "AVIF", "PPM"])
def test_reads_what_pillow_reads(tmp_path, form):
    name = {"PPM": "a.ppm", "TIFF": "a.tif"}.get(form, f"a.{form}")
    content = make_image(3, form=form)
    record = open_source(str(write_tar(tmp_path / "a.tar", [(name, content), ("a.txt", b"one")]))).read(0)
    assert record.image_bytes == content and decode_image(content).size == decode_image(make_image(3)).size


def test_ignored_members_are_counted(tmp_path):
    """Links, macOS attribute files, dotted names, other files and second images of a sample."""
    path = write_tar(tmp_path / "a.tar", [*sample(0), ("._000001.png", b"x"), ("._000001.txt", b"y"), *sample(1)])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("000002.png")
        link.type, link.linkname = tarfile.SYMTYPE, "000001.png"
        tar.addfile(link)
        for name in ("b.v2.png", "notes.md", "b.npy"):
            tar.addfile(tarfile.TarInfo(name))
    other = write_tar(
        tmp_path / "b.tar", [("k.png", make_image(5)), ("k.jpg", make_image(6, form="JPEG")), ("k.txt", b"k")]
    )
    source = open_source([str(path), str(other)])
    assert [source.read(i).name for i in range(len(source))] == ["a.tar:000000", "a.tar:000001", "b.tar:k"]
    (problem,) = source.problems
    assert problem.startswith("7 members of 2 shards are not read") and problem.endswith(f"'._000001.png' of {path}")


def test_lines_are_captions_of_one_image(tmp_path):
    """So are copies of an image, such as COCO's, one per caption. Different images of the same size are not."""
    members = [
        ("a.png", make_image(1)),
        ("a.txt", b"one\n\n two \r\nthree\n"),
        ("b.png", make_image(1)),
        ("b.txt", b"four\n"),
    ]
    members += [("c.json", json.dumps({"caption": ["five", "six"]}).encode()), ("c.png", make_image(2))]
    members += [
        ("d.bmp", make_image(3, form="BMP")),
        ("d.txt", b"seven"),
        ("e.bmp", make_image(4, form="BMP")),
        ("e.txt", b"eight"),
    ]
    members += [("f.json", b'{"caption": ["only"]}'), ("f.png", make_image(2))]
    other = write_tar(tmp_path / "b.tar", [("z.jpg", make_image(1)), ("z.txt", b"again")])
    source = open_source([str(write_tar(tmp_path / "a.tar", members)), str(other)])
    records = [source.read(i) for i in range(len(source))]
    assert " ".join(record.caption for record in records) == "one two three four five six seven eight only again"
    assert [record.image_id for record in records] == [0, 0, 0, 0, 4, 4, 6, 7, 4, 0]
    assert (source.group_sizes.tolist(), source.images) == ([9, 1], 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a pointer of git-lfs"),
        (gzip.compress(b"0" * 1024, mtime=0), "compressed by gzip: unpack it first"),
        (b"a,b\n" * 200, "is not an uncompressed tar"),
    ],
)
def test_files_that_are_not_tars_are_refused(tmp_path, content, message):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path / "a.tar"))


def test_shard_that_shrank_after_indexing_is_a_sample_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample(0))
    source = open_source(str(path))
    os.truncate(path, 600)
    with pytest.raises(SampleError, match="shorter than when it was indexed"):
        source.read(0)


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b" + b"\0" * 2000, b"<html>" * 300])
def test_no_usable_sample_is_one_line(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError) as error:
        open_source(str(tmp_path / "a.tar"))
    assert "a.tar" in str(error.value) and "\n" not in str(error.value)


def test_brace_and_glob_patterns(tmp_path):
    write_shards(tmp_path, 3, 1)
    (tmp_path / "[odd]{name}.tar").write_bytes((tmp_path / "train-000000.tar").read_bytes())
    for pattern, count in {
        f"{tmp_path}/train-*.tar": 3,
        f"{tmp_path}/train-{{000000..000001}}.tar": 2,
        f"{tmp_path}/train-00000{{0,2}}.tar": 2,
        f"{tmp_path}/train-{{000000..000001}}.*": 2,
        f"{tmp_path}/[odd]{{name}}.tar": 1,
    }.items():
        assert len(open_source(pattern)) == count, pattern
    assert len(open_source([f"{tmp_path}/train-000002.tar", f"{tmp_path}/train-00000[01].tar"])) == 3


@pytest.mark.parametrize("name", ["none-*.tar", "none.tar", "train-{000000..000001}.tar", "train-{0.tar", "."])
def test_missing_shard_is_one_line_that_names_it(tmp_path, name):
    write_shards(tmp_path, 1, 1)
    with pytest.raises(DataError) as error:
        open_source(f"{tmp_path}/{name}")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    if "1}" in name:
        assert "train-000001.tar" in str(error.value)


@pytest.mark.parametrize("data", ["", [], [""]])
def test_no_data_is_an_error(data):
    with pytest.raises(DataError, match="no data"):
        open_source(data)


def test_index_is_cached_and_rebuilt_if_damaged_or_stale(tmp_path, cache, monkeypatch, caplog):
    path = write_tar(tmp_path / "a.tar", sample(0) + sample(1))
    scanned = []
    scan = shard_index.scan_shard
    monkeypatch.setattr(shard_index, "scan_shard", lambda p: scanned.append(p) or scan(p))

    open_source(str(path))
    assert len(scanned) == 1 and len(list(cache.iterdir())) == 1
    monkeypatch.chdir(tmp_path)
    assert open_source("a.tar").read(1).name == "a.tar:000001"
    assert len(scanned) == 1, "the cache is not used"

    file = next(cache.iterdir())
    good = file.read_bytes()
    for damage in (good[:-9], b"", good[:99] + bytes([good[99] ^ 1]) + good[100:]):
        file.write_bytes(damage)
        caplog.clear()
        scanned.clear()
        assert len(open_source(str(path))) == 2
        assert len(scanned) == 1 and "damaged" in caplog.text
    scanned.clear()
    open_source(str(path))
    assert not scanned, "a rebuilt cache is not used"

    stat = os.stat(path)
    write_tar(path, sample(0) + sample(2))  # same size, other images
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert open_source(str(path)).read(1).image_bytes == make_image(2)
    assert len(scanned) == 1
    assert [f.suffix for f in cache.iterdir()] == [".npz"] * 2, "temporary files are left"


def test_problems_survive_the_cache(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample(0) + [("x.png", make_image(1))])
    assert open_source(str(path)).problems == open_source(str(path)).problems != []


def test_unwritable_cache_folder_is_not_an_error(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    # The folder of the cache is a file: even looking for a cache file must not fail.
    assert len(open_source(str(write_tar(tmp_path / "a.tar", sample(0))))) == 1
    assert "cannot be kept" in caplog.text


def test_source_is_small_and_picklable(tmp_path):
    source = open_source(write_shards(tmp_path, 2, 2))
    source.read(3)
    assert source._samples.itemsize + source.image_ids.itemsize == 32
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(3) == source.read(3)


def test_open_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    source = open_source(write_shards(tmp_path, 4, 1))
    before = len(os.listdir("/proc/self/fd"))
    assert [source.read(i % 4).image_bytes for i in range(8)] == [make_image(i % 4) for i in range(8)]
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_index_arrays_hold_no_objects(tmp_path):
    source = open_source(write_shards(tmp_path, 2, 3))
    assert not source._samples.dtype.hasobject and isinstance(source._samples, np.ndarray)
